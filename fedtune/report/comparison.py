"""Which runs may be compared, and what the comparison says.

Runs with the same settings but for the seed are one entry. Entries may stand side by side when they learn the same
task: the same base (by its hash), data, division, population and evaluation. Others go into groups of their own.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.compose import differences
from fedtune.config.schema import flat
from fedtune.core.errors import RunFolderError
from fedtune.report.intervals import estimate
from fedtune.report.labels import alike, labels, told_apart, unique
from fedtune.report.results import write_results
from fedtune.report.shapes import (
    Comparison,
    Curve,
    Entry,
    Estimate,
    Failure,
    Group,
    Protocol,
    Reached,
    Standing,
    Table,
)
from fedtune.report.standings import curve, protocols, reached, table, target
from fedtune.report.tasks import common, tasks, title
from fedtune.runs.comparison_file import COMPARISON, read_comparison
from fedtune.runs.read import Run, find, read

__all__ = [
    "Comparison",
    "Curve",
    "Entry",
    "Estimate",
    "Failure",
    "Group",
    "Protocol",
    "Reached",
    "Standing",
    "Table",
    "compare",
    "curve",
    "estimate",
    "load",
    "protocols",
    "reached",
    "table",
    "target",
    "write_results",
]


def load(paths: list[Path]) -> Comparison:
    """Compare all runs among and below these paths, with what a comparison.json there says of them.

    A folder that can't be read is left out, and said in the notes.

    Raises:
        RunFolderError: naming a path that doesn't exist or holds no run.
    """
    runs: list[Run] = []
    notes: list[str] = []
    for folder in find(paths):
        try:
            runs.append(read(folder))
        except RunFolderError as error:
            notes.append(f"left out: {error}")
    places = dict.fromkeys(place for run in runs for place in (run.path, *_above(run.path)))
    records = {
        place: read_comparison(place) for place in dict.fromkeys([*paths, *places]) if (place / COMPARISON).is_file()
    }
    # Who asks for one run of a comparison wants its label, and not what became of the others
    whole = [said for place, said in records.items() if any(place.resolve().is_relative_to(p.resolve()) for p in paths)]
    failures = [failure for record in whole for failure in record.failures]
    names = {path: label for record in records.values() for path, label in record.labels.items()}
    command = next((record.command for record in whole if record.command), None)
    notes += [note for record in whole for note in record.notes]
    return compare(runs, failures, command, labels=names, notes=notes)


def compare(
    runs: list[Run],
    failures: list[Failure] | None = None,
    command: str | None = None,
    *,
    labels: Mapping[Path, str] | None = None,
    notes: Iterable[str] = (),
) -> Comparison:
    """Put runs into entries and groups.

    Of two runs with the same settings and seed the one that got further counts, and a note says so.

    Args:
        failures: what is known to have failed beside these runs.
        labels: by a run's resolved path, names that somebody gave to entries; the others are told apart by settings.
        notes: what else there is to say about folders.
    """
    said = [*notes, *(f"{run.path}: {note}" for run in runs for note in run.notes)]
    by_task: dict[str, list[Run]] = {}
    of: dict[str, dict[str, Any]] = {}
    for run, task in zip(runs, tasks(runs), strict=True):
        by_task.setdefault(_key(task), []).append(run)
        of[_key(task)] = task
    by_size = sorted(by_task, key=lambda key: -len(by_task[key]))
    groups, first = [], of[by_size[0]] if by_size else {}
    for key in by_size:
        members = by_task[key]
        entries = _entries(members, labels or {}, said)
        kept = [run for entry in entries for run in entry.runs]
        groups.append(Group(title(kept[0]), common(kept), entries))
        if len(groups) > 1:
            parts = "; ".join(differences(first, of[key]))
            said.append(f"not comparable with {groups[0].title}, and so apart from it: {groups[-1].title} ({parts})")
    groups = [
        replace(group, title=name)
        for group, name in zip(groups, _titles(groups, [of[key] for key in by_size]), strict=True)
    ]
    known = {(failure.label, failure.seed): failure for failure in failures or []}
    for group in groups:
        for entry in group.entries:
            for run in entry.runs:  # it may have been resumed since
                if run.status == "finished":
                    known.pop((entry.label, run.experiment.seed), None)
            known |= {
                (entry.label, run.experiment.seed): Failure(entry.label, run.experiment.seed, reason)
                for run in entry.runs
                if (reason := _failed(run)) is not None
            }
            if note := _unlike_machines(entry):
                said.append(note)
            said += [_resumable(entry, run) for run in entry.runs if run.status == "interrupted"]
    return Comparison(tuple(groups), tuple(known.values()), tuple(dict.fromkeys(said)), command)


def _entries(runs: Sequence[Run], given: Mapping[Path, str], notes: list[str]) -> tuple[Entry, ...]:
    same: dict[str, dict[int, Run]] = {}
    for run, shared in zip(runs, alike([run.experiment for run in runs]), strict=True):
        seeds, seed = same.setdefault(_key(shared), {}), run.experiment.seed
        if (other := seeds.get(seed)) is not None:
            kept, left = (run, other) if _far(run) > _far(other) else (other, run)
            notes.append(f"{left.path} is left out: it has the settings and the seed of {kept.path}, which got further")
            run = kept
        seeds[seed] = run
    members = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in same.values()]
    made = labels([runs[0].experiment for runs in members])
    named = [
        next((given[run.path.resolve()] for run in runs if run.path.resolve() in given), label)
        for runs, label in zip(members, made, strict=True)
    ]
    entries = [Entry(label, runs) for label, runs in zip(told_apart(named, made), members, strict=True)]
    return tuple(sorted(entries, key=lambda entry: _natural(entry.label)))


def _key(nested: Mapping[str, Any]) -> str:
    """Equal for equal settings, in whatever order a file has them."""
    return repr(sorted(flat(nested).items(), key=lambda item: item[0]))


def _far(run: Run) -> tuple[int, bool]:
    return (int(run.rounds[-1]) if len(run.rounds) else -1, run.status == "finished")


def _failed(run: Run) -> str | None:
    """Why a run has no usable result, if it has none."""
    if run.status == "failed":
        return run.error or "it failed, and didn't say why"
    if run.status in ("interrupted", "cut off") and not np.isfinite(run.metrics["eval_loss"]).any():
        return run.error or f"{run.status} before anything was evaluated"
    return None


def _resumable(entry: Entry, run: Run) -> str:
    done = f"after round {run.rounds[-1]} of {run.experiment.rounds}" if len(run.rounds) else "before round 0 was done"
    command = shlex.join(["fedtune", "run", f"resume={run.path}"])
    return f"{entry.label} seed {run.experiment.seed} was interrupted {done}; go on with: {command}"


def _unlike_machines(entry: Entry) -> str | None:
    if any(run.is_virtual for run in entry.runs):
        return None
    machines = {
        (run.experiment.runtime.name, str(found.get("device") if isinstance(found, Mapping) else None))
        for run in entry.runs
        if (found := run.summary.get("machine")) is not None
    }
    return (
        f"{entry.label}: its seeds ran on unlike machines, so their seconds are not alike"
        if len(machines) > 1
        else None
    )


def _titles(groups: Sequence[Group], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of the groups, with what tells them from the first of that title beside the later ones."""
    first: dict[str, Mapping[str, Any]] = {}
    found = []
    for group, task in zip(groups, tasks, strict=True):
        other = first.setdefault(group.title, task)
        parts = [
            f"{key} {value.split(' -> ')[-1]}"
            for key, _, value in (line.partition(": ") for line in differences(other, task))
        ]
        found.append(", ".join([group.title, *parts[:2]]))
    return unique(found)


def _above(path: Path) -> tuple[Path, ...]:
    return tuple(path.resolve().parents)[:2]


def _natural(label: str) -> list[tuple[bool, int, str]]:
    """So that r16 comes after r8."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label)]
