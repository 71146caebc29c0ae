"""Models of which a part stays with its client: who evaluates them, with what weight, and what that costs."""

import pytest
from conftest import SMALL, rows, run_on, summary_of
from fedtune.workspace.workspace import Party
from flwr.clientapp import ClientApp

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.evaluation.scoring import Score, mean_score
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid, run_local
from fedtune.wire import messages as wire

WORDS = ("method=fedsa_lora", "population.cohort=2")


def test_the_mean_is_weighted_by_samples():
    """(30 * 2 + 10 * 4) / 40 = 2.5 and (30 * 0.5 + 10 * 0.1) / 40 = 0.4, whatever the tokens."""
    scores = {7: Score(2.0, 0.5, 1), 8: Score(4.0, 0.1, 999)}
    found = mean_score({7: 30, 8: 10}, scores)
    assert (found.loss, found.accuracy, found.tokens) == (2.5, pytest.approx(0.4), 1000)
    assert mean_score({}, {}) is None


def test_after_each_round_every_client_is_asked_and_the_ledger_has_it(small_run):
    folder = small_run(*WORDS, rounds=3)
    asked = rows(folder, "clients.csv")
    assert [(row["round"], row["peer"]) for row in asked] == [(str(r), str(p)) for r in range(4) for p in range(4)]
    workspace = Party(compose([*SMALL, *WORDS]))
    samples = {str(index): workspace.samples(index) for index in range(4)}
    for metric in rows(folder, "metrics.csv"):
        own = [row for row in asked if row["round"] == metric["round"]]
        mean = sum(samples[row["peer"]] * float(row["eval_loss"]) for row in own) / sum(samples.values())
        assert float(metric["eval_loss"]) == pytest.approx(mean, rel=1e-12)
    booked = [row for row in rows(folder, "ledger.csv") if row["part"] == "evaluate"]
    assert len(booked) == 2 * 4 * 4
    assert all(int(row["payload_bytes"]) > 0 for row in booked if row["direction"] == "down")
    assert all(row["payload_bytes"] == "0" for row in booked if row["direction"] == "up")


def test_a_client_is_scored_with_its_own_part(small_run):
    """After round 1, only those that took part hold a B that isn't zero, and only their scores have moved."""
    folder = small_run(*WORDS, rounds=1)
    trained = {row["peer"] for row in rows(folder, "ledger.csv") if row["part"] == "train"}
    before, after = (
        {row["peer"]: row["eval_loss"] for row in rows(folder, "clients.csv") if row["round"] == number}
        for number in ("0", "1")
    )
    assert len(trained) == 2
    assert {peer for peer in before if before[peer] != after[peer]} == trained


def test_a_resume_takes_the_lines_of_an_undone_round_out(tmp_path, small_run):
    whole = small_run(*WORDS, name="whole", rounds=3)
    parts = small_run(*WORDS, name="parts", rounds=1)
    with (parts / "clients.csv").open("a") as stream:
        stream.write("2,0,1.0,0.5,9\n")
    run_local(compose([*SMALL, *WORDS, "rounds=3", f"out={parts}"]), resume=str(parts))
    assert rows(whole, "clients.csv") == rows(parts, "clients.csv")
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]


def test_a_client_that_does_not_answer_is_left_out_of_the_mean(tmp_path):
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))
    app.train()(lambda message, context: inner(message, context))

    @app.evaluate()
    def evaluate(message, context):
        if context.node_config["partition-id"] == 2:
            raise ConnectionError("the battery is flat")
        return inner(message, context)

    run_on(LocalGrid, app, tmp_path / "run", *WORDS, "rounds=3")
    assert {row["peer"] for row in rows(tmp_path / "run", "clients.csv")} == {"0", "1", "3"}
    failed = [row for row in rows(tmp_path / "run", "ledger.csv") if row["part"] == "failed"]
    assert [(row["round"], row["peer"]) for row in failed] == [(str(number), "2") for number in range(4)]
    assert [row["clients"] for row in rows(tmp_path / "run", "metrics.csv")] == ["0", "2", "2", "2"]


def test_without_own_data_to_hold_out_there_is_nothing_to_evaluate_with():
    with pytest.raises(ConfigError, match=r"method=fedsa_lora .* data.client_heldout=0 .* evaluate.every=0"):
        Party(compose(["model=tiny", "method=fedsa_lora", "data.client_heldout=0"]))
    Party(compose(["model=tiny", "method=fedsa_lora", "data.client_heldout=0", "evaluate.every=0"]))


@pytest.mark.parametrize(
    "found", [Score(float("nan"), 0.5, 3), Score(1.0, 1.5, 3), Score(1.0, 0.5, 0), Score(1.0, float("inf"), 3)]
)
def test_a_score_that_can_not_be_is_refused(found):
    assert wire.unpack_score(wire.pack_score(Score(1.5, 0.25, 8))) == Score(1.5, 0.25, 8)
    assert wire.unpack_score(wire.pack_score(None)) is None
    with pytest.raises(WireError, match="expected loss, accuracy and tokens"):
        wire.unpack_score(wire.pack_score(found))
