"""The arithmetic of seeded noise (fedtune/noise.py), in the form that torch.compile fuses.

All of it is tensor operations on 32 bits without branches, so that a compiler keeps it in vector registers; whatever it
does, or doesn't, the bits are the same. Every kernel takes the low elements of some tensors, then the high ones that
share their words, and `at`: (3,) int32, the key k0 and k1, and the place of the first word.
"""

import torch
from torch import Tensor

_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by as if x had no sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _numbers(kind: str, count: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """The whole numbers for `count` low elements and as many high ones, int32."""
    return _numbers_at(kind, torch.arange(count, dtype=torch.int32, device=at.device) + at[2], at)


def _numbers_at(kind: str, places: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    x = places ^ at[0]
    x = (x ^ _shifted(x, 16)) * _M1
    x = ((x ^ _shifted(x, 15)) + at[1]) * _M2
    x = x ^ _shifted(x, 16)
    if kind == "rademacher":
        return ((x << 16) >> 31) | 1, (x >> 31) | 1
    x = x - (_shifted(x, 1) & 0x55555555)
    x = (x & 0x33333333) + (_shifted(x, 2) & 0x33333333)
    x = (x + _shifted(x, 4)) & 0x0F0F0F0F
    x = x + _shifted(x, 8)
    return (x & 31) - 8, ((x >> 16) & 31) - 8


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def add(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, c: Tensor) -> None:
    for (weight,), number in zip((low, high), _numbers(kind, low[0].numel(), at), strict=True):
        wide = _wide(weight)
        weight.copy_(weight.to(wide) + number.to(wide) * c.to(wide))


def accumulate(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, count: Tensor) -> None:
    for (total,), number in zip((low, high), _numbers(kind, low[0].numel(), at), strict=True):
        total.add_(number * count)


def settle(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, scale: Tensor, bound: Tensor) -> None:
    for out, start, total in (low, high):
        wide = _wide(start)
        begun = start.to(wide)
        moved = begun + total.to(wide) * scale.to(wide)
        out.copy_(torch.where((total == 0) | (begun.abs() > bound.to(wide)), begun, moved))


def render(
    kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, scale: Tensor, bound: Tensor, c: Tensor
) -> None:
    for (out, start, total), number in zip((low, high), _numbers(kind, low[0].numel(), at), strict=True):
        wide = _wide(start)
        begun = start.to(wide)
        moved = begun + total.to(wide) * scale.to(wide) + number.to(wide) * c.to(wide)
        out.copy_(torch.where(begun.abs() > bound.to(wide), begun, moved))


# bfloat16 two at a time, as one word of 32 bits: twice as fast as what the compiler makes of 16 bits beside 32.
# Elements 2j and 2j + 1 stand in word j, and their numbers in the words 2j and 2j + 1 of the hash.


def has_words(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.numel() % 4 == 0 and tensor.storage_offset() % 2 == 0


def in_words(*tensors: Tensor) -> list[Tensor]:
    """bfloat16 as int32 and int32 as int64, half as many of each."""
    return [t.view(-1).view(torch.int32 if t.dtype == torch.bfloat16 else torch.int64) for t in tensors]


def _number_pairs(kind: str, count: int, at: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The whole numbers for `count` low words and as many high ones."""
    places = (torch.arange(count, dtype=torch.int32, device=at.device) + at[2]) * 2
    one, other = _numbers_at(kind, places, at), _numbers_at(kind, places + 1, at)
    return (one[0], other[0]), (one[1], other[1])


def _opened(words: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 of each word of two bfloat16."""
    return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)


def _closed(one: Tensor, other: Tensor) -> Tensor:
    """The inverse of `_opened`, rounded to nearest, ties to even."""
    a, b = one.view(torch.int32), other.view(torch.int32)
    a = _shifted(a + 0x7FFF + (_shifted(a, 16) & 1), 16)
    return a | ((b + 0x7FFF + (_shifted(b, 16) & 1)) & -65536)


def _halved(total: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 of each int64."""
    return ((total << 32) >> 32).to(torch.int32), (total >> 32).to(torch.int32)


def add_words(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, c: Tensor) -> None:
    c = c.float()
    for (weight,), (one, other) in zip((low, high), _number_pairs(kind, low[0].numel(), at), strict=True):
        a, b = _opened(weight)
        weight.copy_(_closed(a + one.float() * c, b + other.float() * c))


def settle_words(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, scale: Tensor, bound: Tensor) -> None:
    scale, bound = scale.float(), bound.float()
    for out, start, total in (low, high):
        moved = [
            torch.where((n == 0) | (w.abs() > bound), w, w + n.float() * scale)
            for w, n in zip(_opened(start), _halved(total), strict=True)
        ]
        out.copy_(_closed(*moved))


def render_words(
    kind: str, low: list[Tensor], high: list[Tensor], at: Tensor, scale: Tensor, bound: Tensor, c: Tensor
) -> None:
    scale, bound, c = scale.float(), bound.float(), c.float()
    for (out, start, total), numbers in zip((low, high), _number_pairs(kind, low[0].numel(), at), strict=True):
        moved = [
            torch.where(w.abs() > bound, w, w + n.float() * scale + number.float() * c)
            for w, n, number in zip(_opened(start), _halved(total), numbers, strict=True)
        ]
        out.copy_(_closed(*moved))


def dot(kind: str, low: list[Tensor], high: list[Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    numbers = _numbers(kind, low[0].numel(), at)
    one, other = (
        (vector.to(_wide(vector)) * number.to(_wide(vector))).sum()
        for (vector,), number in zip((low, high), numbers, strict=True)
    )
    return one, other
