"""comparison.json: what `fedtune compare` was asked for, what was tuned, and how each of its runs ended.

    command   the command line, to go on with it
    words     its words
    tuned     by entry: the words that were chosen, the seed, and the losses of all that was tried
    cells     a list of runs: label (of the entry), folder, seed, status (done, failed or interrupted), error, command

Written as each run ends. What is read is a file that may say anything: whatever isn't as it should be is as if it
weren't there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.files import write_atomically

COMPARISON = "comparison.json"
TRIALS = "tune"  # the folder of the trials, beside those of the entries

LONGEST = 80  # characters of a label
MOST = 10_000  # runs that are looked at


class ComparisonWriter:
    """Keeps `out`/comparison.json up to date. What an earlier comparison in the same folder left there stays.

    Args:
        out: the comparison's folder.
        command: the command line, and `words` its words.
    """

    def __init__(self, out: Path, command: str, words: Sequence[str]):
        self.path = out / COMPARISON
        self._out = out
        self._command, self._words = command, list(words)
        before = json_object(self.path) or {}
        cells = before.get("cells")
        self._cells: dict[str, Any] = {
            str(cell["folder"]): cell
            for cell in (cells if isinstance(cells, list) else [])
            if isinstance(cell, dict) and "folder" in cell
        }
        tuned = before.get("tuned")
        self._tuned: dict[str, Any] = dict(tuned) if isinstance(tuned, dict) else {}
        self.write()

    def note_run(self, label: str, folder: Path, seed: int, status: str, error: str, command: str) -> None:
        """How a run of the comparison ended, whose folder is in `out`."""
        where = folder.relative_to(self._out).as_posix()
        told = {"label": label, "folder": where, "seed": seed, "status": status}
        self._cells[where] = {**told, "error": error, "command": command}

    def note_tuning(self, label: str, chosen: Sequence[str], seed: int, losses: Mapping[str, float]) -> None:
        """What was chosen for an entry, and the last held-out loss of each of its trials, by words; inf of none."""
        known = {words: loss if math.isfinite(loss) else None for words, loss in losses.items()}
        self._tuned[label] = {"chosen": list(chosen), "seed": seed, "losses": known}

    def write(self) -> None:
        """Replace the file by what is noted so far."""
        content = {
            "command": self._command,
            "words": self._words,
            "tuned": self._tuned,
            "cells": list(self._cells.values()),
        }
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Failure:
    """A run that a comparison asked for and that has no usable result."""

    label: str  # of its entry
    seed: int | None
    reason: str


@dataclass(frozen=True)
class ComparisonRecord:
    """What of comparison.json can be used."""

    command: str | None = None
    labels: Mapping[Path, str] = field(default_factory=dict)  # by the run's resolved path
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()


def read_comparison(folder: Path) -> ComparisonRecord:
    """What comparison.json in `folder` says. Whatever isn't as it should be is as if it weren't there."""
    path = folder / COMPARISON
    if (found := json_object(path)) is None:
        return ComparisonRecord(notes=(f"{path} can't be read",))
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
    command = _words(found.get("command"), 2000) or None
    return ComparisonRecord(command, names, tuple(failures), _tuned(found.get("tuned")))


def json_object(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is none, it can't be read, or it holds something else than an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
