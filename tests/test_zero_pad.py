"""Zero-padding: the sums are those of tests/test_averaging.py; here, that the method makes them."""

import pytest
import torch
from layers import SCALING, dense, distance, ideal, layout, reply

from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Update
from fedtune.lowrank.algebra import lora_factors, name_of
from strategies.fedit import FedIT
from strategies.zero_pad import ZeroPad


def test_narrow_clients_are_padded_with_zeros():
    """Weights 1/4 and 3/4, ranks 1 and 4, s_k = 8 and 2 = s: rows 1, 2 and 3 of A are 3/4 of client 1's alone, and
    the first column of B is 1/4 * 8/2 of client 0's and 3/4 of client 1's."""
    replies = [reply(0, 1, 8.0, 1), reply(1, 4, 2.0, 3)]
    method = ZeroPad()
    state = method.aggregate(method.init(layout()), 1, replies)
    zero, one = (lora_factors(update.tensors)["one"] for _, update in replies)
    mean = lora_factors(state.adapter)["one"]
    torch.testing.assert_close(mean.a[1:], 0.75 * one.a[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean.a[0], 0.25 * zero.a[0] + 0.75 * one.a[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean.b[:, 0], zero.b[:, 0] + 0.75 * one.b[:, 0], rtol=1e-12, atol=1e-12)


def test_with_equal_ranks_it_is_fedit_to_the_last_bit():
    replies = [reply(index, examples=index + 1) for index in range(3)]
    padded, plain = ZeroPad(), FedIT()
    one = padded.aggregate(padded.init(layout()), 1, replies).adapter
    other = plain.aggregate(plain.init(layout()), 1, replies).adapter
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_one_client_alone_keeps_its_work_whatever_its_scaling():
    replies = [reply(0, 2, 5.0)]
    method = ZeroPad()
    state = method.aggregate(method.init(layout()), 1, replies)
    assert distance(dense(state.adapter, SCALING), ideal(replies)) < 1e-12


def test_it_misses_the_ideal_by_the_spread_of_the_factors():
    replies = [reply(0, 1, 8.0, 1), reply(1, 4, 2.0, 3)]
    method = ZeroPad()
    state = method.aggregate(method.init(layout()), 1, replies)
    assert distance(dense(state.adapter, SCALING), ideal(replies)) > 0.1


@pytest.mark.parametrize("rank", [1, 3])
def test_bytes_are_those_of_the_clients_own_rank(rank):
    """r_k (m + n) a layer: 5 + 3 and 4 + 7."""
    method = ZeroPad()
    state = method.init(layout())
    peer, update = reply(0, rank, SCALING)
    sent = method.configure(state, 1, peer).tensors
    assert sum(t.numel() for t in sent.values()) == sum(t.numel() for t in update.tensors.values()) == rank * 19
    method.validate(state, 1, peer, update)


def test_an_update_of_another_rank_is_refused_by_name():
    method = ZeroPad()
    peer, _ = reply(0, 2, SCALING)
    _, wider = reply(0, 3, SCALING)
    with pytest.raises(WireError, match=r"'one.lora_A.weight': expected float64 \(2, 3\), got float64 \(3, 3\)"):
        method.validate(method.init(layout()), 1, peer, wider)
    a = name_of("one", "lora_A")
    with pytest.raises(WireError, match=r"'one.lora_B.weight' is missing"):
        method.validate(method.init(layout()), 1, ClientInfo(0, 1), Update({a: layout().initial[a]}, 1))
