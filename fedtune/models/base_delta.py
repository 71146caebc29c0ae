"""A changed base that is left as it is: the change is added to what a layer puts out.

    y = W0 x + B (A x)        or, for a dense change D,        y = W0 x + D x

W0 may be held in any form, NF4 and int8 included: nobody reads or writes it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedtune.core.protocol import Tensors
from fedtune.lowrank.residual import from_residual
from fedtune.models.requantize import Rounded

DENSE = ".delta"  # MODULE.delta (out, in) float32


class BaseChange:
    """What is added to the layers of one model.

    Attributes:
        tensors: the change, as `set` got it.
        rounding: ||round(W0 + D) - (W0 + D)||_F / ||D||_F over all layers where the change is rounded into the base,
            else None.

    Args:
        layer_of: the frozen layer behind a module's name.
        requantize: round the change into the base instead of computing it beside.
    """

    def __init__(self, layer_of: Callable[[str], nn.Module], requantize: bool = False):
        self._layer_of = layer_of
        self._requantize = requantize
        self._handles: list[RemovableHandle] = []
        self._rounded: tuple[Tensors, list[Rounded]] = ({}, [])  # the last change, for the next client that has it
        self.tensors: Tensors = {}
        self.rounding: float | None = None

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self.rounding is not None:
            for layer in self._rounded[1]:
                layer.swap_out()
        self._handles = []
        self.tensors = {}
        self.rounding = None

    def set(self, tensors: Tensors) -> None:
        """Add these to the base, instead of what was added before.

        Args:
            tensors: MODULE.residual_B (out, R) and MODULE.residual_A (R, in), or MODULE.delta (out, in), float32.
        """
        self.clear()
        self.tensors = tensors
        if self._requantize:
            self._round(tensors)
            return
        for module, product in from_residual(tensors).items():
            self._add(module, product.a, product.b)
        for name, matrix in tensors.items():
            if name.endswith(DENSE):
                self._add(name.removesuffix(DENSE), matrix)

    def _round(self, tensors: Tensors) -> None:
        known, layers = self._rounded
        if known.keys() != tensors.keys() or not all(torch.equal(known[name], t) for name, t in tensors.items()):
            whole = {module: product.b @ product.a for module, product in from_residual(tensors).items()}
            whole |= {name.removesuffix(DENSE): matrix for name, matrix in tensors.items() if name.endswith(DENSE)}
            layers = [Rounded(self._layer_of(module), matrix) for module, matrix in whole.items()]
            self._rounded = (tensors, layers)
        for layer in layers:
            layer.swap_in()
        size = math.hypot(*(layer.size for layer in layers))
        self.rounding = math.hypot(*(layer.error for layer in layers)) / size if size else 0.0

    def _add(self, module: str, *factors: Tensor) -> None:
        layer = self._layer_of(module)
        device = next(layer.parameters()).device
        there = [factor.to(device) for factor in factors]

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            change = inputs[0].to(there[0].dtype)
            for factor in there:
                change = torch.nn.functional.linear(change, factor)
            return output + change.to(output.dtype)

        self._handles.append(layer.register_forward_hook(hook))


class PlannedChange:
    """What is to be added to a base that others share, when this model's turn comes."""

    rounding = None

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def clear(self) -> None:
        self.tensors = {}

    def set(self, tensors: Tensors) -> None:
        self.tensors = tensors
