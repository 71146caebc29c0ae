"""Averages over adapters of different ranks, against numbers worked out by hand and by numpy.

Two clients with 1 and 3 examples, so weights 1/4 and 3/4; one layer with in = 2, out = 3. Client 0 has rank 1 and
multiplies B A by 8; client 1 has rank 2 and multiplies by 2, as does the global adapter.

    A   = 1/4 [[4, 8], [0, 0]] + 3/4 [[0, 4], [4, 0]]                          = [[1, 5], [3, 0]]
    B   = 1/4 (8/2) [[4, 0], [0, 0], [-4, 0]] + 3/4 [[8, 0], [4, 4], [0, 8]]   = [[10, 0], [3, 3], [-4, 6]]
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import SMALL
from fedtune.workspace.workspace import Party
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, factors, layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Instruction, Update, same_instruction, share
from fedtune.lowrank.algebra import lora_factors
from fedtune.lowrank.averaging import average, for_peer, truncate_rank
from fedtune.training.apply_instruction import install

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
LIKE = {A: torch.zeros(2, 2), B: torch.zeros(3, 2)}
REPLIES = [
    (
        ClientInfo(0, 1, rank=1, scaling=8.0),
        Update({A: torch.tensor([[4.0, 8]]), B: torch.tensor([[4.0], [0], [-4]])}, 1),
    ),
    (
        ClientInfo(1, 3, rank=2, scaling=2.0),
        Update({A: torch.tensor([[0.0, 4], [4, 0]]), B: torch.tensor([[8.0, 0], [4, 4], [0, 8]])}, 3),
    ),
]


def test_narrow_ones_count_as_padded_with_zeros_and_b_carries_its_scaling():
    mean = average(REPLIES, LIKE, scaling=2.0)
    assert mean[A].tolist() == [[1, 5], [3, 0]]
    assert mean[B].tolist() == [[10, 0], [3, 3], [-4, 6]]
    assert mean[B].dtype == torch.float32


def test_without_a_scaling_of_its_own_b_is_taken_as_it_is():
    assert average(REPLIES, LIKE)[B].tolist() == [[7, 0], [3, 3], [-1, 6]]


def test_weights_may_be_given_for_all_or_by_name():
    by_name = average(REPLIES, LIKE, {A: [1.0, 0.0], B: [0.0, 1.0]})
    assert by_name[A].tolist() == [[4, 8], [0, 0]]
    assert torch.equal(by_name[B], REPLIES[1][1].tensors[B])
    assert average(REPLIES, LIKE, [0.5, 0.5])[A].tolist() == [[2, 6], [2, 0]]


@pytest.mark.parametrize("room", [1, 3000])
def test_portions_change_nothing(monkeypatch, room):
    """Updates of 4 * 19 or 2 * 19 float64 numbers: one at a time, or several."""
    replies = [reply(k, 4 - k % 2 * 2, 1.0 + k, 1 + k) for k in range(7)]
    expected = average(replies, layout().initial, scaling=SCALING)
    monkeypatch.setattr("fedtune.lowrank.averaging.PORTION_BYTES", room)
    found = average(replies, layout().initial, scaling=SCALING)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_updates_are_looked_up_once_and_no_more_at_a_time_than_there_is_room_for(monkeypatch):
    looked_up, alive = [], []

    class Stored(list):
        def __iter__(self):
            for place in range(len(self)):
                peer, update = super().__getitem__(place)
                fresh = Update({name: t.clone() for name, t in update.tensors.items()}, update.examples)
                looked_up.append(place)
                alive.append(weakref.ref(fresh))
                assert sum(ref() is not None for ref in alive) <= 2 + 2  # this one, and the last of those before
                yield peer, fresh
                del fresh

    size = sum(t.nbytes for t in reply(0)[1].tensors.values())
    monkeypatch.setattr("fedtune.lowrank.averaging.PORTION_BYTES", 2 * size)
    replies = [reply(k) for k in range(6)]
    average(Stored(replies), layout().initial, [1 / 6] * 6)
    assert looked_up == list(range(6))


def test_only_what_is_asked_for_is_averaged():
    assert average(REPLIES, {A: LIKE[A]}).keys() == {A}


@given(st.data())
def test_it_agrees_with_numpy(data):
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    draw = st.lists(st.integers(1, 999), min_size=len(ranks), max_size=len(ranks))
    examples = data.draw(draw)
    replies = [
        reply(i, rank, 8.0 / rank, n, seed=data.draw(st.integers(0, 999)))
        for i, (rank, n) in enumerate(zip(ranks, examples, strict=True))
    ]
    got = average(replies, layout().initial, scaling=SCALING)
    for module in ("one", "two"):
        a = [
            np.pad(p.a.numpy(), ((0, 4 - len(p.a)), (0, 0)))
            for p in (lora_factors(u.tensors)[module] for _, u in replies)
        ]
        b = [
            np.pad(p.b.numpy() * (8.0 / p.rank) / SCALING, ((0, 0), (0, 4 - p.rank)))
            for p in (lora_factors(u.tensors)[module] for _, u in replies)
        ]
        found = lora_factors(got)[module]
        np.testing.assert_allclose(found.a.numpy(), np.average(a, axis=0, weights=examples), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.b.numpy(), np.average(b, axis=0, weights=examples), rtol=1e-12, atol=1e-12)


@given(st.permutations(range(5)))
def test_the_order_of_clients_changes_nothing(order):
    replies = [reply(i, rank=1 + i % 4, scaling=1.0 + i, examples=10 * i + 1) for i in range(5)]
    one = average(replies, layout().initial, scaling=SCALING)
    other = average([replies[place] for place in order], layout().initial, scaling=SCALING)
    assert all(torch.allclose(one[name], other[name], rtol=1e-12, atol=1e-12) for name in one)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 3.0, 8.0])
def test_what_a_client_is_sent_multiplies_to_the_first_components_of_the_global(rank, scaling):
    adapter = factors(4, 0)
    told = for_peer(adapter, ClientInfo(0, 1, rank=rank, scaling=scaling), SCALING)
    assert (told.settings["rank"], told.settings["scaling"]) == (rank, scaling)
    for module, product in lora_factors(adapter).items():
        expected = SCALING * product.b[:, :rank] @ product.a[:rank]
        assert torch.allclose(dense(told.tensors, scaling)[module], expected, rtol=1e-12, atol=1e-12)


def test_what_comes_back_untouched_from_all_is_what_was_sent():
    adapter = {name: tensor.clone() for name, tensor in factors(4, 0).items()}
    for name, tensor in adapter.items():  # what nobody holds can't come back
        (tensor[2:] if "lora_A" in name else tensor[:, 2:]).zero_()
    replies = []
    for index, (rank, scaling) in enumerate([(2, 3.0), (3, 1.0), (4, 2.0)]):
        peer = ClientInfo(index, 1, rank=rank, scaling=scaling)
        replies.append((peer, Update(dict(for_peer(adapter, peer, SCALING).tensors), index + 1)))
    back = average(replies, adapter, scaling=SCALING)
    assert all(torch.allclose(back[name], adapter[name], rtol=1e-12) for name in adapter)


def test_who_takes_all_is_handed_the_same_tensors_object():
    adapter = factors(4, 0)
    assert for_peer(adapter, ClientInfo(0, 1), SCALING).tensors is adapter
    wide = for_peer(adapter, ClientInfo(0, 1, rank=4, scaling=SCALING), SCALING).tensors
    assert all(wide[name] is adapter[name] for name in adapter)
    assert truncate_rank(adapter, 0) is adapter


def test_peers_that_take_the_same_part_are_handed_the_same_tensors_for_as_long_as_they_live():
    adapter = factors(4, 0)
    peers = [ClientInfo(k, 1, rank=2, scaling=s) for k, s in enumerate((8.0, 8.0, 4.0))]
    same, again, other = (for_peer(adapter, peer, SCALING) for peer in peers)
    assert same_instruction(same, again)
    assert not same_instruction(same, other)
    halved = "one.lora_B.weight"
    assert torch.equal(2 * same.tensors[halved], other.tensors[halved])
    alone = for_peer({halved: adapter[halved]}, peers[0], SCALING)
    assert alone.tensors[halved] is same.tensors[halved]
    part = weakref.ref(same.tensors[halved])
    del same, again, other, alone, adapter
    gc.collect()
    assert part() is None


def test_narrowing_hands_out_copies_that_hold_no_more_than_they_show():
    part = truncate_rank(factors(4, 0), 2)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() <= 2 * 7 * 8 * 2 for t in part.values())


def test_no_samples_at_all_is_an_error_with_a_name():
    with pytest.raises(WireError, match="none of the 2 updates has a training example behind it"):
        share([(peer, Update(update.tensors, 0)) for peer, update in REPLIES])


def test_a_client_of_a_narrower_rank_starts_from_the_first_components_of_what_it_isnt_sent():
    model = Party(compose(SMALL)).model
    start = lora_factors(model.layout.initial)
    install(model, Instruction({}, {"rank": 3, "scaling": 5.0}), {})
    for module, held in lora_factors(model.adapter()).items():
        assert torch.equal(held.a, start[module].a[:3])
        assert held.b.shape == (start[module].b.shape[0], 3)
    assert model.scaling == 5.0
    model.reset()
    b_alone = {name: torch.ones(t.shape[0], 3) for name, t in model.layout.initial.items() if "lora_B" in name}
    install(model, Instruction(b_alone, {"rank": 3}), {})
    for module, held in lora_factors(model.adapter()).items():
        assert torch.equal(held.a, start[module].a[:3])
        assert held.b.eq(1).all()
    model.reset()
    assert all(torch.equal(t, model.layout.initial[name]) for name, t in model.adapter().items())
