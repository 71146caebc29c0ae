"""Seeded noise: directions that every device regenerates alike from a seed, and arithmetic that never holds one.

A direction z has one value for every element of every parameter. Elements 2j and 2j + 1 of a parameter are made from
word j of a counter-based hash keyed by the seed and the parameter's name, and so depend on nothing else: not on the
device, its generator, the number of threads, or how the work is cut up.

    x = (0x9e3779b1 j) ^ k0;  x = (x ^ x >> 16) * 0x7feb352d;  x = ((x ^ x >> 15) + k1) * 0x846ca68b;  x = x ^ x >> 16

in 32 bits, (k0, k1) = mix(mix(seed) + hash(name)). The even element has the word's low half and the odd one its high,
which halves the cost of what is otherwise bound by arithmetic. The mixing is that of `lowbias32`
(https://nullprogram.com/blog/2018/07/31/) with half of the key put in between, as without it two seeds would give the
same values in another order; mix is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Words are counted
in steps of 2^32 over the golden ratio, as there: counted by ones, words 96 or 1,568 apart had bits in common, since two
multiplications don't mix numbers of which only the low bits differ (tests/test_randomness.py). This third one costs
nothing, for what is multiplied is a table that is made once.

Values are small whole numbers times 1 / SIGMA, of mean 0 and variance 1:

    rademacher   the half's top bit: -1 or 1                                    kurtosis 1
    normal       (bits set in the half - 8) / 2, -4 ... 4: Binomial(16, 1/2)      kurtosis 2.875; at most 0.098 from the
                 distribution function of N(0, 1), for it has steps of 1/2; odd moments 0

So c z is exact in float32 for a c of 20 bits (`coefficient` rounds to that, by 2^-21 at most), w + c z is rounded once,
and whether a device fuses multiplication and addition changes nothing. Sums of directions are kept in int32, where
they are exact and in no order: fedtune/random_directions/weights.py.

One source serves all: torch.compile makes a fused kernel of it, on a CPU by a C++ compiler and on CUDA by Triton.
Where there is none, or with FEDTUNE_COMPILE=0, the same lines run eagerly in pieces that fit the cache: the same bits,
but slowly (docs/benchmarks.md has the figures).
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.core.errors import ConfigError
from fedtune.core.text import first_line
from fedtune.random_directions import kernels
from fedtune.random_directions.kernels import HALF, SPAN

SIGMA = {"normal": 2.0, "rademacher": 1.0}  # the standard deviation of the whole numbers that z is made of
LARGEST = {"normal": 8, "rademacher": 1}  # the largest of these numbers

EAGER = 64  # rows at a time without a compiler: a few tables of that size stay in the cache
BLOCK = 1024  # rows at a time where many directions are added up: read from memory once for all of them
TOGETHER = 8  # directions added up in one pass over a block

# Whole numbers of directions, int32 (rows, SPAN / 2): of the even elements, and of the odd
Sums = tuple[Tensor, Tensor]


def check_kind(kind: str) -> str:
    """The name of a distribution of directions, once it is known to be one.

    Raises:
        ConfigError: if there is no such distribution.
    """
    if kind not in SIGMA:
        raise ConfigError(f"noise={kind} is not known: expected {' or '.join(SIGMA)}")
    return kind


def coefficient(value: float) -> float:
    """Round `value` to 20 significant bits, so that its product with any value of z is exact in float32."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 20)), exponent - 20)


class Table:
    """Parameters end to end in rows of SPAN elements, each beginning a row, so that one kernel goes over all of them.

    Attributes:
        rows: of the whole table.
        spans: by name, the rows that a parameter has.

    Args:
        sizes: elements of each parameter, by name; the last of its rows is padded.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device | str = "cpu"):
        self.sizes = dict(sizes)
        self.device = torch.device(device)
        self.spans: dict[str, slice] = {}
        start = 0
        for name, size in self.sizes.items():
            stop = start + -(-size // SPAN)
            self.spans[name] = slice(start, stop)
            start = stop
        self.rows = start

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Zeros of the table's own shape, (rows, SPAN)."""
        return torch.zeros(self.rows, SPAN, dtype=dtype, device=self.device)

    def sums(self) -> Sums:
        """A sum of no directions."""
        one, other = torch.zeros(2, self.rows, HALF, dtype=torch.int32, device=self.device)
        return one, other

    def part(self, table: Tensor, name: str) -> Tensor:
        """The elements of one parameter, (size,), as a view."""
        return table[self.spans[name]].view(-1)[: self.sizes[name]]

    def total(self, sums: Sums, name: str) -> Tensor:
        """The elements of one parameter, (size,) int32, put together."""
        span = self.spans[name]
        return torch.stack([half[span] for half in sums], 2).view(-1)[: self.sizes[name]]

    @cached_property
    def word(self) -> Tensor:
        """STEP times the number of each row's first word, (rows, 1) int32."""
        counted = [torch.arange(span.stop - span.start) * HALF for span in self.spans.values()]
        return _steps(torch.cat(counted))[:, None].to(self.device) if counted else torch.zeros(0, 1)

    @cached_property
    def owner(self) -> Tensor:
        """The place of each row's parameter, (rows,) int64."""
        lengths = torch.tensor([span.stop - span.start for span in self.spans.values()])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.device)

    def keys(self, seeds: Sequence[int]) -> Tensor:
        """What the hash is keyed by, (seeds, parameters, 2) int32.

        Args:
            seeds: whole numbers of which the lowest 64 bits count.
        """
        given = np.array([int(seed) & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
        mixed = _mix(_mix(given)[:, None] + _hashes(tuple(self.sizes)))
        return torch.from_numpy(mixed.astype("<u8").view("<i4").reshape(*mixed.shape, 2)).to(self.device)

    def spread(self, by_parameter: Tensor, rows: slice = slice(None)) -> Tensor:
        """Give every row of the table its parameter's numbers: (..., parameters, n) becomes (rows, ..., n)."""
        return by_parameter.movedim(-2, 0)[self.owner[rows]]


@torch.no_grad()
def accumulate_(
    table: Table,
    sums: Sums,
    seeds: Sequence[int],
    counts: Sequence[int],
    kind: str = "normal",
    names: Sequence[str] | None = None,
) -> None:
    """Add directions in whole numbers, sums += sum_s counts[s] SIGMA z_s, in place and exact modulo 2^32.

    One pass over memory serves all seeds.

    Args:
        names: the parameters that are added to; None takes all.
    """
    check_kind(kind)
    todo = [(seed, count) for seed, count in zip(seeds, counts, strict=True) if count]
    keys = table.keys([seed for seed, _ in todo])
    amounts = torch.tensor([count for _, count in todo], dtype=torch.int64).to(torch.int32)
    for rows, some in _blocks(table, names, len(todo)):
        given = [table.spread(keys[some], rows), table.word[rows], *(half[rows] for half in sums)]
        _each(kernels.accumulate, [kind, _places(table.device), amounts[some]], given)


@torch.no_grad()
def render_(
    table: Table,
    out: Tensor,
    start: Tensor,
    sums: Sums,
    scale: float,
    seed: int | None = None,
    c: float = 0.0,
    kind: str = "normal",
    bound: Tensor | None = None,
) -> None:
    """Make weights of sums, out = start + scale sums + c z where |start| <= bound, and start elsewhere.

    Args:
        out: (rows, SPAN), floating; rounded to once, at the end, from float32 (or from float64, if `start` is).
        start: (rows, SPAN), floating.
        scale: a power of two or its negative, so that nothing is rounded by it.
        seed: of the direction; None leaves the last term out.
        c: taken to 20 bits (`coefficient`).
        bound: (rows, 1) float64; None holds nothing back.
    """
    given = [kernels.in_pairs(out), kernels.in_pairs(start), *sums, *([] if bound is None else [bound])]
    if seed is None:
        _each(kernels.settle, [_scalar(scale)], given)
        return
    step = _scalar(coefficient(c) / SIGMA[check_kind(kind)])
    keys = table.spread(table.keys([seed])[0])
    _each(kernels.render, [kind, _places(table.device), _scalar(scale), step], [keys, table.word, *given])


@torch.no_grad()
def project(vector: Tensor, seeds: Sequence[int], name: str, kind: str = "normal") -> Tensor:
    """The dot product <z_s, vector> for every seed, (S,) float64.

    Sums run in float32 by blocks, so its last bits are a device's own.

    Args:
        vector: of the parameter `name`, floating, contiguous.
    """
    check_kind(kind)
    table = Table({name: vector.numel()}, vector.device)
    pairs, found = kernels.in_pairs(_rows(vector)), torch.zeros(len(seeds), dtype=torch.float64)
    keys = table.keys(seeds)
    for rows, some in _blocks(table, None, len(seeds)):
        for part in _each(
            kernels.dot, [kind, _places(table.device)], [table.spread(keys[some], rows), table.word[rows], pairs[rows]]
        ):
            found[some] += part.cpu()
    return found / SIGMA[kind]


def _blocks(table: Table, names: Sequence[str] | None, seeds: int) -> Iterator[tuple[slice, slice]]:
    """Which rows to take with which seeds: a block goes through all seeds before the next is read."""
    for span in _joined([table.spans[name] for name in (table.sizes if names is None else names)]):
        block = BLOCK if seeds > 1 else max(table.rows, 1)
        for start in range(span.start, span.stop, block):
            rows = slice(start, min(start + block, span.stop))
            whole = seeds - seeds % TOGETHER
            for first in range(0, whole, TOGETHER):
                yield rows, slice(first, first + TOGETHER)
            for first in range(whole, seeds):
                yield rows, slice(first, first + 1)


@lru_cache(maxsize=1 << 10)
def _hashes(names: tuple[str, ...]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, of uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _rows(tensor: Tensor) -> Tensor:
    """(rows, SPAN): a view where that divides it, a padded copy elsewhere."""
    flat = tensor.view(-1)
    missing = -len(flat) % SPAN
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, SPAN)


def _joined(spans: Sequence[slice]) -> list[slice]:
    """Neighbours as one."""
    found: list[slice] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and found[-1].stop == span.start:
            found[-1] = slice(found[-1].start, span.stop)
        else:
            found.append(span)
    return found


def _each(kernel: Callable[..., Any], settings: Sequence[str | Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    """Run a kernel over tables of as many rows; what it returned, in order."""
    rows, device = len(tables[0]), tables[0].device
    given = [setting if isinstance(setting, str) else setting.to(device) for setting in settings]
    # A single row would be compiled for itself
    fast = _compiled(kernel, device.type) if rows > 1 else None
    if fast:
        return [result for result in [fast(given, tables)] if result is not None]
    step = EAGER if device.type == "cpu" else max(rows, 1)
    pieces = ([table[start : start + step] for table in tables] for start in range(0, rows, step))
    return [result for piece in pieces if (result := kernel(*given, *piece)) is not None]


@lru_cache(maxsize=1 << 10)
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@cache
def _places(device: torch.device) -> Tensor:
    return _steps(torch.arange(HALF)).to(device)


def _steps(numbers: Tensor) -> Tensor:
    """STEP times these whole numbers below 2^31, modulo 2^32, int32."""
    return (numbers * kernels.STEP).to(torch.int32)


@cache
def _compiled(kernel: Callable[..., Any], device: str) -> Callable[..., Any] | None:
    """The kernel as machine code for any number of rows; None where nothing can make it."""
    if os.environ.get("FEDTUNE_COMPILE") == "0" or not _compiler(device):
        return None
    from torch._dynamo import config, mark_dynamic

    config.recompile_limit = max(config.recompile_limit, 64)  # a version for each kind and dtype; 8 would be allowed
    # Never store a direction to read it again, however long the sum that makes it
    options: Any = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 10_000}
    made = torch.compile(kernel, dynamic=False, fullgraph=True, options=options)
    failed = False

    def run(settings: Sequence[str | Tensor], tables: Sequence[Tensor]) -> Any:
        nonlocal failed
        if not failed:
            try:
                for table in tables:
                    mark_dynamic(table, 0)
                return made(*settings, *tables)
            except Exception as error:  # whatever a compiler can fail with; it does before anything was computed
                failed = True
                reason = first_line(error)
                logging.getLogger("fedtune").warning("noise runs uncompiled, slowly: %s", reason)
        return kernel(*settings, *tables)

    return run


def _compiler(device: str) -> bool:
    if device == "cuda":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    named = os.environ.get("CXX")
    return device == "cpu" and any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"]))
