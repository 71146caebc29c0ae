"""FLoRA, FLoRIST and the dense control: what goes into the base is sum_k p_k s_k B_k A_k, or as much as is kept of it.

Weights 1/4 and 3/4, s_k 8 and 2. One layer with in = 2, out = 3; client 0 has rank 1, client 1 rank 2:

    dW* = 1/4 * 8 [1, 0, 2]^T [1, -1] + 3/4 * 2 [[2, 0], [0, 2], [4, 0]] [[0, 1], [1, 0]]
        = [[2, -2], [0, 0], [4, -4]] + [[0, 3], [3, 0], [0, 6]]  =  [[2, 1], [3, 0], [4, 2]]
"""

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, SHAPES, dense, distance, factors, ideal, layout, reply

from clients.fresh import Fresh
from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Update
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.residual import from_residual
from fedtune.lowrank.stacking import State, stacked
from fedtune.runs.checkpoint import state_sha256
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.flora import FLoRA
from strategies.florist import FLoRIST
from strategies.full_delta import FullDelta

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
RUN = "0" * 16
CLIENTS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 99)), min_size=1)


def by_hand():
    zero = {A: torch.tensor([[1.0, -1]]), B: torch.tensor([[1.0], [0], [2]])}
    one = {A: torch.tensor([[0.0, 1], [1, 0]]), B: torch.tensor([[2.0, 0], [0, 2], [4, 0]])}
    return [
        (ClientInfo(0, 1, rank=1, scaling=8.0), Update(zero, 1)),
        (ClientInfo(1, 3, rank=2, scaling=2.0), Update(one, 3)),
    ]


def hand_layout():
    start = {A: torch.ones(2, 2), B: torch.zeros(3, 2)}
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in start.items())
    return Layout(slots, start)


def change_of(state):
    """What was added to the base, whole."""
    if isinstance(state, State):
        return {m: p.b.double() @ p.a.double() for m, p in from_residual(state.merged.total).items()}
    return {name.removesuffix(".delta"): matrix.double() for name, matrix in state.change.items()}


def as_sent(method, replies):
    """The replies as this method's clients send them."""
    if not isinstance(method, FullDelta):
        return replies
    return [
        (
            peer,
            Update({f"{m}.delta": matrix.float() for m, matrix in dense(u.tensors, peer.scaling).items()}, u.examples),
        )
        for peer, u in replies
    ]


EXACT = [FLoRA(), FLoRIST(energy=1.0), FullDelta()]
NAMES = ["flora", "florist", "full_delta"]


@pytest.mark.parametrize("method", EXACT, ids=NAMES)
def test_the_base_changes_by_the_weighted_sum_with_each_scaling_once(method):
    state = method.aggregate(method.init(hand_layout()), 1, as_sent(method, by_hand()))
    np.testing.assert_allclose(change_of(state)["layer"], [[2, 1], [3, 0], [4, 2]], atol=1e-6)


@given(CLIENTS)
def test_the_stack_is_the_ideal_update(clients):
    """B_s A_s = dW* in float64, at mixed ranks and scalings."""
    replies = [reply(k, rank, scaling, n) for k, (rank, scaling, n) in enumerate(clients)]
    found = {module: product().b @ product().a for module, product in stacked(replies, SCALING).items()}
    assert distance(found, ideal(replies)) < 1e-12


@pytest.mark.parametrize("method", [FLoRA(), FLoRIST(0.9)], ids=["flora", "florist"])
def test_threads_change_no_bit_and_are_given_back(method):
    replies = [reply(k, 1 + k % 4, 1.0 + k, 1 + k) for k in range(5)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(state_sha256(method.aggregate(method.init(layout()), 1, replies)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("method", EXACT, ids=NAMES)
def test_rounds_add_up(method):
    state, expected = method.init(layout(dtype=torch.float32)), None
    for number in range(1, 4):
        replies = [reply(k, k + 1, 1.0 + k, 5 - k, seed=10 * number + k) for k in range(3)]
        state = method.aggregate(state, number, as_sent(method, replies))
        made = ideal(replies)
        expected = made if expected is None else {m: expected[m] + made[m] for m in made}
    assert distance(change_of(state), expected) < 1e-6


@pytest.mark.parametrize("method", EXACT, ids=NAMES)
@given(order=st.permutations(range(5)))
def test_the_order_of_clients_changes_nothing(method, order):
    replies = as_sent(method, [reply(k, 1 + k % 4, 1.0 + k, 1 + k) for k in range(5)])
    start = method.init(layout(dtype=torch.float32))
    one = method.aggregate(start, 1, replies)
    other = method.aggregate(start, 1, [replies[place] for place in order])
    assert distance(change_of(other), change_of(one)) < 1e-6


@pytest.mark.parametrize("method", EXACT, ids=NAMES)
def test_identical_clients_are_one(method):
    same = as_sent(method, [reply(k, 3, 2.0, 1 + k, seed=1) for k in range(4)])
    start = method.init(layout(dtype=torch.float32))
    alone, together = method.aggregate(start, 1, same[:1]), method.aggregate(start, 1, same)
    assert distance(change_of(together), change_of(alone)) < 1e-6


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9, 0.99])
def test_florist_keeps_the_fewest_components_that_hold_the_energy(energy):
    replies = [reply(k, 2, 2.0, 1 + k) for k in range(4)]
    method = FLoRIST(energy)
    state = method.aggregate(method.init(layout()), 1, replies)
    for module, matrix in ideal(replies).items():
        squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
        shares = squares.cumsum() / squares.sum()
        rank = int(np.argmax(shares >= energy)) + 1
        kept = from_residual(state.merged.total)[module]
        assert kept.rank == rank
        lost = float((matrix - kept.b.double() @ kept.a.double()).norm() / matrix.norm())
        assert lost == pytest.approx((1 - shares[rank - 1]) ** 0.5, abs=1e-6)
        assert lost <= (1 - energy) ** 0.5 + 1e-6


def test_florist_sends_one_rank_where_all_clients_agree():
    method = FLoRIST(energy=1.0)
    same = [reply(k, 2, 2.0, 1, seed=1) for k in range(5)]
    state = method.aggregate(method.init(layout()), 1, same)
    assert {product.rank for product in from_residual(state.merged.total).values()} == {2}


@pytest.mark.parametrize("method", [FLoRA(), FLoRIST()], ids=["flora", "florist"])
def test_bytes_are_those_of_the_ranks(method):
    """Up r_k (m + n) numbers a layer, m + n = 8 and 11. Down, after clients of rank 1 and 2, 3 (m + n) at most: layer
    `one` has a side of 3, `two` of 4, so nothing is narrowed."""
    state = method.init(layout(dtype=torch.float32))
    replies = [reply(0, 1), reply(1, 2)]
    assert method.configure(state, 1, replies[0][0]).tensors == {}
    for peer, update in replies:
        floats = Update({name: t.float() for name, t in update.tensors.items()}, 1)
        assert sum(t.numel() for t in floats.tensors.values()) == peer.rank * 19
        method.validate(state, 1, peer, floats)
    state = method.aggregate(state, 1, replies)
    told = method.configure(state, 2, ClientInfo(1, 1, rank=2, scaling=3.0))
    ranks = {module: product.rank for module, product in from_residual(state.merged.total).items()}
    assert sum(t.numel() for t in told.tensors.values()) == ranks["one"] * 8 + ranks["two"] * 11
    if isinstance(method, FLoRA):
        assert ranks == {"one": 3, "two": 3}
    assert told.settings == {"builds_on": 0, "version": 1, "rank": 2, "scaling": 3.0}


def test_the_controls_bytes_are_those_of_the_weights_each_way():
    method = FullDelta()
    state = method.init(layout(dtype=torch.float32))
    told = method.configure(state, 1, ClientInfo(0, 1, rank=2, scaling=3.0))
    assert {name: tuple(t.shape) for name, t in told.tensors.items()} == {"one.delta": (5, 3), "two.delta": (4, 7)}
    assert told.settings == {"rank": 2, "scaling": 3.0}
    assert method.configure(state, 1, ClientInfo(0, 1)).settings == {}


def test_clients_of_one_rank_are_sent_one_encoding():
    method = FLoRA()
    state = method.aggregate(method.init(layout()), 1, [reply(0), reply(1)])
    one, other = (method.configure(state, 2, ClientInfo(k, 9, base_version=0)).tensors for k in range(2))
    assert all(one[name] is other[name] for name in one)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("one.lora_B.weight"), "'one.lora_B.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' was not asked for"),
        (lambda t: t.update(factors(3, 0, dtype=torch.float32)), "expected float32 (2, 3), got float32 (3, 3)"),
        (lambda t: t.update(factors(2, 0)), "expected float32 (2, 3), got float64 (2, 3)"),
    ],
)
@pytest.mark.parametrize("method", [FLoRA(), FLoRIST()], ids=["flora", "florist"])
def test_an_update_of_another_form_is_refused_by_name(method, change, said):
    tensors = factors(2, 0, dtype=torch.float32)
    change(tensors)
    with pytest.raises(WireError) as caught:
        method.validate(method.init(layout()), 1, ClientInfo(0, 1, rank=2, scaling=1.0), Update(tensors, 1))
    assert said in str(caught.value)


def test_the_control_takes_matrices_of_the_layers_shape_alone():
    method = FullDelta()
    state = method.init(layout())
    right = {f"{m}.delta": torch.zeros(shape) for m, shape in SHAPES.items()}
    method.validate(state, 1, ClientInfo(0, 1), Update(right, 1))
    with pytest.raises(WireError, match=r"expected float32 \(5, 3\), got float32 \(3, 5\)"):
        method.validate(state, 1, ClientInfo(0, 1), Update(right | {"one.delta": torch.zeros(3, 5)}, 1))


@pytest.mark.parametrize("method", EXACT, ids=NAMES)
def test_an_adapter_that_holds_a_part_of_the_base_is_refused(method):
    start = layout()
    start.initial["one.lora_B.weight"] += 1
    with pytest.raises(ConfigError, match=r"begins each round with B = 0.*adapter=lora"):
        method.init(start)


@pytest.mark.parametrize(("method", "said"), [(FLoRA, "residual_rank"), (FLoRIST, "residual_rank")])
def test_a_residual_without_room_is_refused(method, said):
    with pytest.raises(ConfigError, match=said):
        method(residual_rank=0)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5])
def test_an_energy_that_is_no_fraction_is_refused(energy):
    with pytest.raises(ConfigError, match="energy"):
        FLoRIST(energy)


def turn(*overrides, peer=None, round=1):
    workspace = Workspace(compose([*SMALL, *overrides]))
    peer = peer or ClientInfo(1, 9)
    state = workspace.strategy.init(workspace.model.layout)
    return workspace, local_update(workspace, RUN, peer.index, round, workspace.strategy.configure(state, round, peer))


@pytest.mark.slow
def test_a_client_begins_anew_with_a_rank_and_a_draw_of_its_own():
    ranks = "population.ranks=[8,3]"
    workspace, mine = turn("method=flora", ranks, peer=ClientInfo(1, 9, rank=3, scaling=5.0))
    assert {product.rank for product in lora_factors(mine.tensors).values()} == {3}
    assert mine.metrics["scaling"] == 5.0
    workspace.strategy.validate(
        workspace.strategy.init(workspace.model.layout), 1, ClientInfo(1, 9, rank=3, scaling=5.0), mine
    )
    _, again = turn("method=flora", ranks, peer=ClientInfo(1, 9, rank=3, scaling=5.0))
    _, other = turn("method=flora", ranks, peer=ClientInfo(0, 9, rank=3, scaling=5.0))
    _, later = turn("method=flora", ranks, peer=ClientInfo(1, 9, rank=3, scaling=5.0), round=2)
    for name, tensor in mine.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])
        assert not torch.equal(tensor, later.tensors[name])


@pytest.mark.slow
def test_a_is_drawn_by_the_clients_key():
    """Steps so small that A stays where it began: uniform in +-1/sqrt(48)."""
    started = []
    for index in (0, 1):
        _, update = turn("method=flora", "train.lr=1e-9", peer=ClientInfo(index, 9))
        started.append([product.a for product in lora_factors(update.tensors).values()])
    for one, other in zip(*started, strict=True):
        assert (one - other).abs().mean() > 0.3 / 48**0.5  # of two independent draws: 2/3 of the bound
        assert 0.9 / 48**0.5 < one.abs().max() < 1.001 / 48**0.5


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [2.0, 5.0])
def test_the_control_sends_what_flora_sends_multiplied_out(scaling):
    peer = ClientInfo(1, 9, rank=3, scaling=scaling)
    _, short = turn("method=flora", "population.ranks=[8,3]", peer=peer)
    workspace, long = turn("method=full_delta", "population.ranks=[8,3]", peer=peer)
    assert isinstance(workspace.client, Fresh)
    found = {name.removesuffix(".delta"): matrix for name, matrix in long.tensors.items()}
    assert distance(found, dense(short.tensors, scaling)) < 1e-6
    assert all(matrix.any() for matrix in found.values())
