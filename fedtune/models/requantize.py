"""A changed base in the form that the base is held in: NF4, int8, or its own dtype.

What a layer then computes with is round(W0 + D), rounded as W0 was. Nothing is added to what a step costs; what a round
changes may be less than what rounding loses, so the loss is measured.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def dequantized(layer: nn.Module) -> Tensor:
    """The weight that a frozen layer computes with: (out, in) float32, on its device."""
    # Conv1D, as in GPT-2, holds (in, out)
    from transformers.pytorch_utils import Conv1D

    whole = _plain(layer).float()
    return whole.T if isinstance(layer, Conv1D) else whole


class Rounded:
    """A layer's weight with a change rounded into it; the original is kept and can be put back.

    Attributes:
        error: ||round(W0 + D) - (W0 + D)||_F, and
        size: ||D||_F.

    Args:
        change: D, (out, in) float32.
    """

    def __init__(self, layer: Any, change: Tensor):
        from transformers.pytorch_utils import Conv1D

        self._layer = layer
        self._original = self._held()
        oriented = change.T if isinstance(layer, Conv1D) else change
        wanted = _plain(layer).float() + oriented.to(self._layer.weight.device)
        self._changed = (_like(self._layer, wanted), self._fresh_state())
        self.swap_in()
        self.error = float((_plain(layer).float() - wanted).norm())
        self.size = float(change.norm())
        self.swap_out()

    def swap_in(self) -> None:
        self._hold(self._changed)

    def swap_out(self) -> None:
        self._hold(self._original)

    def _held(self) -> tuple[nn.Parameter, Any]:
        return self._layer.weight, getattr(self._layer, "state", None)

    def _hold(self, weight_and_state: tuple[nn.Parameter, Any]) -> None:
        self._layer.weight, state = weight_and_state
        if state is not None:
            self._layer.state = state

    def _fresh_state(self) -> Any:
        """bitsandbytes keeps an int8 weight's scales beside it, in the layer."""
        state = copy.copy(getattr(self._layer, "state", None))
        if state is not None:
            state.CB = state.SCB = None
        return state


def _plain(layer: Any) -> Tensor:
    kind = type(layer.weight).__name__
    if kind == "Params4bit":
        import bitsandbytes

        found: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return found
    if kind == "Int8Params":
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        whole: Tensor = layer.weight.data.float() * scales.view(-1, 1) / 127
        return whole
    return layer.weight.data  # type: ignore[no-any-return]


def _like(layer: Any, wanted: Tensor) -> nn.Parameter:
    """`wanted` held as the layer's weight is."""
    old = layer.weight
    kind = type(old).__name__
    if kind == "Params4bit":
        made: nn.Parameter = type(old)(
            wanted.to(old.quant_state.dtype).cpu(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        ).to(torch.device(old.device))
        return made
    if kind == "Int8Params":
        eight: nn.Parameter = type(old)(wanted.cpu(), requires_grad=False, has_fp16_weights=False).to(
            torch.device(old.device)
        )
        return eight
    return nn.Parameter(wanted.to(old.dtype), requires_grad=False)
