"""Bf16: float32's upper half, rounded to nearest, ties to even.

Error: |decoded - x| <= 2^-8 |x|, or 2^-134 where that is more, half of the step between denormals. Values beyond
bfloat16's largest number, 3.3895e38, become that number and not infinity, within the same bound.

    blob      "fb", version 1 (one byte), every tensor's values by name, 2 bytes each, little-endian

Bytes: 3 + 2 n, for n values in all. The format is that of "A Study of BFLOAT16 for Deep Learning Training" (Kalamkar
et al., 2019, arXiv:1905.12322).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedtune.codecs.blob import Array, Shape, join, little, split
from fedtune.codecs.bytes import Format
from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fb")
LARGEST = torch.finfo(torch.bfloat16).max
EXPONENT = 0x7F80  # all ones in infinities and what is not a number


@dataclass(frozen=True)
class Bf16:
    """Half of float32's bytes, and no draw."""

    lossless: ClassVar[bool] = False
    contracts: ClassVar[bool] = True

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Round every value to bfloat16, to nearest even; 2 bytes a value.

        Raises:
            WireError: naming the tensor that isn't floating, or not finite.
        """
        return join(FORMAT, tensors, _write)

    def decode(self, blob: bytes, shapes: Mapping[str, Shape]) -> Tensors:
        return split("bf16", FORMAT, blob, shapes, lambda shape: 2 * math.prod(shape), _read)


def _write(name: str, values: Array) -> list[Array]:
    near = torch.from_numpy(values).clamp(-LARGEST, LARGEST).bfloat16()
    return [little(near.view(torch.int16).numpy())]


def _read(part: Array, shape: Shape) -> Array:
    halves = part.view("<u2")
    if (halves & EXPONENT == EXPONENT).any():
        raise WireError("a value is not finite")
    return (halves.astype(np.uint32) << 16).view(np.float32)
