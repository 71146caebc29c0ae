"""Packed: every bit of every tensor, with integers at the least bits that their range needs.

For messages of a few kilobytes, where raw's header of each tensor's name and about 65 bytes, and its 32 or 64 bits an
integer, are a large part: seeds down, indices and quantized slopes up. Floats are as many bytes as in raw.

    blob      "fp", version 1 (one byte), number of tensors (varint); every tensor's head, by name; every body
    head      length of the name (varint), name (UTF-8), dtype (one byte, its place in `DTYPES`), number of dimensions
              (varint), each dimension (varint); of integers besides: bits a value b (one byte) and, if b is less than
              the dtype's own, the least value (zigzag varint)
    body      floats: the values, little-endian; bool: 1 bit each; integers: value - least at b bits each, or the
              values, little-endian. Bits fill a byte from its lowest, and the last byte ends in zeros

Bytes: 4, a head of 4 + len(name) for a vector of up to 127 floats (of integers 1 to 11 more), and ceil(n b / 8). b is
what the largest value - least needs: ceil(log2(max - min + 1)). Integers that wouldn't get smaller stay as they are, so
a body and its least value are never more than the tensor's own bytes.

Equal values need 0 bits, but then a few bytes could ask their receiver for a terabyte. So they get 0 bits up to `FREE`
values and 1 beyond. The head of 256 int64 is 8 bytes or more (7 without a name, which one tensor can be), and so no
blob decodes to more than 256 times its length.

Every dictionary of tensors has one blob, and `decode` takes no other: what it returns, encoded again, is what came.

Least value and b are "frame of reference" (Goldstein, Ramakrishnan and Shaft, Compressing Relations and Indexes, ICDE
1998; arXiv:1209.2137), once per tensor where they have it once per block: messages are short.
Varint and zigzag: fedtune/codecs/bytes.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtune.codecs.bytes import Format, Reader, unzigzag, varint, zigzag
from fedtune.core.errors import WireError
from fedtune.core.protocol import Tensors, describe

Array = npt.NDArray[Any]

FORMAT = Format(b"fp")
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # a dtype's place is its code on the wire: append only
FREE = 256  # values that may all be equal and take no bits
MAX_DIMENSIONS = 64  # far beyond use; numpy stops here too
CHUNK = 1 << 15  # values whose bits are spread out at once; a multiple of 8, so that a chunk ends with a byte


@dataclass(frozen=True)
class Packed:
    """Lossless; for integers in a known range."""

    lossless: ClassVar[bool] = True

    def encode(self, tensors: Tensors, key: int) -> bytes:
        """Write floats as they are and whole numbers at the bits that their range needs, after a short head for each
        tensor.

        Raises:
            WireError: naming the tensor of a dtype, name or shape that the format has no place for.
        """
        heads, bodies = [FORMAT.head, varint(len(tensors))], []
        for name in sorted(tensors):
            head, body = _encode(name, tensors[name])
            heads.append(head)
            bodies.append(body)
        return b"".join(heads + bodies)

    def decode(self, blob: bytes) -> Tensors:
        try:
            return _decode(blob)
        except WireError as error:
            raise WireError(f"not a packed blob ({len(blob)} bytes): {error}") from None


@dataclass(frozen=True)
class _Head:
    """What is said of a tensor before its body."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: int
    bits: int  # a value; the dtype's own if they are as they are
    least: int

    @property
    def body_bytes(self) -> int:
        return (self.values * self.bits + 7) // 8


def _encode(name: str, tensor: Tensor) -> tuple[bytes, bytes]:
    """A tensor's head and body."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(map(_named, DTYPES))
        raise WireError(f"tensor '{name}' is {describe(tensor)}, and codec=packed has {known}; codec=raw has more")
    try:
        text = name.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"the name {name!r} of a tensor is not text that UTF-8 has: {error.reason}") from error
    shape = tuple(tensor.shape)
    values = _values(shape, tensor.dtype, f"tensor '{name}'")
    head = varint(len(text)) + text + bytes([DTYPES.index(tensor.dtype)])
    head += b"".join(map(varint, (len(shape), *shape)))
    flat = tensor.detach().cpu().contiguous().flatten()
    if tensor.dtype == torch.bool:
        return head, np.packbits(flat.numpy(), bitorder="little").tobytes()
    array: Array = flat.view(_integer(tensor.dtype)).numpy()
    if tensor.dtype.is_floating_point:
        return head, _little(array).tobytes()
    bits, least = _plan(array)
    head += bytes([bits])
    if bits == 8 * array.itemsize:
        return head, _little(array).tobytes()
    return head + varint(zigzag(least)), _pack(array, bits, least, (values * bits + 7) // 8)


def _decode(blob: bytes) -> Tensors:
    reader = FORMAT.reader(blob)
    heads: list[_Head] = []
    for _ in range(reader.varint("the number of tensors")):
        heads.append(read_head(reader))
        if len(heads) > 1 and heads[-1].name <= heads[-2].name:
            one, other = heads[-2].name[:64], heads[-1].name[:64]
            raise WireError(f"names should come once and in order, got {other!r} after {one!r}")
    # Before anything of the size that the heads declare is made
    declared = sum(head.body_bytes for head in heads)
    if declared != reader.left:
        raise WireError(f"{len(heads)} tensors should have {declared} bytes of values, got {reader.left}")
    bodies: Array = np.frombuffer(blob, np.uint8)
    tensors: Tensors = {}
    place = reader.place
    for head in heads:
        tensors[head.name] = _read_body(head, bodies[place : place + head.body_bytes])
        place += head.body_bytes
    return tensors


def read_head(reader: Reader) -> _Head:
    text = reader.take(reader.varint("the length of a name"), "a name")
    try:
        name = text.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"a name is not UTF-8: {error.reason} at its byte {error.start}") from None
    what = f"tensor {name[:64]!r}"
    code = reader.take(1, f"the dtype of {what}")[0]
    if code >= len(DTYPES):
        raise WireError(f"{what}: no dtype has code {code}, the last is {len(DTYPES) - 1}")
    dtype = DTYPES[code]
    dimensions = reader.varint(f"the number of dimensions of {what}")
    # Before the loop, so that it isn't the loop that finds out
    _expect_dimensions(dimensions, what)
    shape = tuple(reader.varint(f"a dimension of {what}") for _ in range(dimensions))
    values = _values(shape, dtype, what)
    if dtype == torch.bool:
        return _Head(name, dtype, shape, values, 1, 0)
    width = 8 * dtype.itemsize
    if dtype.is_floating_point:
        return _Head(name, dtype, shape, values, width, 0)
    bits = reader.take(1, f"the bits of {what}")[0]
    if bits > width:
        raise WireError(f"{what}: {bits} bits a value, but {_named(dtype)} has {width}")
    if bits == 0 and values > FREE:
        raise WireError(f"{what}: {values} values at 0 bits, at most {FREE} may be")
    least = 0
    if bits < width:
        least = unzigzag(reader.varint(f"the least value of {what}"))
        limits = torch.iinfo(dtype)
        if not limits.min <= least <= limits.max:
            raise WireError(f"{what}: its least value {least} is no {_named(dtype)}")
    return _Head(name, dtype, shape, values, bits, least)


def _read_body(head: _Head, body: Array) -> Tensor:
    what = f"tensor {head.name[:64]!r}"
    if (filled := head.values * head.bits % 8) and body[-1] >> filled:
        raise WireError(f"{what}: the bits after its last value should be zero")
    if head.dtype == torch.bool:
        flags = np.unpackbits(body, count=head.values, bitorder="little").view(np.bool_)
        return torch.from_numpy(flags).reshape(head.shape)
    integer = _integer(head.dtype)
    native = np.dtype(str(integer).removeprefix("torch."))
    if head.bits == 8 * native.itemsize:
        array = body.copy().view(native.newbyteorder("<")).astype(native, copy=False)
    else:
        array = _unpack(body, head.values, head.bits, np.dtype(f"u{native.itemsize}"))
        top, limit = head.least + int(array.max(initial=0)), int(np.iinfo(native).max)
        if top > limit:
            raise WireError(f"{what}: its largest value {top} is no {_named(head.dtype)}")
        array += _wrapped(head.least, array.dtype)
        array = array.view(native)
    if not head.dtype.is_floating_point and (plan := _plan(array)) != (head.bits, head.least):
        raise WireError(
            f"{what}: {head.bits} bits a value above {head.least}, where {plan[0]} above {plan[1]} are what it needs"
        )
    return torch.from_numpy(array).view(head.dtype).reshape(head.shape)


def _plan(array: Array) -> tuple[int, int]:
    """Bits a value and the least value: the one choice that both sides make for these integers."""
    as_they_are = 8 * array.itemsize, 0
    if not array.size:
        return as_they_are
    least = int(array.min())
    bits = (int(array.max()) - least).bit_length()
    if bits == 0 and array.size > FREE:
        bits = 1
    smaller = (array.size * bits + 7) // 8 + len(varint(zigzag(least))) < array.nbytes
    return (bits, least) if smaller else as_they_are


def _pack(array: Array, bits: int, least: int, length: int) -> bytes:
    """`value - least` at `bits` bits each. A bit takes a byte meanwhile, hence in chunks."""
    unsigned = array.view(f"u{array.itemsize}")
    packed = np.empty(length, np.uint8)
    for start in range(0, array.size if bits else 0, CHUNK):
        # Wraps around for ranges beyond the signed half, to the right unsigned difference
        above = _little(unsigned[start : start + CHUNK] - _wrapped(least, unsigned.dtype))
        spread = np.unpackbits(above.view(np.uint8), bitorder="little").reshape(len(above), -1)[:, :bits]
        piece = np.packbits(spread, bitorder="little")
        packed[start * bits // 8 :][: len(piece)] = piece
    return packed.tobytes()


def _unpack(body: Array, values: int, bits: int, dtype: np.dtype[Any]) -> Array:
    """What `_pack` packed, without its least value."""
    unpacked = np.zeros(values, dtype)
    for start in range(0, values if bits else 0, CHUNK):
        some = min(CHUNK, values - start)
        spread = np.zeros((some, 8 * dtype.itemsize), np.uint8)
        piece = body[start * bits // 8 :][: (some * bits + 7) // 8]
        flat = np.unpackbits(piece, count=some * bits, bitorder="little")
        spread[:, :bits] = flat.reshape(some, bits)
        unpacked[start : start + some] = np.packbits(spread, bitorder="little").view(dtype.newbyteorder("<"))
    return unpacked


def _values(shape: Sequence[int], dtype: torch.dtype, what: str) -> int:
    """The product of the dimensions.

    Raises:
        WireError: if torch can't have such a shape, as it can't with some empty ones whose strides overflow.
    """
    _expect_dimensions(len(shape), what)
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise WireError(f"{what}: its dimensions {tuple(shape)} are more than a tensor can have")
    return math.prod(shape)


def _expect_dimensions(dimensions: int, what: str) -> None:
    if dimensions > MAX_DIMENSIONS:
        raise WireError(f"{what}: {dimensions} dimensions, at most {MAX_DIMENSIONS} may be")


def _integer(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype whose bits are this one's: numpy has no bfloat16."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize] if dtype.is_floating_point else dtype


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _little(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _wrapped(value: int, dtype: np.dtype[Any]) -> Any:
    """A number modulo the unsigned dtype's range, as a scalar of it."""
    return dtype.type(value % (1 << 8 * dtype.itemsize))
