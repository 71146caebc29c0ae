"""FedEx-LoRA: FedIT's average and the residual make the ideal update.

By hand, FedIT's own example (tests/test_fedit.py): weights 1/4 and 3/4, in = 2, out = 3, r = 1, here s = 2.

    A_0 = [4, 8], A_1 = [0, 4], A = [1, 5]        B_0 = [4, 0, -4], B_1 = [8, 4, 0], B = [7, 3, -1]
    residual = s p_0 (B_0 - B)(A_0 - A_1) = 2/4 [-3, -3, -3]^T [4, 4] = [[-6, -6], [-6, -6], [-6, -6]]
    check: s sum p_k B_k A_k = 2 (1/4 [4, 0, -4]^T [4, 8] + 3/4 [8, 4, 0]^T [0, 4]) = [[8, 64], [0, 24], [-8, -16]]
           s B A = 2 [7, 3, -1]^T [1, 5] = [[14, 70], [6, 30], [-2, -10]], and 14 - 6 = 8, ...
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, distance, factors, ideal, layout, reply

from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Update, share
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.residual import from_residual
from strategies.fedex_lora import FedExLoRA, spread
from strategies.fedit import FedIT
from strategies.fedit import State as FedITState

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def whole(state):
    """What a client holds beside the plain base: s B A, and the residuals so far."""
    held = dense(state.adapter, state.scaling)
    for module, p in from_residual(state.merged.total).items():
        held[module] = held[module] + p.b.double() @ p.a.double()
    return held


def aggregate(replies, start=None):
    method = FedExLoRA()
    return method.aggregate(method.init(start or layout()), 1, replies)


def test_the_residual_by_hand():
    start = {A: torch.zeros(1, 2), B: torch.zeros(3, 1)}
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in start.items())
    numbers = [([[4.0, 8]], [[4.0], [0], [-4]], 1), ([[0.0, 4]], [[8.0], [4], [0]], 3)]
    replies = [
        (ClientInfo(k, n), Update({A: torch.tensor(a), B: torch.tensor(b)}, n)) for k, (a, b, n) in enumerate(numbers)
    ]
    state = aggregate(replies, Layout(slots, start))
    assert state.adapter[A].tolist() == [[1, 5]]
    assert state.adapter[B].tolist() == [[7], [3], [-1]]
    (residual,) = from_residual(state.merged.total).values()
    assert (residual.b @ residual.a).tolist() == [[-6, -6]] * 3
    assert whole(state)["layer"].tolist() == [[8, 64], [0, 24], [-8, -16]]


@pytest.mark.slow
@given(st.lists(st.integers(1, 99), min_size=2, max_size=6))
def test_the_spread_is_what_the_average_misses(examples):
    """In float64: s sum p_k B_k A_k - s B A, of rank (N - 1) r."""
    replies = [reply(k, examples=n) for k, n in enumerate(examples)]
    average = FedIT().aggregate(FedITState(layout().initial), 1, replies).adapter
    weights = [SCALING * weight for weight in share(replies)]
    missed = {m: matrix - dense(average, SCALING)[m] for m, matrix in ideal(replies).items()}
    found = {}
    for module, mean in lora_factors(average).items():
        product = spread([lora_factors(update.tensors)[module] for _, update in replies], mean, weights)
        assert product.rank == 4 * (len(examples) - 1)
        found[module] = product.b @ product.a
    size = sum(float(matrix.square().sum()) for matrix in ideal(replies).values()) ** 0.5
    for module, matrix in missed.items():
        np.testing.assert_allclose(found[module], matrix, atol=1e-12 * size)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=6))
def test_base_and_adapter_make_the_ideal_update(examples):
    replies = [reply(k, examples=n) for k, n in enumerate(examples)]
    assert distance(whole(aggregate(replies)), ideal(replies)) < 1e-6


def test_each_round_ends_where_the_ideal_update_would():
    """The base moves by what that round's average missed, and by nothing else."""
    method = FedExLoRA()
    state = method.init(layout())
    moved = dict.fromkeys(dense(state.adapter), 0)
    for number in range(1, 4):
        replies = [reply(k, examples=1 + k, seed=10 * number + k) for k in range(3)]
        state = method.aggregate(state, number, replies)
        wanted = {m: moved[m] + matrix for m, matrix in ideal(replies).items()}
        assert distance(whole(state), wanted) < 1e-6
        moved = {m: whole(state)[m] - matrix for m, matrix in dense(state.adapter, SCALING).items()}


def test_fedit_misses_what_this_adds():
    """The same replies without the residual are off by more than half of it."""
    replies = [reply(k) for k in range(3)]
    state = aggregate(replies)
    assert distance(dense(state.adapter, SCALING), ideal(replies)) > 0.5


@pytest.mark.slow
@given(st.permutations(range(4)))
def test_the_order_of_clients_changes_nothing(order):
    replies = [reply(k, examples=1 + k) for k in range(4)]
    one, other = aggregate(replies), aggregate([replies[place] for place in order])
    assert distance(whole(other), whole(one)) < 1e-6


def test_identical_clients_are_a_fixed_point_and_leave_no_residual():
    tensors = factors(4, 1, dtype=torch.float32)
    same = [(ClientInfo(k, 9), Update(tensors, 1 + k)) for k in range(4)]
    state = aggregate(same, layout(dtype=torch.float32))
    assert all(torch.equal(state.adapter[name], tensor) for name, tensor in same[0][1].tensors.items())
    assert distance(whole(state), dense(same[0][1].tensors, SCALING)) < 1e-12


def test_one_client_alone_changes_no_base():
    state = aggregate([reply(0)])
    assert state.merged.version == 0
    assert distance(whole(state), ideal([reply(0)])) < 1e-12


def test_bytes_are_those_of_the_adapter_and_of_the_residual():
    """Rank 4, three replies, layers of 5 + 3 and 4 + 7: 4 * 19 numbers, and a residual of rank min(m, n, 8)."""
    method = FedExLoRA()
    state = aggregate([reply(k) for k in range(3)])
    told = method.configure(state, 2, ClientInfo(0, 1, base_version=0))
    assert sum(t.numel() for t in told.tensors.values()) == 4 * 19 + 3 * 8 + 4 * 11
    assert told.settings == {"builds_on": 0, "version": 1}
    assert method.configure(state, 2, ClientInfo(0, 1, base_version=1)).tensors.keys() == state.adapter.keys()
    method.validate(state, 2, ClientInfo(0, 1), Update(factors(4, 1), 1))
    with pytest.raises(WireError, match=r"expected float64 \(4, 3\), got float64 \(2, 3\)"):
        method.validate(state, 2, ClientInfo(0, 1), Update(factors(2, 1), 1))


def test_a_residual_without_room_is_refused():
    with pytest.raises(ConfigError, match="residual_rank"):
        FedExLoRA(residual_rank=0)
