"""The arithmetic of seeded noise (fedtune/random_directions/hash_noise.py), in the form that torch.compile fuses.

All of it is tensor operations on 32 bits without branches, so that a compiler keeps it in vector registers; whatever it
does, or doesn't, the bits are the same. Tensors come as rows of SPAN elements. With each row come its parameter's
`key`, (rows, 2) int32, k0 and k1, and `word`, (rows, 1) int32, STEP times the number of its first word; of the others
it is that plus `places`, STEP times 0 ... SPAN / 2 - 1, all modulo 2^32: so that the hash's first multiplication is no
work here, and to load them is faster than to make them. `even` and `odd` are (rows, SPAN / 2) int32: what belongs to
the elements with an even and an odd place.

Weights come two at a time, (rows, SPAN / 2): bfloat16 as int32 and float32 as int64, so that both elements are at
hand where their word of the hash is. Other types come as they are, (rows, SPAN), and take longer.
"""

import torch
from torch import Tensor

SPAN = 1024  # elements a row
HALF = SPAN // 2
STEP = 0x9E3779B1  # what the words' numbers are multiplied by: 2^32 over the golden ratio, the odd number nearest
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def in_pairs(table: Tensor) -> Tensor:
    """A table of weights in the form in which kernels take it: a view."""
    pair = {torch.bfloat16: torch.int32, torch.float32: torch.int64}.get(table.dtype)
    return table if pair is None else table.view(pair)


def _opened(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd elements, in the type in which sums run."""
    if x.dtype == torch.int32:
        return (x << 16).view(torch.float32), (x & -65536).view(torch.float32)
    if x.dtype == torch.int64:
        return ((x << 32) >> 32).to(torch.int32).view(torch.float32), (x >> 32).to(torch.int32).view(torch.float32)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = x.view(-1, HALF, 2).to(wide)
    return pairs[:, :, 0], pairs[:, :, 1]


def _closed(even: Tensor, odd: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_opened`; rounded, where it has to be, to nearest and ties to even."""
    if dtype == torch.int32:
        a, b = even.view(torch.int32), odd.view(torch.int32)
        a = _shifted(a + 0x7FFF + ((a >> 16) & 1), 16)
        return a | ((b + 0x7FFF + ((b >> 16) & 1)) & -65536)
    if dtype == torch.int64:
        a, b = even.view(torch.int32).to(torch.int64), odd.view(torch.int32).to(torch.int64)
        return (a & 0xFFFFFFFF) | (b << 32)
    return torch.stack((even, odd), 2).flatten(1).to(dtype)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by as if x had no sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def words(places: Tensor, key: Tensor, word: Tensor) -> Tensor:
    """The words of the hash, (rows, SPAN / 2) int32."""
    x = (word + places) ^ key[:, :1]
    x = (x ^ _shifted(x, 16)) * _M1
    x = ((x ^ _shifted(x, 15)) + key[:, 1:]) * _M2
    return x ^ _shifted(x, 16)


def _numbers(kind: str, places: Tensor, key: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
    """The whole numbers that z is made of, for the even and the odd elements, int32."""
    x = words(places, key, word)
    if kind == "rademacher":
        return ((x << 16) >> 31) | 1, (x >> 31) | 1
    # The bits set in each half; here no shift brings in a sign that stays
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x & 31) - 8, ((x >> 16) & 31) - 8


def accumulate(
    kind: str, places: Tensor, counts: Tensor, keys: Tensor, word: Tensor, even: Tensor, odd: Tensor
) -> None:
    """Add counts[s] times direction s to `even` and `odd`, for every seed s.

    Args:
        counts: (seeds,) int32.
        keys: (rows, seeds, 2).
    """
    a, b = even, odd
    for place in range(keys.shape[1]):
        one, other = _numbers(kind, places, keys[:, place], word)
        a, b = a + one * counts[place], b + other * counts[place]
    even.copy_(a)
    odd.copy_(b)


def settle(scale: Tensor, out: Tensor, start: Tensor, even: Tensor, odd: Tensor, bound: Tensor | None = None) -> None:
    moved = []
    for begun, total in zip(_opened(start), (even, odd), strict=True):
        there = begun + total.to(begun.dtype) * scale.to(begun.dtype)
        moved.append(_held(torch.where(total == 0, begun, there), begun, bound))
    out.copy_(_closed(moved[0], moved[1], out.dtype))


def render(
    kind: str,
    places: Tensor,
    scale: Tensor,
    c: Tensor,
    key: Tensor,
    word: Tensor,
    out: Tensor,
    start: Tensor,
    even: Tensor,
    odd: Tensor,
    bound: Tensor | None = None,
) -> None:
    moved = []
    for begun, total, number in zip(_opened(start), (even, odd), _numbers(kind, places, key, word), strict=True):
        there = begun + total.to(begun.dtype) * scale.to(begun.dtype) + number.to(begun.dtype) * c.to(begun.dtype)
        moved.append(_held(there, begun, bound))
    out.copy_(_closed(moved[0], moved[1], out.dtype))


def _held(moved: Tensor, start: Tensor, bound: Tensor | None) -> Tensor:
    """What is larger than its row's bound, (rows, 1), stays where it started."""
    return moved if bound is None else torch.where(start.abs() > bound.to(start.dtype), start, moved)


def dot(kind: str, places: Tensor, keys: Tensor, word: Tensor, vector: Tensor) -> Tensor:
    """The dot product of a vector with every direction, (seeds,), in the type in which sums run; `keys` as for
    `accumulate`."""
    parts = _opened(vector)
    found = []
    for place in range(keys.shape[1]):
        one, other = _numbers(kind, places, keys[:, place], word)
        found.append((parts[0] * one.to(parts[0].dtype) + parts[1] * other.to(parts[1].dtype)).sum())
    return torch.stack(found)
