"""Play cells in processes that stay, each of which loads the base and the data once.

    cell -> a free process -> its run folder; what it says goes to log.txt beside it

A process that dies (out of memory, say) takes the runs of its neighbours along: they are run again one at a time, and
the one that dies alone has failed. If this process is killed, so are the others within a second; what is on disk is
what the next comparison goes on from.
"""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from fedtune.comparisons.plan import PlannedRun
from fedtune.comparisons.processes import starting, take_environment, without_script
from fedtune.comparisons.state import now
from fedtune.config.compose import compose, differences, load_file
from fedtune.config.schema import Experiment
from fedtune.core.errors import FedtuneError, Interrupted, RunFolderError
from fedtune.core.signals import ENDINGS
from fedtune.runtime.worker_process import WATCH_SECONDS, is_alive

LOG = "log.txt"
POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for what is interrupted
_STAYS = contextlib.ExitStack()  # what a process has until it ends


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    status: str  # done, failed or interrupted
    error: str = ""
    seconds: float = 0.0


def asked(cell: PlannedRun) -> tuple[Experiment, Experiment | None]:
    """What the cell is, and what its folder holds of it, if anything.

    Raises:
        ConfigError: if these settings don't go together.
        RunFolderError: if the folder holds a run with others.
    """
    experiment = replace(compose(list(cell.words)), out=str(cell.folder))
    if experiment.data.is_brought:
        from fedtune.data.own_data import counted

        experiment = counted(experiment)
    stored = cell.folder / "config.yaml"
    if not stored.is_file():
        return experiment, None
    before = load_file(stored)
    if before.adapter.path is not None and before.adapter.path == experiment.adapter.path:
        experiment = replace(experiment, adapter=before.adapter)  # with what that folder said
    if changed := differences(before.fixed(), experiment.fixed()):
        raise RunFolderError(
            f"{cell.folder} holds a run with other settings: {'; '.join(changed)}. Take another out=, or leave "
            "these as they were"
        )
    return experiment, before


def is_done(cell: PlannedRun) -> bool:
    """Whether the cell's folder holds it, finished.

    Raises:
        ConfigError, RunFolderError: as `asked`, where the folder holds a run.
    """
    if not (cell.folder / "config.yaml").is_file():  # composing takes a tenth of a second
        return False
    experiment, before = asked(cell)
    if before is None or (before.rounds, before.budget) != (experiment.rounds, experiment.budget):
        return False
    found = now(cell.folder)
    return found is not None and found.status == "finished"


def play(cell: PlannedRun) -> Outcome:
    """Run the cell, or go on with it, in this process. Whatever it says is in its log."""
    caught = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in (signal.SIGINT, *caught):
        signal.signal(number, _interrupt_once)
    begun = time.monotonic()
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with (
            (cell.folder / LOG).open("a", encoding="utf-8", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            print(f"$ {cell.command}")
            try:
                outcome = _play(cell)
            except Exception as error:  # one cell's end is not the others'
                outcome = Outcome("failed", _said(error))
            print(outcome.error or outcome.status)
    except KeyboardInterrupt:
        outcome = Outcome("interrupted")
    except OSError as error:
        outcome = Outcome("failed", f"{cell.folder} can't be written: {error.strerror or error}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
    return replace(outcome, seconds=time.monotonic() - begun)


def _play(cell: PlannedRun) -> Outcome:
    from fedtune.runtime.start import start

    experiment, before = asked(cell)
    try:
        start(experiment, None if before is None else str(cell.folder))
    except Interrupted:
        return Outcome("interrupted")
    return Outcome("done")


def _said(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, FedtuneError) else f"{type(error).__name__}: {words}"


def _interrupt_once(*_: Any) -> None:
    for number in (signal.SIGINT, *ENDINGS):
        signal.signal(number, signal.SIG_IGN)  # what the first one ends is being written down
    raise KeyboardInterrupt


def _begin(parent: int, environment: dict[str, str]) -> None:
    """What a process does before its first cell."""
    from fedtune.core.caches import sharing

    take_environment(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _STAYS.enter_context(sharing())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while is_alive(parent):
        time.sleep(WATCH_SECONDS)
    os._exit(1)


class Processes:
    """So many processes that play cells; a context."""

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        if kind is not None:
            for pid in [process.pid for process in processes if process.pid is not None]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGINT)
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        until = time.monotonic() + GRACE_SECONDS
        for process in processes if kind is not None else ():
            process.join(max(0.0, until - time.monotonic()))
            process.kill()  # what it hasn't written down by now, it will do again

    def run(
        self,
        cells: Sequence[PlannedRun],
        begins: Callable[[PlannedRun], None],
        ends: Callable[[PlannedRun, Outcome], None],
        waits: Callable[[], None],
    ) -> None:
        """Play all of them, in order as far as several at a time can be.

        Args:
            begins: told of each cell as it is handed over; `ends`, of how it ended.
            waits: called now and then in between.
        """
        waiting, alone = deque(cells), deque[PlannedRun]()
        running: dict[Future[Outcome], PlannedRun] = {}
        suspects: set[PlannedRun] = set()
        while waiting or alone or running:
            for cell in self._next(waiting, alone, running):
                begins(cell)
                running[self._submit(cell)] = cell
            finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            waits()
            died = []
            for future in finished:
                cell = running.pop(future)
                try:
                    ends(cell, future.result())
                except BrokenProcessPool:
                    died.append(cell)
            if died:
                died += running.values()
                running.clear()
                self._pool = None
                for cell in died:
                    if cell in suspects:
                        ends(cell, Outcome("failed", f"its process died, twice; see {cell.folder / LOG}"))
                    else:
                        suspects.add(cell)
                        alone.append(cell)

    def _next(
        self, waiting: deque[PlannedRun], alone: deque[PlannedRun], running: dict[Future[Outcome], PlannedRun]
    ) -> Iterator[PlannedRun]:
        if alone:
            if not running:
                yield alone.popleft()
            return
        while waiting and len(running) < self.count:
            yield waiting.popleft()

    def _submit(self, cell: PlannedRun) -> Future[Outcome]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, starting(), _begin, (os.getpid(), dict(os.environ)))
        with without_script():  # this may start a process
            return self._pool.submit(play, cell)
