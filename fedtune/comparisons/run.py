"""A comparison from its words to its page: tune if asked, play every cell, say how each ended."""

import math
from collections.abc import Mapping, Sequence

from fedtune.comparisons.plan import ComparisonPlan, PlannedEntry, PlannedRun, plan
from fedtune.comparisons.play import Outcome, Processes, is_done
from fedtune.comparisons.state import now
from fedtune.comparisons.view import CompareView
from fedtune.core.errors import ConfigError, FedtuneError, Interrupted, RunFolderError
from fedtune.core.files import hold
from fedtune.runs.comparison_file import COMPARISON, ComparisonWriter


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


def _compare(made: ComparisonPlan) -> int:
    record = ComparisonWriter(made.out, made.command, made.words)
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
        raise FedtuneError(f"none of these runs came to anything: {made.out / COMPARISON} has the reasons")
    from fedtune.report.page import report

    print(f"page     {report([str(made.out)], str(made.out))}")
    return int(failed)


def _play(
    title: str, cells: Sequence[PlannedRun], processes: Processes, record: ComparisonWriter
) -> dict[PlannedRun, Outcome]:
    """Play the cells that aren't done, and return how each ended.

    Raises:
        KeyboardInterrupt: if any was interrupted.
    """
    outcomes: dict[PlannedRun, Outcome] = {}
    waiting = []
    with CompareView(title, cells) as view:

        def ends(cell: PlannedRun, outcome: Outcome) -> None:
            outcomes[cell] = outcome
            _note(record, cell, outcome)
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
                _note(record, cell, outcomes[cell])
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


def tune(made: ComparisonPlan, processes: Processes, record: ComparisonWriter) -> dict[PlannedEntry, tuple[str, ...]]:
    """Try every value on the tuning seed; of each entry the words of the trial with the lowest last held-out loss.

    An entry of which no trial came to a loss is left out, and is a failure of each of its seeds.
    """
    trials = {entry: made.trials(entry) for entry in made.entries}
    cells = [cell for tried in trials.values() for _, cell in tried]
    outcomes = _play(f"{made.out}: trials on seed {made.tuning_seed}", cells, processes, record)
    chosen: dict[PlannedEntry, tuple[str, ...]] = {}
    for entry, tried in trials.items():
        losses = [_last_loss(cell) if outcomes[cell].status == "done" else math.inf for _, cell in tried]
        best = losses.index(min(losses))
        if losses[best] == math.inf:
            reason = next((outcomes[cell].error for _, cell in tried if outcomes[cell].error), "no held-out loss")
            for seed in made.seeds:
                failed = Outcome("failed", f"no trial of tune. ended with a loss: {reason}")
                _note(record, made.cell(entry, seed), failed)
            continue
        chosen[entry] = tried[best][0]
        tried_words = [" ".join(words) for words, _ in tried]
        found = dict(zip(tried_words, losses, strict=True))
        record.note_tuning(entry.label, chosen[entry], made.tuning_seed, found)
        edge = " (the end of what was tried: try further)" if _is_edge(made.tuned, best, len(tried)) else ""
        print(f"tuned    {entry.label}: {' '.join(chosen[entry])}{edge}")
    record.write()
    return chosen


def _note(record: ComparisonWriter, cell: PlannedRun, outcome: Outcome) -> None:
    record.note_run(cell.label, cell.folder, cell.seed, outcome.status, outcome.error, cell.command)


def _last_loss(cell: PlannedRun) -> float:
    found = now(cell.folder)
    return found.loss if found is not None and math.isfinite(found.loss) else math.inf


def _is_edge(tuned: Mapping[str, Sequence[str]], best: int, count: int) -> bool:
    return len(tuned) == 1 and count > 1 and best in (0, count - 1)
