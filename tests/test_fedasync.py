"""FedAsync against numbers worked out by hand.

The server holds A = [8, -4] and B = [0, 0, 16], and alpha = 1/2. A client answers A = [0, 4], B = [8, 0, 0].

Fresh, it has a = 1/2:  A = [4, 0]  B = [4, 0, 8]. Three updates behind, s is

    constant              1                         a = 1/2
    polynomial, a = 1/2   (1 + 3)^-1/2 = 1/2        a = 1/4    A = 3/4 [8, -4] + 1/4 [0, 4] = [6, -2]   B = [2, 0, 12]
    hinge, a = 3, b = 2   1/(3 (3 - 2) + 1) = 1/4   a = 1/8    A = 7/8 [8, -4] + 1/8 [0, 4] = [7, -3]   B = [1, 0, 14]

Two at once, the one above fresh (a = 1/2) and A = [8, 12], B = 0 three behind (polynomial, a = 1/4), are one step:

    1 - (1/2 + 1/4) / 2 = 5/8
    A = 5/8 [8, -4] + 1/2 (1/2 [0, 4] + 1/4 [8, 12]) = [6, 0]
    B = 5/8 [0, 0, 16] + 1/2 (1/2 [8, 0, 0])         = [2, 0, 10]
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Traits, Update
from strategies.fedasync import FedAsync, State

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
HELD = {A: torch.tensor([[8.0, -4]]), B: torch.tensor([[0.0], [0], [16]])}


def reply(index, a, b, staleness=0, examples=1):
    tensors = {A: torch.tensor([a]).float(), B: torch.tensor(b).float().reshape(-1, 1)}
    return ClientInfo(index, examples, staleness=staleness), Update(tensors, examples)


def after(method, *replies):
    """A and B as lists of numbers."""
    adapter = method.aggregate(State(HELD), 1, replies).adapter
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    return adapter[A].flatten().tolist(), adapter[B].flatten().tolist()


@pytest.mark.parametrize(
    ("settings", "staleness", "expected"),
    [
        ({}, 0, ([4, 0], [4, 0, 8])),
        ({"discount": "constant"}, 3, ([4, 0], [4, 0, 8])),
        ({"discount": "polynomial", "a": 0.5}, 3, ([6, -2], [2, 0, 12])),
        ({"discount": "hinge", "a": 3, "b": 2}, 3, ([7, -3], [1, 0, 14])),
        ({"discount": "hinge", "a": 3, "b": 3}, 3, ([4, 0], [4, 0, 8])),
    ],
)
def test_one_update_by_hand(settings, staleness, expected):
    assert after(FedAsync(alpha=0.5, **settings), reply(0, [0, 4], [8, 0, 0], staleness)) == expected


def test_updates_that_come_together_are_one_step():
    together = reply(0, [0, 4], [8, 0, 0]), reply(1, [8, 12], [0, 0, 0], 3)
    expected = ([6, 0], [2, 0, 10])
    assert after(FedAsync(alpha=0.5), *together) == expected
    assert after(FedAsync(alpha=0.5), *reversed(together)) == expected


def test_samples_do_not_count():
    one, many = ((reply(0, [0, 4], [8, 0, 0]), reply(1, [8, 12], [0, 0, 0], examples=n)) for n in (1, 1000))
    assert after(FedAsync(), *one) == after(FedAsync(), *many)


numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2)


@given(numbers, st.sampled_from(["constant", "hinge", "polynomial"]))
def test_a_fresh_update_at_alpha_1_replaces_to_the_last_bit(a, discount):
    peer, update = reply(0, a, [1.1, -0.3, 7])
    adapter = FedAsync(alpha=1.0, discount=discount).aggregate(State(HELD), 1, [(peer, update)]).adapter
    assert all(torch.equal(adapter[name], update.tensors[name]) for name in (A, B))


@given(numbers, st.lists(st.integers(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_what_comes_back_as_it_was_sent_changes_nothing_however_stale(a, staleness, alpha):
    replies = [reply(index, a, [1.1, -0.3, 7], late) for index, late in enumerate(staleness)]
    held = replies[0][1].tensors
    adapter = FedAsync(alpha=alpha).aggregate(State(held), 1, replies).adapter
    assert all(torch.equal(adapter[name], held[name]) for name in (A, B))


@given(numbers, st.integers(1, 50), st.floats(0.01, 1))
def test_the_same_update_from_many_is_that_from_one(a, count, alpha):
    method, replies = FedAsync(alpha=alpha), [reply(index, a, [1.1, -0.3, 7]) for index in range(count)]
    one, all_ = (method.aggregate(State(HELD), 1, some).adapter for some in (replies[:1], replies))
    for name in (A, B):
        torch.testing.assert_close(all_[name], one[name], rtol=1e-6, atol=1e-9)


@given(st.data())
def test_it_agrees_with_numpy(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 6))
    staleness, factors = rng.integers(0, 20, count), rng.standard_normal((count, 2)).astype(np.float32)
    alpha, a, b = rng.uniform(0.1, 1), rng.uniform(0.1, 10), int(rng.integers(0, 10))
    weights = {
        "constant": np.full(count, alpha),
        "polynomial": alpha * (staleness + 1.0) ** -a,
        "hinge": np.where(staleness <= b, alpha, alpha / (a * np.maximum(staleness - b, 0) + 1)),
    }
    for discount, w in weights.items():
        replies = [reply(k, factors[k].tolist(), [0, 0, 0], int(staleness[k])) for k in range(count)]
        method = FedAsync(alpha, discount, a, b)
        got = method.aggregate(State(HELD), 1, replies).adapter[A].numpy()[0]
        expected = (1 - w.mean()) * HELD[A].numpy()[0] + (w[:, None] * factors).mean(0)
        assert np.allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_the_staler_the_less_it_counts():
    for discount in ("hinge", "polynomial"):
        weights = [FedAsync(discount=discount).weight(staleness) for staleness in range(30)]
        assert weights == sorted(weights, reverse=True)
        assert 0 < weights[-1] < weights[0] == 0.6


def test_it_says_that_it_takes_updates_one_at_a_time():
    assert FedAsync.traits == Traits(title="FedAsync", asynchronous=True)
    assert FedAsync.buffer == FedAsync().buffer == 1


def test_it_starts_from_the_layout_and_sends_everybody_the_same():
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in HELD.items())
    method = FedAsync()
    state = method.init(Layout(slots, HELD))
    assert method.configure(state, 1, ClientInfo(0, 1)).tensors is method.configure(state, 1, ClientInfo(1, 9)).tensors
    assert all(torch.equal(state.adapter[name], HELD[name]) for name in (A, B))


def test_an_update_of_another_form_is_refused_by_name():
    peer, update = reply(0, [1, 1], [1, 1, 1])
    del update.tensors[B]
    with pytest.raises(WireError, match=r"'layer.lora_B.weight' is missing"):
        FedAsync().validate(State(HELD), 1, peer, update)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0}, "alpha=0: expected a weight above 0, and at most 1"),
        ({"alpha": 1.5}, "alpha=1.5: expected"),
        ({"alpha": float("nan")}, "alpha=nan: expected"),
        ({"discount": "hing"}, "discount=hing is not known: expected constant, hinge, polynomial; did you mean hinge?"),
        ({"a": -0.5}, "a=-0.5 is too small: expected at least 0"),
        ({"b": -1}, "b=-1 is too small: expected at least 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, said):
    with pytest.raises(ConfigError) as caught:
        FedAsync(**settings)
    assert f"method.strategy.{said}" in str(caught.value)
