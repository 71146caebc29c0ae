"""raFLoRA against numbers worked out by hand.

Clients of ranks 1, 2 and 2 with 2, 1 and 1 examples, so p = 1/2, 1/4, 1/4; the global rank is 3; one layer. Component 0
is trained by all (c = 1), component 1 by the last two (c = 1/2), component 2 by nobody (c = 0). So component 1 counts
p_k / c_1 = 1/2 and 1/2, and component 2 stays what it was.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import SCALING, SHAPES, dense, distance, factors, ideal, layout, reply

from fedtune.core.errors import ConfigError, WireError
from fedtune.lowrank.algebra import lora_factors
from strategies.raflora import RaFLoRA, State

OLD = State(factors(3, 50), SCALING)
REPLIES = [reply(0, 1, SCALING, 2), reply(1, 2, SCALING, 1), reply(2, 2, SCALING, 1)]


def parts(module):
    return [lora_factors(update.tensors)[module] for _, update in REPLIES]


@pytest.mark.parametrize("module", SHAPES)
def test_each_component_is_averaged_over_those_who_have_it(module):
    new = lora_factors(RaFLoRA(form="factors").aggregate(OLD, 1, REPLIES).adapter)[module]
    zero, one, two = parts(module)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(new.a[0], zero.a[0] / 2 + one.a[0] / 4 + two.a[0] / 4, **close)
    torch.testing.assert_close(new.a[1], one.a[1] / 2 + two.a[1] / 2, **close)
    torch.testing.assert_close(new.b[:, 1], one.b[:, 1] / 2 + two.b[:, 1] / 2, **close)
    assert torch.equal(new.a[2], lora_factors(OLD.adapter)[module].a[2])
    assert torch.equal(new.b[:, 2], lora_factors(OLD.adapter)[module].b[:, 2])


@pytest.mark.parametrize("module", SHAPES)
def test_products_of_components_are_averaged_and_cut_to_the_rank(module):
    """By numpy: dW as a whole matrix, its SVD, and the error that Eckart and Young leave."""
    zero, one, two = parts(module)
    old = lora_factors(OLD.adapter)[module]
    change = (
        torch.outer(zero.b[:, 0], zero.a[0]) / 2 + torch.outer(one.b[:, 0], one.a[0]) / 4
        + torch.outer(two.b[:, 0], two.a[0]) / 4
        + torch.outer(one.b[:, 1], one.a[1]) / 2 + torch.outer(two.b[:, 1], two.a[1]) / 2
        + torch.outer(old.b[:, 2], old.a[2])
    ).numpy()  # fmt: skip
    new = lora_factors(RaFLoRA().aggregate(OLD, 1, REPLIES).adapter)[module]
    values = np.linalg.svd(change, compute_uv=False)
    assert new.rank == 3
    missed = np.linalg.norm(change - (new.b @ new.a).numpy())
    assert missed == pytest.approx(np.sqrt((values[3:] ** 2).sum()), abs=1e-12)
    np.testing.assert_allclose(np.linalg.svd((new.b @ new.a).numpy())[1][:3], values[:3], rtol=1e-12)


@pytest.mark.parametrize("form", ["product", "factors"])
def test_a_component_that_one_client_has_is_not_diluted(form):
    """Zero-padding would give the second client's own components half their size."""
    replies = [reply(0, 1, SCALING), reply(1, 4, SCALING)]
    (_, narrow), (_, wide) = replies
    for name, tensor in narrow.tensors.items():  # the shared component is the same at both
        tensor.copy_(wide.tensors[name][:1] if "lora_A" in name else wide.tensors[name][:, :1])
    method = RaFLoRA(form=form)
    state = method.aggregate(method.init(layout()), 1, replies)
    assert distance(dense(state.adapter), dense(wide.tensors)) < 1e-12


@pytest.mark.parametrize("form", ["product", "factors"])
def test_each_client_counts_at_its_own_scaling(form):
    method = RaFLoRA(form=form)
    replies = [reply(0, 4, 8.0)]
    state = method.aggregate(method.init(layout()), 1, replies)
    assert distance(dense(state.adapter, SCALING), ideal(replies)) < 1e-12


def test_with_equal_ranks_the_product_is_the_best_there_is_of_that_rank():
    replies = [reply(index, 2, SCALING, index + 1) for index in range(3)]
    method = RaFLoRA()
    state = method.aggregate(State(factors(2, 1), SCALING), 1, replies)
    for module, whole in ideal(replies).items():
        values = np.linalg.svd(whole.numpy(), compute_uv=False)
        missed = np.linalg.norm((whole - dense(state.adapter, SCALING)[module]).numpy())
        assert missed == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["product", "factors"])
@given(order=st.permutations(range(4)))
def test_the_order_of_clients_changes_nothing(form, order):
    replies = [reply(index, 1 + index % 3, 1.0 + index, index + 1) for index in range(4)]
    method, start = RaFLoRA(form=form), State(factors(4, 50), SCALING)
    one = method.aggregate(start, 1, replies).adapter
    other = method.aggregate(start, 1, [replies[place] for place in order]).adapter
    assert distance(dense(other), dense(one)) < 1e-12


def test_the_form_and_the_rank_are_checked():
    with pytest.raises(ConfigError, match="form=blocks is not known"):
        RaFLoRA(form="blocks")
    method = RaFLoRA()
    with pytest.raises(WireError, match=r"expected float64 \(2, 3\), got float64 \(3, 3\)"):
        method.validate(method.init(layout()), 1, reply(0, 2)[0], reply(0, 3)[1])
