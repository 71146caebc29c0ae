"""FedSVD: exact, since A is one for all, and A's rows are orthonormal from the start to the end."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, dense, distance, ideal, layout, reply

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo
from fedtune.lowrank.algebra import lora_factors
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from strategies.fedsvd import FedSVD

NARROW = {"one": (5, 6), "two": (2, 7)}  # rank 4 of the second is more than its 2 outputs


def start(shapes=NARROW, **options):
    return layout(shapes=shapes, **options)


def replies_of(count, seed=0, shapes=NARROW):
    made = []
    for k in range(count):
        peer, update = reply(k, examples=1 + k, roles=["lora_B"], seed=seed + k)
        tensors = {
            name: torch.randn(
                shapes[name.split(".")[0]][0], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + k)
            )
            for name in update.tensors
        }
        made.append((peer, type(update)(tensors, update.examples)))
    return made


def check_orthonormal(adapter, atol=1e-12):
    for product in lora_factors(adapter).values():
        np.testing.assert_allclose(product.a @ product.a.T, np.eye(4), atol=atol)


def test_a_is_orthonormal_from_the_start_and_spans_what_it_spanned():
    first = start()
    state = FedSVD().init(first)
    check_orthonormal(state.adapter)
    for module, product in lora_factors(state.adapter).items():
        assert not product.b.any()
        old = lora_factors(first.initial)[module].a
        np.testing.assert_allclose(old @ product.a.T @ product.a, old, atol=1e-12)


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 4))
def test_it_is_exact_round_after_round(count, rounds):
    method = FedSVD()
    state = method.init(start())
    for number in range(1, rounds + 1):
        replies = replies_of(count, seed=10 * number)
        before, state = state, method.aggregate(state, number, replies)
        frozen = {name: t for name, t in before.adapter.items() if "lora_A" in name}
        assert distance(dense(state.adapter, SCALING), ideal(replies, frozen)) < 1e-12
        check_orthonormal(state.adapter)


def test_b_holds_the_singular_values_in_order():
    method = FedSVD()
    state = method.aggregate(method.init(start()), 1, replies_of(3))
    for module, product in lora_factors(state.adapter).items():
        values = np.linalg.svd(dense(state.adapter)[module].numpy(), compute_uv=False)
        rank = min(4, len(values))
        np.testing.assert_allclose(product.b.norm(dim=0)[:rank], values[:rank], rtol=1e-12)
        columns = (product.b / product.b.norm(dim=0).clamp(min=1e-9))[:, :rank]
        np.testing.assert_allclose(columns.T @ columns, np.eye(rank), atol=1e-10)


@pytest.mark.slow
@given(st.permutations(range(4)))
def test_the_order_of_clients_changes_nothing(order):
    method = FedSVD()
    replies, state = replies_of(4), FedSVD().init(start())
    one = method.aggregate(state, 1, replies)
    other = method.aggregate(state, 1, [replies[place] for place in order])
    assert distance(dense(other.adapter), dense(one.adapter)) < 1e-12


def test_identical_clients_are_a_fixed_point():
    method = FedSVD()
    state = method.init(start())
    (peer, update), *_ = replies_of(1)
    alone = method.aggregate(state, 1, [(peer, update)])
    together = method.aggregate(state, 1, [(ClientInfo(k, 9), update) for k in range(5)])
    assert distance(dense(together.adapter), dense(alone.adapter)) < 1e-12


def test_bytes_are_those_of_both_down_and_of_b_up():
    """r (m + n) and r m numbers: m = 5 and 2, n = 6 and 7."""
    method = FedSVD()
    state = method.init(start())
    told = method.configure(state, 1, ClientInfo(0, 1))
    assert told.settings == {"train": "lora_B"}
    assert sum(t.numel() for t in told.tensors.values()) == 4 * (5 + 6 + 2 + 7)
    ((peer, update),) = replies_of(1)
    assert sum(t.numel() for t in update.tensors.values()) == 4 * (5 + 2)
    method.validate(state, 1, peer, update)
    update.tensors["one.lora_A.weight"] = state.adapter["one.lora_A.weight"]
    with pytest.raises(WireError, match=r"'one.lora_A.weight' was not asked for"):
        method.validate(state, 1, peer, update)


def test_more_rows_than_a_layer_has_inputs_are_refused():
    with pytest.raises(ConfigError, match="layer 'one' takes 3 numbers, so there are no 4 orthonormal rows"):
        FedSVD().init(start({"one": (5, 3)}))


def test_a_start_with_a_product_of_its_own_keeps_it():
    """PiSSA's: B isn't 0."""
    first = start()
    for name, tensor in first.initial.items():
        if "lora_B" in name:
            tensor += torch.arange(tensor.numel()).reshape(tensor.shape) / 10
    state = FedSVD().init(first)
    check_orthonormal(state.adapter)
    assert distance(dense(state.adapter), dense(first.initial)) < 1e-12


@pytest.mark.slow
def test_a_real_turn_trains_b_alone():
    workspace = Workspace(compose([*SMALL, "method=fedsvd", "train.weight_decay=0.1"]))
    state = workspace.strategy.init(workspace.model.layout)
    update = local_update(workspace, "0" * 16, 1, 1, workspace.strategy.configure(state, 1, ClientInfo(1, 9)))
    workspace.strategy.validate(state, 1, ClientInfo(1, 9), update)
    for module, held in lora_factors(workspace.model.adapter()).items():
        assert torch.equal(held.a, lora_factors(state.adapter)[module].a)
        assert held.b.any()
