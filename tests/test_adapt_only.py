"""Some layers of an adapter alone: the others are the base's own, cost nothing, and are back for the next client."""

import pytest
import torch

from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.errors import ModelError
from fedtune.lowrank.algebra import lora_factors, name_of
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base, pick_device


@pytest.fixture
def model():
    return LocalModel(load_base(ModelSpec(name="tiny", dtype="float32"), pick_device("cpu")), AdapterSpec(rank=4), 0)


def of(model, ending):
    """The layers whose names end so."""
    return [module for module in lora_factors(model.layout.initial) if module.endswith(ending)]


def logits(model, seed=0):
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.module(tokens).logits


def nudged(model):
    """Some B A in every layer."""
    return {name: tensor + 0.1 for name, tensor in model.layout.initial.items()}


def test_a_layer_that_is_switched_off_is_the_bases_own(model):
    """As if its B were zero, to the last bit; neither A nor B of it is multiplied; and it is back after a reset."""
    model.install(nudged(model))
    without = {name: tensor * (".0.self_attn.q_proj.lora_B" not in name) for name, tensor in nudged(model).items()}
    model.install(without)
    expected = logits(model)
    model.reset()
    chosen = [module for module in lora_factors(model.layout.initial) if ".0.self_attn.q_proj" not in module]
    model.adapt_only(chosen)
    model.install(nudged(model))
    (off,) = of(model, "0.self_attn.q_proj")
    calls = []
    for name in ("lora_A", "lora_B", "lora_dropout"):
        getattr(model.module.get_submodule(off), name)["default"].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(model), expected)
    assert not calls
    assert {name for name in model.layout.initial if off in name}.isdisjoint(model.trained())
    model.reset()
    model.install(nudged(model))
    assert not torch.equal(logits(model), expected)
    assert len(calls) == 3
    assert model.trained().keys() == model.layout.initial.keys()


def test_the_layers_of_one_client_are_not_those_of_the_next(model):
    """Asked twice without a reset, the second choice holds; per-layer ranks are gone after one."""
    first, second = of(model, "q_proj"), of(model, "v_proj")
    model.adapt_only(first)
    model.adapt_only(second)
    assert set(lora_factors(dict(model.trained()))) == set(second)
    name = second[0]
    model.install({name_of(name, "lora_A"): torch.ones(1, 48), name_of(name, "lora_B"): torch.ones(24, 1)})
    assert {m: p.rank for m, p in lora_factors(model.read()).items()} == {second[0]: 1, second[1]: 4}
    model.reset()
    assert all(torch.equal(model.read()[name], start) for name, start in model.layout.initial.items())
    assert model.read().keys() == model.layout.initial.keys()


def test_blocks_below_the_lowest_adapted_layer_keep_nothing(model):
    """Of the two blocks, a client of block 1's layers keeps about half of what one of block 0's does."""

    def kept(modules):
        model.reset()
        model.adapt_only(modules)
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.module(torch.zeros(2, 30, dtype=torch.int64)).logits.sum()
        return sum(size for place, size in sizes.items() if place not in own)

    low, high = kept(of(model, "0.self_attn.q_proj")), kept(of(model, "1.self_attn.q_proj"))
    assert high < 0.65 * low


def test_layers_without_an_adapter_are_named(model):
    with pytest.raises(ModelError, match="layer 'nothing' has no LoRA adapter"):
        model.adapt_only(["nothing"])
