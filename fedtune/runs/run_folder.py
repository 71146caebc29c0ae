"""The run folder: everything a run leaves behind, written as it goes and whole at any moment.

config.yaml     every setting, resolved; what `fedtune run resume=` starts from
metrics.csv     a line per round
ledger.csv      a line per message
failures.csv    what went wrong, with whom; a line per failed client and round
clients.csv     how good the model, or each client's own where a method leaves it one, is on each client's own data
clock.csv       what each client's turn took on its device, where devices have limits (fedtune/server/virtual_clock.py)
similarity.csv  how much the signs of clients' updates agree, where evaluate.similarity asks for it; a line per pair
summary.json    totals, versions, hashes; replaced after each round
checkpoint/     the strategy's state after the last finished round
adapter/        the global adapter, for PeftModel.from_pretrained; none where the base itself is trained
start/          what it was before the first round, for fedtune compress --start
best/           keep.best: the round with the lowest held-out loss: its adapter, its model.fedtune, and which it was
rounds/N/       keep.every: the same of each Nth round
tracker.json    by which ids trackers know the run (fedtune/server/trackers.py); TensorBoard's and wandb's files lie
                beside it
model.fedtune   all that makes the model of its base, where that is numbers along seeded directions: a few kB
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedtune.config.compose import load_file
from fedtune.config.schema import Experiment
from fedtune.core.csv_cells import guarded
from fedtune.core.errors import RunFolderError
from fedtune.core.files import hold, sync_folder, write_atomically
from fedtune.core.protocol import Score
from fedtune.planning.turn_times import Timed
from fedtune.runs import model_file
from fedtune.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedtune.runs.ledger import LedgerRow
from fedtune.runs.metrics_columns import CLOCK, METRICS, MORE_SCORES, SIMILARITY
from fedtune.runs.tables import COLUMNS, Tables, csv_text, read_lines

BEST, ROUNDS = "best", "rounds"
KEPT = "kept.json"  # in such a folder: {"round": N, "eval_loss": x}


def best_of(round: int) -> str:
    """Where the best round's folder waits until the checkpoint is written, with which the round counts: the one before
    it stays whole until then."""
    return f".{BEST}-{round}"


class RunFolder:
    """An open run folder. Only one process at a time can hold it.

    Every method that writes raises `RunFolderError` with the file and the way out if it can't.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: FileLock | None = hold(path)
        self._tables = Tables(path)
        self._settled: dict[str, list[Any]] = {}  # the tables as of the checkpoint that was read

    @classmethod
    def create(cls, out: str | None, name: str) -> "RunFolder":
        """Make the folder `out`, or the first free one of runs/NAME, runs/NAME-2, ...

        Raises:
            RunFolderError: if it holds a run already or can't be made.
        """
        try:
            if out is not None:
                check_vacant(out)
                path = Path(out).expanduser()
                path.mkdir(parents=True, exist_ok=True)
                return cls(path)
            return cls(free_folder(name))
        except OSError as error:
            named = out or f"runs/{name}"
            raise RunFolderError(
                f"out={named} can't be made: {error.strerror or error}. Name another with out="
            ) from error

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """Open an existing run to go on with it.

        Raises:
            RunFolderError: if it holds no run, or another process is at it.
        """
        folder = Path(path).expanduser()
        if not (folder / "config.yaml").is_file():
            raise RunFolderError(f"resume={path} holds no run (no config.yaml): give the folder that out= named")
        try:
            return cls(folder)
        except OSError as error:
            raise RunFolderError(
                f"resume={path} can't be written to: {error.strerror or error}. A run goes on in its own folder: make "
                "room there, or copy it to where it can be written"
            ) from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_config(self, experiment: Experiment) -> None:
        with self._writing("config.yaml") as path:
            write_atomically(path, experiment.text().encode())

    def read_config(self) -> Experiment:
        """What `write_config` wrote.

        Raises:
            ConfigError: if it can't be read.
        """
        return load_file(self.path / "config.yaml")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.csv", [row])

    def append_ledger(self, entries: Iterable[LedgerRow]) -> None:
        with self._writing("ledger.csv"):
            self._tables.append("ledger.csv", "".join([entry.line() for entry in entries]))

    def append_failures(self, failures: Iterable[tuple[int, int, str]]) -> None:
        """By client, whoever failed first."""
        ordered = sorted(failures, key=lambda failure: failure[:2])
        self._append("failures.csv", [{"round": round, "client": peer, "error": why} for round, peer, why in ordered])

    def append_clients(self, round: int, scores: Mapping[int, Score], names: Mapping[int, str]) -> None:
        rows = [
            {"round": round, "client": peer, "tokens": score.tokens, **score.row(), "name": names.get(peer) or None}
            for peer, score in sorted(scores.items())
        ]
        self._append("clients.csv", rows)

    def append_similarity(self, round: int, pairs: Iterable[tuple[int, int, float | None]]) -> None:
        """A line to similarity.csv for each two clients of a round.

        Args:
            pairs: as fedtune.server.update_similarity.every_two has them.
        """
        self._append("similarity.csv", [dict(zip(SIMILARITY, (round, *pair), strict=True)) for pair in pairs])

    def append_clock(self, round: int, turns: Iterable[Timed]) -> None:
        """A line a turn, by client and then by when it began. No limit is an empty cell, as in a file of devices."""
        rows = []
        for timed in sorted(turns, key=lambda timed: (timed.client, timed.begun)):
            took = [None if value == math.inf else value for value in astuple(timed.turn)]
            cells = (round, timed.client, timed.begun, *took, timed.staleness, timed.excluded_reason)
            rows.append(dict(zip(CLOCK, cells, strict=True)))
        self._append("clock.csv", rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        with self._writing("summary.json") as path:
            write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """After this the round counts, so its lines are on disk before."""
        with self._writing("checkpoint/state.safetensors") as path:
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, replace(checkpoint, tables=self._tables.settle()))

    def load_checkpoint(self, template: Any) -> Checkpoint | None:
        """The last finished round, or None if there is none yet."""
        path = self.path / "checkpoint" / "state.safetensors"
        if not path.exists():
            return None
        checkpoint = load_checkpoint(path, template)
        self._settled = checkpoint.tables
        return checkpoint

    def write_adapter(self, name: str, content: bytes, place: str = "adapter") -> None:
        """Write one file of a PEFT adapter, whole or not at all.

        Args:
            place: `start` for the adapter before the first round, which `fedtune compress` takes the difference from.
        """
        with self._writing(f"{place}/{name}") as path:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)

    def write_model(self, content: bytes) -> None:
        with self._writing(model_file.NAME) as path:
            write_atomically(path, content)

    def write_kept(self, place: str, files: Mapping[str, bytes]) -> None:
        """Write the folder `place` with these files, whole or not at all, for whatever was there."""
        with self._writing(place) as path:
            unfinished = path.with_name(f".{path.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name, content in files.items():
                write_atomically(unfinished / name, content)
            sync_folder(unfinished)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)

    def settle_kept(self, done: int) -> None:
        """Make what was kept agree with the checkpoint: round `done`'s is the best if it was found to be so, and what
        is of later rounds goes."""
        with self._writing(BEST) as best:
            for waiting in self.path.glob(f".{BEST}-*"):
                if waiting.name == best_of(done):
                    shutil.rmtree(best, ignore_errors=True)
                    waiting.rename(best)
                else:
                    shutil.rmtree(waiting)
            for kept in (self.path / ROUNDS).glob("*"):
                if not kept.name.isdecimal() or int(kept.name) > done:
                    shutil.rmtree(kept)

    def best(self) -> dict[str, Any]:
        """Which round is in best/, and its held-out loss; nothing if none is."""
        try:
            found = json.loads((self.path / BEST / KEPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def forget_after(self, round: int) -> list[LedgerRow]:
        """Take out what follows `round`, that of the checkpoint that was read, and return the ledger.

        Raises:
            RunFolderError: if lines of finished rounds are gone or changed.
        """
        for name in COLUMNS:
            with self._writing(name):
                self._tables.cut_back(name, round, self._settled)
        return self._tables.entries()

    def spent(self) -> tuple[float, float | None, float]:
        """Seconds of the rounds so far, without evaluation (the virtual clock's where it runs), the last held-out loss,
        and the seconds of the last round."""
        rows = self._rows()
        clock = [float(row["virtual_seconds"]) for row in rows if row.get("virtual_seconds")]
        losses = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
        times = [after - before for before, after in itertools.pairwise([0.0, *clock])] or [
            float(row["seconds"]) for row in rows
        ]
        return sum(times) if not clock else clock[-1], losses[-1] if losses else None, times[-1] if times else 0.0

    def scores(self) -> dict[str, Any]:
        """The first and the last held-out scores so far, and the time that rounds took, here and on the clients'
        devices."""
        rows = self._rows()
        scored = [row for row in rows if row["eval_loss"]]
        found: dict[str, Any] = {}
        for label, row in (("first", scored[0]), ("last", scored[-1])) if scored else ():
            names = ("eval_loss", "eval_accuracy", *MORE_SCORES)
            found |= {f"{label}_{name}": float(row[name]) for name in names if row.get(name)}
        found["seconds"] = round(sum(float(row["seconds"]) + float(row["eval_seconds"]) for row in rows), 3)
        if timed := [row["virtual_seconds"] for row in rows if row.get("virtual_seconds")]:
            found["virtual_seconds"] = float(timed[-1])
        return found

    def _rows(self) -> list[dict[str, str]]:
        header, *lines = read_lines(self.path / "metrics.csv") or [list(METRICS)]
        return [dict(zip(header, cells, strict=True)) for cells in lines]

    def metrics(self) -> list[dict[str, float]]:
        """The rounds so far, each with the numbers that it has."""
        return [{name: float(cell) for name, cell in row.items() if cell} for row in self._rows()]

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = csv_text([[_cell(row.get(column)) for column in COLUMNS[name]] for row in rows])
        with self._writing(name):
            self._tables.append(name, lines)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        path = self.path / name
        try:
            yield path
        except OSError as error:
            begun = (self.path / "config.yaml").exists()
            way_out = f"fedtune run resume={self.path}" if begun else f"start it again, with out={self.path}"
            raise RunFolderError(
                f"{path} can't be written: {error.strerror or error}. What was written before is kept; "
                f"make room, then: {way_out}"
            ) from error


@contextmanager
def settled(experiment: Experiment, resume: str | None) -> Iterator[Experiment]:
    """The experiment with its run folder named, so that server and clients agree on where things are kept.

    A folder that was made for it here and stayed empty is taken away again.

    Raises:
        RunFolderError: if no folder can be made.
        FedtuneError: if files or users are the clients, and can't be read.
    """
    if experiment.data.is_brought:
        from fedtune.data.own_data import counted

        experiment = counted(experiment)
    if resume is not None or experiment.out is not None:
        yield replace(experiment, out=resume or experiment.out)
        return
    try:
        folder = free_folder(experiment.name)
    except OSError as error:
        raise RunFolderError(
            f"runs/{experiment.name} can't be made: {error.strerror or error}. Name another with out="
        ) from error
    try:
        yield replace(experiment, out=str(folder))
    finally:
        with suppress(OSError):
            folder.rmdir()


def free_folder(name: str) -> Path:
    """Make the first of runs/NAME, runs/NAME-2, ... that isn't there yet.

    Raises:
        OSError: if it can't be made.
    """
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        path.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("there is always another number")


def check_vacant(out: str) -> None:
    """Check that a new run may write to `out`.

    Raises:
        RunFolderError: if `out` holds a run already, or is a file.
    """
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"out={out} is a file: expected a folder, or a name for a new one")
    if any((path / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoint")):
        raise RunFolderError(
            f"out={out} already holds a run: go on with it by resume={out}, or name another folder with out="
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else guarded(str(value))
