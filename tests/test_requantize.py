"""A change rounded into a base: what the layer then computes with, what that loses, and that it can be undone."""

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.lowrank.algebra import LowRank
from fedtune.lowrank.residual import as_residual
from fedtune.models.base_delta import BaseChange
from fedtune.models.requantize import dequantized

OUT, IN = 96, 64


def plain(dtype):
    layer = nn.Linear(IN, OUT, bias=False).to(dtype)
    return layer.requires_grad_(False)


def conv():
    return Conv1D(OUT, IN).requires_grad_(False)


def four_bit():
    layer = bitsandbytes.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.support_avx512bf16_for_cpu = False  # as load_base sets it
    return layer.to("cpu")


def eight_bit():
    return bitsandbytes.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False).to("cpu")


LAYERS = {"bfloat16": lambda: plain(torch.bfloat16), "conv1d": conv, "nf4": four_bit, "int8": eight_bit}


@pytest.fixture(params=LAYERS)
def layer(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LAYERS[request.param]()


def residual(seed=0):
    generator = torch.Generator().manual_seed(seed)
    product = LowRank(torch.randn(OUT, 4, generator=generator) / 20, torch.randn(4, IN, generator=generator) / 2)
    return as_residual({"layer": product}), (product.b @ product.a)


def inputs(layer):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(5, IN, generator=generator).to(
        getattr(layer, "compute_dtype", None) or torch.bfloat16 if not isinstance(layer, Conv1D) else torch.float32
    )


def test_the_layer_computes_with_the_rounded_sum_and_the_loss_is_measured(layer):
    tensors, change = residual()
    before = dequantized(layer).clone()
    base = BaseChange(lambda _: layer, requantize=True)
    base.set(tensors)
    after = dequantized(layer)
    lost = (after - before - change).norm() / change.norm()
    assert base.rounding == pytest.approx(float(lost), rel=1e-4, abs=1e-7)
    x = inputs(layer)
    expected = x.float() @ after.T
    assert (layer(x).float() - expected - (layer.bias.float() if layer.bias is not None else 0)).norm() < (
        0.02 * expected.norm()
    )
    assert (after - before).norm() > 0.3 * change.norm()


def test_putting_it_back_leaves_every_bit_as_it_was(layer):
    x = inputs(layer)
    weight, out = layer.weight, layer(x)
    base = BaseChange(lambda _: layer, requantize=True)
    base.set(residual()[0])
    changed = layer(x)
    assert not torch.equal(changed, out)
    base.clear()
    assert layer.weight is weight
    assert torch.equal(layer(x), out)
    assert base.rounding is None
    base.set(residual()[0])  # of the same content: nothing is rounded again, and nothing is different
    assert torch.equal(layer(x), changed)
    base.set(residual(seed=1)[0])
    assert not torch.equal(layer(x), changed)
    base.clear()
    assert torch.equal(layer(x), out)


def test_beside_the_base_it_is_exact(layer):
    """In the layer's own arithmetic: y + B (A x), in float32 until the sum."""
    tensors, change = residual()
    x = inputs(layer)
    out = layer(x)
    base = BaseChange(lambda _: layer)
    base.set(tensors)
    wanted = out + (x.float() @ change.T).to(out.dtype)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-2 if out.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    base.clear()
    assert torch.equal(layer(x), out)


def test_a_float32_base_loses_next_to_nothing():
    layer = plain(torch.float32)
    base = BaseChange(lambda _: layer, requantize=True)
    base.set(residual()[0])
    assert base.rounding < 1e-6
