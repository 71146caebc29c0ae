"""A run folder as arrays: what a comparison reads, whether the run has ended, is going on, or was cut off mid-write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.schema import Experiment

Floats = np.ndarray  # float64


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
    status: str  # finished, running, interrupted, failed; "cut off" where summary.json is missing or unreadable
    error: str | None  # of a failed run
    summary: Mapping[str, Any]  # empty if it can't be read
    metrics: Mapping[str, Floats]  # by column of metrics.csv: (R,); "round" ascends from 0
    wire: Mapping[tuple[str, str], Floats]  # by (direction, part) of ledger.csv: (R,) wire bytes in each round
    payload: Mapping[tuple[str, str], Floats]  # likewise, the codec's blobs alone
    clients: Clients | None
    memory_bytes: float  # the most that any client's turn takes of its device, by clock.csv or the cost model; NaN
    notes: tuple[str, ...]  # what had to be left out, as "ledger.csv: the last line is cut off"

    @property
    def rounds(self) -> np.ndarray:
        """(R,) int64."""
        return self.metrics["round"].astype(np.int64)

    def spent(self, direction: str | None = None) -> Floats:
        """(R,) wire bytes since the start, after each round: what the method costs. Messages that only measure
        (part `evaluate`) aren't in it."""
        raise NotImplementedError

    def seconds(self) -> Floats:
        """(R,) since the start, after each round: of the virtual clock where it runs, else as measured, without
        evaluation."""
        raise NotImplementedError

    @property
    def is_virtual(self) -> bool:
        """Whether `seconds` are those of the virtual clock."""
        raise NotImplementedError


def read(path: Path) -> Run:
    """Read a run folder; a line that was cut off is left out, and said in `notes`.

    Raises:
        RunFolderError: if there is no run, or its config can't be read.
    """
    raise NotImplementedError


def find(paths: list[Path]) -> list[Path]:
    """The run folders among and below these paths, sorted; a run's own subfolders aren't searched, nor a comparison's
    `tune/` (a path given itself always counts).

    Raises:
        RunFolderError: naming a path that doesn't exist or holds no run.
    """
    raise NotImplementedError
