"""What the codecs that send few of the values have in common: which ones, where they are, and their signs.

All tensors count as one vector in the order of their names, of d values. The floor(`density` d) largest by magnitude
are sent, or all that aren't zero if those are fewer; of equals the first. Positions are coded as gaps (`coder`): by
Golomb-Rice as in the papers, or by a range coder, which comes closer to the entropy and takes longer. Golomb's
parameter is one for all tensors, or one for each where that is shorter: tensors that move by different amounts send
different shares of their values.

    blob    the codec's two letters, version 1, coder (one byte: 0 Golomb, 1 range, 2 Golomb by tensors), number of
            values (varint), length of the positions (varint), positions (fedtune/codecs/positions.py; by tensors, for
            each by name the number of its values and the length of their positions, varints, and these), and what the
            codec says of the values
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.codecs import positions as at
from fedtune.codecs.bytes import Format, Reader, varint
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import Tensors

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 but its sign: as whole numbers they order as magnitudes do
STRIDE = 101  # from one value of the sample to the next; odd, since rows have even lengths
BLOCK = 1 << 15  # values gone over at once: as float64 they stay in a core's cache
CODERS: dict[str, tuple[Callable[[Array, int], bytes], Callable[[bytes, int, int], Array]]] = {
    "golomb": (at.golomb_encode, at.golomb_decode),
    "range": (at.range_encode, at.range_decode),
}  # a coder's place is its code on the wire
APART = len(CODERS)  # and the code of Golomb by tensors


def check(density: float, coder: str) -> None:
    """Check the settings that all sparse codecs share.

    Raises:
        ConfigError: for a density that isn't a share, or a coder that there isn't.
    """
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ConfigError(f"codec.density={density}: expected a share above 0 and up to 1")
    if coder not in CODERS:
        raise ConfigError(f"codec.coder={coder} is not known: expected {' or '.join(CODERS)}")


def flattened(tensors: Tensors) -> Array:
    """All values as one vector, float32, by name.

    Raises:
        WireError: naming a tensor with values that aren't finite.
    """
    flat: Array = np.empty(sum(tensor.numel() for tensor in tensors.values()), np.float32)
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        part = flat[start : start + tensor.numel()]
        torch.from_numpy(part).view(tensor.shape).copy_(tensor)
        if not np.isfinite(part).all():
            raise WireError(f"tensor '{name}' has values that are not finite")
        start += len(part)
    return flat


def restored(flat: Array, shapes: Shapes) -> Tensors:
    """The inverse of `flattened`."""
    found: Tensors = {}
    start = 0
    for name in sorted(shapes):
        stop = start + math.prod(shapes[name])
        found[name] = torch.from_numpy(flat[start:stop]).view(shapes[name])
        start = stop
    return found


def largest(flat: Array, density: float) -> Array:
    """The positions of what is sent, in order, int64."""
    count = math.floor(density * len(flat))
    if not count:
        return np.zeros(0, np.int64)
    # To select among a few takes a fraction of the time; a guess that is too high costs another look, not exactness
    guess = _guess(flat, count)
    candidates = _at_least(flat, guess)
    if len(candidates) < count and guess > 1:
        candidates = _at_least(flat, 1)
    excess = len(candidates) - count
    if excess <= 0:
        return candidates
    size = flat.view(np.int32)[candidates] & MAGNITUDE
    bar = np.partition(size, excess)[excess]
    kept = size >= bar
    if equals := int(np.count_nonzero(kept)) - count:
        kept[np.flatnonzero(size == bar)[-equals:]] = False
    chosen: Array = candidates[kept]
    return chosen


def _guess(flat: Array, count: int) -> int:
    """A magnitude that somewhat more than `count` values are likely to reach, from a sample; at least 1."""
    sample = flat.view(np.int32)[::STRIDE] & MAGNITUDE
    share = count * len(sample) / len(flat)
    rank = len(sample) - math.ceil(share + 5 * math.sqrt(share))  # 5 standard deviations to spare
    return max(int(np.partition(sample, rank)[rank]), 1) if rank >= 0 else 1


def _at_least(flat: Array, magnitude: int) -> Array:
    """Where a value has this magnitude or more, in order."""
    found = []
    for start in range(0, len(flat), BLOCK):
        size = flat[start : start + BLOCK].view(np.int32) & MAGNITUDE
        found.append(np.flatnonzero(size >= magnitude) + start)
    return np.concatenate(found)


def deviation(values: Array) -> float:
    """The standard deviation, in float64; 0 of no values. As numpy's `std` but for the order of its sum."""
    if not len(values):
        return 0.0
    return math.sqrt(_squares(values, values.sum(dtype=np.float64) / len(values)) / len(values))


def length(values: Array) -> float:
    """The root of the sum of their squares, in float64."""
    return math.sqrt(_squares(values, 0.0))


def _squares(values: Array, mean: float) -> float:
    """The sum of (value - mean)^2, in blocks that stay in the cache.

    Every machine finds the same: each difference and square is rounded once, numpy sums in an order that unlike that of
    a BLAS product doesn't depend on the processor, and the blocks' sums are added exactly.
    """
    room = np.empty(min(BLOCK, len(values)))
    sums = []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        squares = np.subtract(block, mean, out=room[: len(block)], dtype=np.float64)
        sums.append(np.square(squares, out=squares).sum())
    return math.fsum(sums)


def ends_of(shapes: Shapes) -> Array:
    """Where each tensor ends in the vector, by name, int64."""
    return np.cumsum([math.prod(shapes[name]) for name in sorted(shapes)], dtype=np.int64)


def shapes_of(tensors: Tensors) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def encode(format: Format, coder: str, positions: Array, ends: Array, values: bytes) -> bytes:
    """The blob of a sparse codec: its head, the coded positions, then what it says of the values there.

    Args:
        ends: of the tensors (`ends_of`).
        values: what the codec says of them.
    """
    code = list(CODERS).index(coder)
    where = CODERS[coder][0](positions, int(ends[-1]) if len(ends) else 0)
    if coder == "golomb" and len(ends) > 1 and len(apart := _apart(positions, ends)) < len(where):
        code, where = APART, apart
    head = format.head + bytes([code])
    return head + varint(len(positions)) + varint(len(where)) + where + values


def decode(format: Format, blob: bytes, shapes: Shapes, length: Callable[[int], int]) -> tuple[Array, Array, bytes]:
    """The vector, with zeros in it; the positions, and what is said of their values.

    Args:
        length: the bytes of that, by the number of values.
    """
    ends = ends_of(shapes)
    size = int(ends[-1]) if len(ends) else 0
    reader = format.reader(blob)
    code = reader.take(1, "the coder")[0]
    if code > APART:
        raise WireError(f"no coder has code {code}, the last is {APART}")
    count = reader.varint("the number of values")
    if count > size:
        raise WireError(f"{count} values are sent, of {size}")
    where = reader.take(reader.varint("the length of the positions"), "the positions")
    if reader.left != length(count):
        raise WireError(f"{count} values should have {length(count)} bytes, got {reader.left}")
    positions = _read_apart(where, ends) if code == APART else list(CODERS.values())[code][1](where, size, count)
    if len(positions) != count:
        raise WireError(f"{count} values are sent, and there are {len(positions)} positions")
    return np.zeros(size, np.float32), positions, reader.rest()


def _apart(positions: Array, ends: Array) -> bytes:
    """Positions by tensors."""
    found = []
    starts = np.concatenate([[0], ends[:-1]])
    for start, end, part in zip(starts, ends, np.split(positions, np.searchsorted(positions, ends[:-1])), strict=True):
        code = at.golomb_encode(part - start, int(end - start))
        found += [varint(len(part)), varint(len(code)), code]
    return b"".join(found)


def _read_apart(where: bytes, ends: Array) -> Array:
    reader = Reader(where)
    found = [np.zeros(0, np.int64)]
    start = 0
    for end in map(int, ends):
        count = reader.varint("the number of a tensor's values")
        code = reader.take(reader.varint("the length of a tensor's positions"), "a tensor's positions")
        found.append(at.golomb_decode(code, end - start, count) + start)
        start = end
    if reader.left:
        raise WireError(f"{reader.left} bytes follow the last tensor's positions")
    return np.concatenate(found)


def signs_of(values: Array) -> bytes:
    """A bit each, 1 for negative."""
    return np.packbits(np.signbit(values), bitorder="little").tobytes()


def read_signs(blob: bytes, count: int) -> Array:
    """The signs of `signs_of`, -1 or 1 each, float32."""
    bits = np.unpackbits(np.frombuffer(blob, np.uint8), bitorder="little")
    if bits[count:].any():
        raise WireError("the bits after the last sign should be zero")
    return np.float32(1) - 2 * bits[:count].astype(np.float32)


def scales(blob: bytes, magnitude: str) -> Array:
    """Magnitudes, float32, checked."""
    found = np.frombuffer(blob, "<f4").astype(np.float32)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise WireError(f"{magnitude} should be finite and not negative")
    return found
