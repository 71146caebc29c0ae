"""A run folder as arrays: what a comparison reads, whether the run has ended, is going on, or was cut off mid-write."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedtune.config.compose import load
from fedtune.config.plain_yaml import read_plain
from fedtune.config.schema import Experiment, SafeDumper
from fedtune.core.errors import ConfigError, FedtuneError, RunFolderError
from fedtune.core.files import is_held
from fedtune.runs.comparison_file import COMPARISON, TRIALS, json_object
from fedtune.runs.csv_columns import MOST, is_none, number, read_columns, read_lines
from fedtune.runs.ledger import Part
from fedtune.runs.metrics_columns import METRICS

Floats = np.ndarray  # float64

STATUSES = ("finished", "running", "interrupted", "failed")
CUT_OFF = "cut off"
UNTOLD = "its process ended without writing that down"
WAYS = ("up", "down")
COUNTS = ("clients", "failed")  # columns of metrics.csv that can't be below 0, as those of bytes and seconds
_OWN = {"seed": int, "out": str, "name": str, "overrides": list}  # settings that differ between runs of one kind


@dataclass(frozen=True)
class Clients:
    """How good the model, or each client's own, is on each client's own held-out data, after one round."""

    round: int
    peers: np.ndarray  # (n,) int64, ascending
    loss: Floats  # (n,)
    accuracy: Floats  # (n,)


@dataclass(frozen=True)
class Run:
    """One run. R is the number of whole lines in its metrics.csv; a number that isn't there is NaN."""

    path: Path
    experiment: Experiment
    status: str  # finished, running, interrupted, failed; "cut off" where summary.json is missing or unreadable. What
    # says that it is running and is held by no process is interrupted
    error: str | None  # why it failed or was interrupted, where that is known
    summary: Mapping[str, Any]  # empty if it can't be read
    metrics: Mapping[str, Floats]  # by column of metrics.csv: (R,); "round" ascends from 0
    wire: Mapping[tuple[str, str], Floats]  # by (direction, part) of ledger.csv: (R,) wire bytes in each round
    payload: Mapping[tuple[str, str], Floats]  # likewise, the codec's blobs alone
    clients: Clients | None
    memory_bytes: float  # the most that any client's turn takes of its device, by clock.csv or the cost model; NaN
    notes: tuple[str, ...]  # what had to be left out, as "ledger.csv: the last line is cut off"

    @property
    def rounds(self) -> np.ndarray:
        """The rounds that metrics.csv tells of, (R,) int64."""
        return self.metrics["round"].astype(np.int64)

    def spent(self, direction: str | None = None) -> Floats:
        """Wire bytes (R,) since the start, after each round: what the method costs. Messages that only measure
        (part `evaluate`) aren't in it. NaN from the first round on whose messages aren't all in ledger.csv."""
        counted = [
            sizes for (way, part), sizes in self.wire.items() if part != Part.EVALUATE and direction in (None, way)
        ]
        return np.cumsum(sum(counted, np.zeros(len(self.rounds))))

    def seconds(self) -> Floats:
        """Seconds (R,) since the start, after each round: of the virtual clock where it runs, else as measured, without
        evaluation."""
        if not self.is_virtual:
            return np.cumsum(self.metrics["seconds"])
        shown = self.metrics["virtual_seconds"]
        return np.maximum.accumulate(np.where(np.isfinite(shown), shown, 0.0))

    @property
    def is_virtual(self) -> bool:
        """Whether `seconds` are those of the virtual clock."""
        return bool(np.isfinite(self.metrics["virtual_seconds"]).any())


def read(path: Path) -> Run:
    """Read a run folder; a line that was cut off is left out, and said in `notes`.

    Raises:
        RunFolderError: if there is no run, or its config can't be read.
    """
    experiment = _experiment(path)
    summary, lost = _summary(path / "summary.json")
    metrics, notes = _metrics(path / "metrics.csv")
    wire, payload, more = _traffic(path / "ledger.csv", metrics)
    clients, about_clients = _clients(path / "clients.csv", metrics["round"])
    memory, about_memory = _memory(path / "clock.csv", metrics["round"], summary)
    status, error = summary.get("status"), summary.get("error")
    if status == "running" and is_held(path) is False:
        status, error = "interrupted", UNTOLD
    return Run(
        path=path,
        experiment=experiment,
        status=status if status in STATUSES else CUT_OFF,
        error=str(error) if error else None,
        summary=summary,
        metrics=metrics,
        wire=wire,
        payload=payload,
        clients=clients,
        memory_bytes=memory,
        notes=(*lost, *notes, *more, *about_clients, *about_memory),
    )


def find(paths: list[Path]) -> list[Path]:
    """The run folders among and below these paths, sorted; a run's own subfolders aren't searched, nor a comparison's
    `tune/` (a path given itself always counts).

    Raises:
        RunFolderError: naming a path that doesn't exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if not path.is_dir():
            what = "is a file" if path.exists() else "doesn't exist"
            raise RunFolderError(f"{given} {what}: expected a run folder, as out= named it, or one that holds some")
        below = _below(path)
        if not below:
            raise RunFolderError(f"{given} holds no run: expected a folder with config.yaml, there or further down")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return sorted(found.values())


def _below(path: Path) -> list[Path]:
    found = []
    for where, folders, files in os.walk(path):
        if "config.yaml" in files:
            found.append(Path(where))
            folders.clear()
        hidden = [name for name in folders if name.startswith(".") or (name == TRIALS and COMPARISON in files)]
        folders[:] = [name for name in folders if name not in hidden]
    return found


def _experiment(folder: Path) -> Experiment:
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunFolderError(f"{folder} holds no run (no config.yaml): give the folder that out= named")
    try:
        experiment = _loaded(path.read_text(encoding="utf-8"), str(path))
        experiment.method_name, experiment.server_optimizer_name  # noqa: B018 (what has no name can't be compared)
    except FedtuneError as error:
        named = str(path) in str(error)
        raise RunFolderError(str(error) if named else f"{path} can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path} can't be read: it isn't UTF-8 text. Put back what fedtune wrote") from error
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise RunFolderError(f"{path} can't be read: {type(error).__name__}: {error}"[:300]) from error
    return experiment


def _loaded(text: str, where: str) -> Experiment:
    """As `load`; what runs of one kind share is looked at once."""
    try:
        given = read_plain(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a number of thousands of digits
        return load(text, where)
    if not isinstance(given, dict):
        return load(text, where)
    if "overrides" not in given:  # the last that is written; the others have defaults, which this run may not have had
        raise ConfigError(f"{where} is cut off: its last setting, overrides, is missing")
    own = {key: given[key] for key in _OWN if key in given}
    if any(type(value) is not _OWN[key] for key, value in own.items()) or own.get("seed", 0) < 0:
        return load(text, where)
    if not all(isinstance(word, str) and "${" not in word for value in own.values() for word in _words(value)):
        return load(text, where)
    shared = {key: value for key, value in given.items() if key not in own}
    try:
        text_of_all = yaml.dump(shared, Dumper=SafeDumper)
        return replace(_shared(text_of_all), **own)
    except (ConfigError, yaml.YAMLError):
        return load(text, where)


def _words(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [str(value)]


@lru_cache(maxsize=256)
def _shared(text: str) -> Experiment:
    return load(text)


def _summary(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    if (found := json_object(path)) is not None:
        return found, ()
    return {}, ("summary.json can't be read" if path.exists() else "summary.json is missing",)


def _metrics(path: Path) -> tuple[dict[str, Floats], tuple[str, ...]]:
    """By column; a round that is there twice counts as it was written last."""
    header, rows, notes = read_lines(path)
    if header and "round" not in header:
        header, rows, notes = [], [], (*notes, f"{path.name} has no column round")
    columns = {name: header.index(name) for name in dict.fromkeys([*METRICS, *header]) if name in header}
    table = {name: np.array([number(cells[place]) for cells in rows]) for name, place in columns.items()}
    damaged = 0
    for name in set(table).intersection(METRICS) - {"round"}:
        damaged += sum(not is_none(rows[line][columns[name]]) for line in np.flatnonzero(np.isnan(table[name])))
        if name in COUNTS or name.endswith(("_bytes", "seconds")):
            wrong = (table[name] < 0) | (table[name] >= MOST)
            damaged += int(wrong.sum())
            table[name][wrong] = np.nan
    if damaged:
        notes = (*notes, f"{path.name}: {damaged} {'cell' if damaged == 1 else 'cells'} can't be read")
    rounds = table.get("round", np.empty(0))
    good = (rounds >= 0) & (rounds < MOST) & (rounds == np.floor(rounds))
    if not good.all():
        notes = (*notes, f"{path.name}: {int((~good).sum())} lines name no round")
    last = {value: place for place, value in enumerate(rounds.tolist()) if good[place]}
    order = [last[value] for value in sorted(last)]
    if len(order) < good.sum():
        notes = (*notes, f"{path.name}: {int(good.sum()) - len(order)} rounds are there twice")
    return {name: table[name][order] if name in table else np.full(len(order), np.nan)
            for name in dict.fromkeys([*METRICS, *columns])}, notes  # fmt: skip


def _traffic(
    path: Path, metrics: Mapping[str, Floats]
) -> tuple[dict[tuple[str, str], Floats], dict[tuple[str, str], Floats], tuple[str, ...]]:
    """Wire and payload bytes by direction and part."""
    rounds = metrics["round"]
    found = read_columns(path, ("round", "payload_bytes", "wire_bytes"), words=("direction", "part"))
    notes = found.notes if found else (f"{path.name} is missing",) if len(rounds) else ()
    wire: dict[tuple[str, str], Floats] = {}
    payload: dict[tuple[str, str], Floats] = {}
    if found is not None:
        (ways, way_names), (parts, part_names) = found.words["direction"], found.words["part"]
        at, known = _places(found.numbers["round"], rounds)
        if not known.all():
            notes = (*notes, f"{path.name}: {int((~known).sum())} lines are of rounds that didn't end")
        if (odd := ~np.isin(ways, [place for place, name in enumerate(way_names) if name in WAYS])).any():
            notes = (*notes, f"{path.name}: left out what goes neither up nor down, in {int(odd.sum())} of its lines")
            known &= ~odd
        codes = (ways * len(part_names) + parts)[known]
        there = np.bincount(codes) > 0
        kinds, kind = np.flatnonzero(there), (np.cumsum(there) - 1)[codes]
        for into, name in ((wire, "wire_bytes"), (payload, "payload_bytes")):
            place = kind * len(rounds) + at[known]
            total = np.bincount(place, found.numbers[name][known], len(kinds) * len(rounds))
            for code, sizes in zip(kinds.tolist(), total.reshape(len(kinds), len(rounds)), strict=True):
                into[way_names[code // len(part_names)], part_names[code % len(part_names)]] = sizes
    for way in WAYS:
        found_bytes = sum((sizes for (to, _), sizes in wire.items() if to == way), np.zeros(len(rounds)))
        # A resumed run shakes hands in a round that had ended, so more may be there than metrics.csv says
        lost = found_bytes < np.nan_to_num(metrics[f"{way}_wire_bytes"])
        if lost.any():
            notes = (*notes, f"{path.name} lacks messages {way} of {int(lost.sum())} rounds: their bytes are unknown")
            for into in (wire, payload):
                into[way, Part.TRAIN] = np.where(lost, np.nan, into.get((way, Part.TRAIN), np.zeros(len(rounds))))
    return wire, payload, notes


def _clients(path: Path, rounds: Floats) -> tuple[Clients | None, tuple[str, ...]]:
    """After the last round in which any were scored."""
    found = read_columns(path, ("round", "client"), ("eval_loss", "eval_accuracy"))
    if found is None:
        return None, ()
    table = found.numbers
    _, known = _places(table["round"], rounds)
    if not known.any():
        return None, found.notes
    last = table["round"][known].max()
    chosen = np.flatnonzero(known & (table["round"] == last))
    chosen = chosen[np.argsort(table["client"][chosen], kind="stable")]
    peers = table["client"][chosen].astype(np.int64)
    return Clients(int(last), peers, table["eval_loss"][chosen], table["eval_accuracy"][chosen]), found.notes


def _memory(path: Path, rounds: Floats, summary: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    found = read_columns(path, ("round",), ("memory_bytes",))
    if found is not None:
        used = found.numbers["memory_bytes"][_places(found.numbers["round"], rounds)[1]]
        if np.isfinite(used).any():
            return float(np.nanmax(used)), found.notes
    told = summary.get("memory_bytes")
    fits = isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told < 1e18
    return float(told) if told is not None and fits else np.nan, found.notes if found else ()


def _places(values: Floats, rounds: Floats) -> tuple[np.ndarray, np.ndarray]:
    """Where in `rounds` each value is, (n,) int64, and whether it is there, (n,) bool."""
    at = np.minimum(np.searchsorted(rounds, values), max(len(rounds) - 1, 0))
    return at, rounds[at] == values if len(rounds) else np.zeros(len(values), bool)
