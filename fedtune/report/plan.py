"""comparison.json: what `fedtune compare` says of the runs that it made. A file, which may say anything."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.comparisons.state import RECORD, json_object
from fedtune.report.shapes import Failure

LONGEST = 80  # characters of a label
MOST = 10_000  # cells that are looked at


@dataclass(frozen=True)
class Plan:
    """What of it can be used."""

    command: str | None = None
    labels: Mapping[Path, str] = field(default_factory=dict)  # by the run's resolved path
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()


def read_plan(folder: Path) -> Plan:
    """What comparison.json in `folder` says. Whatever isn't as it should be is as if it weren't there."""
    path = folder / RECORD
    if (found := json_object(path)) is None:
        return Plan(notes=(f"{path} can't be read",))
    cells = found.get("cells")
    cells = [cell for cell in cells[:MOST] if isinstance(cell, dict)] if isinstance(cells, list) else []
    names: dict[Path, str] = {}
    failures = []
    for cell in cells:
        label, where = _words(cell.get("label")), cell.get("folder")
        if label and isinstance(where, str):
            names |= dict.fromkeys(_meant(where, folder), label)
        failed = cell.get("status") == "failed" or cell.get("error")
        if label and failed:
            reason = _words(cell.get("error"), 400) or "it failed, and didn't say why"
            failures.append(Failure(label, _seed(cell.get("seed")), reason))
    return Plan(_words(found.get("command"), 2000) or None, names, tuple(failures), _tuned(found.get("tuned")))


def _tuned(tuned: Any) -> tuple[str, ...]:
    """What was tuned, in a line."""
    chosen = []
    for label, choice in list(tuned.items())[:MOST] if isinstance(tuned, dict) else ():
        words = choice.get("chosen") if isinstance(choice, dict) else None
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            chosen.append(f"{_words(label)} {_words(' '.join(words))}")
    return (f"tuned by held-out loss on a seed of its own: {'; '.join(chosen)}",) if chosen else ()


def _meant(where: str, folder: Path) -> list[Path]:
    """From where the command was given, or beside the file, which may have been moved with its runs."""
    try:
        return [Path(where).resolve(), (folder / where).resolve()]
    except (OSError, ValueError, RuntimeError):  # no path at all, or one that leads back to itself
        return []


def _words(value: Any, longest: int = LONGEST) -> str:
    """Text on one line, without what a terminal would take for an order."""
    if not isinstance(value, str):
        return ""
    text = " ".join("".join(c if c.isprintable() else " " for c in value[: 10 * longest]).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _seed(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
