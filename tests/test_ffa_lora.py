"""FFA-LoRA: exact, at equal and at mixed ranks and scalings, and A stays where it starts."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL
from fedtune.workspace.workspace import Party
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, distance, ideal, layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Instruction
from fedtune.lowrank.algebra import lora_factors
from strategies.ffa_lora import FFALoRA

RUN = "0" * 16
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples


def test_b_is_averaged_by_samples_and_scaling():
    """Weights 1/4 and 3/4, s = 2, s_k = 8 and 2, ranks 1 and 4: B = 1/4 * 4 pad(B_0) + 3/4 B_1."""
    replies = [reply(0, 1, 8.0, 1, roles=["lora_B"]), reply(1, 4, 2.0, 3, roles=["lora_B"])]
    method = FFALoRA()
    state = method.aggregate(method.init(layout()), 1, replies)
    zero, one = (update.tensors["one.lora_B.weight"] for _, update in replies)
    expected = 0.75 * one
    expected[:, 0] += zero[:, 0]
    torch.testing.assert_close(state.adapter["one.lora_B.weight"], expected, rtol=1e-12, atol=1e-12)
    assert state.adapter.keys() == {"one.lora_B.weight", "two.lora_B.weight"}


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(1, 99)), min_size=1))
def test_it_is_exact(clients):
    replies = [reply(k, rank, scaling, n, roles=["lora_B"]) for k, (rank, scaling, n) in enumerate(clients)]
    method = FFALoRA()
    start = layout()
    state = method.aggregate(method.init(start), 1, replies)
    assert distance(dense(start.initial | state.adapter, SCALING), ideal(replies, start.initial)) < 1e-12


@pytest.mark.parametrize("rank", [1, 4])
def test_bytes_are_those_of_b_alone(rank):
    """r_k m a layer: m = 5 and 4."""
    method = FFALoRA()
    peer, update = reply(0, rank, roles=["lora_B"])
    state = method.init(layout())
    told = method.configure(state, 1, peer)
    assert sum(t.numel() for t in told.tensors.values()) == sum(t.numel() for t in update.tensors.values()) == 9 * rank
    method.validate(state, 1, peer, update)
    with pytest.raises(WireError, match=r"lora_A\.weight' was not asked for"):
        method.validate(state, 1, peer, reply(0, rank)[1])


def workspace_with(*overrides):
    return Party(compose([*SMALL, "method=ffa_lora", FEW, "train.weight_decay=0.1", *overrides]))


@pytest.mark.parametrize("overrides", [(), ("population.ranks=[8,3]", "population.scaling=per_rank")])
def test_a_does_not_move_in_a_real_turn(overrides):
    """Frozen after the adapters were attached, and not dragged along by weight decay."""
    workspace = workspace_with(*overrides)
    start = lora_factors(workspace.model.layout.initial)
    assert all(product.a.any() for product in start.values())
    state = workspace.strategy.init(workspace.model.layout)
    peer = (
        ClientInfo(1, workspace.samples(1), rank=3, scaling=4.0) if overrides else ClientInfo(1, workspace.samples(1))
    )
    update = workspace.turn(RUN, 1, 1, workspace.strategy.configure(state, 1, peer))
    workspace.strategy.validate(state, 1, peer, update)
    for module, held in lora_factors(workspace.model.adapter()).items():
        assert torch.equal(held.a, start[module].a[: held.rank])
        assert held.rank == (3 if overrides else 8)
        assert held.b.any()


def test_every_party_has_the_same_a():
    one, other = (lora_factors(workspace_with().model.layout.initial) for _ in range(2))
    assert all(torch.equal(one[module].a, other[module].a) for module in one)
    differently = lora_factors(workspace_with("seed=1").model.layout.initial)
    assert not any(torch.equal(one[module].a, differently[module].a) for module in one)


def test_the_next_client_can_train_all_again():
    workspace = workspace_with()
    state = workspace.strategy.init(workspace.model.layout)
    workspace.turn(RUN, 0, 1, workspace.strategy.configure(state, 1, ClientInfo(0, 1)))
    workspace.install(Instruction({}), {})
    assert workspace.model.trained().keys() == workspace.model.layout.initial.keys()


def test_the_runs_own_meter_says_exact(small_run):
    words = ("population.ranks=[8,4,2]", "population.scaling=per_rank", "rounds=3")
    for name, overrides in (("equal", ()), ("mixed", words)):
        lines = (small_run("method=ffa_lora", FEW, *overrides, name=name) / "metrics.csv").read_text().splitlines()
        place = lines[0].split(",").index("aggregation_error")
        assert all(float(line.split(",")[place]) < 1e-6 for line in lines[2:])
