"""Weights that are a base and a sum of seeded directions, in whole numbers:

    w = w0 - 2^-k T        T = SIGMA sum_s n_s z_s,  int32, modulo 2^32        n_s: how far along direction s

z_s comes from fedtune/random_directions/hash_noise.py. A step of -lr g z is n = g / quantum of these, rounded, with
quantum = SIGMA 2^-k / lr.
Because T is a sum of whole numbers, it is the same in whatever order, blocks and rounds its terms came, on every
device: w is a function of w0 and the n_s alone. Who knows an older sum adds what changed; one copy of T takes a model
back to where it was; perturbing and going back leaves no trace, also in bfloat16, for weights are always made from w0
and T.

Per parameter that takes w0, w and two T (the shared one, and the one that a client trains on): 12 bytes in bfloat16, 16
in float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.core.errors import ConfigError, DivergedError
from fedtune.core.seeds import bits, derive_seed
from fedtune.random_directions.hash_noise import LARGEST, SIGMA, Table, accumulate_, check_kind, render_

FINEST = 2.0**-16  # what a slope is rounded to at most, loss per unit of z, unless a method needs it otherwise
SIGMAS = 8  # T stays below its limit with that many standard deviations of its largest elements to spare

Record = Mapping[int, int]  # seed -> n
Names = tuple[str, ...]  # of parameters


@dataclass(frozen=True)
class Space:
    """In which directions weights move, and in what steps.

    Attributes:
        lr: learning rate, of slopes in loss per unit of z.
        noise: the distribution of z, "normal" or "rademacher".
        sparsity: the share of each parameter's weights, those of largest magnitude in w0, that stay as they are
            (Sparse-MeZO, Liu et al. 2024, arXiv:2402.15751).
        finest: what a slope is rounded to at most, loss per unit of z.

    Raises:
        ConfigError: for a value out of range.
    """

    lr: float
    noise: str = "normal"
    sparsity: float = 0.0
    finest: float = FINEST

    def __post_init__(self) -> None:
        check_kind(self.noise)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr}: expected a number above 0")
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity}: expected a share from 0 up to, but not, 1")
        if not 2.0**-64 <= self.finest <= 1:
            raise ConfigError(f"finest={self.finest}: expected a number from 2^-64 to 1")

    @cached_property
    def exponent(self) -> int:
        """The exponent k: one n moves a weight by 2^-k times the whole number that z is made of."""
        return math.ceil(-math.log2(self.lr * self.finest / SIGMA[self.noise]))

    @cached_property
    def quantum(self) -> float:
        """The slope, in loss per unit of z, that is one n."""
        return math.ldexp(SIGMA[self.noise] / self.lr, -self.exponent)

    @cached_property
    def limit(self) -> int:
        """The largest |n| of one slope: nothing larger could be added even once."""
        return (2**31 - 1) // LARGEST[self.noise]

    def counts(self, slopes: np.ndarray) -> np.ndarray:
        """Slopes (loss per unit of z) as n, int64, rounded to the nearest and cut to +-limit."""
        return np.rint(np.clip(np.asarray(slopes, np.float64) / self.quantum, -self.limit, self.limit)).astype(np.int64)

    def slopes(self, counts: np.ndarray) -> np.ndarray:
        """The inverse of `counts`, float64."""
        return np.asarray(counts, np.float64) * self.quantum

    def check(self, counts: np.ndarray) -> None:
        """Check that the sum of so many steps along every direction stays within int32.

        Raises:
            DivergedError: if a sum of so many steps might not fit 32 bits.
        """
        # An element of T is a sum of independent bounded terms, so Hoeffding's bound holds for it
        length = float(np.linalg.norm(np.asarray(counts, np.float64)))
        room = 2**31 / (SIGMAS * SIGMA[self.noise])
        if not length < room:
            raise DivergedError(
                f"the slopes add up to a length of {length * self.quantum:.3g}; at lr={self.lr:g} there is room for "
                f"{room * self.quantum:.3g}: the run has diverged. Start a new one with a lower lr"
            )


def pool(pool_seed: int, count: int) -> list[int]:
    """Make `count` seeds, each a function of `pool_seed` and its place."""
    return [int(seed) for seed in bits(derive_seed(pool_seed, "pool"), count)]


class SeededWeights:
    """The trainable tensors of one model as w0 - 2^-k T.

    The tensors, and those of w0 where they are on their device, move into tables of rows, one for each dtype, so that
    one kernel goes over all of them. Nothing else about them changes.

    Attributes:
        live: the model's tensors.
        start: w0, by the same names, on their device.
        passes: how many directions have been added to T so far, for those who count work.

    Args:
        live: the model's tensors, which are written to.
        start: w0, by the same names.
    """

    def __init__(self, live: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]):
        self.live = dict(live)
        self.passes = 0
        self.space: Space | None = None
        self._parts = [_Part(names, self.live, start) for names in _alike(self.live, start)]
        self.start = {name: tensor for part in self._parts for name, tensor in part.views(part.start).items()}
        self._known: dict[Names, dict[int, int]] = {}  # the n that `shared` is the sum of, by what they move

    def move_to(self, space: Space, record: Record) -> None:
        """Make the weights those of `record`, by way of what changed or from w0, whichever is less work.

        Raises:
            DivergedError: if the sum might not fit.
        """
        self.move_blocks(space, {tuple(self.live): record})

    def move_blocks(self, space: Space, records: Mapping[Names, Record]) -> None:
        """The same where each group of parameters, named by its key, has directions of its own.

        Args:
            records: of disjoint groups; parameters that are in none are those of w0.
        """
        for record in records.values():
            space.check(np.fromiter(record.values(), np.float64, len(record)))
        if self.space is None or self.space.noise != space.noise or self._known.keys() != records.keys():
            self._known = {names: {} for names in records}
            for part in self._parts:
                for half in part.shared:
                    half.zero_()
        # The same n mean another distance under another lr, but T doesn't depend on it
        self.space = space
        for names, record in records.items():
            record = {seed: int(count) for seed, count in record.items() if count}
            known = self._known[names]
            changed = {
                seed: delta
                for seed in record.keys() | known.keys()
                if (delta := record.get(seed, 0) - known.get(seed, 0))
            }
            anew = len(changed) > len(record)
            for part in self._parts:
                mine = [name for name in names if name in part.shapes]
                if anew:
                    for name in mine:
                        for half in part.shared:
                            half[part.table.spans[name]] = 0
                accumulate_(part.table, part.shared, *_apart(record if anew else changed), space.noise, mine)
            self.passes += len(record if anew else changed)
            self._known[names] = record
        self.restore()

    def restore(self) -> None:
        """Take back all steps since `move_to`."""
        for part in self._parts:
            for own, shared in zip(part.own, part.shared, strict=True):
                own.copy_(shared)
        self.render()

    def step(self, record: Record) -> None:
        """Go n along each direction. The model's tensors follow at the next `render`."""
        assert self.space is not None
        for part in self._parts:
            accumulate_(part.table, part.own, *_apart(record), self.space.noise)
        self.passes += len(record)

    def render(self, seed: int | None = None, c: float = 0.0) -> None:
        """Set the model's tensors to w, or to w + c z.

        Args:
            c: taken to 20 bits (`fedtune.random_directions.hash_noise.coefficient`).
        """
        assert self.space is not None
        scale = -math.ldexp(1.0, -self.space.exponent)
        for part in self._parts:
            bound = part.bound(self.space.sparsity)
            render_(part.table, part.out, part.start, part.own, scale, seed, c, self.space.noise, bound)

    def totals(self) -> dict[str, Tensor]:
        """T as it stands, (by name) int32; a copy."""
        return {
            name: part.table.total(part.own, name).view(shape)
            for part in self._parts
            for name, shape in part.shapes.items()
        }


class _Part:
    """The tensors of one dtype and device."""

    def __init__(self, names: Sequence[str], live: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]):
        first = live[names[0]]
        self.shapes = {name: live[name].shape for name in names}
        self.table = Table({name: live[name].numel() for name in names}, first.device)
        self.out = self.table.zeros(first.dtype)
        self.start = self.table.zeros(start[names[0]].dtype)
        self.shared, self.own = self.table.sums(), self.table.sums()
        self._bound: tuple[float, Tensor] | None = None
        for table, given in ((self.start, start), (self.out, live)):
            for name, view in self.views(table).items():
                view.copy_(given[name].data)
                if given[name].device == view.device:
                    given[name].data = view

    def views(self, table: Tensor) -> dict[str, Tensor]:
        return {name: self.table.part(table, name).view(shape) for name, shape in self.shapes.items()}

    def bound(self, sparsity: float) -> Tensor | None:
        """The largest magnitude that still moves, (rows, 1) float64; None where all do."""
        if not sparsity:
            return None
        if self._bound is None or self._bound[0] != sparsity:
            each = [_threshold(tensor, sparsity) for tensor in self.views(self.start).values()]
            by_parameter = torch.tensor(each, dtype=torch.float64, device=self.table.device)
            self._bound = sparsity, self.table.spread(by_parameter[:, None])
        return self._bound[1]


def _alike(live: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of those that can share tables."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in live.items():
        groups.setdefault((tensor.dtype, start[name].dtype, tensor.device), []).append(name)
    return list(groups.values())


def _apart(record: Record) -> tuple[list[int], list[int]]:
    return list(record), list(record.values())


def _threshold(start: Tensor, sparsity: float) -> float:
    """The magnitude of the largest weight that still moves, which is the k-th smallest of all."""
    kept = start.numel() - math.floor(sparsity * start.numel())
    if kept == start.numel():
        return math.inf
    # On the CPU, once a run: a GPU has no k-th smallest among its deterministic operations
    return float(start.abs().flatten().float().cpu().kthvalue(kept).values)


def steps_record(seeds: Sequence[int], counts: Sequence[int]) -> dict[int, int]:
    """Steps as a record: what was taken along one direction twice is added up."""
    record: dict[int, int] = {}
    for seed, count in zip(seeds, counts, strict=True):
        record[seed] = record.get(seed, 0) + int(count)
    return record
