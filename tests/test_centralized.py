"""Centralized: one client that holds what all would have held, and takes the steps that a cohort would have taken."""

import csv
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import SMALL, summary_of

from fedtune.config.compose import compose, from_run_config, load
from fedtune.config.population import PopulationSpec
from fedtune.config.schema import Experiment, MethodSpec
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo
from fedtune.core.seeds import derive_seed
from fedtune.data.federated_data import load_data
from fedtune.models.tiny import tiny_tokenizer
from fedtune.runtime.local import run_local
from fedtune.training.first_order import fit
from fedtune.training.gradients import finished
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace

pytestmark = pytest.mark.slow

RUN = "0" * 16


def test_the_clients_become_one_with_the_steps_of_a_cohort():
    experiment = compose(["method=centralized", "population.clients=20", "population.cohort=8", "train.steps=3"])
    assert (experiment.population.clients, experiment.population.cohort_size, experiment.population.pooled) == (
        1,
        1,
        20,
    )
    assert experiment.method.client["steps"] == experiment.train.steps == 24
    assert compose(["method=centralized", "population.clients=50"]).train.steps == 40  # ten of fifty, as by default
    own = compose(["method=centralized", "population.clients=4", "method.client.steps=7"])
    assert (own.method.client["steps"], own.train.steps) == (28, 16)


def test_what_was_written_down_is_not_pooled_again():
    experiment = compose(["method=centralized", "population.clients=20", "population.cohort=8"])
    for _ in range(3):
        again = load(experiment.text())
        assert again == experiment
        assert again.sha256 == experiment.sha256
        experiment = again
    assert from_run_config({"config": experiment.text()}).train.steps == 32
    assert (
        from_run_config({"overrides": "method=centralized population.clients=20 population.cohort=8"}).train.steps == 32
    )


def test_pooling_is_a_setting_of_any_method_and_of_code():
    experiment = compose(["method=fedavgm", "method.pooled=true", "population.clients=6", "population.cohort=2"])
    assert (experiment.population.pooled, experiment.train.steps) == (6, 8)
    assert compose(["method=scaffold", "method.pooled=true"]).method.strategy["clients"] == 1
    made = Experiment(method=MethodSpec({"_target_": "a.b.C"}, {}, True), population=PopulationSpec(clients=3))
    assert (made.population.clients, made.population.pooled) == (1, 3)
    with pytest.raises(ConfigError, match=r"population\.pooled=3 puts all data with one client"):
        compose(["population.pooled=3"])


@pytest.mark.parametrize(
    ("partition", "clients"),
    [("iid", 7), ("dirichlet", 20), ("natural", 21), ("pathological", 3), ("shard", 10), ("square", 5)],
)
def test_it_trains_on_the_very_rows_that_the_clients_train_on(partition, clients):
    words = ["model=tiny", f"data.partition={partition}", f"population.clients={clients}"]
    spec = compose(words).data
    federated = load_data(spec, clients, tiny_tokenizer(), 0)
    data = Workspace(compose([*words, "method=centralized"])).data
    assert np.array_equal(data.server, federated.server)
    assert (len(data.train), len(data.heldout)) == (1, 1)
    for mine, theirs in ((data.train, federated.train), (data.heldout, federated.heldout)):
        assert np.array_equal(mine[0], np.sort(np.concatenate(theirs)))
        assert len(np.unique(mine[0])) == len(mine[0])


def test_a_round_is_plain_training_on_the_union():
    workspace = Workspace(compose([*SMALL, "method=centralized"]))
    state = workspace.strategy.init(workspace.model.layout)
    peer = ClientInfo(0, workspace.samples(0))
    update = local_update(workspace, RUN, 0, 1, workspace.strategy.configure(state, 1, peer))
    after = workspace.strategy.aggregate(state, 1, [(peer, update)])
    assert update.examples == peer.samples == len(workspace.data.train[0])
    workspace.model.reset()
    key = derive_seed(0, "train", 1, 0)
    batches = workspace.data.batches(0, 4, key)
    finished(
        fit(workspace.model, batches, steps=6, lr=1e-3, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, key=key)
    )
    assert all(torch.equal(after.adapter[name], tensor) for name, tensor in workspace.model.read().items())


def test_a_run_says_that_there_is_one_client_and_resumes(small_run):
    said = io.StringIO()
    with redirect_stdout(said):
        whole = small_run("method=centralized", name="whole", rounds=4)
    assert "centralized, 1 client that holds the data of all 4, 6 steps a round, 4 rounds" in said.getvalue()
    assert summary_of(whole)["population"] == {"clients": 1, "cohort": 1, "pooled": 4}
    parts = small_run("method=centralized", name="parts", rounds=2)
    run_local(compose([*SMALL, "method=centralized", "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    with (whole / "metrics.csv").open(newline="") as stream:
        metrics = list(csv.DictReader(stream))
    assert float(metrics[4]["eval_loss"]) < float(metrics[2]["eval_loss"]) < float(metrics[0]["eval_loss"])
    assert all(float(row["aggregation_error"]) < 1e-12 for row in metrics[1:])
    assert [row["clients"] for row in metrics] == ["0", "1", "1", "1", "1"]


def test_it_goes_on_from_the_command_line_with_the_settings_it_was_started_with(capsys, tmp_path):
    from fedtune.commands.main import main

    out = tmp_path / "run"
    assert main(["run", *SMALL, "method=centralized", "rounds=1", f"out={out}"]) == 0
    assert main(["run", f"resume={out}", "rounds=2"]) == 0
    assert main(["run", f"resume={out}", "population.clients=5"]) == 1
    assert "population.pooled: 4 -> 5" in capsys.readouterr().err
    assert load((out / "config.yaml").read_text()).train.steps == 6
