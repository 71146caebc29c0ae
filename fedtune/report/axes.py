"""Axes of figures: few ticks at round numbers, and as wide as the values need."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Spec = dict[str, Any]

NUMBER = {"type": "quantitative"}
BYTES = (
    "datum.value >= 1e12 ? format(datum.value / 1e12, '~r') + ' TB' : "
    "datum.value >= 1e9 ? format(datum.value / 1e9, '~r') + ' GB' : "
    "datum.value >= 1e6 ? format(datum.value / 1e6, '~r') + ' MB' : "
    "datum.value >= 1e3 ? format(datum.value / 1e3, '~r') + ' kB' : format(datum.value, '~r') + ' B'"
)
SECONDS = (
    "datum.value >= 3600 ? format(datum.value / 3600, '~r') + ' h' : "
    "datum.value >= 60 ? format(datum.value / 60, '~r') + ' min' : format(datum.value, '~r') + ' s'"
)
LABELS = {"bytes": BYTES, "seconds": SECONDS}
# 1, 2, 5 x 10^n of a minute or an hour aren't round in seconds
CLOCK: list[float] = [
    1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600,
    7200, 18000, 36000, 72000, 180000, 360000,
]  # fmt: skip
TENTHS = [ten / 10 for ten in range(10, 100)]


def log_ticks(low: float, high: float, unit: str = "") -> list[float]:
    """Round numbers within [low, high], 0 < low < high: few, but two or more where there are as many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if unit == "seconds" and low >= 0.5 and high <= CLOCK[-1] and high / low > 3:
        candidates: list[list[float]] = [
            CLOCK,
            [1, 5, 20, 60, 300, 1200, 3600, 18000, 86400],
            [1, 10, 60, 600, 3600, 36000, 360000],
        ]
        limits = [5, 5, 99]
    else:
        digits: tuple[Sequence[float], ...] = (TENTHS, TENTHS[::5], range(1, 10), (1, 2, 5), (1, 3), (1,))
        candidates = [[digit * 10.0**n for n in range(first, last + 1) for digit in some] for some in digits]
        candidates += [[10.0**n for n in range(first, last + 1) if n % every == 0] for every in (2, 3, 4, 6)]
        limits = [3, 3, 3, 5, 5, 5, 5, 5, 5, 99]  # fine ones crowd at a decade's end
    inside = [[float(f"{tick:.6g}") for tick in ticks if low <= tick <= high] for ticks in candidates]
    fits = [ticks for ticks, limit in zip(inside, limits, strict=True) if len(ticks) <= limit]
    enough = [ticks for ticks in fits if len(ticks) > 1] or sorted((t for t in inside if len(t) > 1), key=len)
    return enough[0] if enough else max(inside, key=len)


def log_axis(field: str, title: str, values: Sequence[float], unit: str = "") -> Spec:
    """An encoding on a log axis with few ticks and some room around the values, all of which are above zero."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.12)
    domain = [low / room, high * room]
    axis: Spec = {"values": log_ticks(domain[0], domain[1], unit), "labelOverlap": True}
    if unit:
        axis["labelExpr"] = LABELS[unit]
    elif domain[0] < 1e-3:
        axis["format"] = "~e"
    scale = {"type": "log", "domain": [float(f"{end:.6g}") for end in domain], "nice": False}
    return {"field": field, "title": title, "scale": scale, "axis": axis, **NUMBER}


def axis(field: str, title: str, unit: str = "", whole: bool = False, domain: Sequence[float] | None = None) -> Spec:
    """An encoding on a linear axis, as wide as the values unless a domain is given."""
    drawn: Spec = {"tickCount": 5, "labelOverlap": True}
    scale: Spec = {"zero": False} if domain is None else {"domain": list(domain), "nice": False, "zero": False}
    if unit:
        drawn["labelExpr"] = LABELS[unit]
    if whole:
        drawn |= {"format": "d", "tickMinStep": 1}
    return {"field": field, "title": title, "scale": scale, "axis": drawn, **NUMBER}


def around(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    """A domain that shows the values, all but those far above most, and of the intervals' ends what is near."""
    low, high = min(values), max(values)
    most = float(np.quantile(values, 0.8))
    high = min(high, most + 3 * (most - low)) if most > low else high
    room = (high - low) or abs(high) * 0.05 or 1.0
    bottom = max(min([low, *ends]), low - 0.35 * room) - 0.06 * room
    top = min(max([high, *(end for end in ends if end > high)]), high + 0.35 * room) + 0.06 * room
    return [float(f"{bottom:.6g}"), float(f"{top:.6g}")]
