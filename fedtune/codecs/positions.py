"""Sets of positions, a few bits each: Golomb-Rice for speed, a range coder for the last few percent.

For updates that are zero but for 1 to 50 % of their parameters (top-k; ComPEFT, arXiv:2311.13171; STC,
arXiv:1903.02891). Positions are sorted, unique int64 in range(size). How many there are (count) and size are for the
caller to send; both ends derive everything else from them, with integers or with operations that IEEE 754 rounds
exactly, so that no two machines differ.

If more than half of range(size) are positions, the rest is coded in their place: n = min(count, size - count) in all.
A gap is how many numbers lie before a position and after the last one. No gaps, no bytes.

Golomb-Rice: b = `golomb_parameter(n / size)`; a gap's remainder is its lowest b bits, its quotient the rest.

    remainders   b planes of n bits, the lowest bit of every gap first
    quotients    a gap's quotient in zeros and a one, for every gap

Bits fill a byte from its lowest, and the last byte ends in zeros. Bit planes, and remainders apart from quotients, are
as many bits as one gap after another, and numpy reads and writes them whole.

Range: what constriction's `RangeEncoder` makes (Pasco 1976; Martin 1979; https://bamler-lab.github.io/constriction) of

    gaps         n symbols 0 ... M of a categorical model: a gap below M, or M for one that is M or more
    lengths      of every M, in order, how many bytes gap - M takes, less 1: at least one byte, 8 lengths equally likely
    excesses     these bytes, the lowest of each first, all values equally likely

as little-endian uint32. M = min(12 size // n, size, 16383), so that, unless n is below size / 1365, one gap in
160,000 needs an excess; where positions cluster more do, and cost less than a geometric distribution would have it.
Symbol g has (T[g] >> 38) - (T[g + 1] >> 38) + 1 chances in 2**24, and symbol M has (T[M] >> 38) + 1, where T[0] =
(2**24 - M - 1) << 38 and T[g + 1] = T[g] (size - n) // size: a geometric distribution. constriction takes floats,
scales them to a sum of 2**24 - M - 1 and adds one to each. These are integers of that sum and below 2**24: its
float64 hold them exactly, and its scale is 1.

Every set has one blob of each kind, and the decoders take no other.
"""

import math
from collections.abc import Callable
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from fedtune.core.errors import WireError

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]

MAX_SIZE = 1 << 48  # beyond any model; so that no sum of a position and a hostile gap leaves int64
PRECISION = 24  # bits of a chance in constriction's Python classes
FINER = 38  # bits of T below a chance; T fits int64
MAX_SYMBOL = 16383  # a table of T is made for every message
BYTES = 8  # of an excess, at most


def golomb_parameter(density: float) -> int:
    """The bits b of a remainder that make Golomb-Rice codes of iid positions shortest.

    max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - density)))) with the golden ratio phi (Golomb 1966; Gallager and van
    Voorhis 1975; STC, arXiv:1903.02891). b + 1 begins where (1 - density) ** (2 ** b) = phi - 1, and from one b to the
    next that density is found by a square root, which is the same everywhere, as logarithms aren't.

    Args:
        density: The part of all numbers that are positions, above 0.

    Raises:
        ValueError: it isn't above 0.
    """
    if density <= 0:
        raise ValueError(f"a density above 0 expected, got {density}")
    bits, most = 0, (3 - math.sqrt(5)) / 2
    while density <= most:
        bits += 1
        most /= 1 + math.sqrt(1 - most)
    return bits


def golomb_encode(positions: Positions, size: int) -> bytes:
    """The Golomb-Rice code of `positions` (count,): within 4.3 % of the entropy if they're iid and many.

    Raises:
        WireError: they aren't sorted, unique int64 in range(size).
    """
    gaps = _gaps(positions, size)
    n = len(gaps)
    if not n:
        return b""
    bits = golomb_parameter(n / size)
    ends = np.cumsum((gaps >> bits) + 1)
    flags = np.zeros(n * bits + int(ends[-1]), np.uint8)
    for bit in range(bits):
        flags[n * bit : n * (bit + 1)] = gaps >> bit & 1
    flags[n * bits - 1 + ends] = 1
    return np.packbits(flags, bitorder="little").tobytes()


def golomb_decode(blob: bytes, size: int, count: int) -> Positions:
    """The positions (count,) that `golomb_encode` made `blob` of.

    Raises:
        WireError: no `count` positions in range(size) have this blob.
    """
    return _decoded("Golomb", _golomb_positions, blob, size, count)


def range_encode(positions: Positions, size: int) -> bytes:
    """The range code of `positions` (count,): within 0.1 % of the entropy if they're iid and many.

    Raises:
        WireError: they aren't sorted, unique int64 in range(size).
    """
    return _range_blob(_gaps(positions, size), size)


def range_decode(blob: bytes, size: int, count: int) -> Positions:
    """The positions (count,) that `range_encode` made `blob` of.

    Raises:
        WireError: no `count` positions in range(size) have this blob.
    """
    return _decoded("range", _range_positions, blob, size, count)


def _decoded(code: str, read: Callable[[bytes, int, int], Positions], blob: bytes, size: int, count: int) -> Positions:
    """The positions, of which `read` finds those that are coded: they themselves, or all others."""
    try:
        n = _coded(size, count)
        coded = read(blob, size, n)
    except WireError as error:
        raise WireError(f"not the {code} code of {count} positions of {size} ({len(blob)} bytes): {error}") from None
    return coded if n == count else _others(coded, size)


def _golomb_positions(blob: bytes, size: int, n: int) -> Positions:
    if not n:
        return _none(blob)
    bits = golomb_parameter(n / size)
    room = n * bits + n + (size >> bits)
    # Before anything of the blob's size is made
    if 8 * len(blob) >= room + 8:
        raise WireError(f"at most {(room + 7) // 8} bytes expected")
    if 8 * len(blob) < n * (bits + 1):
        raise WireError(f"at least {(n * (bits + 1) + 7) // 8} bytes expected")
    flags = np.unpackbits(np.frombuffer(blob, np.uint8), bitorder="little")
    ends = np.flatnonzero(flags[n * bits :].view(np.bool_))
    if len(ends) != n:
        raise WireError(f"it has {len(ends)} quotients, {n} expected")
    if len(flags) - n * bits - int(ends[-1]) > 8:
        raise WireError("it goes on after its last quotient")
    order = np.arange(n)
    remainders = np.zeros(n, np.int64)
    for bit in range(bits):
        remainders += flags[n * bit : n * (bit + 1)].astype(np.int64) << bit
    positions: Positions = (ends - order << bits) + np.cumsum(remainders) + order
    if positions[-1] >= size:
        raise WireError(f"its last position is not below {size}")
    return positions


def _range_blob(gaps: Positions, size: int) -> bytes:
    if not len(gaps):
        return b""
    model, last = _model(size, len(gaps))
    parts = (gaps[gaps >= last] - last).astype("<u8").view(np.uint8).reshape(-1, BYTES)
    lengths = ((parts > 0) * np.arange(1, BYTES + 1)).max(axis=1, initial=1)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(np.minimum(gaps, last).astype(np.int32), model)
    encoder.encode((lengths - 1).astype(np.int32), constriction.stream.model.Uniform(BYTES))
    encoder.encode(parts[_within(lengths)].astype(np.int32), constriction.stream.model.Uniform(256))
    words: Array = encoder.get_compressed()
    return words.astype("<u4").tobytes()


def _range_positions(blob: bytes, size: int, n: int) -> Positions:
    if not n:
        return _none(blob)
    # No gap has more than half of the chances, so none is less than a bit; the coder may keep two words to itself
    if n > 8 * len(blob) + 64:
        raise WireError(f"at least {(n - 64 + 7) // 8} bytes expected")
    if len(blob) % 4:
        raise WireError("a multiple of 4 bytes expected")
    model, last = _model(size, n)
    words = np.frombuffer(blob, "<u4").astype(np.uint32)
    try:
        decoder = constriction.stream.queue.RangeDecoder(words)
        gaps = decoder.decode(model, n).astype(np.int64)
        escaped = np.flatnonzero(gaps == last)
        lengths = decoder.decode(constriction.stream.model.Uniform(BYTES), len(escaped)) + 1
        digits = decoder.decode(constriction.stream.model.Uniform(256), int(lengths.sum()))
    except BaseException as error:
        # A panic is a BaseException of a class that can't be imported
        if not isinstance(error, AssertionError) and type(error).__name__ != "PanicException":
            raise
        raise WireError("no symbols have its bytes") from None
    parts = np.zeros((len(escaped), BYTES), np.uint8)
    parts[_within(lengths)] = digits
    excesses = parts.view("<u8").ravel()
    if (excesses >= size).any():
        raise WireError(f"its last position is not below {size}")
    gaps[escaped] += excesses.astype(np.int64)
    positions: Positions = np.cumsum(gaps + 1) - 1
    if positions.max() >= size:
        raise WireError(f"its last position is not below {size}")
    # Bytes after its end, and other numbers in the last interval: encoding takes a fraction of the time of decoding
    if _range_blob(gaps, size) != blob:
        raise WireError("its positions have another code")
    return positions


def _model(size: int, n: int) -> tuple[Any, int]:
    """The model of gaps and its last symbol."""
    last = min(12 * size // n, size, MAX_SYMBOL)
    tails = [(1 << PRECISION) - last - 1 << FINER]
    for _ in range(last):
        tails.append(tails[-1] * (size - n) // size)
    chances = np.array(tails) >> FINER
    chances[:-1] -= chances[1:]
    return constriction.stream.model.Categorical(chances.astype(np.float64), lazy=False, perfect=False), last


def _within(lengths: Array) -> Array:
    """Of each excess (row) which bytes count: (excesses, BYTES), bool."""
    within: Array = np.arange(BYTES) < lengths[:, None]
    return within


def _gaps(positions: Positions, size: int) -> Positions:
    """The gaps to code, of the positions or of the others."""
    if positions.dtype != np.int64 or positions.ndim != 1:
        raise WireError(f"positions should be int64 in one dimension, got {positions.dtype} {positions.shape}")
    count = len(positions)
    n = _coded(size, count)
    if count and (positions[0] < 0 or positions[-1] >= size or (positions[1:] <= positions[:-1]).any()):
        raise WireError(f"positions should be sorted, unique and in range({size})")
    coded = positions if n == count else _others(positions, size)
    return np.diff(coded, prepend=-1) - 1


def _coded(size: int, count: int) -> int:
    """How many gaps are coded."""
    if not 0 <= count <= size <= MAX_SIZE:
        raise WireError(f"{count} positions of {size}: expected 0 <= count <= size <= {MAX_SIZE}")
    return min(count, size - count)


def _others(positions: Positions, size: int) -> Positions:
    flags = np.ones(size, np.bool_)
    flags[positions] = False
    return np.flatnonzero(flags)


def _none(blob: bytes) -> Positions:
    if blob:
        raise WireError("no bytes expected")
    return np.zeros(0, np.int64)
