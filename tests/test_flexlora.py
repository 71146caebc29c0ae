"""FlexLoRA: the best adapter of its rank, by Eckart and Young, whatever ranks and scalings the clients have."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from fedtune.workspace.workspace import Party
from hypothesis import given
from hypothesis import strategies as st
from layers import RANK, SCALING, dense, distance, factors, ideal, layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Update
from fedtune.lowrank.algebra import lora_factors
from strategies.flexlora import FlexLoRA

CLIENTS = st.lists(st.tuples(st.integers(1, RANK), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 99)), min_size=1)


def aggregate(replies, start=None):
    method = FlexLoRA()
    return method.aggregate(method.init(start or layout()), 1, replies)


def singular_values(replies):
    return {module: np.linalg.svd(matrix.numpy(), compute_uv=False) for module, matrix in ideal(replies).items()}


@given(CLIENTS)
def test_the_error_is_that_of_the_singular_values_cut_off(clients):
    """||dW* - s B A||_F^2 = sum_{i>r} sigma_i^2, layer by layer, in float64."""
    replies = [reply(k, rank, scaling, n) for k, (rank, scaling, n) in enumerate(clients)]
    found = dense(aggregate(replies).adapter, SCALING)
    for module, values in singular_values(replies).items():
        apart = float((found[module] - ideal(replies)[module]).square().sum())
        assert apart == pytest.approx((values[RANK:] ** 2).sum(), abs=1e-12 * (values**2).sum())


@given(st.lists(st.integers(1, 2), min_size=1, max_size=2), st.sampled_from([1.0, 4.0]))
def test_it_is_exact_where_the_ranks_add_up_to_no_more(ranks, scaling):
    replies = [reply(k, rank, scaling, 1 + k) for k, rank in enumerate(ranks)]
    assert distance(dense(aggregate(replies).adapter, SCALING), ideal(replies)) < 1e-12


@given(CLIENTS, st.integers(1, RANK), st.sampled_from([0.5, SCALING, 8.0]))
def test_a_client_is_sent_the_best_of_its_rank_at_its_scaling(clients, rank, scaling):
    replies = [reply(k, r, s, n) for k, (r, s, n) in enumerate(clients)]
    told = FlexLoRA().configure(aggregate(replies), 2, ClientInfo(0, 1, rank=rank, scaling=scaling))
    assert told.settings == {"rank": rank, "scaling": scaling}
    found = dense(told.tensors, scaling)
    for module, matrix in ideal(replies).items():
        u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
        np.testing.assert_allclose(found[module], (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-9 * s[0])


def test_all_of_the_singular_values_stand_in_b():
    """A's rows are orthonormal; the columns of s B have the singular values as lengths."""
    replies = [reply(k, RANK, 3.0, 1 + k) for k in range(3)]
    for module, product in lora_factors(aggregate(replies).adapter).items():
        rank = min(RANK, *product.b.shape, *product.a.shape)
        np.testing.assert_allclose(product.a[:rank] @ product.a[:rank].T, np.eye(rank), atol=1e-12)
        lengths = SCALING * product.b.norm(dim=0)[:rank]
        np.testing.assert_allclose(lengths, singular_values(replies)[module][:rank], rtol=1e-10)


def test_components_that_nobody_trained_can_still_be_trained():
    """One client of rank 1 of four: were A and B both zero in the others, no gradient would ever reach them."""
    state = aggregate([reply(0, 1, 2.0, 1)])
    for product in lora_factors(state.adapter).values():
        assert not product.b[:, 1:].any()
        assert (product.a.norm(dim=1) > 0.1).all()


@given(st.permutations(range(5)))
def test_the_order_of_clients_changes_nothing(order):
    replies = [reply(k, 1 + k % 4, 1.0 + k, 1 + k) for k in range(5)]
    one, other = aggregate(replies), aggregate([replies[place] for place in order])
    assert distance(dense(other.adapter), dense(one.adapter)) < 1e-12


def test_identical_clients_are_a_fixed_point():
    same = [reply(k, RANK, SCALING, 1 + k, seed=1) for k in range(4)]
    assert distance(dense(aggregate(same).adapter), dense(same[0][1].tensors)) < 1e-12


def test_in_float32_it_is_exact_to_float32():
    start = layout(dtype=torch.float32)
    replies = [reply(0, 2, 4.0, 1), reply(1, 2, 2.0, 3)]
    state = aggregate(replies, start)
    assert all(tensor.dtype == torch.float32 for tensor in state.adapter.values())
    assert distance(dense(state.adapter, SCALING), ideal(replies)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_bytes_are_those_of_the_clients_rank(rank):
    method = FlexLoRA()
    state = method.init(layout())
    told = method.configure(state, 1, ClientInfo(0, 1, rank=rank, scaling=SCALING))
    assert sum(t.numel() for t in told.tensors.values()) == rank * (8 + 11)
    method.validate(state, 1, ClientInfo(0, 1, rank=rank, scaling=1.0), Update(factors(rank, 1), 1))
    with pytest.raises(WireError, match=rf"expected float64 \({rank}, 3\), got float64 \({rank + 1}, 3\)"):
        method.validate(state, 1, ClientInfo(0, 1, rank=rank, scaling=1.0), Update(factors(rank + 1, 1), 1))


def test_equal_ranks_are_sent_one_object():
    method = FlexLoRA()
    state = method.init(layout())
    assert method.configure(state, 1, ClientInfo(0, 1)).tensors is method.configure(state, 1, ClientInfo(1, 9)).tensors
    assert method.configure(state, 1, ClientInfo(0, 1)).settings == {}


def test_a_real_turn_at_a_rank_and_scaling_of_its_own():
    workspace = Party(compose([*SMALL, "method=flexlora", "population.ranks=[8,3]"]))
    state = workspace.strategy.init(workspace.model.layout)
    peers = [ClientInfo(0, 9, rank=8, scaling=2.0), ClientInfo(1, 9, rank=3, scaling=16 / 3)]
    for number in (1, 2):
        updates = [
            workspace.turn("0" * 16, p.index, number, workspace.strategy.configure(state, number, p)) for p in peers
        ]
        for peer, update in zip(peers, updates, strict=True):
            workspace.strategy.validate(state, number, peer, update)
            assert update.metrics["scaling"] == peer.scaling
        state = workspace.strategy.aggregate(state, number, list(zip(peers, updates, strict=True)))
    assert distance(dense(state.adapter, 2.0), ideal(list(zip(peers, updates, strict=True)))) < 0.2
