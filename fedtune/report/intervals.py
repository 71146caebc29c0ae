"""What seeds say: means with intervals, and whether a difference is more than noise."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedtune.report.shapes import Estimate
from fedtune.runs.read import Floats

LEVEL = 0.95
SIGNIFICANT = 0.05


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of the finite values, with its 95 % interval: mean ± t(n - 1) s / sqrt(n)."""
    given = np.asarray(values, np.float64).reshape(-1, 1)
    mean, low, high = means(given)
    return Estimate(float(mean[0]), float(low[0]), float(high[0]), tuple(given[:, 0].tolist()))


def means(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Means over rows with their 95 % intervals, of what is finite.

    Args:
        values: (seeds, n)

    Returns:
        mean, low, high: (n,) each; NaN of nothing, and low and high NaN below two values.
    """
    there = np.isfinite(values)
    count = there.sum(0)
    kept = np.where(there, values, 0.0)
    mean = np.where(count > 0, kept.sum(0) / np.maximum(count, 1), np.nan)
    spread = np.where(there, values - mean, 0.0)
    deviation = np.sqrt((spread**2).sum(0) / np.maximum(count - 1, 1))
    quantiles = np.array([_quantile(number - 1) for number in range(len(values) + 1)])[count]
    half = np.where(count > 1, quantiles * deviation / np.sqrt(np.maximum(count, 1)), np.nan)
    return mean, mean - half, mean + half


def paired_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of a paired t-test: how likely a mean as far from 0 is where there is none. NaN below two."""
    given = np.asarray(differences, np.float64)
    if len(given) < 2:
        return math.nan
    mean, deviation = float(given.mean()), float(given.std(ddof=1))
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(len(given) - 1, -abs(mean) / deviation * math.sqrt(len(given))))


@lru_cache(maxsize=1024)
def _quantile(freedom: int) -> float:
    """Of Student's t, so that LEVEL lies between it and its negative. scipy.stats has it too, and takes four times as
    long to import."""
    if freedom < 1:
        return math.nan
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
