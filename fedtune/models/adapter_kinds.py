"""The kinds of adapter: what each makes of a model, what its tensors are called, and where they start.

A kind's settings become a PEFT config, PEFT attaches it, and everything that PEFT would draw from torch's generator is
drawn again here by key, so that every party has the same bits. Papers and caveats: docs/adapters.md.

The kind "none" is no adapter: nothing is attached, and the base's own weights are trained from where they are.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.config.schema import ADAPTERS, ALL_LINEAR, FULL, AdapterSpec
from fedtune.core.errors import ModelError
from fedtune.core.protocol import Layout, Slot, Tensors
from fedtune.core.seeds import bits, derive_seed, uniform
from fedtune.core.text import first_line
from fedtune.lowrank.algebra import LowRank, lora_factors, to_adapter
from fedtune.lowrank.residual import as_residual
from fedtune.models.requantize import dequantized
from fedtune.models.target_modules import Targets, adaptable, check_attached, check_names, targets_for

FACTORED = ("lora", "rslora", "dora", "pissa")  # kinds that have A and B
RESIZABLE = ("lora", "rslora")  # kinds that mean something at any other rank too


def attach(model: nn.Module, spec: AdapterSpec, reached: Collection[str] | None = None) -> tuple[Any, str]:
    """Put adapters on `model`, whose own weights stay as they are; or, for "none", have these weights trained.

    Args:
        reached: the layers, by whole name, that a text goes through; None if that isn't known.

    Returns:
        The PEFT model, its adapters in float32 and at PEFT's own start, which `starting_values` replaces; for "none",
        `model` itself. And what is to be said of the layers chosen; empty if that is nothing.

    Raises:
        ModelError: if a target names no layer, or this kind can't adapt this model, saying why.
    """
    if spec.kind == FULL:
        return _unfrozen(model, spec), ""
    from peft import get_peft_model

    targets = targets_for(model, spec, reached) if "targets" in ADAPTERS[spec.kind] else Targets(None)
    config = _config(model, spec, targets.names)
    if spec.kind == "dora" and any(type(p).__name__ == "Int8Params" and p.is_cpu for p in model.parameters()):
        raise ModelError(
            "adapter.kind=dora needs every layer's weights at each step, and bitsandbytes loses an int8 layer's scales "
            "when PEFT asks for them on a CPU. Set model.quantization to none or nf4"
        )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            module = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise ModelError(_refusal(model, spec, first_line(error))) from error
    check_attached(module, type(model).__name__, adaptable(module.get_base_model()))
    if spec.kind == "adaption_prompt":
        _train_in_float32(module)
    elif spec.kind == "ia3":
        _keep_the_bases_dtype(module)
    _check_sizes(module, spec)
    return module, targets.note


def public_name(name: str) -> str:
    """A parameter's name in adapter_model.safetensors, from the one that it has in memory.

    "q_proj.lora_A.default.weight" is "q_proj.lora_A.weight" there, "k_proj.ia3_l.default" is "k_proj.ia3_l".
    """
    if name == "prompt_encoder.default.embedding.weight":
        return "prompt_embeddings"
    name = name.replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def trainable(module: Any, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """What is trained of what `attach` returned, by public name: a weight that two layers share once, by the first."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return named if spec.kind == FULL else {public_name(name): p for name, p in named.items()}


def slot_of(module: Any, name: str, parameter: Tensor, spec: AdapterSpec) -> Slot:
    """What a trainable tensor is, from its public name; virtual tokens belong to no layer, so theirs is ''."""
    # PEFT's "q_proj.lora_A.weight" has the role lora_A, a base's own "q_proj.weight" the role weight
    layer, _, role = (name if spec.kind == FULL else name.removesuffix(".weight")).rpartition(".")
    scaling = module.get_submodule(layer).scaling["default"] if role.startswith("lora_") else 1.0
    return Slot(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), role, layer, float(scaling))


def starting_values(module: Any, live: Mapping[str, Tensor], spec: AdapterSpec, seed: int) -> Tensors:
    """The values that every party starts from, on the CPU: zero, one, drawn by key, or taken from the base.

    Random ones are drawn as PEFT draws them, but a normal distribution is replaced by the uniform one of its variance.
    """
    if spec.kind == FULL:
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in live.items()}
    start = {}
    for name, parameter in live.items():
        slot = slot_of(module, name, parameter, spec)
        start[name] = _START[slot.role](module, slot, derive_seed(seed, "adapter", name)).to(parameter.dtype)
    if spec.kind == "pissa":
        start = to_adapter({layer: _principal(module.get_submodule(layer), spec.rank) for layer in lora_factors(start)})
    return start


def origin_shift(layout: Layout, spec: AdapterSpec) -> Tensors:
    """What has to be added to the base for the model to start as the base: -s B0 A0 where B0 isn't zero, in PiSSA.

    Returns:
        MODULE.residual_B (out, r) and MODULE.residual_A (r, in), float32, on the CPU.
    """
    if spec.kind != "pissa":
        return {}
    starts = lora_factors(layout.initial)
    return as_residual({layer: LowRank(-layout.scaling * start.b, start.a) for layer, start in starts.items()})


def constants(module: Any, seed: int) -> Tensors:
    """What an exported adapter holds besides its trainable tensors, set to its values for this seed.

    VeRA's two projections are all there is: vera_A (r, widest in), vera_B (widest out, r), float32 on the CPU, uniform
    with variance 2 / fan-in, as PEFT's Kaiming start.
    """
    made = {}
    for side in ("vera_A", "vera_B"):
        if (shared := getattr(module.base_model, side, None)) is not None:
            name, buffer = f"base_model.{side}", shared["default"]
            made[name] = uniform(derive_seed(seed, "adapter", name), buffer.shape, math.sqrt(6 / buffer.shape[1]))
            buffer.copy_(made[name])
    return made


def _unfrozen(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Have every floating-point weight of the targets trained: of these modules and all that is in them.

    Raises:
        ModelError: if a target names no layer or has no such weight, or the base is quantized.
    """
    if getattr(model, "is_quantized", False):  # also a folder or hub model that was saved so
        raise ModelError(
            f"adapter=none trains the base's own weights, and those of this {type(model).__name__} are quantized: no "
            "small step can be put into their codes. Take a base that isn't, or an adapter"
        )
    named = spec.targets
    if named is not None and named != [ALL_LINEAR]:
        check_names(model, named)
    targets = [""] if named is None else adaptable(model) if named == [ALL_LINEAR] else named
    for target in targets:
        chosen = [m for name, m in model.named_modules() if not target or f".{name}".endswith(f".{target}")]
        weights = [p for module in chosen for p in module.parameters() if p.is_floating_point()]
        if not weights:
            raise ModelError(f"adapter.targets: '{target}' of {type(model).__name__} has no weights to train")
        for weight in weights:
            weight.requires_grad_(True)
    if not targets:
        raise ModelError("adapter.targets=[] leaves nothing to train: name some layers, or take null for all")
    return model


def _config(model: Any, spec: AdapterSpec, targets: list[str] | None) -> Any:
    import peft

    common = {"task_type": "CAUSAL_LM"}
    layers = common | {"target_modules": targets}
    match spec.kind:
        case "ia3":
            known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
            chosen = [t for t in targets if t.split(".")[-1] in known] if isinstance(targets, list) else None
            return peft.IA3Config(feedforward_modules=chosen if known else [], **layers)
        case "vera":
            return peft.VeraConfig(r=spec.rank, vera_dropout=spec.dropout, save_projection=True, **layers)
        case "oft":
            # PEFT's default truncates the Cayley transform's inverse, and what it makes isn't quite a rotation
            return peft.OFTConfig(oft_block_size=spec.block_size, use_cayley_neumann=False, **layers)
        case "bone":
            return peft.MissConfig(r=spec.rank, miss_dropout=spec.dropout, **layers)
        case "adaption_prompt":
            depth = model.config.num_hidden_layers if spec.layers is None else spec.layers
            return peft.AdaptionPromptConfig(adapter_len=spec.tokens, adapter_layers=depth, **common)
        case "prompt_tuning":
            return peft.PromptTuningConfig(num_virtual_tokens=spec.tokens, **common)
        case "prefix_tuning":
            return peft.PrefixTuningConfig(num_virtual_tokens=spec.tokens, **common)
    assert spec.kind in FACTORED
    return peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.kind == "rslora",
        use_dora=spec.kind == "dora",
        **layers,
    )


def _refusal(model: Any, spec: AdapterSpec, said: str) -> str:
    name = type(model).__name__
    if "`target_modules`" in said:
        return (
            f"PEFT does not know which layers of {name} to adapt ({said}). "
            f"Set adapter.targets to some of {adaptable(model)}"
        )
    if "Unsupported model type" in said:
        said += " PEFT has it for gpt2, llama and mistral; every other kind goes by layers and works more widely"
    return f"adapter.kind={spec.kind} can't adapt {name}: {said}"


def _check_sizes(module: Any, spec: AdapterSpec) -> None:
    for name, layer in module.named_modules():
        if spec.kind in FACTORED and hasattr(layer, "lora_A"):
            width = min(layer.in_features, layer.out_features)
            if spec.rank > width:
                raise ModelError(
                    f"adapter.rank={spec.rank} is above the width of layer '{name}' ({layer.in_features} in, "
                    f"{layer.out_features} out): expected at most {width}, or other adapter.targets"
                )
        elif spec.kind == "oft" and hasattr(layer, "oft_R") and layer.in_features % spec.block_size:
            raise ModelError(
                f"adapter.block_size={spec.block_size} does not divide the {layer.in_features} inputs of layer "
                f"'{name}' into whole blocks"
            )


def _train_in_float32(module: Any) -> None:
    """PEFT holds these prompts in the base's dtype, and a bfloat16 of size 1 is deaf to steps below 0.004."""
    for attention in module.modules():
        if hasattr(attention, "adaption_gate") and (dtype := attention.adaption_gate.dtype) != torch.float32:
            for parameter in (attention.adaption_prompt, attention.adaption_gate):
                parameter.data = parameter.data.float()
            attention.forward = torch.autocast(parameter.device.type, dtype=dtype)(attention.forward)


def _keep_the_bases_dtype(module: Any) -> None:
    """On a quantized layer PEFT's IA3 computes and answers in float32, which attention refuses beside bfloat16; on any
    other it keeps to its input's dtype."""
    from peft.tuners.ia3.layer import Linear

    for layer in module.modules():
        if hasattr(layer, "ia3_l"):
            layer.forward = MethodType(Linear.forward, layer)


def _row_norms(module: Any, slot: Slot, key: int) -> Tensor:
    weight = dequantized(module.get_submodule(slot.module).get_base_layer()).detach()
    norms: Tensor = torch.linalg.vector_norm(weight.cpu().double(), dim=1)
    return norms


def _principal(layer: Any, rank: int) -> LowRank:
    """B = U_r sqrt(S_r / s) and A = sqrt(S_r / s) V_r, so that s B A has the largest singular values of W0.

    Signs are fixed (the largest entry of each row of A is positive), so that parties which compute this apart agree.
    """
    u, values, v = torch.linalg.svd(dequantized(layer.get_base_layer()).detach(), full_matrices=False)
    root = (values[:rank] / layer.scaling["default"]).sqrt()
    b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    return LowRank((b * signs.T).cpu().contiguous(), (a * signs).cpu().contiguous())


def _virtual_tokens(module: Any, slot: Slot, key: int) -> Tensor:
    """Words drawn by key: their embeddings, or the keys and values that they leave in the base, both as (tokens, ...).

    Random keys and values, PEFT's start, would drown the text: SmolLM2's loss is 12 with them, 3 with words.
    """
    base = module.get_base_model()
    table: Tensor = base.get_input_embeddings().weight.detach()
    words = torch.from_numpy(bits(key, slot.shape[0]) % len(table)).to(table.device, torch.int64)
    if module.active_peft_config.peft_type == "PROMPT_TUNING":
        return table[words].to("cpu", torch.float32)
    with torch.no_grad():
        cache = base(input_ids=words[None], use_cache=True).past_key_values
    states = [state[0].transpose(0, 1).flatten(1) for layer in cache.layers for state in (layer.keys, layer.values)]
    start = torch.cat(states, dim=1).to("cpu", torch.float32)
    if start.shape != slot.shape:
        raise ModelError(
            f"adapter.kind=prefix_tuning wants keys and values of one shape in all layers, {slot.shape[1]} numbers a "
            f"token; {type(base).__name__} has {start.shape[1]}"
        )
    return start


def _all(value: float) -> Callable[[Any, Slot, int], Tensor]:
    return lambda module, slot, key: torch.full(slot.shape, value)


_START: dict[str, Callable[[Any, Slot, int], Tensor]] = {
    "lora_A": lambda module, slot, key: uniform(key, slot.shape, 1 / math.sqrt(slot.shape[1])),
    "lora_B": _all(0),
    "lora_magnitude_vector": _row_norms,
    "ia3_l": _all(1),
    "vera_lambda_d": _all(0.1),
    "vera_lambda_b": _all(0),
    "oft_R": _all(0),
    "miss_block": _all(0),
    "adaption_prompt": lambda module, slot, key: uniform(key, slot.shape, math.sqrt(3)),
    "adaption_gate": _all(0),
    "prompt_embeddings": _virtual_tokens,
}
