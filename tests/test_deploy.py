"""Real nodes on loopback, with TLS and node authentication: the bits of one process, and clients that fail."""

import mischief
import pytest
import remembering
from conftest import rows, summary_of
from deployed import call, failures, in_one_process, round_is_done, run, three_nodes, words, working_on

from simulations.fleet.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with three_nodes(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


def test_a_fleet_gives_the_bits_of_one_process_and_resumes_exactly(fleet, tmp_path, monkeypatch):
    """Three rounds, of which the third is in a new Flower run; the clients remember what they learnt. In between,
    somebody tries to go on with other settings."""
    folder = tmp_path / "run"
    more = (*remembering.WORDS, "seed=1")
    code, out = run(fleet, *words(folder, *more, "rounds=2"))
    assert code == 0, out
    overrides = " ".join(words(folder, *more, "train.lr=0.5"))
    refused = fleet.run({"overrides": overrides, "resume": str(folder)}, seconds=100)
    assert refused.status == "finished:failed"
    assert "train.lr: 0.001 -> 0.5" in refused.log.read_text()
    code, out = run(fleet, f"resume={folder}", "rounds=3")
    assert code == 0, out
    assert "resumed after round 2" in out
    whole = in_one_process(tmp_path / "whole", monkeypatch, [], *more, "rounds=3")
    assert summary_of(folder)["state_sha256"] == whole
    assert failures(folder) == {}
    metrics = rows(folder, "metrics.csv")
    assert [row["clients"] for row in metrics] == ["0", "3", "3", "3"]
    for row, other in zip(metrics, rows(tmp_path / "whole", "metrics.csv"), strict=True):
        assert {row[name] == other[name] for name in ("eval_loss", "train_loss", "up_payload_bytes")} == {True}


def test_a_late_client_starves_no_later_round_and_when_all_fail_the_run_says_so(fleet, tmp_path):
    """Client 0 hangs in round 1, takes part in round 2; in round 3 every client raises."""
    folder = tmp_path / "run"
    code, out = run(fleet, *words(folder, *mischief.WORDS, "seed=3", "rounds=5", "runtime.timeout=45"))
    assert code == 1
    assert "round 3: 0 of 3 clients gave a usable update" in out
    assert "the battery is flat" in out
    assert "finished:failed" in out
    lost = failures(folder)
    assert lost.keys() == {(1, 0), (3, 0), (3, 1), (3, 2)}
    assert "no reply within 45 s" in lost[1, 0] or "the worker did not answer within 45 s" in lost[1, 0]
    assert summary_of(folder)["status"] == "failed"
    assert summary_of(folder)["rounds"] == 2


def test_a_node_that_is_started_again_at_once_loses_its_turn_and_no_time(fleet, tmp_path):
    """Flower takes it back before it has missed it, so only we notice that its message is gone."""
    folder = tmp_path / "run"
    process = call(fleet, *words(folder, *mischief.WORDS, "seed=5", "rounds=3", "runtime.timeout=500"))
    node = fleet.nodes[0]
    assert wait_until(lambda: round_is_done(folder, 0) and working_on(node, 1), 120)
    node.stop()
    node.start()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    lost = failures(folder)
    assert lost.keys() - {(2, 0)} == {(1, 0)}
    assert "its node was started again" in lost[1, 0] or "its node went away" in lost[1, 0]
    asked = [row["round"] for row in rows(folder, "ledger.csv") if row["part"] == "handshake" and row["peer"] == "0"]
    assert asked in (["0", "0", "2", "2"], ["0", "0", "3", "3"])  # it may have come back as somebody else
