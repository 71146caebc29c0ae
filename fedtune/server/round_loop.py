"""The round loop: what the server does, on any Flower Grid.

    play      ask a cohort, receive, check, aggregate    (synchronous.py or asynchronous.py, over client_channel.py)
    finish    evaluate what clients decode               (held_out.py)
              write it down, the checkpoint last         (round_recorder.py)

A failed client is a line in the ledger and in failures.csv. The round counts while a quorum of its cohort replied.
"""

import gc
import math
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from threading import Event
from typing import Any, Protocol

from flwr.serverapp import Grid

from fedtune.config.compatibility import check_client, traits_of
from fedtune.config.compose import differences
from fedtune.core.errors import DivergedError, Interrupted, RunFolderError
from fedtune.core.optional import HasBuffer
from fedtune.runs.checkpoint import state_sha256
from fedtune.runs.ledger import Ledger
from fedtune.runs.run_folder import RunFolder, check_vacant
from fedtune.server.aggregation import Aggregator
from fedtune.server.asynchronous import AsynchronousRounds
from fedtune.server.budget import Spent, ended_by
from fedtune.server.client_channel import ClientChannel
from fedtune.server.eligibility import Eligibility
from fedtune.server.held_out import HeldOut
from fedtune.server.progress import View, make_view
from fedtune.server.round import Round
from fedtune.server.round_parts import RoundParts
from fedtune.server.round_recorder import RoundRecorder
from fedtune.server.state import ServerState
from fedtune.server.synchronous import SynchronousRounds
from fedtune.server.trackers import Tracking
from fedtune.server.virtual_clock import Clock
from fedtune.wire.transport import Transport
from fedtune.workspace.workspace import Workspace


class Rounds(Protocol):
    """How a round is played."""

    def play(self, number: int) -> Round:
        """One round, up to the aggregated state."""
        ...


def run(grid: Grid, workspace: Workspace, resume: str | None = None, stop: Event | None = None) -> None:
    """Run an experiment to its last round, or go on with the one in `resume`, and leave a run folder behind.

    Args:
        stop: set it to interrupt the run at its next wait, as Ctrl-C does.

    Raises:
        FedtuneError: of whichever kind; everything up to the last finished round is then in the run folder.
    """
    experiment = workspace.experiment
    check_client(experiment, workspace.strategy, workspace.client)
    workspace.use_threads()
    if resume is None and experiment.out is not None:
        check_vacant(experiment.out)
    view = make_view()
    try:
        tracking = Tracking(experiment.tracker, view.note)
        view.loading(experiment)
        # Loaded before the folder is made: a wrong path leaves no half-made run behind
        workspace.model, workspace.data  # noqa: B018
        # What is loaded stays until the end. Unfrozen, every full collection walks it: a pause of 0.4 s
        gc.collect()
        gc.freeze()
        folder = RunFolder.open(resume) if resume else RunFolder.create(experiment.out, experiment.name)
        if experiment.runtime.name == "flower":  # whoever reads the log is in another folder
            folder.path = folder.path.resolve()
        try:
            known = restored(workspace, folder)
            RoundLoop(Transport(grid, stop), workspace, known, folder, view, tracking).run()
        finally:
            folder.close()
    finally:
        gc.unfreeze()  # a process may hold one run after the other
        view.close()


def restored(workspace: Workspace, folder: RunFolder) -> ServerState:
    """The server's state as the folder's last checkpoint has it, or a new run's.

    Raises:
        RunFolderError: if the checkpoint can't be read, or is of other settings.
        DataError: if it is of other data.
    """
    experiment = workspace.experiment
    state = workspace.strategy.init(workspace.layout)
    if (checkpoint := folder.load_checkpoint(state)) is None:
        return ServerState(state, run_id=secrets.token_hex(8))
    if checkpoint.config_sha256 != experiment.sha256:
        asked = differences(folder.read_config().fixed(), experiment.fixed())
        changed = f": {'; '.join(asked)}. Leave these out" if asked else "; its config.yaml was changed. Put it back"
        raise RunFolderError(
            f"{folder.path} was started with other settings{changed}, or start a new run with another out="
        )
    workspace.data.check_same(checkpoint.data, f"{folder.path} can't go on")
    return ServerState.restored(checkpoint)


class RoundLoop:
    """One run of one experiment: its rounds, its budget, and how it ends.

    Attributes:
        known: what lasts between rounds.
        rounds: how they are played.
    """

    def __init__(
        self,
        transport: Transport,
        workspace: Workspace,
        known: ServerState,
        folder: RunFolder,
        view: View,
        tracking: Tracking,
    ):
        experiment, strategy = workspace.experiment, workspace.strategy
        asynchronous = traits_of(strategy).asynchronous
        self.known = known
        self._workspace = workspace
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._tracking = tracking
        self._clock = Clock(workspace, known)
        self._channel = ClientChannel(transport, workspace, known, self._clock, view, asynchronous)
        eligibility = Eligibility(workspace, self._channel.registry, self._clock, view)
        self._aggregator = Aggregator(experiment, strategy, view.note, self._channel.exclude)
        self._recorder = RoundRecorder(workspace, known, folder)
        parts = RoundParts(workspace, self._channel, eligibility, self._aggregator, self._clock, known, folder, view)
        self._held_out = HeldOut(parts)
        synchronous = SynchronousRounds(parts)
        buffer = strategy.buffer if isinstance(strategy, HasBuffer) else 1
        self.rounds: Rounds = AsynchronousRounds(buffer, synchronous, parts) if asynchronous else synchronous
        self._status = "running"
        self._seconds = 0.0  # of the rounds so far, without evaluation: the virtual clock's where it runs
        self._loss: float | None = None  # the last held-out one
        self._before = (0, 0.0)  # bytes and seconds when the last round began
        self._memory_bytes: float | None = None  # of a client's work, where devices have no limits

    def run(self) -> None:
        """All rounds that are not done yet.

        Raises:
            FedtuneError: as `run`, outside.
        """
        self._take_up()
        known, folder, view = self.known, self._folder, self._view
        folder.write_config(replace(self._experiment, out=str(folder.path)))
        self._summarise()
        view.started(self._experiment, self._workspace, folder.path, known.done)
        for note in self._workspace.notes:
            view.note(note)
        self._tracking.begin(self._experiment, folder.path, folder.metrics(), known.done)
        try:
            self._play_all()
        except BaseException as error:
            self._status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(RunFolderError):  # the first error is the one to show
                folder.append_ledger(self._channel.ledger.take_pending())
                self._summarise(error)
            self._tracking.end(self._status, self._totals)
            if isinstance(error, KeyboardInterrupt):
                done = f"after round {known.done}" if known.done >= 0 else "before round 0 was done"
                raise Interrupted(f"interrupted {done}; go on with: fedtune run resume={folder.path}") from error
            raise
        self._status = "finished"
        if (limit := self._spent(known.done)) and known.done < self._experiment.rounds:
            view.note(f"ended after round {known.done} of {self._experiment.rounds}: {limit} has no room for another")
        if not self._clock.timed:
            self._memory_bytes = self._clock.memory(known.strategy_state, known.done + 1)
        summary = self._summarise()
        self._tracking.end(self._status, self._totals)
        view.finished(summary, folder.path)

    def _play_all(self) -> None:
        known, registry = self.known, self._channel.registry
        if known.done < self._experiment.rounds:
            registry.gather(max(known.done, 0))
            self._channel.forget_versions(set(known.progress.state_unknown) & registry.peers.keys())
        if known.done < 0:
            self._finish(Round(0))
        while not self._is_last(known.done):
            self._before = (self._totals["spent_bytes"], self._seconds)
            self._finish(self.rounds.play(known.done + 1))

    def _take_up(self) -> None:
        """Go on with what the folder's tables say of finished rounds."""
        done = self.known.done
        entries = self._folder.forget_after(done)
        self._folder.settle_kept(done)
        self._channel.ledger = Ledger(entries)
        self._seconds, self._loss, last = self._folder.spent()
        earlier = Ledger(entry for entry in entries if entry.round < done)
        self._before = (earlier.totals["spent_bytes"], self._seconds - last)
        self._channel.registry.run = self.known.run_id

    @property
    def _totals(self) -> Any:
        return self._channel.ledger.totals

    def _spent(self, number: int) -> str | None:
        """The limit of the budget that leaves no room for another round after this one."""
        bytes, seconds = self._totals["spent_bytes"], self._seconds
        before = self._before if number else (bytes, seconds)  # round 0 is no round like the others
        spent = Spent(number, bytes, seconds, self._loss, bytes - before[0], seconds - before[1])
        return ended_by(self._experiment.budget, spent)

    def _is_last(self, number: int) -> bool:
        """Whether the run ends with this round, by its number or its budget."""
        return number >= self._experiment.rounds or self._spent(number) is not None

    def _finish(self, played: Round) -> None:
        """Evaluate what clients will decode, and write the round down."""
        self._view.evaluating()
        begun = time.monotonic()
        number, known, downlink = played.number, self.known, self._channel.downlink
        downlink.forget()
        known.sent = downlink.next_broadcast(known.sent, known.strategy_state, number + 1)
        broadcast = downlink.broadcast(known.sent, known.strategy_state, number + 1)
        self._workspace.install(broadcast, memory={})
        played.rounding = self._workspace.model.base_delta.rounding
        found = self._held_out.score(number, broadcast)
        self._seconds = self._seconds + played.seconds if played.virtual_seconds is None else played.virtual_seconds
        self._loss = self._loss if found is None else found.loss
        if self._held_out.clients_are_due(number, self._is_last(number)):
            self._held_out.ask_clients(number, broadcast)
        if found is not None and not math.isfinite(found.loss):
            said = f"round {number}: the held-out loss became {found.loss}"
            raise DivergedError(f"{said}. {self._aggregator.advice(played)}")
        self._channel.record_idle(number)
        seconds = time.monotonic() - begun
        peers = self._channel.registry.peers
        row = self._recorder.record(played, found, seconds, broadcast, self._channel.ledger, peers)
        known.done, known.sha256 = number, state_sha256(known.strategy_state)
        self._summarise()
        self._tracking.log(row)
        self._view.round_ends(row)

    def _summarise(self, error: BaseException | None = None) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if limit := self._spent(self.known.done):
            more["ended_by"] = limit
        if (population := self._experiment.population).connected:
            came = {"clients": len(self._channel.registry.peers), "cohort": population.cohort_size}
            more["population"] = {**came, "pooled": 0, "connected": True}
        if self._memory_bytes is not None:
            more["memory_bytes"] = round(self._memory_bytes)
        if error is not None:
            more["error"] = f"{type(error).__name__}: {error}"
        if self._clock.excluded:
            more["excluded"] = {str(index): reason for index, reason in self._clock.excluded.items()}
        return self._recorder.summarise(self._status, self._totals, more)
