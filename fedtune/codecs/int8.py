"""Int8: a scale per row and eight bits a value, rounded up or down at random so that the mean is right.

    scale     the least float32 with 127 scale >= max |x| of the row: max |x| / 127, but for its last bit
    value     q = floor(x / scale + u), u uniform in (0, 1), from -127 to 127
    decoded   q scale

E[decoded] = x, |decoded - x| < scale, the variance at most scale^2 / 4. In float32 and with u of 16 bits, (j + 1/2) /
2^16, the mean is within 2^-16 scale and the error at most (1 + 2^-16) scale. That holds for denormals too: as the scale
is rounded up, no quotient is above 127, and a row whose values aren't all zero has a scale. A row of zeros has 0.

With feedback u is 1/2, which rounds to nearest: a mean that is right needs no luck where what is left out comes later,
and |decoded - x| <= min(|x|, scale / 2) however long a row is, whereas at random it isn't even in the mean that less is
left out than there was once a row has more than 8 127^2 values: one large and the others scale / 4.

The last dimension is a row's length; a vector or a scalar is one row. u is drawn for a tensor by the key and its name:
the same key gives the same bits everywhere, and different keys independent errors.

    blob      "fi", version 1 (one byte), by name every tensor's scales (float32, little-endian) and values (int8)

Bytes: 3 + 4 rows + n, for n values in all; in rows of 8, as those of a B of rank 8, 12 bits a value. Stochastic
rounding is that of QSGD (Alistarh et al., NeurIPS 2017, arXiv:1610.02132), with 127 levels of the largest value instead
of the norm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from fedtune.codecs.blob import LARGEST, Array, Shape, as_scales, divisors, join, largest, little, split
from fedtune.codecs.bytes import Format
from fedtune.core import seeds as keys
from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors

FORMAT = Format(b"fi")
LEVELS = 127
MOST = np.nextafter(LARGEST / np.float32(LEVELS), np.float32(0))  # 127 times the float32 above it overflows


@dataclass(frozen=True)
class Int8:
    """A quarter of float32's bytes, unbiased.

    Args:
        feedback: whether what is left out is sent later.
    """

    lossless: ClassVar[bool] = False
    feedback: bool = False

    @property
    def contracts(self) -> bool:
        return self.feedback

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Write each row as whole multiples of its largest value / 127, rounded at random by `key`, or to nearest with
        feedback.

        Raises:
            WireError: naming the tensor that isn't floating, not finite, or has values within 2^-23 of float32's
                largest.
        """
        return join(FORMAT, tensors, partial(_write, None if self.feedback else key))

    def decode(self, blob: bytes, shapes: Mapping[str, Shape]) -> Tensors:
        return split("int8", FORMAT, blob, shapes, lambda shape: 4 * _rows(shape) + math.prod(shape), _read)


def _write(key: int | None, name: str, values: Array) -> list[Array]:
    """
    Args:
        key: of the draws; None rounds to nearest.
    """
    rows = values.reshape(_rows(values.shape), -1)
    scales = _scales(largest(rows, rows.shape[1]))
    if scales.max() > MOST:
        raise WireError(f"tensor '{name}' has values too close to float32's largest for codec=int8")
    rounded = np.full(rows.shape, 0.5, np.float32) if key is None else _draws(key, name, rows.shape)
    rounded += rows / divisors(scales)[:, None]
    return [little(scales), np.floor(rounded, out=rounded).astype(np.int8)]


def _draws(key: int, name: str, shape: Shape) -> Array:
    """Uniform in (0, 1), float32."""
    size = math.prod(shape)
    halves = keys.bits(keys.derive_seed(key, name), -(-size // 4)).astype("<u8", copy=False).view("<u2")
    drawn: Array = halves[:size].reshape(shape).astype(np.float32)
    drawn += np.float32(0.5)
    drawn *= np.float32(2.0**-16)
    return drawn


def _read(part: Array, shape: Shape) -> Array:
    rows = _rows(shape)
    scales = as_scales(part[: 4 * rows], MOST)
    values = part[4 * rows :].view(np.int8).reshape(rows, -1)
    if values.min() < -LEVELS:
        raise WireError(f"a value is {values.min()}, they go from {-LEVELS} to {LEVELS}")
    return np.multiply(values, scales[:, None], dtype=np.float32)


def _rows(shape: Shape) -> int:
    return math.prod(shape[:-1]) if len(shape) > 1 else 1


def _scales(most: Array) -> Array:
    """The least float32 of which 127 are no less: products of the two are exact in float64."""
    near = most / np.float32(LEVELS)
    low = near.astype(np.float64) * LEVELS < most
    return np.where(low, np.nextafter(near, np.float32(np.inf)), near)
