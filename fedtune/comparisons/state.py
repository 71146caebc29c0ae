"""What stands in a comparison's folder while it goes on, as far as it can be read."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "comparison.json"  # what was asked for, and what became of it
TRIALS = "tune"  # the folder of the trials


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


def json_object(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is none, it can't be read, or it holds something else than an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
