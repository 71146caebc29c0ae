"""Updates by their coordinates along seeded directions, block by block: what Ferret projects and rebuilds.

The parameters are cut, whole and in the layout's order, into blocks l = 1 ... L. Of an update's part Delta_l, with d_l
elements, what is kept are K_l numbers along directions V_l = (z_1 ... z_K_l) that live on that block alone:

    gamma_l = share / K_l V_l^T Delta_l        rebuilt as V_l gamma_l

The elements of z are independent, of mean 0, variance 1 and fourth moment kappa
(fedtune.random_directions.hash_noise.KURTOSIS), so that with share = 1, and with D for Delta_l

    E z z^T D = D        E |z z^T D|^2 = sum_i E (z^T D)^2 z_i^2 = sum_i (|D|^2 + (kappa - 1) D_i^2)
    E V gamma = D        E |V gamma - D|^2 = (d - 2 + kappa) / K |D|^2

K_l goes with |Delta_l|. Of a given K, that leaves the least error where blocks have about one size; in general it would
be least with K_l in proportion to sqrt(d_l) |Delta_l|.

What is rebuilt is a sum of whole numbers of directions (fedtune/random_directions/weights.py), so all who know the
counts and budgets of all answers hold the same weights, to the bit, in whatever order they came to know them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtune.core.checks import at_least
from fedtune.core.errors import ClientError, ConfigError, DivergedError, WireError
from fedtune.core.protocol import Layout, Tensors, Update, describe
from fedtune.core.seeds import bits, derive_seed
from fedtune.core.settings import SharedRules
from fedtune.random_directions.hash_noise import project
from fedtune.random_directions.weights import Names, Space
from fedtune.training.zeroth_order import check_counts

FEWEST = 2  # directions of a block
FULL = 0.9  # of the median parameter's size: a block that would grow past it is closed
TURN, BUDGET, SLOPES = "turn", "budget", "slopes"  # (n, 2), (n, L) and (n, K) int32: a row for each answer


@dataclass(frozen=True)
class Projection(SharedRules):
    """What all parties have to agree on.

    By the budget's rule coordinates have one size in all blocks, sum_l |Delta_l| / K. For a gradient of SmolLM2-135M,
    that is 211 blocks, and K = 4096 it is 0.0027 |Delta|: 2,900 of the default's quanta after 40 steps of SGD at 1e-4
    along gradients of length 1. Rounding is then lost in what the projection itself costs, even for a hundredth of
    that, and there is room for weights that wander by 0.5 server_lr / 8.

    Raises:
        ConfigError: for a value out of range.
    """

    directions: int = 4096  # K, those of all blocks together
    server_lr: float = 1.0  # what the mean of the rebuilt updates is multiplied by
    noise: str = "normal"  # the distribution of z, or rademacher
    finest: float = 2.0**-28  # what a coordinate is rounded to at most
    pool_seed: int = 0  # what all seeds are made from

    def __post_init__(self) -> None:
        at_least("method.strategy.rules.directions", self.directions, FEWEST)
        if not 0 < self.server_lr < math.inf:
            raise ConfigError(f"method.strategy.rules.server_lr={self.server_lr}: expected a number above 0")
        _ = self.space

    @property
    def space(self) -> Space:
        return Space(self.server_lr, self.noise, finest=self.finest)


def blocks_of(layout: Layout) -> list[Names]:
    """The parameters' names by block.

    A parameter joins the open block unless that would then have more than int(0.9 median) elements, the median being of
    the sizes of all parameters (of an even number, the mean of the middle two). A block has one parameter at least.
    """
    sizes = {slot.name: math.prod(slot.shape) for slot in layout.slots}
    largest = int(FULL * float(np.median(list(sizes.values()))))
    blocks: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not blocks or held + size > largest:
            blocks.append([])
            held = 0
        blocks[-1].append(name)
        held += size
    return [tuple(block) for block in blocks]


def budget_of(norms: Sequence[float], directions: int) -> np.ndarray:
    """K_l, int64: in proportion to |Delta_l|, at least 2, and K in all.

    Whoever falls short of 2 gets 2, and the others share the rest in proportion; what rounding down leaves over goes to
    the largest fractions, the earlier of equals first. Equal shares where nothing has moved.
    """
    weights = np.asarray(norms, np.float64)
    weights = weights / weights.max() if weights.any() else np.ones(len(weights))  # so that no sum is infinite
    poor = np.zeros(len(weights), bool)
    while True:
        quota = np.full(len(weights), float(FEWEST))
        if not poor.all():
            quota[~poor] = (directions - FEWEST * poor.sum()) * weights[~poor] / weights[~poor].sum()
        if not (found := quota < FEWEST).any():
            break
        poor |= found
    whole: np.ndarray = np.floor(quota).astype(np.int64)
    left = int(directions - whole.sum())
    whole[np.argsort(-(quota - whole), kind="stable")[:left]] += 1
    return whole


def seeds_of(rules: Projection, version: int, client: int) -> list[int]:
    """The seeds of the answer that `client` gives to `version`: (K,), the first K_1 being those of the first block."""
    seeds: list[int] = bits(derive_seed(rules.pool_seed, "ferret", version, client), rules.directions).tolist()
    return seeds


@torch.no_grad()
def coordinates(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    blocks: Sequence[Names],
    rules: Projection,
    seeds: Sequence[int],
    share: float = 1.0,
) -> Tensors:
    """A turn's update, old - new, as an answer: `budget` (L,) and `slopes` (K,), in quanta, int32.

    Raises:
        ClientError: if it isn't finite, or a coordinate is too large to be written down.
    """
    norms = [math.hypot(*(float(_gone(old, new, name).norm()) for name in names)) for names in blocks]
    if not all(map(math.isfinite, norms)):
        raise ClientError("the weights are no finite numbers after training: lower train.lr")
    budget = budget_of(norms, rules.directions)
    found = np.zeros(rules.directions)
    last = 0
    for names, norm, count in zip(blocks, norms, budget.tolist(), strict=True):
        first, last = last, last + count
        if norm:
            for name in names:
                along = project(_gone(old, new, name), seeds[first:last], name, rules.noise)
                found[first:last] += along.numpy() * share / count
    answer = {BUDGET: torch.from_numpy(budget).int(), SLOPES: torch.from_numpy(rules.space.counts(found)).int()}
    try:
        check_room({name: tensor[None] for name, tensor in answer.items()}, rules)
    except DivergedError as error:
        raise ClientError(f"this update is too large: {error}") from error
    return answer


def check_answer(update: Update, blocks: int, rules: Projection) -> None:
    """Check what a client sent for each block: its budget of slopes, and the slopes.

    Raises:
        WireError: if this is nothing that `coordinates` can give.
    """
    if update.tensors.keys() != {BUDGET, SLOPES}:
        raise WireError(f"expected the tensors '{BUDGET}' and '{SLOPES}', got {sorted(update.tensors)[:5]}")
    budget = update.tensors[BUDGET]
    if budget.dtype != torch.int32 or tuple(budget.shape) != (blocks,):
        raise WireError(f"tensor '{BUDGET}': expected int32 {(blocks,)}, got {describe(budget)}")
    if int(budget.min()) < FEWEST:
        raise WireError(f"tensor '{BUDGET}': expected at least {FEWEST} directions a block, got {int(budget.min())}")
    if (total := int(budget.long().sum())) != rules.directions:
        raise WireError(f"tensor '{BUDGET}': expected {rules.directions} directions in all, got {total}")
    check_counts(SLOPES, update.tensors[SLOPES], (rules.directions,), rules.space)
    try:  # else one client could end the run
        check_room({name: tensor[None] for name, tensor in update.tensors.items()}, rules)
    except DivergedError as error:
        raise WireError(f"tensor '{SLOPES}': {error}") from error


def check_room(history: Tensors, rules: Projection) -> None:
    """Check that all answers so far, added up, fit the whole numbers that weights are summed in.

    Raises:
        DivergedError: if the sum of all answers might not fit, in some block.
    """
    budget = history[BUDGET].long()
    block = torch.repeat_interleave(torch.arange(budget.shape[1]).repeat(len(budget)), budget.flatten())
    squares = torch.bincount(block, history[SLOPES].flatten().double().square(), budget.shape[1])
    for place, square in enumerate(squares.tolist()):
        try:
            rules.space.check(np.array([math.sqrt(square)]))
        except DivergedError as error:
            raise DivergedError(f"block {place}: {error}, or with a larger rules.finest ({rules.finest:g})") from error


def records_of(history: Tensors, blocks: Sequence[Names], rules: Projection) -> dict[Names, dict[int, int]]:
    """How far along each direction all answers together have led, by block: what `SeededWeights.move_blocks` takes."""
    records: dict[Names, dict[int, int]] = {names: {} for names in blocks}
    rows = zip(*(history[name].tolist() for name in (TURN, BUDGET, SLOPES)), strict=True)
    for (version, client), budget, slopes in rows:
        seeds = seeds_of(rules, version, client)
        last = 0
        for record, count in zip(records.values(), budget, strict=True):
            first, last = last, last + count
            record.update(zip(seeds[first:last], slopes[first:last], strict=True))
    return records


def _gone(old: Mapping[str, Tensor], new: Mapping[str, Tensor], name: str) -> Tensor:
    """One parameter's part of Delta, float32."""
    return (old[name].float() - new[name].float()).contiguous()
