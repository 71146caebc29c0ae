"""SignSGD: one bit a value, its sign, and one scale a tensor, the mean magnitude.

    decoded   scale * sign(x), scale = mean |x| as float32, sign(0) = +1

The scale is the one with the least squared error: |decoded - x|^2 = |x|^2 - n scale^2. It is biased: what a value lost
stays lost unless the sender keeps it and adds it to its next update (error feedback). A value's error is at most
max |x|, and a tensor whose magnitudes are all equal comes back as it was, but for scale's last bit. Zeros have scale 0.

    blob      "fs", version 1 (one byte), by name every tensor's scale (float32, little-endian) and signs, a bit each, 1
              for values below zero. Bits fill a byte from its lowest, and the last byte ends in zeros

Bytes: 3 + the sum over tensors of 4 + ceil(n / 8). Scaled sign is that of Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes" (ICML 2019, arXiv:1901.09847).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.codecs.blob import Array, Shape, as_scales, join, little, split
from fedtune.codecs.bytes import Format
from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fs")
# What each byte holds
SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)


@dataclass(frozen=True)
class SignSGD:
    """A 32nd of float32's bytes. Needs error feedback."""

    lossless: ClassVar[bool] = False
    contracts: ClassVar[bool] = True

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Write each value's sign, a bit each, and each tensor's mean magnitude in float32.

        Raises:
            WireError: naming the tensor that isn't floating, or not finite.
        """
        return join(FORMAT, tensors, _write)

    def decode(self, blob: bytes, shapes: Mapping[str, Shape]) -> Tensors:
        return split("signsgd", FORMAT, blob, shapes, lambda shape: 4 + -(-math.prod(shape) // 8), _read)


def _write(name: str, values: Array) -> list[Array]:
    scale = np.abs(values).mean(dtype=np.float64, keepdims=True).astype(np.float32)
    return [little(scale), np.packbits(values < 0, bitorder="little")]


def _read(part: Array, shape: Shape) -> Array:
    scale, signs = as_scales(part[:4]), part[4:]
    if (filled := math.prod(shape) % 8) and signs[-1] >> filled:
        raise WireError("the bits after its last value should be zero")
    return (SIGNS * scale).take(signs, axis=0)
