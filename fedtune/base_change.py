"""A changed base that is left as it is: the change is added to what a layer puts out.

    y = W0 x + B (A x)        or, for a dense change D,        y = W0 x + D x

W0 may be held in any form, NF4 and int8 included: nobody reads or writes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedtune.merging import from_residual
from fedtune.protocol import Tensors

DENSE = ".delta"  # MODULE.delta (out, in) float32


class BaseChange:
    """What is added to the layers of one model.

    Args:
        layer_of: the frozen layer behind a module's name.
    """

    def __init__(self, layer_of: Callable[[str], nn.Module]):
        self._layer_of = layer_of
        self._handles: list[RemovableHandle] = []
        self.tensors: Tensors = {}

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.tensors = {}

    def set(self, tensors: Tensors) -> None:
        """Add these to the base, instead of what was added before.

        Args:
            tensors: MODULE.residual_B (out, R) and MODULE.residual_A (R, in), or MODULE.delta (out, in), float32.
        """
        self.clear()
        self.tensors = tensors
        for module, product in from_residual(tensors).items():
            self._add(module, product.a, product.b)
        for name, matrix in tensors.items():
            if name.endswith(DENSE):
                self._add(name.removesuffix(DENSE), matrix)

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
