"""How far a run of a comparison is, as far as its folder says."""

import math
from dataclasses import dataclass
from pathlib import Path

from fedtune.runs.comparison_file import json_object


@dataclass(frozen=True)
class Now:
    """How far a run is, by its summary.json."""

    status: str
    round: int
    loss: float  # NaN before the first evaluation
    first_loss: float
    up_bytes: int
    down_bytes: int


def now(folder: Path) -> Now | None:
    """None while there is nothing to read."""
    if (found := json_object(folder / "summary.json")) is None:
        return None
    try:
        totals = found["totals"]
        return Now(
            str(found.get("status", "")),
            int(found["rounds"]),
            float(found.get("last_eval_loss", math.nan)),
            float(found.get("first_eval_loss", math.nan)),
            int(totals["up_wire_bytes"]),
            int(totals["down_wire_bytes"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
