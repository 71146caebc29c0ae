"""LoRA adapters on a base model, addressed by name.

A `LocalModel` is what a party trains and evaluates: one frozen base and one set of trainable tensors that are swapped
in place. However many clients share a process, there is one base.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.keys import fold, uniform
from fedtune.models import Base
from fedtune.protocol import Layout, Slot, Tensors, describe
from fedtune.schema import AdapterSpec


class LocalModel:
    """A base with adapters.

    Attributes:
        module: the PEFT model, on its device.
        tokenizer: the base's tokenizer.
        origin: where the base came from.
        layout: names, shapes and starting values of the trainable tensors, in PEFT's own naming, so that an exported
            adapter has the names that PEFT looks for.
    """

    def __init__(self, base: Base, spec: AdapterSpec, seed: int):
        """Attach adapters and set them to the values that every party starts from.

        Raises:
            ModelError: if a target names no layer that can be adapted.
        """
        from peft import LoraConfig, get_peft_model

        targets = check_targets(base.model, spec.targets)
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        # PEFT draws a start of its own from torch's generator; ours replaces it below
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                self.module: Any = get_peft_model(base.model, config)
            except ValueError as error:
                raise ModelError(
                    f"PEFT does not know which layers of {type(base.model).__name__} to adapt "
                    f"({str(error).splitlines()[0]}). Set adapter.targets to some of {adaptable(base.model)}"
                ) from error
        self.tokenizer = base.tokenizer
        self.origin = base.origin
        self.device: torch.device = next(base.model.parameters()).device
        self._live = {_public_name(name): p for name, p in self.module.named_parameters() if p.requires_grad}
        self.layout = Layout(tuple(self._slot(name, p) for name, p in self._live.items()), _initial(self._live, seed))
        self._tensors: list[Tensor] = list(self._live.values())
        self._start = list(self.layout.initial.values())
        self.reset()

    def reset(self) -> None:
        """Put every trainable tensor back to its starting value, so that nothing leaks from one client to the next."""
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._start)

    def install(self, tensors: Tensors) -> None:
        """Copy `tensors` into the trainable tensors of those names; the others keep their values.

        Raises:
            ModelError: for a name, shape or dtype that this model doesn't have.
        """
        for name, tensor in tensors.items():
            live = self._live.get(name)
            if live is None:
                raise ModelError(f"this model has no trainable tensor '{name}'")
            if live.shape != tensor.shape or live.dtype != tensor.dtype:
                raise ModelError(f"tensor '{name}': expected {describe(live)}, got {describe(tensor)}")
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_([self._live[name] for name in tensors], list(tensors.values()))

    def read(self) -> Tensors:
        """A copy of every trainable tensor, on the CPU."""
        return {name: live.detach().to("cpu", copy=True) for name, live in self._live.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors themselves, for an optimizer."""
        return list(self._live.values())

    @property
    def trainable(self) -> int:
        """How many trainable numbers there are."""
        return sum(live.numel() for live in self._live.values())

    def _slot(self, name: str, parameter: Tensor) -> Slot:
        module, role = name.removesuffix(".weight").rsplit(".", 1)
        scaling = self.module.get_submodule(module).scaling["default"]
        dtype = str(parameter.dtype).removeprefix("torch.")
        return Slot(name, tuple(parameter.shape), dtype, role, module, float(scaling))


def check_targets(model: nn.Module, targets: list[str] | None) -> list[str] | str | None:
    """The targets as PEFT takes them.

    Raises:
        ModelError: if a target is not the name of any layer, listing those that are.
    """
    if targets is None or targets == ["all-linear"]:
        return targets[0] if targets else None
    known = adaptable(model)
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise ModelError(
                f"adapter.targets: {type(model).__name__} has no layer '{target}'; it has {', '.join(known)}"
            )
    return list(targets)


def adaptable(model: nn.Module) -> list[str]:
    """The last names of the layers that LoRA can adapt, e.g. ['down_proj', ..., 'v_proj']."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if type(module).__name__ in kinds and module is not head
        }
    )


def _public_name(name: str) -> str:
    # PEFT keeps "lora_A.default.weight" in memory and "lora_A.weight" on disk
    return name.replace(".default.", ".")


def _initial(live: dict[str, nn.Parameter], seed: int) -> Tensors:
    """A uniform in +-1/sqrt(in), as PEFT's Kaiming start, but drawn by key; B zero."""
    start = {}
    for name, parameter in live.items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            start[name] = uniform(fold(seed, "adapter", name), parameter.shape, bound).to(parameter.dtype)
        else:
            start[name] = torch.zeros(parameter.shape, dtype=parameter.dtype)
    return start
