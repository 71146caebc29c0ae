"""Which layers an adapter goes on: what the settings name, PEFT's choice for the architecture, or all that it can be.

An adapter changes a matrix that a layer of its own multiplies with. Fused experts, whose matrices lie in one tensor of
three dimensions, have no such layers: what PEFT puts beside them is no one product B A, and methods that multiply,
average or measure products would take it for one. Nor has a layer whose weight its model reads without calling it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedtune.config.schema import ALL_LINEAR, AdapterSpec
from fedtune.core.errors import ModelError

ROUTERS = ("gate", "router", "shared_expert_gate")  # the last names of layers that choose among experts
# PEFT refuses these: their kernels read the weight
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_KERNELS = ("out_proj", "conv1d")
PRODUCTS = ("lora", "rslora", "dora", "pissa")  # kinds whose matrix is as wide inside as adapter.rank
DEFAULTS = {"ia3": "IA3", "vera": "VERA", "oft": "OFT", "bone": "MISS"}  # PEFT's tables, LORA otherwise


@dataclass(frozen=True)
class Targets:
    """What to adapt.

    Attributes:
        names: as PEFT takes them; None leaves it to PEFT.
        note: what to say about the choice; empty if there is nothing to say.
    """

    names: list[str] | None
    note: str = ""


@dataclass
class _Choice:
    """All layers that could be adapted, and why the others can't."""

    names: list[str] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=dict)  # by reason

    def leave_out(self, name: str, reason: str) -> None:
        self.excluded.setdefault(reason, []).append(name)


def targets_for(model: Any, spec: AdapterSpec, reached: Collection[str] | None = None) -> Targets:
    """The layers that an adapter of this kind goes on.

    Args:
        reached: the layers, by whole name, that a text goes through; None if that isn't known.

    Raises:
        ModelError: if a target is no layer that can be adapted, listing those that are.
    """
    if spec.targets is None:
        if (known := _default(model, spec)) is not None:
            return known
        choice = _all_linear(model, spec, reached)
        said = f"PEFT has no default layers for {type(model).__name__}, so adapter.targets is {ALL_LINEAR}: "
        return Targets(choice.names, said + _listed(choice))
    if spec.targets == [ALL_LINEAR]:
        choice = _all_linear(model, spec, reached)
        return Targets(choice.names, f"adapter.targets={ALL_LINEAR}: {_listed(choice)}" if choice.excluded else "")
    check_names(model, spec.targets)
    for target in spec.targets:
        _check_target(model, spec, target, reached)
    return Targets(list(spec.targets))


def check_names(model: nn.Module, targets: Iterable[str]) -> None:
    """
    Raises:
        ModelError: if a target is not the name of any module, listing the layers.
    """
    for target in targets:
        if not any(_matches(name, target) for name, _ in model.named_modules()):
            raise ModelError(
                f"adapter.targets: {type(model).__name__} has no layer '{target}'; it has {', '.join(adaptable(model))}"
            )


def adaptable(model: nn.Module) -> list[str]:
    """The last names of the layers that are matrices, but for the head, e.g. ['down_proj', ..., 'v_proj']."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return sorted({_last(name) for name, module in model.named_modules() if is_matrix(module) and module is not head})


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer is one matrix, in whatever form it is held, and perhaps a bias."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def has_fused_experts(model: nn.Module) -> bool:
    """Whether some weights are experts' matrices in one tensor."""
    return bool(_fused(model))


def check_attached(module: Any, model_name: str, usable: list[str]) -> None:
    """The last word, whatever PEFT made of the targets: an adapter beside a tensor that is no layer of its own.

    Raises:
        ModelError: if there is one.
    """
    for name, layer in module.named_modules():
        if type(layer).__name__ == "ParamWrapper":
            raise ModelError(
                f"adapter.targets: PEFT would adapt '{name.removeprefix('base_model.model.')}' of {model_name} as one "
                "tensor, which is several matrices (fused experts) and no one product B A: leave it out. It has "
                f"{', '.join(usable)}"
            )


def _default(model: Any, spec: AdapterSpec) -> Targets | None:
    """PEFT's own choice for this architecture; None if it has none."""
    from peft.utils import constants

    kind = DEFAULTS.get(spec.kind, "LORA")
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING", None)
    if table is None:  # an older PEFT keeps it elsewhere
        return Targets(None)
    if (found := table.get(getattr(model.config, "model_type", None))) is None:
        return None
    # Where experts are fused PEFT first rewrites the targets, and trips over None
    return Targets(list(found) if has_fused_experts(model) and not isinstance(found, str) else None)


def _all_linear(model: Any, spec: AdapterSpec, reached: Collection[str] | None) -> _Choice:
    """Every layer that is a matrix, less heads, routers and what can't be adapted.

    Raises:
        ModelError: if that leaves nothing.
    """
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if is_matrix(module) and module is not head}
    choice = _Choice()
    for last in sorted({_last(name) for name in layers}):
        own = {name: module for name, module in layers.items() if _last(name) == last}
        if reason := _unfit(model, spec, own, reached):
            choice.leave_out(last, reason)
        elif sum(_matches(name, last) for name, _ in model.named_modules()) == len(own):
            choice.names.append(last)
        else:  # the name is also another module's, as CTRL's "0" and "2"
            choice.names += sorted(own)
    for name in sorted({_last(name) for name in _fused(model)}):
        choice.leave_out(name, "fused, no layers of their own")
    if not choice.names:
        raise ModelError(f"{type(model).__name__} has no layer to adapt: {_reasons(choice)}")
    return choice


def _unfit(model: Any, spec: AdapterSpec, layers: dict[str, Any], reached: Collection[str] | None) -> str:
    """Why these layers of one last name can't, or shouldn't, be adapted; empty if they can."""
    some = next(iter(layers))
    if _last(some) in ROUTERS or any("router" in part for part in some.split(".")):
        return "routers"
    if getattr(model.config, "model_type", None) in MAMBA and _last(some) in MAMBA_KERNELS:
        return "read by Mamba's kernels"
    if reached is not None and not any(name in reached for name in layers):
        return "weights that the model reads without calling the layer"
    if spec.kind in PRODUCTS and min(min(_sides(layer)) for layer in layers.values()) < spec.rank:
        return f"narrower than adapter.rank={spec.rank}"
    if spec.kind in PRODUCTS and _taken_for_experts(model, some):
        return "names that PEFT takes for parts of the fused experts"
    return ""


def _check_target(model: Any, spec: AdapterSpec, target: str, reached: Collection[str] | None) -> None:
    """
    Raises:
        ModelError: if some module of this name can't be adapted.
    """
    named = {name: module for name, module in model.named_modules() if _matches(name, target)}
    usable = f"It has {', '.join(adaptable(model))}"
    for name, module in named.items():
        if not is_matrix(module):
            raise ModelError(
                f"adapter.targets: '{target}' of {type(model).__name__} is {type(module).__name__} ('{name}'), and an "
                f"adapter goes on layers that are one matrix each. {usable}"
            )
    if reached is not None and not any(name in reached for name in named):
        raise ModelError(
            f"adapter.targets: {type(model).__name__} reads the weight of '{target}' without calling the layer, so an "
            f"adapter on it would be trained by nothing. {usable}"
        )
    if spec.kind in PRODUCTS and has_fused_experts(model) and _taken_for_experts(model, next(iter(named))):
        raise ModelError(
            f"adapter.targets: PEFT takes '{target}' of {type(model).__name__} for a part of its fused experts, which "
            f"have no layers of their own to adapt. {usable}, of which "
            f"{', '.join(_all_linear(model, spec, reached).names)} can be adapted"
        )


def _taken_for_experts(model: Any, name: str) -> bool:
    """Whether PEFT reads a layer's name as it was before transformers fused the experts, and adapts these instead: it
    does so with gate_proj and the like, dense and shared ones too, here and wherever the adapter is loaded."""
    if not has_fused_experts(model):
        return False
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before PEFT did so
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one part without the others
        return True
    return name not in config.target_modules


def _fused(model: nn.Module) -> list[str]:
    """Modules that hold experts' matrices in one tensor."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in name and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]


def _sides(layer: Any) -> tuple[int, int]:
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)
    return int(layer.weight.shape[0]), int(layer.weight.shape[1])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _listed(choice: _Choice) -> str:
    return ", ".join(choice.names) + (f"; without {_reasons(choice)}" if choice.excluded else "")


def _reasons(choice: _Choice) -> str:
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in choice.excluded.items())
