"""FedIT against numbers worked out by hand.

Two clients with 1 and 3 examples, so weights 1/4 and 3/4. One layer with in = 2, out = 3, r = 1.

    A = 1/4 [4, 8] + 3/4 [0, 4]             = [1, 5]
    B = 1/4 [4, 0, -4] + 3/4 [8, 4, 0]      = [7, 3, -1]

What it misses: sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A).
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Update, share
from strategies.fedit import FedIT, State

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def layout():
    start = {A: torch.zeros(1, 2), B: torch.zeros(3, 1)}
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in start.items())
    return Layout(slots, start)


def reply(index, a, b, examples):
    tensors = {A: torch.tensor([a]).float(), B: torch.tensor(b).float().reshape(-1, 1)}
    return ClientInfo(index, examples), Update(tensors, examples)


REPLIES = [reply(0, [4, 8], [4, 0, -4], 1), reply(1, [0, 4], [8, 4, 0], 3)]


def test_a_and_b_are_averaged_apart_by_samples():
    method = FedIT()
    state = method.aggregate(method.init(layout()), 1, REPLIES)
    assert state.adapter[A].tolist() == [[1, 5]]
    assert state.adapter[B].tolist() == [[7], [3], [-1]]
    assert state.adapter[A].dtype == torch.float32


def test_what_it_misses_is_the_spread_of_the_factors():
    method = FedIT()
    state = method.aggregate(method.init(layout()), 1, REPLIES)
    a, b = state.adapter[A].double(), state.adapter[B].double()
    ideal = sum(
        p * u.tensors[B].double() @ u.tensors[A].double() for p, (_, u) in zip([0.25, 0.75], REPLIES, strict=True)
    )
    spread = sum(
        p * (u.tensors[B].double() - b) @ (u.tensors[A].double() - a)
        for p, (_, u) in zip([0.25, 0.75], REPLIES, strict=True)
    )
    assert torch.allclose(ideal - b @ a, spread, atol=1e-12)
    assert spread.norm() > 1  # this example would not notice a method that were exact


def test_everyone_is_sent_the_same_tensors_object():
    method = FedIT()
    state = method.init(layout())
    assert method.configure(state, 1, ClientInfo(0, 1)).tensors is method.configure(state, 1, ClientInfo(1, 9)).tensors


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
)
def test_identical_clients_are_a_fixed_point_to_the_last_bit(a, weights):
    method = FedIT()
    replies = [reply(index, a, [1.1, -0.3, 7], n) for index, n in enumerate(weights)]
    state = method.aggregate(method.init(layout()), 1, replies)
    assert torch.equal(state.adapter[A], replies[0][1].tensors[A])
    assert torch.equal(state.adapter[B], replies[0][1].tensors[B])


@given(st.data())
def test_it_agrees_with_numpy(data):
    count = data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = rng.integers(1, 1000, count)
    factors = rng.standard_normal((count, 2)).astype(np.float32)
    replies = [reply(i, factors[i].tolist(), [0, 0, 0], int(weights[i])) for i in range(count)]
    method = FedIT()
    got = method.aggregate(method.init(layout()), 1, replies).adapter[A].numpy()[0]
    expected = np.average(factors.astype(np.float64), axis=0, weights=weights)
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_shares_sum_to_one():
    assert share(REPLIES) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(B), "'layer.lora_B.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' was not asked for"),
        (lambda t: t.update({A: torch.zeros(2, 1)}), "expected float32 (1, 2), got float32 (2, 1)"),
        (lambda t: t.update({A: torch.zeros(1, 2, dtype=torch.float64)}), "got float64 (1, 2)"),
    ],
)
def test_an_update_of_another_form_is_refused_by_name(change, said):
    peer, update = reply(0, [1, 1], [1, 1, 1], 1)
    change(update.tensors)
    with pytest.raises(WireError) as caught:
        FedIT().validate(State(dict(layout().initial)), 1, peer, update)
    assert said in str(caught.value)
