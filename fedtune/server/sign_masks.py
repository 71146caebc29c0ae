"""Ternary updates as two bit masks, and arithmetic on them by AND and popcount.

ComPEFT (Yadav et al. 2023, arXiv:2311.13171) compares updates of values -1, 0 and 1 in this form: one mask
has the places of the positive values, one those of the negative. 2 bits a value, where float32 takes 32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors

Bits = npt.NDArray[np.uint8]
WORD = 64  # bits that are counted at once: masks are filled up with zeros to whole words


@dataclass(frozen=True)
class Masks:
    """A vector of d values -1, 0 and 1, as `masks_of` makes it; no place is in both masks."""

    positive: Bits  # (8 ceil(d / 64),): a bit a value, the first in a byte's lowest
    negative: Bits  # the same
    size: int  # d

    @cached_property
    def count(self) -> int:
        """How many values aren't zero."""
        return _popcount(_words(self.positive)) + _popcount(_words(self.negative))


def masks_of(tensors: Tensors, start: Mapping[str, Tensor] | None = None) -> Masks:
    """The signs of all values as one vector, by tensors' names; NaN counts as zero.

    Args:
        start: of each tensor's name, one of its shape; the signs are then those of the difference from it.
    """
    above, below = [], []
    for name in sorted(tensors):
        tensor = tensors[name].detach().flatten()
        # To compare is exact in every dtype, where a difference could round to zero
        bar = 0 if start is None else start[name].detach().to(tensor.device).flatten()
        above.append((tensor > bar).cpu())
        below.append((tensor < bar).cpu())
    return Masks(_packed(above), _packed(below), sum(part.numel() for part in above))


def dot(one: Masks, other: Masks) -> int:
    """The dot product of the two vectors.

    Raises:
        WireError: if they are of different sizes.
    """
    if one.size != other.size:
        raise WireError(f"masks of {one.size} and of {other.size} values can't be compared: expected one size")
    p, n, p_other, n_other = map(_words, (one.positive, one.negative, other.positive, other.negative))
    return _popcount(p & p_other) + _popcount(n & n_other) - _popcount(p & n_other) - _popcount(n & p_other)


def cosine(one: Masks, other: Masks) -> float:
    """The cosine of the angle between the two vectors, from -1 to 1; 0 where one is all zeros.

    Raises:
        WireError: if they are of different sizes.
    """
    product = dot(one, other)
    return product / math.sqrt(one.count * other.count) if product else 0.0


def _packed(parts: list[Tensor]) -> Bits:
    bits = torch.cat(parts).numpy() if parts else np.zeros(0, bool)
    packed: Bits = np.zeros(-(-len(bits) // WORD) * (WORD // 8), np.uint8)
    packed[: -(-len(bits) // 8)] = np.packbits(bits, bitorder="little")
    return packed


def _words(mask: Bits) -> npt.NDArray[np.uint64]:
    return mask.view(np.uint64)


def _popcount(words: npt.NDArray[np.uint64]) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
