"""Which weights to adapt and with what ranks: every selection that could be the best of some device.

A multiple-choice knapsack: a weight j is left alone or adapted with one of the ranks, for its value[j, r]. What that
takes is counted in two ways, because memory and time weigh them differently and each device has its own limits of both:

    P = sum r_j (rows_j + columns_j)                              trainable numbers
    T = sum (input_bytes columns_j + inner_bytes r_j)             bytes per token, over the adapted weights
    l = min block_j                                               where back-propagation may end

So the answer for all devices is one set of selections, made without knowing any limit. A device takes the best of those
that fit it, and with more of anything at least the same ones do.

Weights are gone through from the last block to the first. The list of selections keeps those that no other one beats in
P, T and value at once (Nemhauser and Ullmann, 1969); one with a lower l than another gains nothing from it, so they
are compared whatever their blocks. Up to `LIMIT` selections that is exact. Beyond, the list keeps the best of each cell
of a grid in log P and log T, which serves devices that can train little, and ladders join it for those that can train
much. A ladder is the greedy way up where a byte per token has a certain price in numbers (Sinha and Zoltners, 1979):
the steps along the concave hulls of the weights' values, those first that give most for what they cost. Where each of
them leads is the best there is for that cost. As the right price is not known before the limits are, there are `PRICES`
ladders for each l, and each begins with its first step to a weight of block l, wherever that came.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtune.core.costs import Weight
from fedtune.core.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LIMIT = 2048  # selections up to which none that could be a device's best is left out
CELLS = 32  # of the grid, each way
PRICES = 128
DEAREST = 1e4  # the highest price of all T in that of all P, and of all P in that of all T
CHUNK = 256  # selections that are compared in pairs at a time

P, COLUMNS, RANKS, VALUE = range(4)  # rows of the sums below; all are whole, or of few enough bits to add up exactly


class Run(NamedTuple):
    """Selections start to stop, all of which adapt `block` and none below it."""

    block: int
    start: int
    stop: int
    ladder: int  # which; P, T and value rise along it. -1: none, but a list with the best first
    price: float  # of a byte per token on that ladder, in numbers
    moved: int  # the step that goes first, so that the block is reached; from here on rungs are the best at their price


@dataclass(frozen=True, eq=False)
class Selections:
    """Arrays with an entry per selection, and which ranks they stand for."""

    weights: tuple[Weight, ...]
    ranks: tuple[int, ...]
    values: Floats  # (weights, ranks), rounded so that sums are exact
    input_bytes: float
    inner_bytes: float
    block: Ints  # l
    parameters: Floats  # P, whole numbers
    per_token_bytes: Floats  # T
    value: Floats
    runs: list[Run]
    _nodes: Ints = field(repr=False)  # where in the trail a selection of the list ends
    _trail: Ints = field(repr=False)  # (3, nodes): the node before or -1, a weight, and which of the ranks it takes
    _rungs: list[Ints] = field(repr=False)  # [price] (2, steps): a weight, and which of the ranks it goes up to

    def ranks_of(self, i: int) -> dict[str, int]:
        """The adapted weights of selection `i`, by module in the order of `weights`."""
        chosen = np.full(len(self.weights), -1)
        run = self.runs[bisect_right(self._starts, i) - 1]
        if run.ladder >= 0:
            weight, choice = self._rungs[run.ladder]
            within = _reordered(np.flatnonzero(self._blocks[weight] >= run.block), run.moved)[: i - run.start + 1]
            np.maximum.at(chosen, weight[within], choice[within])
        else:
            node = int(self._nodes[i])
            while node >= 0:
                node, weight, choice = self._trail[:, node].tolist()
                chosen[weight] = choice
        return {
            weight.module: self.ranks[choice]
            for weight, choice in zip(self.weights, chosen.tolist(), strict=True)
            if choice >= 0
        }

    def worth(self, value: float) -> Ints:
        """The selections of exactly this value."""
        first, last = (int(np.searchsorted(self._ascending, value, side)) for side in ("left", "right"))
        return self._by_value[first:last]

    def within(self, max_rank: float) -> "Selections | None":
        """The selections among the ranks up to `max_rank`, made when first asked for; None if there are none."""
        count = sum(rank <= max_rank for rank in self.ranks)
        if count and count not in self._fewer:
            few = self.values[:, :count]
            self._fewer[count] = selections(self.weights, self.ranks[:count], few, self.input_bytes, self.inner_bytes)
        return self._fewer[count] if count else None

    @cached_property
    def _fewer(self) -> "dict[int, Selections]":
        return {len(self.ranks): self}

    @cached_property
    def _starts(self) -> list[int]:
        return [run.start for run in self.runs]

    @cached_property
    def _blocks(self) -> Ints:
        return np.array([weight.block for weight in self.weights])

    @cached_property
    def _by_value(self) -> Ints:
        return np.argsort(self.value, kind="stable")

    @cached_property
    def _ascending(self) -> Floats:
        return self.value[self._by_value]


def selections(
    weights: Sequence[Weight],
    ranks: Sequence[int],
    values: NDArray[np.floating],
    input_bytes: float = 4.0,
    inner_bytes: float = 4.0,
) -> Selections:
    """All selections that could be the best of some device, or so many of them that one of nearly its value is there.

    Args:
        ranks: on offer, ascending.
        values: (weights, ranks) non-negative, and from one rank to the next never less. They are rounded to 53 bits of
            their sum, so that equal values of weights add up to equal values of selections in whatever order.
        input_bytes: per token and column of an adapted weight.
        inner_bytes: per token and rank of an adapted weight.

    Raises:
        ConfigError: naming what of these was given otherwise.
    """
    values = _checked(weights, ranks, np.asarray(values, np.float64), input_bytes, inner_bytes)
    blocks = np.array([weight.block for weight in weights])
    options = np.empty((4, *values.shape))
    options[P] = np.outer([weight.rows + weight.columns for weight in weights], ranks)
    options[COLUMNS] = np.array([[weight.columns] for weight in weights])
    options[RANKS] = ranks
    options[VALUE] = values
    price = (input_bytes, inner_bytes)

    runs: list[Run] = []
    sums, nodes, rungs = [], [], []
    listed = _Listed(options, blocks, price)
    for block in np.unique(blocks)[::-1].tolist():
        found, ends = listed.down_to(block)
        order = np.lexsort((found[P], -found[VALUE]))
        if len(order):  # else selections of later blocks beat all of this one's
            runs.append(Run(block, 0, len(order), -1, 0.0, 0))
            sums.append(found[:, order])
            nodes.append(ends[order])
    if listed.thinned:
        for ladder, (dear, rung, steps) in enumerate(_ladders(options, price)):
            rungs.append(rung)
            for block in np.unique(blocks).tolist():
                within = np.flatnonzero(blocks[rung[0]] >= block)
                of_block = blocks[rung[0, within]] == block
                if of_block.any():
                    moved = int(of_block.argmax())
                    runs.append(Run(block, 0, len(within), ladder, dear, moved))
                    sums.append(np.cumsum(steps[:, _reordered(within, moved)], axis=1))
    stops = np.cumsum([run.stop for run in runs]).tolist()
    runs = [run._replace(start=stop - run.stop, stop=stop) for run, stop in zip(runs, stops, strict=True)]
    total = np.concatenate(sums, axis=1)
    return Selections(
        tuple(weights),
        tuple(int(rank) for rank in ranks),
        values,
        input_bytes,
        inner_bytes,
        block=np.repeat([run.block for run in runs], [run.stop - run.start for run in runs]),
        parameters=total[P],
        per_token_bytes=_per_token(total, price),
        value=total[VALUE],
        runs=runs,
        _nodes=np.concatenate(nodes),
        _trail=np.concatenate(listed.trail, axis=1),
        _rungs=rungs,
    )


def _per_token(sums: Floats, price: tuple[float, float]) -> Floats:
    """T of sums whose first axis is the four of them."""
    per_token: Floats = price[0] * sums[COLUMNS] + price[1] * sums[RANKS]
    return per_token


def _reordered(steps: Ints, moved: int) -> Ints:
    return np.concatenate([steps[moved : moved + 1], steps[:moved], steps[moved + 1 :]])


class _Listed:
    """The list of selections, from the last block down."""

    def __init__(self, options: Floats, blocks: Ints, price: tuple[float, float]):
        self.thinned = False
        weights, ranks = options.shape[1:]
        # First each weight alone, with each rank: what every selection begins with
        alone = np.indices((weights, ranks)).reshape(2, -1)
        self.trail = [np.concatenate([np.full((1, weights * ranks), -1), alone])]
        self._known = weights * ranks
        self._options, self._blocks, self._price = options, blocks, price
        self._sums = np.empty((4, 0))
        self._nodes = np.empty(0, np.int64)

    def down_to(self, block: int) -> tuple[Floats, Ints]:
        """The sums (4, selections) and last nodes of the selections that adapt `block` and none below it. Blocks are to
        be asked for from the last down."""
        first = self._known
        members = np.flatnonzero(self._blocks == block)
        for weight in members.tolist():
            self._extend(weight)
        alone = (members[:, None] * self._options.shape[2] + np.arange(self._options.shape[2])).ravel()
        here = (self._nodes >= first) | np.isin(self._nodes, alone)
        sums, nodes = self._sums[:, here], self._nodes[here]
        if not self.thinned:
            return sums, nodes
        # What takes least may have had to make room for what gives most
        single = self._options[:, members].reshape(4, -1)
        return np.concatenate([sums, single], axis=1), np.concatenate([nodes, alone])

    def _extend(self, weight: int) -> None:
        option = self._options[:, weight]
        count, ranks = self._sums.shape[1], option.shape[1]
        grown = (self._sums[:, :, None] + option[:, None]).reshape(4, -1)
        candidates = np.concatenate([self._sums, option, grown], axis=1)
        # Nothing, which takes nothing, is no selection: it would beat whatever is worth nothing
        nodes = np.concatenate([self._nodes, weight * ranks + np.arange(ranks), np.full(count * ranks, -1)])
        per_token = _per_token(candidates, self._price)
        kept = np.arange(len(nodes))
        if self.thinned:
            kept = _thinned(candidates[P], per_token, candidates[VALUE])
        kept = kept[_unbeaten(candidates[P, kept], per_token[kept], candidates[VALUE, kept])]
        if len(kept) > LIMIT:
            self.thinned = True
            kept = kept[_thinned(candidates[P, kept], per_token[kept], candidates[VALUE, kept])]
        new = np.flatnonzero(nodes[kept] < 0)
        before, choice = np.divmod(kept[new] - count - ranks, ranks)
        self.trail.append(np.stack([self._nodes[before], np.full(len(new), weight), choice]))
        self._nodes = nodes[kept]
        self._nodes[new] = self._known + np.arange(len(new))
        self._known += len(new)
        self._sums = candidates[:, kept]


def _unbeaten(parameters: Floats, per_token: Floats, value: Floats) -> Ints:
    """Which have no other with at most their P and T and at least their value; the first of equals stays."""
    order = np.lexsort((-value, per_token, parameters))  # nothing is beaten by what comes after it
    kept = []
    front, best = np.empty(0), np.empty(0)  # the T of those kept, ascending, and the best value up to there
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        if len(front):
            place = np.searchsorted(front, per_token[chunk], "right") - 1
            chunk = chunk[(place < 0) | (best[place] < value[chunk])]
        t, v = per_token[chunk], value[chunk]
        beats = (t[:, None] <= t) & (v[:, None] >= v)  # (by, whom)
        chunk = chunk[~np.triu(beats, 1).any(axis=0)]
        kept.append(chunk)
        front = np.concatenate([front, per_token[chunk]])
        best = np.concatenate([best, value[chunk]])
        ascending = np.argsort(front, kind="stable")
        front, best = front[ascending], np.maximum.accumulate(best[ascending])
    return np.concatenate(kept)


def _thinned(parameters: Floats, per_token: Floats, value: Floats) -> Ints:
    """Which has the best value in each cell of a grid in log P and log T."""
    cell = np.zeros(len(value), np.int64)
    for taken in (parameters, per_token):
        logs = np.log(np.maximum(taken, 1.0))
        low, high = logs.min(), logs.max()
        cell = cell * CELLS + np.minimum((logs - low) * (CELLS / max(high - low, 1e-9)), CELLS - 1).astype(np.int64)
    order = np.lexsort((parameters, -value, cell))
    first: Ints = order[np.diff(cell[order], prepend=-1) != 0]
    return first


def _ladders(options: Floats, price: tuple[float, float]) -> list[tuple[float, Ints, Floats]]:
    """Each price of T in P, and the steps up of all weights, those first that give most for what they cost at it:
    (2, steps) the weight and which rank it goes up to, and (4, steps) what that adds to the sums."""
    per_token = _per_token(options, price)
    all_of_it = per_token.max(axis=1).sum()
    even = options[P].max(axis=1).sum() / all_of_it if all_of_it else 1.0  # all T is as dear as all P
    # Steps of the golden ratio: the first few of the prices are as far apart as so many can be
    dear = even * DEAREST ** (2 * (np.arange(PRICES) * (math.sqrt(5) - 1) / 2 % 1) - 1)
    cost = options[P] + dear[:, None, None] * per_token
    cost = np.pad(cost, ((0, 0), (0, 0), (1, 0)))  # (prices, weights, 1 + ranks)
    options = np.pad(options, ((0, 0), (0, 0), (1, 0)))
    value = np.broadcast_to(options[VALUE], cost.shape)
    count = cost.shape[2]
    at = np.zeros((*cost.shape[:2], 1), np.int64)
    least = np.full(at.shape, np.inf)
    begun, ended, gains = [], [], []
    for _ in range(1, count):
        more, paid = (each - np.take_along_axis(each, at, 2) for each in (value, cost))
        gain = np.where(np.arange(count) > at, more / np.where(paid > 0, paid, 1.0), 0.0)
        best = gain.max(axis=2, keepdims=True)
        # Of steps in one line the longest; and rounding must not put a later one before
        to = np.where(best > 0, count - 1 - np.argmax(gain[..., ::-1], axis=2, keepdims=True), at)
        least = np.minimum(least, best)
        begun.append(at)
        ended.append(to)
        gains.append(least)
        at = to
    start, stop, worth = (np.concatenate(each, axis=2).reshape(PRICES, -1) for each in (begun, ended, gains))
    found = []
    for each, at_price in enumerate(dear.tolist()):
        order = np.argsort(-worth[each], kind="stable")[: np.count_nonzero(worth[each])]
        weight, first, last = order // (count - 1), start[each, order], stop[each, order]
        adds = options[:, weight, last] - options[:, weight, first]
        found.append((at_price, np.stack([weight, last - 1]), adds))
    return found


def _checked(
    weights: Sequence[Weight], ranks: Sequence[int], values: Floats, input_bytes: float, inner_bytes: float
) -> Floats:
    """The values, rounded to 53 bits of their sum."""
    if not weights:
        raise ConfigError("there is no weight to adapt: expected at least one; see adapter.targets")
    names = [weight.module for weight in weights]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"weight '{twice}' is there {names.count(twice)} times: name each weight once")
    for weight in weights:
        if weight.block < 0 or weight.rows < 1 or weight.columns < 1:
            raise ConfigError(f"{weight}: expected a block from 0 and at least one row and column")
    expect_ranks(ranks)
    for name, taken in (("input_bytes", input_bytes), ("inner_bytes", inner_bytes)):
        if not 0 <= taken < math.inf:
            raise ConfigError(f"{name} should be a number from 0, got {taken}")
    shape = (len(weights), len(ranks))
    if values.shape != shape:
        raise ConfigError(f"values: expected a number for each of {shape} weights and ranks, got shape {values.shape}")
    with np.errstate(over="ignore"):
        most = float(values[:, -1].sum())
    if not np.isfinite(values).all() or (values < 0).any() or not math.isfinite(most):
        wrong = names[int((~(np.isfinite(values) & (values >= 0))).any(axis=1).argmax())]
        raise ConfigError(
            f"values: expected non-negative numbers with a finite sum, got {values.min()} up to "
            f"{values.max()}, at weight '{wrong}'"
        )
    if (falls := (np.diff(values, axis=1) < 0).any(axis=1)).any():
        j = int(falls.argmax())
        raise ConfigError(
            f"the values of weight '{names[j]}' should never be less at a higher rank, got {values[j].tolist()}"
        )
    unit = math.ldexp(1.0, math.frexp(most)[1] - 52) if most else 1.0
    return np.round(values / unit) * unit if unit else values


def expect_ranks(ranks: Sequence[int]) -> None:
    """Raises ConfigError unless these are ranks, ascending."""
    rising = all(low < high for low, high in pairwise(ranks))
    if not ranks or not rising or not all(isinstance(rank, int | np.integer) and rank > 0 for rank in ranks):
        raise ConfigError(f"ranks should be whole numbers above 0, ascending and at least one, got {list(ranks)}")
