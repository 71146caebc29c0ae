"""Adapters on a base model, addressed by name.

A `LocalModel` is what a party trains and evaluates: one frozen base and one set of trainable tensors that are swapped
in place. However many clients share a process, there is one base; each of those that are trained at once has a twin,
with tensors of its own. Without an adapter (adapter=none) the base's own weights are these tensors, and a copy of them
is what everybody starts from.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedtune.config.schema import FULL, AdapterSpec
from fedtune.core.errors import ModelError
from fedtune.core.protocol import Layout, Tensors, describe
from fedtune.core.seeds import derive_seed, uniform
from fedtune.lowrank.algebra import ROLES, lora_factors, name_of
from fedtune.models.adapter_kinds import RESIZABLE, attach, constants, origin_shift, slot_of, starting_values, trainable
from fedtune.models.base import Base
from fedtune.models.base_delta import BaseChange, PlannedChange
from fedtune.models.given_adapter import fitting, given_values, hints
from fedtune.models.packing import obstacle
from fedtune.random_directions.weights import SeededWeights


class LocalModel:
    """A base with adapters, or one that is trained itself.

    Attributes:
        module: the PEFT model, on its device; the base model itself where there is no adapter.
        tokenizer: the base's tokenizer.
        origin: where the base came from.
        layout: names, shapes and starting values of the trainable tensors, in PEFT's own naming, so that an exported
            adapter has the names that PEFT looks for; the base's own names where there is no adapter.
        base_delta: what was merged into the base.
        origin_shift: what is added to the base from the start and for good; nothing for most kinds
            (fedtune/models/adapter_kinds.py).
        pad: the token that pads.
        quantization: what the base is held in: none, int8, nf4, or what its files say.
        notes: what is to be said of base and adapter when a run starts.
        constants: what an exported adapter needs besides, by such names: VeRA's projections; nothing for other kinds.
        checkpoints: whether activations are computed anew on the way back (`checkpoint_activations`).
        kind: of adapter.
        dropout: the share of an adapter's input that is dropped in training.
        scalings: what B A is multiplied by now, by layer.
        switched_off: the layers that are left as the base has them.
        through: (r, in) by layer: what its input passes before A (fedtune/training/frozen_basis.py).
        root: the model that this is a twin of; itself if it is none.
    """

    def __init__(self, base: Base, spec: AdapterSpec, seed: int, requantize: bool = False):
        """Attach adapters and set them to the values that every party starts from.

        Args:
            requantize: what is merged into the base is rounded as the base is held, instead of kept beside it.

        Raises:
            ModelError: if a target names no layer that can be adapted, or this kind can't adapt this base.
        """
        with fitting(spec):
            attached: tuple[Any, str] = attach(base.model, spec, base.reached)
        self.module, said = attached
        self.module.eval()  # PEFT's own modules come ready to train, with dropout
        self.notes = [*base.notes, *([said] if said else []), *hints(spec, base.origin)]
        self.quantization, self.pad = base.quantization, base.pad
        self.tokenizer = base.tokenizer
        self.origin = base.origin
        self.device: torch.device = next(base.model.parameters()).device
        self._live = trainable(self.module, spec)
        slots = tuple(slot_of(self.module, name, p, spec) for name, p in self._live.items())
        given = spec.path is not None
        start = (
            given_values(self.module, slots, spec) if given else starting_values(self.module, self._live, spec, seed)
        )
        self.layout = Layout(slots, start, base.origin.sha256 if spec.kind == FULL else "", spec.sha256 or "")
        self.constants = constants(self.module, seed)
        self._tensors: list[Tensor] = list(self._live.values())
        self._start = list(self.layout.initial.values())
        self._roles = {slot.name: slot.role for slot in slots}
        self._lora = {slot.module: slot.scaling for slot in self.layout.slots if slot.role == "lora_A"}
        self.scalings = dict(self._lora)
        self._changed = False  # ranks, scaling or what is trained differ from the layout's
        self.switched_off: set[str] = set()
        self.through: dict[str, Tensor] = {}
        self.kind, self.dropout = spec.kind, spec.dropout
        self.root = self
        self._hooks: list[RemovableHandle] = []
        self._resizable = spec.kind in RESIZABLE
        self.checkpoints = False
        self.base_delta: BaseChange | PlannedChange = BaseChange(self._base_layer, requantize)
        self.origin_shift = origin_shift(self.layout, spec)
        BaseChange(self._base_layer).set(self.origin_shift)
        self.reset()

    def reset(self) -> None:
        """Put everything back to how it started, so that nothing leaks from one client to the next."""
        with torch.no_grad():
            if self._changed:
                self._switch_on()
                for live, start in zip(self._live.values(), self._start, strict=True):
                    if live.shape != start.shape:
                        live.data = torch.empty_like(start, device=live.device)
                    live.requires_grad_(True)
                self._scale(self._lora)
                self.pass_through({})
                self._changed = False
            torch._foreach_copy_(self._tensors, self._start)
        self.base_delta.clear()

    def twin(self) -> "LocalModel":
        """A model on the same base with trainable tensors of its own, at their start, to be trained beside others
        (fedtune/models/packing.py). Its module computes with this model's tensors, not with the twin's."""
        made = copy.copy(self)
        for cached in ("seeded", "by_layer"):
            vars(made).pop(cached, None)
        made._live = {
            name: nn.Parameter(start.to(self.device, copy=True)) for name, start in self.layout.initial.items()
        }
        made._tensors = list(made._live.values())
        made.scalings, made.switched_off, made.through = dict(self._lora), set(), {}
        made.base_delta, made._changed = PlannedChange(), False
        return made

    def adopt(self, twin: "LocalModel") -> "LocalModel":
        """Be what a twin is now; returns this model. A model adopts itself as it is."""
        if twin is not self:
            self.reset()
            self.base_delta.set(twin.base_delta.tensors)
            if twin.switched_off:
                self.adapt_only(self._lora.keys() - twin.switched_off)
            self.install(twin.adapter(), twin.scaling)
        return self

    @cached_property
    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """The trainable tensors of each adapted layer, by role."""
        found: dict[str, dict[str, Tensor]] = {}
        for slot in self.layout.slots:
            found.setdefault(slot.module, {})[slot.role] = self._live[slot.name]
        return found

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The adapted layers themselves."""
        return {name: self.module.get_submodule(name) for name in self.by_layer}

    @cached_property
    def obstacle(self) -> str:
        """Why clients can't be trained at once on this base, or ""."""
        return obstacle(self)

    def install(self, tensors: Tensors, scaling: float | None = None) -> None:
        """Copy `tensors` into the trainable tensors of those names; the others keep their values.

        Args:
            tensors: A and B of a LoRA or rsLoRA layer may come with another rank than the layout's, if both come.
            scaling: what B A is multiplied by from here on; None leaves it.

        Raises:
            ModelError: for a name, shape or dtype that this model doesn't have.
        """
        fitting, resized = [], {}
        for name, tensor in tensors.items():
            live = self._live.get(name)
            if live is None:
                raise ModelError(f"this model has no trainable tensor '{name}'")
            if live.shape == tensor.shape and live.dtype == tensor.dtype:
                fitting.append(name)
            elif (
                self._resizable
                and (role := self._roles[name]) in ROLES
                and live.dtype == tensor.dtype
                and _outer(role, live) == _outer(role, tensor)
            ):
                resized[name] = tensor
            else:
                raise ModelError(f"tensor '{name}': expected {describe(live)}, got {describe(tensor)}")
        with torch.no_grad():
            if fitting:
                torch._foreach_copy_([self._live[name] for name in fitting], [tensors[name] for name in fitting])
            for name, tensor in resized.items():
                self._live[name].data = tensor.detach().to(self.device, copy=True)
        if resized:
            self._changed = True
            for module, product in lora_factors(dict(self._live)).items():
                if product.a.shape[0] != product.b.shape[1]:
                    raise ModelError(
                        f"layer '{module}': A has rank {product.a.shape[0]}, B has rank {product.b.shape[1]}"
                    )
        if scaling is not None:
            self._changed = True
            self._scale(dict.fromkeys(self._lora, scaling))

    def start_at(self, rank: int, scaling: float | None, key: int) -> None:
        """A fresh LoRA adapter: B zero, A uniform in +-1/sqrt(in), drawn by key.

        Raises:
            ModelError: for a rank that nobody has in this run, and in PiSSA, whose base lacks what its own A and B
                start as.
        """
        if self.origin_shift:
            raise ModelError(
                "adapter=pissa starts from the base's own factors, and this method starts from fresh ones again and "
                "again: take adapter=lora"
            )
        if not 1 <= rank <= self.layout.rank:
            raise ModelError(
                f"a fresh adapter of rank {rank}: expected 1 to {self.layout.rank}, the widest of this run"
            )
        fresh = {}
        for module, product in lora_factors(self.layout.initial).items():
            (out, _), (_, width) = product.b.shape, product.a.shape
            name = name_of(module, "lora_A")
            fresh[name] = uniform(derive_seed(key, "adapter", name), (rank, width), 1 / math.sqrt(width)).to(
                product.a.dtype
            )
            fresh[name_of(module, "lora_B")] = torch.zeros(out, rank, dtype=product.b.dtype)
        self.install(fresh, scaling)

    def train_only(self, roles: Collection[str]) -> None:
        """Freeze every tensor whose role is not among `roles`, as "lora_B".

        Raises:
            ModelError: for a role that no tensor has.
        """
        known = {slot.role for slot in self.layout.slots}
        if unknown := set(roles) - known:
            raise ModelError(f"there is no '{min(unknown)}' to train: this adapter has {', '.join(sorted(known))}")
        self._changed = True
        for slot in self.layout.slots:
            self._live[slot.name].requires_grad_(slot.role in roles)

    def adapt_only(self, modules: Collection[str]) -> None:
        """Leave every other adapted layer as the base has it: its adapter is neither trained nor computed. All tensors
        of these are trained, until `train_only` says otherwise.

        Raises:
            ModelError: for a layer that has no LoRA adapter.
        """
        if unknown := set(modules) - self._lora.keys():
            raise ModelError(f"layer '{min(unknown)}' has no LoRA adapter")
        self._changed = True
        self._switch_on()
        self.switched_off = self._lora.keys() - set(modules)
        for slot in self.layout.slots:
            if slot.module in self.switched_off:
                self._live[slot.name].requires_grad_(False)
        if self.root is self:
            for module in self.switched_off:
                self.layers[module].enable_adapters(False)

    def pass_through(self, bases: Mapping[str, Tensor]) -> None:
        """Have the inputs of these layers, and of no others, pass a matrix (r, in) each before they come to A."""
        self._changed = True
        self.through = {module: basis.to(self.device) for module, basis in bases.items()}
        if self.root is self:
            for hook in self._hooks:
                hook.remove()
            self._hooks = [
                self.layers[module].lora_A["default"].register_forward_pre_hook(_passing(basis))
                for module, basis in self.through.items()
            ]

    def _switch_on(self) -> None:
        for slot in self.layout.slots:
            if slot.module in self.switched_off:
                self._live[slot.name].requires_grad_(True)
        if self.root is self:
            for module in self.switched_off:
                self.layers[module].enable_adapters(True)  # and has them trained
        self.switched_off = set()

    def read(self) -> Tensors:
        """A copy of every tensor that is being trained, on the CPU."""
        return {name: live.detach().to("cpu", copy=True) for name, live in self.trained().items()}

    def at_start(self) -> bool:
        """Whether all trainable tensors have the values that every party starts from."""
        return all(torch.equal(live.detach().cpu(), self.layout.initial[name]) for name, live in self._live.items())

    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that are being trained, by name."""
        return {name: live for name, live in self._live.items() if live.requires_grad}

    def adapter(self) -> Tensors:
        """A copy of every trainable tensor, frozen for the moment or not, on the CPU."""
        return {name: live.detach().to("cpu", copy=True) for name, live in self._live.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that are being trained, for an optimizer."""
        return list(self.trained().values())

    def checkpoint_activations(self) -> None:
        """From here on, training keeps activations at the borders of blocks alone; what is between them is computed
        again on the way back. The gradients are the same.

        Raises:
            ModelError: if this architecture has no such blocks.
        """
        base = self.base
        if not getattr(base, "supports_gradient_checkpointing", False):
            raise ModelError(
                f"{type(base).__name__} can't compute activations anew: leave out train.checkpoint_activations"
            )
        # The reentrant kind wants gradients at the blocks' inputs, which a frozen base's embeddings have not
        kind = {"use_reentrant": False}
        if hasattr(base, "activation_checkpointing_enable"):  # what newer transformers call it
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        self.checkpoints = True

    @cached_property
    def seeded(self) -> SeededWeights:
        """The trainable tensors as sums of seeded directions, for methods that move them in such; it outlasts turns."""
        return SeededWeights(self._live, self.layout.initial)

    @property
    def is_seeded(self) -> bool:
        """Whether anybody has moved the weights along seeded directions."""
        return "seeded" in vars(self)

    @property
    def dtype(self) -> str:
        """The base's, as "float32"."""
        return str(self.module.dtype).removeprefix("torch.")

    @property
    def scaling(self) -> float | None:
        """What B A is multiplied by now; None for adapters that have none."""
        return next((float(value) for value in self.scalings.values()), None)

    def _scale(self, scaling: Mapping[str, float]) -> None:
        self.scalings = dict(scaling)
        if self.root is self:
            for module, value in scaling.items():
                self.layers[module].scaling["default"] = value

    def _base_layer(self, module: str) -> nn.Module:
        layer: Any = self.module.get_submodule(module)
        found: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        return found

    @property
    def base(self) -> Any:
        """The base model, with whatever adapters are in its layers."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @property
    def trainable(self) -> int:
        """How many trainable numbers there are, at the layout's ranks."""
        return sum(start.numel() for start in self._start)


def _passing(basis: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (nn.functional.linear(inputs[0], basis), *inputs[1:])

    return hook


def _outer(role: str, tensor: Tensor) -> int:
    """The size that a LoRA factor of this role shares with its layer."""
    return tensor.shape[1 if role == "lora_A" else 0]
