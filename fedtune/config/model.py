"""The settings of the base model and of what is trained on it.

A part of fedtune/config/schema.py; no torch here either.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedtune.core.checks import above_zero, at_least, fraction, one_of, option
from fedtune.core.errors import ConfigError

_LAYERED = ("rank", "dropout", "targets")
ALL_LINEAR = "all-linear"  # among adapter.targets: every layer that is a matrix
FULL = "none"  # the kind that is no adapter: the base's own weights are trained

# The kinds of adapter, and which settings each has
ADAPTERS: dict[str, tuple[str, ...]] = {
    "lora": ("alpha", *_LAYERED),
    "rslora": ("alpha", *_LAYERED),
    "dora": ("alpha", *_LAYERED),
    "pissa": ("alpha", *_LAYERED),
    "ia3": ("targets",),
    "vera": _LAYERED,
    "oft": ("block_size", "targets"),
    "bone": _LAYERED,
    "adaption_prompt": ("tokens", "layers"),
    "prompt_tuning": ("tokens",),
    "prefix_tuning": ("tokens",),
    FULL: ("targets",),
}


@dataclass(frozen=True)
class ModelSpec:
    name: str = option("custom", "label of the base model")
    path: str | None = option(None, "a hub id, a folder, or a GGUF file")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    quantization: str = option("none", "how the frozen base is held: none, int8 or nf4")
    merge: str = option(
        "residual", "how a change of the base is held: residual (beside it, exact) or requantize (rounded into it)"
    )
    min_quantized: float = option(
        0.5, "int8, nf4: the share of the weights, the vocabulary's aside, that has to become so; 0 takes any"
    )
    dtype: str = option(
        "auto",
        "auto (bfloat16 where the hardware is fast at it, else float32), bfloat16, float16 (for GPUs without bfloat16; "
        "the loss is scaled) or float32",
    )
    attention: str = option(
        "auto", "transformers' attention: auto (its choice), eager, sdpa, flash_attention_2 or flex_attention"
    )

    def __post_init__(self) -> None:
        one_of("model.quantization", self.quantization, ("none", "int8", "nf4"))
        fraction("model.min_quantized", self.min_quantized)
        one_of("model.merge", self.merge, ("residual", "requantize"))
        one_of("model.dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        one_of("model.attention", self.attention, ("auto", "eager", "sdpa", "flash_attention_2", "flex_attention"))


@dataclass(frozen=True)
class AdapterSpec:
    kind: str = option("lora", "what is trained, none: the base itself; adapter=NAME sets it, and the rest as suits it")
    rank: int = option(8, "r: inner width of B A, and of VeRA's and Bone's matrices")
    alpha: float = option(16.0, "B A is multiplied by alpha / r; by alpha / sqrt(r) in rslora")
    dropout: float = option(0.0, "dropout on the adapter's input while training")
    targets: Any = option(
        None,
        "names of the layers to adapt, as q_proj or [q_proj,v_proj], or all-linear; null: PEFT's choice for the "
        "architecture, all-linear where it has none, all weights for adapter=none",
    )
    tokens: int = option(10, "adaption_prompt, prompt_tuning, prefix_tuning: how many virtual tokens")
    layers: int | None = option(None, "adaption_prompt: how many of the topmost layers; null takes all")
    block_size: int = option(16, "oft: width of a rotated block; has to divide a layer's inputs")
    path: str | None = option(
        None, "a PEFT adapter's folder, or a run's, to go on from: kind, rank, alpha and targets are the folder's"
    )
    sha256: str | None = option(None, "of the tensors' file in adapter.path; written down when a run begins")

    def __post_init__(self) -> None:
        one_of("adapter.kind", self.kind, tuple(ADAPTERS))
        if self.targets is not None:
            object.__setattr__(self, "targets", _names("adapter.targets", self.targets))
        for item in fields(self):
            value, takes = getattr(self, item.name), ADAPTERS[self.kind]
            if item.name not in ("kind", "path", "sha256", *takes) and value != item.default:
                raise ConfigError(
                    f"adapter.{item.name}={value} means nothing to adapter.kind={self.kind}, "
                    f"which has {', '.join(takes)}"
                )
        at_least("adapter.rank", self.rank, 1)
        above_zero("adapter.alpha", self.alpha)
        fraction("adapter.dropout", self.dropout)
        at_least("adapter.tokens", self.tokens, 1)
        at_least("adapter.layers", 1 if self.layers is None else self.layers, 1)
        at_least("adapter.block_size", self.block_size, 2)
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(
                f"adapter.sha256={self.sha256[:70]}: expected 64 hexadecimal digits. A run writes it down itself: "
                "leave it out"
            )


def _names(key: str, value: Any) -> list[str]:
    """One name or several as a list.

    Raises:
        ConfigError: for anything else.
    """
    names = [value] if isinstance(value, str) else value
    if isinstance(names, str | Mapping) or not hasattr(names, "__iter__") or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{key}={value}: expected a name, as q_proj, or several, as [q_proj,v_proj]")
    names = list(names)
    if ALL_LINEAR in names and len(names) > 1:
        raise ConfigError(f"{key}={value}: {ALL_LINEAR} is all layers already: leave out the others")
    return names
