"""FedSA-LoRA: A is shared, B stays with its client, from round to round and from nobody to nobody.

Two clients with 1 and 3 examples: A = 1/4 A_0 + 3/4 A_1. Up and down r in a layer: 4 (3 + 7) = 40 numbers.
"""

import csv
from pathlib import Path

import pytest
import torch
from conftest import SMALL, summary_of
from layers import layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import WireError
from fedtune.core.protocol import SERVER, ClientInfo
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.fedsa_lora import FedSALoRA

RUN = "0" * 16
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples


def test_a_alone_travels_and_is_averaged_by_samples():
    method = FedSALoRA()
    state = method.init(layout())
    replies = [reply(0, examples=1, roles=["lora_A"]), reply(1, examples=3, roles=["lora_A"])]
    after = method.aggregate(state, 1, replies)
    assert after.adapter.keys() == {"one.lora_A.weight", "two.lora_A.weight"}
    for name, mean in after.adapter.items():
        zero, one = (update.tensors[name] for _, update in replies)
        torch.testing.assert_close(mean, zero / 4 + 3 * one / 4, rtol=1e-12, atol=1e-12)
    told = method.configure(after, 2, ClientInfo(0, 1))
    assert sum(t.numel() for t in told.tensors.values()) == 40
    assert method.configure(after, 2, ClientInfo(1, 1)).tensors is told.tensors


def test_an_update_with_b_in_it_is_refused():
    method = FedSALoRA()
    with pytest.raises(WireError, match=r"'one.lora_B.weight' was not asked for \(2 such\)"):
        method.validate(method.init(layout()), 1, *reply(0))


def workspace_in(folder):
    return Workspace(compose([*SMALL, "method=fedsa_lora", FEW, f"out={folder}"]))


def bs(workspace):
    return {name: tensor for name, tensor in workspace.model.adapter().items() if "lora_B" in name}


def test_each_client_finds_its_own_b_again_and_nobody_elses(tmp_path):
    workspace = workspace_in(tmp_path)
    state = workspace.strategy.init(workspace.model.layout)
    left = {}
    for index in (0, 1):
        told = workspace.strategy.configure(state, 1, ClientInfo(index, 1))
        update = local_update(workspace, RUN, index, 1, told)
        assert all("lora_A" in name for name in update.tensors)
        left[index] = bs(workspace)
        assert all(tensor.any() for tensor in left[index].values())
    assert not any(torch.equal(left[0][name], left[1][name]) for name in left[0])
    told = workspace.strategy.configure(state, 2, ClientInfo(0, 1))
    for index in (1, 0):
        workspace.install(told, workspace.client_states.load(RUN, index, 2))
        held = bs(workspace)
        assert all(torch.equal(held[name], tensor) for name, tensor in left[index].items())
    for run, index in ((RUN, 2), ("1" * 16, 0)):  # a client, and a run, that did not train yet
        workspace.install(told, workspace.client_states.load(run, index, 2))
        assert not any(tensor.any() for tensor in bs(workspace).values())
    workspace.install(workspace.strategy.configure(state, 2, ClientInfo(SERVER, 1)), {})
    assert not any(tensor.any() for tensor in bs(workspace).values())


@pytest.mark.slow
def test_a_second_turn_goes_on_from_the_b_of_the_first(tmp_path):
    """The same turn without the memory has another result, and one whose memory came through the disk has the same."""
    workspace, again = workspace_in(tmp_path / "one"), workspace_in(tmp_path / "again")
    state = workspace.strategy.init(workspace.model.layout)
    told = workspace.strategy.configure(state, 1, ClientInfo(0, 1))
    for each in (workspace, again):
        local_update(each, RUN, 0, 1, told)
    forgetful = local_update(again, "1" * 16, 0, 2, told)
    remembering = local_update(again, RUN, 0, 2, told)
    fresh = local_update(workspace_in(tmp_path / "one"), RUN, 0, 2, told)
    assert state_sha256(fresh.tensors) == state_sha256(remembering.tensors) != state_sha256(forgetful.tensors)


def test_a_turn_that_fails_leaves_the_b_from_before(tmp_path, monkeypatch):
    workspace = workspace_in(tmp_path)
    state = workspace.strategy.init(workspace.model.layout)
    told = workspace.strategy.configure(state, 1, ClientInfo(0, 1))
    local_update(workspace, RUN, 0, 1, told)
    before = state_sha256(workspace.client_states.load(RUN, 0, 2))
    monkeypatch.setattr("clients.first_order.fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local_update(workspace, RUN, 0, 2, told)
    assert state_sha256(workspace.client_states.load(RUN, 0, 3)) == before


def test_a_run_with_partial_cohorts_resumes_to_the_same_models(small_run):
    words = ["method=fedsa_lora", FEW, "population.cohort=2"]
    whole = small_run(*words, name="whole", rounds=4)
    parts = small_run(*words, name="parts", rounds=2)
    run_local(compose([*SMALL, *words, "rounds=4", f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    scores = []
    for folder in (whole, parts):
        with (folder / "clients.csv").open(newline="") as stream:
            scores.append([(r["round"], r["client"], r["eval_loss"]) for r in csv.DictReader(stream)])
    assert scores[0] == scores[1]
    last = [float(loss) for round, _, loss in scores[0] if round == "4"]
    assert len(set(last)) == len(last) == 4
