"""RoLoRA: exact in every round, half of the bytes, and nobody is left behind.

B is trained in odd rounds and A in even ones, so a client that takes part in round t is sent, of layers with
out = 5, 4 and in = 3, 7, at rank 4:

    t = 1: nothing      t = 2: B, 4 (5 + 4) = 36 numbers      t = 3: A, 4 (3 + 7) = 40      t = 4: B      ...

and one that missed round t - 1 both, 76.
"""

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SMALL, summary_of
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, distance, ideal, layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import ClientError, WireError
from fedtune.core.protocol import SERVER, ClientInfo
from fedtune.lowrank.averaging import for_peer
from fedtune.lowrank.residual import FROM, VERSION, base_version
from fedtune.runs.checkpoint import state_sha256
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace
from strategies.rolora import RoLoRA, active

RUN = "0" * 16
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples
METHOD = RoLoRA()


def play(rounds, clients=((1, SCALING), (4, SCALING), (3, 5.0))):
    """The states before and after each round, and its replies, as made by clients that send something random."""
    states, answers = [METHOD.init(layout())], []
    for number in range(1, rounds + 1):
        replies = [
            reply(k, rank, scaling, k + 1, 10 * number + k, [active(number)])
            for k, (rank, scaling) in enumerate(clients)
        ]
        for peer, update in replies:
            METHOD.validate(states[-1], number, peer, update)
        states.append(METHOD.aggregate(states[-1], number, replies))
        answers.append(replies)
    return states, answers


def numbers(instruction):
    return sum(tensor.numel() for tensor in instruction.tensors.values())


def test_each_round_is_exact_and_leaves_the_other_factor_bit_for_bit():
    states, answers = play(6)
    for number, (before, after, replies) in enumerate(zip(states, states[1:], answers, strict=False), 1):
        held = [{**for_peer(before.adapter, peer, SCALING).tensors, **update.tensors} for peer, update in replies]
        whole = [(peer, replace(update, tensors=t)) for (peer, update), t in zip(replies, held, strict=True)]
        error = distance(dense(after.adapter, SCALING), ideal(whole))
        assert error < 1e-12
        for name, tensor in after.adapter.items():
            assert torch.equal(tensor, before.adapter[name]) is (active(number) not in name)


def test_b_goes_first_and_is_all_that_comes_up():
    assert [active(number) for number in (1, 2, 3, 4)] == ["lora_B", "lora_A", "lora_B", "lora_A"]
    state = METHOD.init(layout())
    assert METHOD.configure(state, 1, ClientInfo(0, 1)).settings["train"] == "lora_B"
    peer, update = reply(0, roles=["lora_A"])
    with pytest.raises(WireError, match=r"'one.lora_B.weight' is missing"):
        METHOD.validate(state, 1, peer, update)
    METHOD.validate(state, 2, peer, update)
    assert sum(t.numel() for t in update.tensors.values()) == 40


def test_who_was_there_is_sent_one_factor_and_who_was_not_both():
    states, _ = play(5)
    down, held = [], 0
    for number, state in enumerate(states, 1):
        told = METHOD.configure(state, number, ClientInfo(0, 1, base_version=held))
        down.append(numbers(told))
        assert told.settings[VERSION] == number - 1
        held = int(told.settings[VERSION])
    assert down == [0, 36, 40, 36, 40, 36]
    for held in (0, 1, 2, 3):
        told = METHOD.configure(states[5], 6, ClientInfo(0, 1, base_version=held))
        assert numbers(told) == 76
        assert told.settings[FROM] == 0
    assert numbers(METHOD.configure(states[5], 6, ClientInfo(0, 1, base_version=4))) == 36
    assert numbers(METHOD.configure(states[5], 6, ClientInfo(0, 1, base_version=10**9))) == 76
    assert numbers(METHOD.configure(states[5], 6, ClientInfo(SERVER, 1))) == 76


def test_all_who_lack_the_same_are_handed_the_same_tensors():
    states, _ = play(4)
    one, other = (METHOD.configure(states[4], 5, ClientInfo(k, 1, base_version=k)) for k in (0, 1))
    assert one.settings == other.settings
    assert all(tensor is other.tensors[name] for name, tensor in one.tensors.items())


def workspace_with(*overrides):
    return Workspace(compose([*SMALL, "method=rolora", FEW, *overrides]))


@cache
def some_states():
    """A model, and seven states of it, each with the factor of its round changed."""
    workspace = workspace_with()
    states = [workspace.strategy.init(workspace.model.layout)]
    for number in range(1, 7):
        changed = {n: t + number if active(number) in n else t for n, t in states[-1].adapter.items()}
        last = states[-1].changed | {active(number): number}
        states.append(replace(states[-1], adapter=changed, changed=last))
    return workspace, states


@given(st.lists(st.sets(st.integers(0, 1), min_size=1), min_size=3, max_size=6))
def test_after_any_absences_a_client_holds_the_same_as_the_server(cohorts):
    """Two clients that only receive: whatever rounds they sat out, they hold what the server holds."""
    workspace, states = some_states()
    memories, versions = [{}, {}], [0, 0]
    for number, cohort in enumerate(cohorts, 1):
        for index in sorted(cohort):
            told = workspace.strategy.configure(
                states[number - 1], number, ClientInfo(index, 1, base_version=versions[index])
            )
            workspace.install(told, memories[index])
            held = workspace.model.adapter()
            assert all(torch.equal(held[name], tensor) for name, tensor in states[number - 1].adapter.items())
            versions[index] = int(told.settings[VERSION])
            assert base_version(memories[index]) == versions[index]


@pytest.mark.slow
def test_what_it_is_spared_does_not_change_what_a_client_trains(tmp_path):
    """Through real turns: a client that was there in rounds 1 to 4 and one that wasn't in 2 and 3 train the same in
    round 4 as they would on the whole adapter."""
    workspace, states = workspace_with(f"out={tmp_path}"), some_states()[1]
    strategy, versions = workspace.strategy, {0: 0, 1: 0}
    for number in (1, 2, 3, 4):
        for index in (0, 1) if number in (1, 4) else (0,):
            peer = ClientInfo(index, workspace.samples(index), base_version=versions[index])
            told = strategy.configure(states[number - 1], number, peer)
            update = local_update(workspace, RUN, index, number, told)
            strategy.validate(states[number - 1], number, peer, update)
            frozen = {n: t for n, t in states[number - 1].adapter.items() if active(number) not in n}
            held = workspace.model.adapter()
            assert all(torch.equal(held[name], tensor) for name, tensor in frozen.items())
            versions[index] = int(told.settings[VERSION])
            assert Downlink(workspace).held(RUN, index, number + 1)[0] == versions[index]
            whole = strategy.configure(states[number - 1], number, replace(peer, base_version=0))
            assert state_sha256(local_update(workspace, "1" * 16, index, number, whole)) == state_sha256(update)


def test_merges_on_something_else_are_refused_by_the_client(tmp_path):
    workspace, states = workspace_with(f"out={tmp_path}"), some_states()[1]
    told = workspace.strategy.configure(states[4], 5, ClientInfo(0, 1, base_version=3))
    with pytest.raises(ClientError, match=r"build on version 3 .*; this client holds 0"):
        local_update(workspace, RUN, 0, 5, told)


WHOLE = "method.strategy._target_=remembering_nothing.Whole"


@pytest.mark.parametrize("ranks", [(), ("population.ranks=[8,4,2]", "population.scaling=per_rank")])
def test_a_run_with_partial_cohorts_ends_as_one_that_sends_all_and_costs_less(ranks, small_run):
    words = ["method=rolora", FEW, "population.cohort=2", *ranks]
    spared, whole = (
        small_run(*words, *more, name=name, rounds=6) for name, more in (("spared", []), ("whole", [WHOLE]))
    )
    assert summary_of(spared)["state_sha256"] == summary_of(whole)["state_sha256"]
    one, other = (summary_of(folder)["totals"] for folder in (spared, whole))
    assert one["down_payload_bytes"] < 0.9 * other["down_payload_bytes"]
    with (spared / "metrics.csv").open(newline="") as stream:
        errors = [float(row["aggregation_error"]) for row in csv.DictReader(stream) if row["round"] != "0"]
    assert len(errors) == 6
    assert max(errors) < 1e-6


def test_a_run_that_is_resumed_ends_the_same_and_moves_the_same_bytes(small_run):
    words = ["method=rolora", FEW, "population.cohort=2"]
    whole = small_run(*words, name="whole", rounds=6)
    parts = small_run(*words, name="parts", rounds=3)
    run_local(compose([*SMALL, *words, "rounds=6", f"out={parts}"]), resume=str(parts))
    assert summary_of(whole)["state_sha256"] == summary_of(parts)["state_sha256"]
    sent = []
    for folder in (whole, parts):
        with (folder / "ledger.csv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["part"] == "train"]
        sent.append([(row["round"], row["client"], row["direction"], row["payload_bytes"]) for row in rows])
    assert sent[0] == sent[1]
