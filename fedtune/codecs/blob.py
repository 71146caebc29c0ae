"""What the blobs of the dense lossy codecs have in common: the head of the codec's format, and then only values.

Both ends know the names and shapes, so neither is in the blob: tensors come in the order of their names, each with as
many bytes as the codec says for its shape, and a tensor without values has none. So a blob's length follows from the
shapes, and is checked before anything is made. Scales are little-endian float32 from 0 up, finite and not -0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.codecs.bytes import Format
from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors, describe

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

LARGEST = np.finfo(np.float32).max


def join(format: Format, tensors: Tensors, write: Callable[[str, Array], list[Array]]) -> bytes:
    """The blob of what `write` makes, in little-endian, of each tensor, which it is handed by name as a float32 array
    that it may not change.

    Raises:
        WireError: naming the tensor that isn't floating, or not finite as float32.
    """
    parts: list[bytes | memoryview] = [format.head]
    for name in sorted(tensors):
        tensor = tensors[name]
        if not tensor.dtype.is_floating_point:
            raise WireError(f"tensor '{name}' is {describe(tensor)}: a lossy codec takes floats only")
        values = tensor.detach().cpu().float().contiguous().numpy()
        if not np.isfinite(values).all():
            raise WireError(f"tensor '{name}' ({describe(tensor)}) has values that are not finite as float32")
        if values.size:
            parts += [part.data for part in write(name, values)]
    return b"".join(parts)


def split(
    codec: str,
    format: Format,
    blob: bytes,
    shapes: Mapping[str, Shape],
    size: Callable[[Shape], int],
    read: Callable[[Array, Shape], Array],
) -> Tensors:
    """The tensors that `read` makes of their bytes, of which it was told the shape.

    Args:
        codec: its name, for errors.
        size: the bytes of a tensor of this shape, if it has values.
        read: may return a few values more than the shape has.

    Raises:
        WireError: if it isn't a blob of this codec for these shapes.
    """
    try:
        return _split(format, blob, shapes, size, read)
    except WireError as error:
        raise WireError(f"not a blob of codec={codec} ({len(blob)} bytes): {error}") from None


def as_scales(part: Array, most: np.float32 = LARGEST) -> Array:
    """The scales in these bytes.

    Raises:
        WireError: if there is one that can't be a scale.
    """
    scales: Array = part.copy().view("<f4").astype(np.float32, copy=False)
    # Bits of the numbers from 0 up are in the numbers' order; those of -0, what is negative and nan are above them
    bad = scales.view(np.uint32) > most.view(np.uint32)
    if bad.any():
        raise WireError(f"a scale should be a number from 0 up to {most:g}, got {scales[bad][0]:g}")
    return scales


def largest(values: Array, length: int) -> Array:
    """The largest magnitude max |x| of each `length` values in a row, the last of which may be fewer."""
    return np.maximum.reduceat(np.abs(values).reshape(-1), np.arange(0, values.size, length))


def divisors(scales: Array) -> Array:
    """The scales to divide by: what has scale 0 is all zeros, and stays so."""
    return np.where(scales > 0, scales, np.float32(1))


def little(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _split(
    format: Format,
    blob: bytes,
    shapes: Mapping[str, Shape],
    size: Callable[[Shape], int],
    read: Callable[[Array, Shape], Array],
) -> Tensors:
    head = format.reader(blob).place
    sizes = {name: size(shapes[name]) if math.prod(shapes[name]) else 0 for name in sorted(shapes)}
    if len(blob) != (expected := head + sum(sizes.values())):
        raise WireError(f"{len(shapes)} tensors of these shapes take {expected} bytes, got {len(blob)}")
    rest: Array = np.frombuffer(blob, np.uint8)[head:]
    tensors: Tensors = {}
    for name, length in sizes.items():
        shape = tuple(shapes[name])
        try:
            values = read(rest[:length], shape) if length else np.zeros(0, np.float32)
        except WireError as error:
            raise WireError(f"tensor '{name}': {error}") from None
        tensors[name] = torch.from_numpy(values.reshape(-1)[: math.prod(shape)]).reshape(shape)
        rest = rest[length:]
    return tensors
