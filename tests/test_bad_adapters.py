"""Adapters that don't fit together: each mismatch has an error that names it, before it costs anything."""

import csv
from pathlib import Path

import pytest
from conftest import of_each_kind, run_on, summary_of, traits_of_method
from flwr.app import MetricRecord
from flwr.clientapp import ClientApp

from fedtune.codecs.raw import Raw
from fedtune.commands.main import main
from fedtune.config.compose import choices, compose
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.protocol import Update
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid
from fedtune.wire import messages as wire
from fedtune.workspace.workspace import Workspace

FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples
NOWHERE = "model.path=/nowhere/at/all"  # loading it is another error
MIXED = [name for name in choices("method") if traits_of_method(name).mixed_ranks]


@pytest.mark.slow
@pytest.mark.parametrize("method", of_each_kind(set(choices("method")) - set(MIXED)))
def test_mixed_ranks_with_a_same_rank_method_stop_the_run_before_a_model_is_loaded(method):
    why = (
        "gives each client ranks by what its device can do" if method == "fedpipe" else "needs the same rank everywhere"
    )
    with pytest.raises(ConfigError, match=f"method={method} {why}: leave out population.ranks"):
        Workspace(compose([f"method={method}", "population.ranks=[8,4]", NOWHERE]))


def test_the_command_says_so_in_one_line_and_leaves_no_folder(tmp_path, capsys):
    words = ["run", "method=fedit", "population.ranks=[8,4]", NOWHERE, f"out={tmp_path / 'run'}"]
    assert main(words) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs the same rank everywhere" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", of_each_kind(MIXED))
def test_methods_for_mixed_ranks_take_them(method):
    assert Workspace(compose([f"method={method}", "population.ranks=[8,4]", NOWHERE])).strategy


def with_alpha_halved(index, reply):
    """Client 1 multiplied B A by half of what it was told, and says so."""
    if index == 1:
        update = wire.unpack_update(reply.content, wire.blob_of(reply.content), Raw())
        metrics = {**update.metrics, "scaling": update.metrics["scaling"] / 2}
        reply.content = wire.pack_update(Update(update.tensors, update.examples, metrics), Raw(), 0)
    return reply


def app_with(tamper):
    app, inner = ClientApp(), make_client_app()
    app.query()(lambda message, context: inner(message, context))
    app.train()(lambda message, context: tamper(context.node_config["partition-id"], inner(message, context)))
    return app


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=fedit"], "alpha / r = 1, expected 2"),
        (["method=ffa_lora"], "alpha / r = 1, expected 2"),
        (["method=zero_pad", "population.ranks=[8,4]", "population.scaling=per_rank"], "alpha / r = 2, expected 4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_client_with_another_alpha_is_left_out_and_both_are_named(overrides, said, tmp_path):
    """alpha is 16, so alpha / r is 2 at rank 8 and 4 at rank 4; the result is that without this client."""

    def drop(index, reply):
        if index == 1:
            raise ConnectionError("gone")
        return reply

    words = [*overrides, FEW, "rounds=1", "population.cohort=4"]
    run_on(LocalGrid, app_with(with_alpha_halved), tmp_path / "run", *words)
    with (tmp_path / "run" / "failures.csv").open(newline="") as stream:
        failures = list(csv.DictReader(stream))
    assert [(row["round"], row["client"]) for row in failures] == [("1", "1")]
    assert said in failures[0]["error"]
    run_on(LocalGrid, app_with(drop), tmp_path / "without", *words)
    assert summary_of(tmp_path / "run")["state_sha256"] == summary_of(tmp_path / "without")["state_sha256"]


def test_a_client_that_claims_no_samples_is_left_out(tmp_path):
    def none(index, reply):
        if index == 1:
            record = reply.content["metrics"]
            reply.content["metrics"] = MetricRecord({**record, "examples": 0})
        return reply

    run_on(LocalGrid, app_with(none), tmp_path / "run", FEW, "rounds=1", "population.cohort=4")
    with (tmp_path / "run" / "failures.csv").open(newline="") as stream:
        failures = list(csv.DictReader(stream))
    assert len(failures) == 1
    assert "'examples' should be a positive integer, got 0" in failures[0]["error"]


def test_no_samples_for_anybody_is_said_before_a_round(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "a{i}", "completion": "b"}}\n' for i in range(3)))
    with pytest.raises(DataError, match="3 examples are too few for 4 clients"):
        run_on(LocalGrid, make_client_app(), tmp_path / "run", f"data.path={rows}")
    assert not (tmp_path / "run").exists()
