"""A comparison from its words to its page: tune if asked, play every cell, say how each ended."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.comparisons.plan import Cell, Entry, Plan, plan
from fedtune.comparisons.play import Outcome, Processes, is_done
from fedtune.comparisons.state import RECORD, json_object, now
from fedtune.comparisons.view import CompareView
from fedtune.core.errors import ConfigError, FedtuneError, Interrupted, RunFolderError
from fedtune.core.files import hold, write_atomically


def compare(words: Sequence[str]) -> int:
    """Run the comparison that the words describe, or go on with it.

    Returns:
        0, or 1 if a cell failed.

    Raises:
        FedtuneError: if nothing can be run; a cell that fails is a line in the page, and the others go on.
    """
    made = plan(words)
    try:
        made.out.mkdir(parents=True, exist_ok=True)
        held = hold(made.out)
    except OSError as error:
        raise RunFolderError(f"out={made.out} can't be made: {error.strerror or error}. Name another") from error
    try:
        return _compare(made)
    finally:
        held.release()


def _compare(made: Plan) -> int:
    record = Record(made)
    failed = False
    with Processes(made.jobs) as processes:
        try:
            chosen = tune(made, processes, record) if made.tuned else dict.fromkeys(made.entries, ())
            cells = [
                made.cell(entry, seed, chosen[entry])
                for seed in made.seeds
                for entry in made.entries
                if entry in chosen
            ]
            failed = len(chosen) < len(made.entries)
            outcomes = _play(f"{made.out}", cells, processes, record)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; go on with the same command: {made.command}") from None
    failed |= any(outcome.status == "failed" for outcome in outcomes.values())
    if all(outcome.status == "failed" for outcome in outcomes.values()):
        raise FedtuneError(f"none of these runs came to anything: {made.out / RECORD} has the reasons")
    from fedtune.report.page import report

    print(f"page     {report([str(made.out)], str(made.out))}")
    return int(failed)


def _play(title: str, cells: Sequence[Cell], processes: Processes, record: "Record") -> dict[Cell, Outcome]:
    """Play the cells that aren't done, and return how each ended.

    Raises:
        KeyboardInterrupt: if any was interrupted.
    """
    outcomes: dict[Cell, Outcome] = {}
    waiting = []
    with CompareView(title, cells) as view:

        def ends(cell: Cell, outcome: Outcome) -> None:
            outcomes[cell] = outcome
            record.note(cell, outcome)
            record.write()
            view.ends(cell, outcome)

        for cell in cells:
            try:
                done = is_done(cell)
            except (
                ConfigError
            ) as error:  # of this entry's words alone: fedtune/comparisons/plan.py has seen one that works
                ends(cell, Outcome("failed", str(error)))
                continue
            if done:
                outcomes[cell] = Outcome("done")
                record.note(cell, outcomes[cell])
                view.was_done(cell)
            else:
                waiting.append(cell)
        record.write()
        if view.there:
            view.say(f"{view.there} of {len(cells)} runs are there already")
        processes.run(waiting, view.begins, ends, view.refresh)
    if any(outcome.status == "interrupted" for outcome in outcomes.values()):
        raise KeyboardInterrupt
    return outcomes


def tune(made: Plan, processes: Processes, record: "Record") -> dict[Entry, tuple[str, ...]]:
    """Try every value on the tuning seed; of each entry the words of the trial with the lowest last held-out loss.

    An entry of which no trial came to a loss is left out, and is a failure of each of its seeds.
    """
    trials = {entry: made.trials(entry) for entry in made.entries}
    cells = [cell for tried in trials.values() for _, cell in tried]
    outcomes = _play(f"{made.out}: trials on seed {made.tuning_seed}", cells, processes, record)
    chosen: dict[Entry, tuple[str, ...]] = {}
    for entry, tried in trials.items():
        losses = [_last_loss(cell) if outcomes[cell].status == "done" else math.inf for _, cell in tried]
        best = losses.index(min(losses))
        if losses[best] == math.inf:
            reason = next((outcomes[cell].error for _, cell in tried if outcomes[cell].error), "no held-out loss")
            for seed in made.seeds:
                record.note(made.cell(entry, seed), Outcome("failed", f"no trial of tune. ended with a loss: {reason}"))
            continue
        chosen[entry] = tried[best][0]
        record.tuned[entry.label] = {
            "chosen": list(chosen[entry]),
            "seed": made.tuning_seed,
            "losses": {
                " ".join(words): loss if math.isfinite(loss) else None
                for (words, _), loss in zip(tried, losses, strict=True)
            },
        }
        edge = " (the end of what was tried: try further)" if _is_edge(made.tuned, best, len(tried)) else ""
        print(f"tuned    {entry.label}: {' '.join(chosen[entry])}{edge}")
    record.write()
    return chosen


def _last_loss(cell: Cell) -> float:
    found = now(cell.folder)
    return found.loss if found is not None and math.isfinite(found.loss) else math.inf


def _is_edge(tuned: Mapping[str, Sequence[str]], best: int, count: int) -> bool:
    return len(tuned) == 1 and count > 1 and best in (0, count - 1)


class Record:
    """comparison.json: what was asked for, what was tuned, how each cell ended. What an earlier comparison in the same
    folder left there stays."""

    def __init__(self, made: Plan):
        self.path = made.out / RECORD
        self._out = made.out
        self._words = made.words
        before = json_object(self.path) or {}
        cells = before.get("cells")
        self._cells: dict[str, Any] = {
            str(cell["folder"]): cell
            for cell in (cells if isinstance(cells, list) else [])
            if isinstance(cell, dict) and "folder" in cell
        }
        tuned = before.get("tuned")
        self.tuned: dict[str, Any] = dict(tuned) if isinstance(tuned, dict) else {}
        self._command = made.command
        self.write()

    def note(self, cell: Cell, outcome: Outcome) -> None:
        folder = cell.folder.relative_to(self._out).as_posix()
        told = {"label": cell.label, "folder": folder, "seed": cell.seed, "status": outcome.status}
        self._cells[folder] = {**told, "error": outcome.error, "command": cell.command}

    def write(self) -> None:
        content = {
            "command": self._command,
            "words": list(self._words),
            "tuned": self.tuned,
            "cells": list(self._cells.values()),
        }
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())
