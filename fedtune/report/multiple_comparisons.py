"""Whether losses differ from a reference's by more than noise, where the reference may be the best of them.

The best of k is the luckiest of k, and all others are behind it even where they are equal: a test that was made for a
fixed reference finds too much (measured with three to five seeds and 5 to 34 entries that are equal: Holm over paired t
calls one of them worse in 7 to 18 % of tables; Hsu's comparison with the best in 17 to 60 %, since what it may say at
5 % is "not the only best one"). The spread of all of them, from the lowest to the highest mean, has a distribution of
its own: Tukey's studentized range. It holds for any reference, however it was chosen.
"""

import math
from functools import lru_cache

import numpy as np

from fedtune.report.intervals import paired_p
from fedtune.runs.read import Floats


def step_down(losses: Floats, reference: int) -> Floats:
    """Adjusted two-sided p of every entry's difference from the reference, good for any reference.

    Seeds are blocks: a loss is its entry's mean, plus what its seed adds to all entries, plus noise. Two tests, either
    of which may find a difference, each at half of the level:

    - The range, stepping down. The entry farthest from the reference goes first: its p is that of a range as wide as
      its difference among the entries that are still in, over the noise of them all; then it is out, and what it
      scattered with it. No p is below one before it, nor below the entry's own paired t; where a difference scatters
      more than the common noise, its own counts. It has power with few seeds, and takes the entries to scatter alike.
    - The entry's own paired t, times all pairs of entries (Bonferroni). It takes nothing of the others.

    Of two entries both are the paired t, and so is p.

    Args:
        losses: (seeds, entries); NaN where an entry has no such seed.
        reference: its column.

    Returns:
        p: (entries,); NaN for the reference, and where fewer than two seeds are in common with it.
    """
    apart = losses - losses[:, [reference]]
    common = np.isfinite(apart).sum(0)
    others = [entry for entry in np.flatnonzero(common > 1).tolist() if entry != reference]
    found = np.full(losses.shape[1], np.nan)
    widths = {entry: abs(float(np.nanmean(apart[:, entry]))) * math.sqrt(common[entry]) for entry in others}
    pairs, tests = math.comb(len(others) + 1, 2), 2 if len(others) > 1 else 1
    least = 0.0
    while others:
        farthest = max(others, key=lambda entry: widths[entry])
        differences = apart[np.isfinite(apart[:, farthest]), farthest]
        alone = paired_p(differences)
        noise, freedom = common_noise(losses[:, [reference, *others]])
        own = float(differences.std(ddof=1)) / math.sqrt(2)
        least = max(least, range_p(_ratio(widths[farthest], noise), len(others) + 1, freedom))
        noisier = range_p(_ratio(widths[farthest], own), len(others) + 1, freedom) if own > noise else 0.0
        found[farthest] = min(1.0, max(alone, tests * min(max(least, noisier), pairs * alone)))
        others.remove(farthest)
    return found


def common_noise(losses: Floats) -> tuple[float, int]:
    """The standard deviation of what entries' and seeds' means leave over, by least squares, and its degrees of
    freedom.

    Args:
        losses: (seeds, entries); NaN where there is none. Every entry shares a seed with the first.
    """
    there = np.isfinite(losses)
    losses, there = losses[there.any(1)], there[there.any(1)]
    often = there.sum(0)
    left = np.where(there, losses - np.where(there, losses, 0.0).sum(0) / often, 0.0)
    # What seeds add, once each entry's mean is taken out: as many equations as seeds, which leave one constant open
    equations = np.diag(there.sum(1)) - (there / often) @ there.T
    seeds = np.where(there, (np.linalg.pinv(equations) @ left.sum(1))[:, None], 0.0)
    left = left - np.where(there, seeds - seeds.sum(0) / often, 0.0)
    freedom = int(there.sum()) - losses.shape[1] - len(losses) + 1
    return math.sqrt(float((left**2).sum()) / freedom), freedom


def range_p(width: float, count: int, freedom: int) -> float:
    """How likely the range of `count` standard normal values, over an estimate of their deviation with `freedom`
    degrees of freedom, is `width` or more. To about 1e-6; scipy.stats has it too, and takes far longer."""
    from scipy.special import ndtr, stdtr

    if count == 2:
        return float(2 * stdtr(freedom, -width / math.sqrt(2)))
    if not math.isfinite(width):
        return 0.0
    deviations, weights = _deviations(freedom)
    lowest = np.arange(-7.8, 7.9, 0.3)  # the smallest of them, in steps so fine that a sum is the integral
    density = np.exp(-(lowest**2) / 2) / math.sqrt(2 * math.pi) * 0.3 * count
    others = ndtr(lowest + width * deviations[:, None]) - ndtr(lowest)
    return float(min(1.0, max(0.0, 1 - weights @ (others ** (count - 1) @ density))))


@lru_cache(maxsize=1024)
def _deviations(freedom: int) -> tuple[Floats, Floats]:
    """Values of an estimated deviation whose true one is 1, and how likely each is."""
    from scipy.special import chdtri

    low, high = (0.5 * math.log(chdtri(freedom, tail) / freedom) for tail in (1 - 1e-9, 1e-12))
    logs = np.linspace(low, high, 64)
    weights = np.exp(freedom * (logs - np.exp(2 * logs) / 2 + 0.5))
    return np.exp(logs), weights / weights.sum()


def _ratio(width: float, noise: float) -> float:
    return width / noise if noise else math.inf if width else 0.0
