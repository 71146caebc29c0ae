"""FedBuff against numbers worked out by hand.

The server holds A = [8, -4] and B = [0, 0, 16]. Two clients answer:

    fresh (s = 1):                             A = [10, 0],  B = [2, 0, 16]: changes [2, 4] and [2, 0, 0]
    three updates behind (s = 1/sqrt(4) = 1/2), sent A = [4, 4] and B = [0, 0, 8]:
                                               A = [0, 8],   B = [0, 8, 0]:  changes [-4, 4] and [0, 8, -8]

    1/2 (1 [2, 4] + 1/2 [-4, 4])               = [0, 3]      A = [8, -1];      at eta_g = 2:  [8, 2]
    1/2 (1 [2, 0, 0] + 1/2 [0, 8, -8])         = [1, 2, -2]  B = [1, 2, 14];   at eta_g = 2:  [2, 4, 12]

To average them as they stand, FedIT's [5, 4], would bring back a part of what the server has left behind.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, Layout, Slot, Traits, Update
from strategies.fedbuff import FedBuff, State
from strategies.fedit import FedIT

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def adapter(a, b):
    return {A: torch.tensor([a]).float(), B: torch.tensor(b).float().reshape(-1, 1)}


HELD, EARLIER = adapter([8, -4], [0, 0, 16]), adapter([4, 4], [0, 0, 8])


def reply(index, tensors, staleness=0, start=None, examples=1):
    return ClientInfo(index, examples, staleness=staleness), Update(tensors, examples, start=start or {})


FRESH, LATE = reply(0, adapter([10, 0], [2, 0, 16])), reply(1, adapter([0, 8], [0, 8, 0]), 3, EARLIER)


@pytest.mark.parametrize(("lr", "a", "b"), [(1.0, [8, -1], [1, 2, 14]), (2.0, [8, 2], [2, 4, 12])])
def test_two_updates_by_hand(lr, a, b):
    state = FedBuff(lr=lr).aggregate(State(HELD), 1, [FRESH, LATE])
    assert state.adapter[A].tolist() == [a]
    assert state.adapter[B].flatten().tolist() == b
    assert {tensor.dtype for tensor in state.adapter.values()} == {torch.float32}


def test_the_order_and_samples_do_not_count():
    (peer, update), method = LATE, FedBuff()
    many = ClientInfo(peer.index, 1000, staleness=3), Update(update.tensors, 1000, start=EARLIER)
    one, other = (method.aggregate(State(HELD), 1, some).adapter for some in ([FRESH, LATE], [many, FRESH]))
    assert all(torch.equal(one[name], other[name]) for name in (A, B))


numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2)


@given(st.lists(numbers, min_size=1, max_size=50), numbers)
def test_fresh_updates_are_averaged_as_fedit_does_with_equal_weights(sent, held):
    state = State(adapter(held, [0, 0, 16]))
    replies = [reply(index, adapter(a, [1.1, -0.3, 7])) for index, a in enumerate(sent)]
    mine, fedit = (method.aggregate(state, 1, replies).adapter for method in (FedBuff(), FedIT()))
    assert all(torch.equal(mine[name], fedit[name]) for name in (A, B))


@given(numbers, st.integers(1, 50))
def test_identical_fresh_updates_are_a_fixed_point_to_the_last_bit(a, count):
    tensors = adapter(a, [1.1, -0.3, 7])
    state = FedBuff().aggregate(State(HELD), 1, [reply(index, tensors) for index in range(count)])
    assert all(torch.equal(state.adapter[name], tensors[name]) for name in (A, B))


@given(numbers, st.lists(st.integers(0, 100), min_size=1, max_size=20), st.floats(0.01, 10))
def test_what_comes_back_as_it_was_sent_changes_nothing(a, staleness, lr):
    """Whatever each was sent: the server's own where it is fresh, something earlier where not."""
    held = adapter(a, [1.1, -0.3, 7])
    replies = [
        reply(index, adapter([index, 0.1], [0, late, 0.7]), late, adapter([index, 0.1], [0, late, 0.7]))
        if late
        else reply(index, held)
        for index, late in enumerate(staleness)
    ]
    state = FedBuff(lr=lr).aggregate(State(held), 1, replies)
    for name in (A, B):
        torch.testing.assert_close(state.adapter[name], held[name], rtol=1e-6, atol=0)


@given(st.data())
def test_it_agrees_with_numpy(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count, lr = data.draw(st.integers(1, 6)), float(rng.uniform(0.1, 2))
    staleness = rng.integers(0, 20, count)
    starts, ends = (rng.standard_normal((count, 2)).astype(np.float32) for _ in range(2))
    starts[staleness == 0] = HELD[A].numpy()
    replies = [
        reply(
            k, adapter(ends[k].tolist(), [0, 0, 0]), int(late), adapter(starts[k].tolist(), [0, 0, 0]) if late else {}
        )
        for k, late in enumerate(staleness)
    ]
    got = FedBuff(lr=lr).aggregate(State(HELD), 1, replies).adapter[A].numpy()[0]
    changes = (ends.astype(np.float64) - starts) / np.sqrt(1 + staleness)[:, None]
    assert np.allclose(got, HELD[A].numpy()[0] + lr * changes.mean(0), rtol=1e-6, atol=1e-6)


def test_it_says_how_many_it_waits_for():
    assert FedBuff.traits == Traits(title="FedBuff", asynchronous=True)
    assert (FedBuff().buffer, FedBuff(buffer=7).buffer) == (4, 7)


def test_it_starts_from_the_layout_and_sends_everybody_the_same():
    slots = tuple(Slot(name, tuple(t.shape), "float32", name.split(".")[1], "layer", 2.0) for name, t in HELD.items())
    method = FedBuff()
    state = method.init(Layout(slots, HELD))
    assert method.configure(state, 1, ClientInfo(0, 1)).tensors is method.configure(state, 1, ClientInfo(1, 9)).tensors
    assert all(torch.equal(state.adapter[name], HELD[name]) for name in (A, B))


def test_an_update_of_another_form_is_refused_by_name():
    peer, update = reply(0, {A: HELD[A]})
    with pytest.raises(WireError, match=r"'layer.lora_B.weight' is missing"):
        FedBuff().validate(State(HELD), 1, peer, update)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"buffer": 0}, "buffer=0: expected a whole number from 1 up"),
        ({"buffer": 2.5}, "buffer=2.5: expected a whole number"),
        ({"buffer": True}, "buffer=True: expected a whole number"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, said):
    with pytest.raises(ConfigError) as caught:
        FedBuff(**settings)
    assert f"method.strategy.{said}" in str(caught.value)
