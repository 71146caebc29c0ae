"""Nf4: four bits a value, the nearest of 16 quantiles of the normal distribution, times the block's largest magnitude.

    blocks    of `block` values of a tensor laid out flat; its last may be shorter
    scale     max |x| of the block, float32
    value     the place of the number in `TABLE` that is nearest to x / scale, by the float32 midpoints between its
              numbers; a quotient on a midpoint takes the lower number
    decoded   TABLE[place] scale

Error: at most half of the table's widest gap, 0.1520 scale (between -1 and -0.6962), up to float32's rounding; the
rounding is to nearest and so biased. Zeros and the values of largest magnitude come back exactly.

    blob      "fn", version 1 (one byte), by name every tensor's scales (float32, little-endian) and places, two a byte,
              the first in the high four bits, as bitsandbytes has them; after an odd number of values four zero bits

Bytes: 3 + the sum over tensors of 4 ceil(n / block) + ceil(n / 2). Table, midpoints and layout are those of NF4 (QLoRA,
Dettmers et al., NeurIPS 2023, arXiv:2305.14314; bitsandbytes.functional.get_4bit_type). bitsandbytes multiplies by a
rounded 1 / scale where this divides, so that one of its values within 2^-23 of a midpoint may go the other way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.codecs.blob import Array, Shape, as_scales, divisors, join, largest, little, split
from fedtune.codecs.bytes import Format
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fn")
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
MIDPOINTS = (TABLE[:-1] + TABLE[1:]) / np.float32(2)
PAIRS = np.stack([TABLE.repeat(16), np.tile(TABLE, 16)], axis=1)  # what each byte holds


@dataclass(frozen=True)
class Nf4:
    """An eighth of float32's bytes and a scale for every block."""

    lossless: ClassVar[bool] = False
    contracts: ClassVar[bool] = True
    block: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise ConfigError(f"codec.block={self.block!r}: expected a whole number from 1 up")

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Write each value as the nearest of 16 normal quantiles times the largest of its block; 4 bits a value.

        Raises:
            WireError: naming the tensor that isn't floating, or not finite.
        """
        return join(FORMAT, tensors, self._write)

    def decode(self, blob: bytes, shapes: Mapping[str, Shape]) -> Tensors:
        return split("nf4", FORMAT, blob, shapes, self._size, self._read)

    def _size(self, shape: Shape) -> int:
        values = math.prod(shape)
        return 4 * -(-values // self.block) + -(-values // 2)

    def _write(self, name: str, values: Array) -> list[Array]:
        flat = values.reshape(-1)
        block = min(self.block, flat.size)
        scales = largest(flat, block)
        quotients = flat / divisors(scales).repeat(block)[: flat.size]
        places = np.zeros(flat.size + flat.size % 2, np.uint8)
        for midpoint in MIDPOINTS:  # 15 passes are faster than a binary search for each value
            places[: flat.size] += quotients > midpoint
        return [little(scales), places[::2] << 4 | places[1::2]]

    def _read(self, part: Array, shape: Shape) -> Array:
        values = math.prod(shape)
        block = min(self.block, values)
        blocks = -(-values // block)
        scales, places = as_scales(part[: 4 * blocks]), part[4 * blocks :]
        if values % 2 and places[-1] & 15:
            raise WireError("the bits after its last value should be zero")
        decoded = PAIRS.take(places, axis=0).reshape(-1)[:values]
        decoded *= scales.repeat(block)[:values]
        return decoded
