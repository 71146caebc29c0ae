"""A changed base against one whose weights were changed: Linear and GPT-2's Conv1D, neither square, through PEFT.

GPT-2 of width 32: c_attn is 32 -> 96 and mlp.c_proj 128 -> 32, weights kept as (in, out). A residual added transposed
would only pass on square layers, of which the tiny Llama has q_proj, 48 -> 48; its v_proj is 48 -> 24.
"""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.protocol import ClientInfo, Update
from fedtune.lowrank.algebra import LowRank, lora_factors
from fedtune.lowrank.residual import BaseResidual, as_residual
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.base_delta import DENSE
from fedtune.models.tiny import tiny_tokenizer
from fedtune.training.apply_instruction import install
from strategies.fedex_lora import FedExLoRA
from strategies.flora import FLoRA

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOKENS = torch.arange(40).reshape(2, 20) * 5 % 256
TARGETS = {"tiny": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=260)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["tiny", "gpt2"])
def model(request, saved):
    spec = (
        ModelSpec(name="tiny", dtype="float32") if request.param == "tiny" else ModelSpec(path=saved, dtype="float32")
    )
    return LocalModel(load_base(spec, CPU), AdapterSpec(rank=3, alpha=6, targets=TARGETS[request.param]), 0)


def logits(module):
    with torch.no_grad():
        return module(input_ids=TOKENS).logits


def with_weights(model, changes):
    """The logits of a copy of the base whose weights were changed by these matrices (out, in), without adapters."""
    model.reset()  # the copy would have the hooks too
    base = copy.deepcopy(model.module).unload()
    for name, matrix in changes.items():
        layer = base.get_submodule(name.removeprefix("base_model.model."))
        with torch.no_grad():
            layer.weight += (matrix.T if type(layer).__name__ == "Conv1D" else matrix).float()
    return logits(base)


def drawn(model, rank, seed, size=0.1):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module, start in lora_factors(model.layout.initial).items():
        b = torch.randn(start.b.shape[0], rank, generator=draw, dtype=torch.float64)
        found[module] = LowRank(size * b, torch.randn(rank, start.a.shape[1], generator=draw, dtype=torch.float64))
    return found


def matrices(products, factor=1.0):
    return {module: factor * p.b.double() @ p.a.double() for module, p in products.items()}


def test_a_low_rank_change_is_one_of_the_weights(model):
    plain, change = logits(model.module), drawn(model, 5, 1)
    model.base_delta.set(as_residual(change))
    changed = logits(model.module)
    expected = with_weights(model, matrices(change))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert torch.equal(logits(model.module), plain)


def test_a_dense_change_is_one_of_the_weights(model):
    change = matrices(drawn(model, 5, 1))
    model.base_delta.set({module + DENSE: matrix.float() for module, matrix in change.items()})
    torch.testing.assert_close(logits(model.module), with_weights(model, change), rtol=1e-4, atol=1e-5)


def test_a_change_takes_the_place_of_the_one_before(model):
    model.base_delta.set(as_residual(drawn(model, 2, 1)))
    model.base_delta.set(as_residual(drawn(model, 4, 2)))
    torch.testing.assert_close(
        logits(model.module), with_weights(model, matrices(drawn(model, 4, 2))), rtol=1e-4, atol=1e-5
    )


def test_gradients_pass_through_the_change(model):
    """The adapter of an early layer learns through what was merged into later ones."""
    model.base_delta.set(as_residual(drawn(model, 2, 1)))
    model.module(input_ids=TOKENS).logits.square().mean().backward()
    assert all(p.b.grad is not None and p.b.grad.any() for p in lora_factors(model.trained()).values())


def replies_of(model, count):
    """Clients with adapters of their own, 1, 2, ... examples, and what they add up to: sum p_k s B_k A_k."""
    replies, total, ideal = [], count * (count + 1) / 2, {}
    for index in range(count):
        products = drawn(model, 3, 10 + index)
        tensors = {}
        for module, p in products.items():
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = p.a.float(), p.b.float()
        replies.append((ClientInfo(index, 9), Update(tensors, index + 1)))
        for module, matrix in matrices(products, 2.0 * (index + 1) / total).items():  # s = 6 / 3
            ideal[module] = ideal.get(module, 0) + matrix
    return replies, ideal


@pytest.mark.parametrize("method", [FedExLoRA(), FLoRA()], ids=["fedex_lora", "flora"])
def test_the_model_after_a_round_is_the_base_plus_the_ideal_update(model, method):
    """FedEx: W0' + s B A = W0 + dW*. FLoRA: W0' = W0 + dW*."""
    replies, ideal = replies_of(model, 4)
    state = method.aggregate(method.init(model.layout), 1, replies)
    install(model, method.configure(state, 2, ClientInfo(-1, 1)), {})
    torch.testing.assert_close(logits(model.module), with_weights(model, ideal), rtol=1e-4, atol=1e-5)


def test_merged_bits_are_those_that_are_computed_with(model):
    merged = BaseResidual().merge(drawn(model, 2, 3), 256)
    model.base_delta.set(merged.total)
    assert model.base_delta.tensors is merged.total
