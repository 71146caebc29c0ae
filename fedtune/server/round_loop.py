"""The round loop: what the server does, on any Flower Grid.

    sample -> configure -> encode -> push ... pull -> check -> decode -> aggregate -> evaluate -> write -> checkpoint

A failed client is a line in the ledger and in failures.csv. The round counts while a quorum of its cohort replied.
"""

import gc
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from threading import Event
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from fedtune.config.compatibility import check_client, traits_of
from fedtune.config.compose import differences
from fedtune.core.errors import DivergedError, FedtuneError, Interrupted, QuorumError, RunFolderError
from fedtune.core.protocol import ClientInfo, Instruction, Update
from fedtune.evaluation.scoring import Score, mean_score
from fedtune.planning.population import server_peer
from fedtune.runs.adapter_files import ADAPTER_CONFIG, adapter_files
from fedtune.runs.checkpoint import Checkpoint, state_sha256
from fedtune.runs.ledger import Ledger, LedgerRow, sums
from fedtune.runs.model_file import TunedModel, dump
from fedtune.runs.run_folder import RunFolder, check_vacant
from fedtune.runs.update_store import Replies
from fedtune.server.aggregation import Aggregator
from fedtune.server.aggregation_error import aggregation_error
from fedtune.server.budget import Spent, ended_by
from fedtune.server.client_channel import Talk
from fedtune.server.progress import View, make_view
from fedtune.server.round import Asked, Round
from fedtune.server.summary import summarise
from fedtune.server.trackers import Tracking
from fedtune.server.update_similarity import every_two
from fedtune.server.virtual_clock import Turn
from fedtune.wire import messages as wire
from fedtune.wire.transport import Transport
from fedtune.workspace.workspace import Party


def run(grid: Grid, workspace: Party, resume: str | None = None, stop: Event | None = None) -> None:
    """Run an experiment to its last round, or go on with the one in `resume`, and leave a run folder behind.

    Args:
        stop: set it to interrupt the run at its next wait, as Ctrl-C does.

    Raises:
        FedtuneError: of whichever kind; everything up to the last finished round is then in the run folder.
    """
    from fedtune.server.asynchronous import AsynchronousServer

    experiment = workspace.experiment
    check_client(experiment, workspace.strategy, workspace.client)
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
        kind = AsynchronousServer if traits_of(workspace.strategy).asynchronous else Server
        try:
            kind(Transport(grid, stop), workspace, folder, view, tracking).run()
        finally:
            folder.close()
    finally:
        gc.unfreeze()  # a process may hold one run after the other
        view.close()


class Server(Talk):
    """One run of one experiment: the state that lasts between rounds, and the steps of a round."""

    def __init__(self, exchange: Transport, workspace: Party, folder: RunFolder, view: View, tracking: Tracking):
        super().__init__(exchange, workspace, view)
        self.folder = folder
        self.tracking = tracking
        self.me = server_peer(self.experiment, workspace.model.layout)
        self.aggregator = Aggregator(self.experiment, self.strategy, view.note, self._leave_out)
        self.adapter_config = b""  # as last written
        self.named: dict[int, str] = {}  # who was said to be left out, and why
        self.run_id = secrets.token_hex(8)  # a resumed run has the one it began with
        self.said_untimed = False
        self.status = "running"
        self.done = -1  # the last finished round
        self.seconds = 0.0  # of the rounds so far, without evaluation: the virtual clock's where it runs
        self.loss: float | None = None  # the last held-out one
        self.before = (0, 0.0)  # bytes and seconds when the last round began
        self.memory_bytes: float | None = None  # of a client's turn, where devices have no limits
        self.state_sha256 = ""  # of the state after it

    def run(self) -> None:
        """All rounds that are not done yet."""
        self._restore()
        self.folder.write_config(replace(self.experiment, out=str(self.folder.path)))
        self._summarise()
        self.view.started(self.experiment, self.workspace, self.folder.path, self.done)
        for note in self.workspace.notes:
            self.view.note(note)
        self.tracking.begin(self.experiment, self.folder.path, self.folder.metrics(), self.done)
        try:
            if self.done < self.experiment.rounds:
                self.roster.gather(max(self.done, 0))
                for index in set(self.clock.progress.state_unknown) & self.roster.peers.keys():
                    self.roster.peers[index] = replace(self.roster.peers[index], base_version=0, heard=0)
            if self.done < 0:
                self._finish_round(Round(0))
            while not self._is_last(self.done):
                self._finish_round(self._play(self.done + 1))
        except BaseException as error:
            self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(RunFolderError):  # the first error is the one to show
                self.folder.append_ledger(self.ledger.take_pending())
                self._summarise(error)
            self.tracking.end(self.status, self.ledger.totals)
            if isinstance(error, KeyboardInterrupt):
                done = f"after round {self.done}" if self.done >= 0 else "before round 0 was done"
                raise Interrupted(f"interrupted {done}; go on with: fedtune run resume={self.folder.path}") from error
            raise
        self.status = "finished"
        if (limit := self._spent(self.done)) and self.done < self.experiment.rounds:
            self.view.note(
                f"ended after round {self.done} of {self.experiment.rounds}: {limit} has no room for another"
            )
        if not self.clock.timed:
            self.memory_bytes = self.clock.memory(self.state, self.done + 1)
        summary = self._summarise()
        self.tracking.end(self.status, self.ledger.totals)
        self.view.finished(summary, self.folder.path)

    def _spent(self, number: int) -> str | None:
        """The limit of the budget that leaves no room for another round after this one."""
        bytes, seconds = self.ledger.totals["spent_bytes"], self.seconds
        before = self.before if number else (bytes, seconds)  # round 0 is no round like the others
        spent = Spent(number, bytes, seconds, self.loss, bytes - before[0], seconds - before[1])
        return ended_by(self.experiment.budget, spent)

    def _restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        self.state = self.strategy.init(self.workspace.layout)
        checkpoint = self.folder.load_checkpoint(self.state)
        if checkpoint is not None:
            if checkpoint.config_sha256 != self.experiment.sha256:
                asked = differences(self.folder.read_config().fixed(), self.experiment.fixed())
                raise RunFolderError(
                    f"{self.folder.path} was started with other settings"
                    + (
                        f": {'; '.join(asked)}. Leave these out"
                        if asked
                        else "; its config.yaml was changed. Put it back"
                    )
                    + ", or start a new run with another out="
                )
            self.workspace.data.check_same(checkpoint.data, f"{self.folder.path} can't go on")
            self.state, self.done, self.run_id = checkpoint.state, checkpoint.round, checkpoint.run
            self.sent, self.clock.progress = checkpoint.sent, checkpoint.progress
            self.state_sha256 = state_sha256(self.state)
        entries = self.folder.forget_after(self.done)
        self.ledger = Ledger(entries)
        self.seconds, self.loss, last = self.folder.spent()
        earlier = Ledger(entry for entry in entries if entry.round < self.done)
        self.before = (earlier.totals["spent_bytes"], self.seconds - last)
        self.roster.run = self.run_id

    def _play(self, number: int) -> Round:
        """One round, up to the aggregated state."""
        played = Round(number)
        begun = time.monotonic()
        self.before = (self.ledger.totals["spent_bytes"], self.seconds)
        present = self.roster.refresh(number)
        able, expected = self._able(number)
        self._check_able(number, able)
        cohort = self.clock.cohort(number, able, self.cohort_size, self.roster.peers, expected)
        asked = [index for index in cohort if index in present]
        self.view.round_begins(number, len(cohort))
        with closing(Replies(self.workspace.codec_up, self.folder.path)) as replies:

            def take(peer: ClientInfo, update: Update, blob: bytes, asked: Asked) -> None:
                replies.add(peer, update, blob, self.workspace.known(asked.heard), asked.lost)
                self._count(peer.index, update, blob, asked.heard.tensors, played)

            for index in cohort:
                if index not in present:
                    self._miss(index, played)
            for index, arrival in self._ask(number, asked):
                self._receive(index, arrival, played, take)
                self.view.reply(played.mean("train_loss"), len(played.failures), self.ledger.totals)
            self.aggregator.sift(played, replies)
            self._check_quorum(played, len(replies), len(cohort))
            replies.sort()
            self._aggregate(played, replies, lambda got: self._check_quorum(played, got, len(cohort)))
        self.clock.hear(played.reported("train_loss"))
        if self.clock.timed:
            played.virtual_seconds = self.clock.advance(played.turns, played.clients < len(asked))
        played.seconds = time.monotonic() - begun
        return played

    def _able(self, number: int) -> tuple[list[int], dict[int, Turn]]:
        """Who can take part in round `number`, and what the devices with limits are expected to take."""
        peers, population, idle = self.roster.peers, self.experiment.population, self.idle
        expected: dict[int, Turn] = {}
        if self._is_timed():
            expected = self.clock.eligible_clients(
                self.state, number, {i: peer for i, peer in peers.items() if i not in idle}
            )
        else:
            self.clock.forget()
            self._say_untimed()
        out = self.clock.excluded
        for reason in dict.fromkeys(out.values()):
            new = [index for index in out if out[index] == reason and self.named.get(index) != reason]
            if new:
                self.view.note(f"left out from round {number}: client {', '.join(map(str, new))}, which {reason}")
        self.named = dict(out)
        able = [
            index
            for index in range(population.clients)
            if index not in out and index not in idle and self.clock.is_there(number, index, peers)
        ]
        return able, expected

    def _is_timed(self) -> bool:
        return self.clock.runs(self.roster.peers)

    def _say_untimed(self) -> None:
        """What was asked for and means nothing without a clock."""
        if not self.said_untimed and (note := self.clock.untimed(self.roster.peers)):
            self.view.note(note)
        self.said_untimed = True

    def _check_able(self, number: int, able: Sequence[int]) -> None:
        """
        Raises:
            QuorumError: if a round with nobody else can't count.
        """
        population = self.experiment.population
        needed = population.min_replies(self.cohort_size)
        if len(able) < needed:
            out = self.clock.excluded
            away = population.clients - len(able) - len(out) - len(self.idle)
            why = [f"client {index} {reason}" for index, reason in out.items()][:1]
            why += [f"{len(self.idle)} have no rows"] if self.idle else []
            why += [f"{away} are away in this round, by their devices' availability"] if away else []
            able_of = f"round {number}: {len(able)} of {population.clients} clients can take part"
            raise QuorumError(f"{able_of}, population.quorum asks for {'; '.join([str(needed), *why])}")

    def _check_quorum(self, played: Round, got: int, asked: int) -> None:
        """
        Raises:
            QuorumError: if a round with that many usable updates doesn't count.
        """
        enough = self.experiment.population.min_replies(max(asked, self.cohort_size))
        if got < enough:
            self.folder.append_failures(played.failures)
            first = next((f"; client {peer}: {reason}" for _, peer, reason in played.failures), "")
            raise QuorumError(
                f"round {played.number}: {got} of {asked} clients gave a usable update, "
                f"population.quorum asks for {enough}{first}"
            )

    def _aggregate(self, played: Round, replies: Replies, check: Callable[[int], None]) -> None:
        number, before = played.number, self.state
        self.state, weighed = self.aggregator.aggregate(before, played, replies, check)
        if self.experiment.evaluate.exactness:
            layout = self.workspace.model.layout
            played.error = aggregation_error(layout, self.strategy, number, before, self.state, weighed, self.me)

    def _finish_round(self, played: Round) -> None:
        """Evaluate, then write everything down: lines first and the checkpoint last, so that a round counts as done
        only when all of it is on disk."""
        self.view.evaluating()
        begun = time.monotonic()
        number, every = played.number, self.experiment.evaluate.every
        self.sent = self.workspace.announce(self.sent, self.state, number + 1)
        heard = self.workspace.broadcast(self.sent, self.state, number + 1)
        self.workspace.install(heard, memory={})
        personal = traits_of(self.strategy).personal
        found, rounding = None, self.workspace.model.base_delta.rounding
        if every and number % every == 0:
            found = self._examine(number, heard) if personal else self.workspace.evaluate()
        self.seconds = self.seconds + played.seconds if played.virtual_seconds is None else played.virtual_seconds
        self.loss = self.loss if found is None else found.loss
        if self._asks_peers(number) and not personal:
            self._examine(number, heard)
        if found is not None and not math.isfinite(found.loss):
            said = f"round {number}: the held-out loss became {found.loss}"
            raise DivergedError(f"{said}. {self.aggregator.advice(played)}")
        index_of = {node: index for index, node in self.roster.nodes.items()}
        for node, moved in self.exchange.lines.drain_idle_bytes(index_of).items():
            if moved and node in index_of:
                self._book(LedgerRow(number, index_of[node], "up", "idle", 0, 0, moved, 0.0))
        entries = self.ledger.take_pending()
        row = {
            "round": number,
            "eval_loss": None,
            "eval_accuracy": None,
            "train_loss": played.mean("train_loss"),
            "seconds": round(played.seconds, 3),
            "eval_seconds": round(time.monotonic() - begun, 3),
            "clients": played.clients,
            "failed": len(played.failures),
            **sums(entry for entry in entries if entry.round == number),
            "client_eval_loss": played.mean("client_eval_loss"),
            "client_eval_accuracy": played.mean("client_eval_accuracy"),
            "aggregation_error": played.error,
            "requantization_error": rounding,
            "virtual_seconds": played.virtual_seconds,
            "merge_error": merged.error if (merged := getattr(self.state, "merged", None)) else None,
            **(found.row() if found else {}),
        }
        self.folder.append_ledger(entries)
        self.folder.append_failures(played.failures)
        self.folder.append_clock(number, played.turns)
        self.folder.append_similarity(number, every_two(played.signs))
        self.folder.append_metrics(row)
        files = adapter_files(self.workspace.model)
        for name, content in files.items() if number == 0 else ():
            self.folder.write_adapter(name, content, "start")
        if (config := files.get(ADAPTER_CONFIG, b"")) == self.adapter_config:  # it changes with the ranks alone
            files.pop(ADAPTER_CONFIG, None)
        for name, content in files.items():
            self.folder.write_adapter(name, content)
        self.adapter_config = config
        if self.workspace.model.is_seeded:
            model = self.workspace.model
            self.folder.write_model(dump(TunedModel(self.experiment, heard, model.origin, model.dtype, number)))
        self._save(number)
        self.done, self.state_sha256 = number, state_sha256(self.state)
        self._summarise()
        self.tracking.log(row)
        self.view.round_ends(row)

    def _save(self, number: int) -> None:
        peers, progress = self.roster.peers, self.clock.progress
        # Who has said since what it keeps is known
        unsure = [i for i in progress.state_unknown if i in peers and not (peers[i].heard or peers[i].base_version)]
        self.clock.progress = replace(progress, state_unknown=unsure)
        kept = (self.run_id, self.sent, self.clock.progress, self.workspace.data.identity)
        self.folder.save_checkpoint(Checkpoint(number, self.experiment.sha256, self.state, *kept))

    def _is_last(self, number: int) -> bool:
        """Whether the run ends with this round, by its number or its budget."""
        return number >= self.experiment.rounds or self._spent(number) is not None

    def _asks_peers(self, number: int) -> bool:
        """Whether clients are to score the global model after this round."""
        spec = self.experiment.evaluate
        every = spec.peers == "every" and spec.every > 0 and number % spec.every == 0
        return every or (spec.peers == "last" and self._is_last(number))

    def _examine(self, number: int, heard: Instruction) -> Score | None:
        """How good what the clients hold is after round `number` (the global model, or their own), each on its own
        held-out data: the mean over all that are there, weighted by samples.

        Args:
            heard: what the server's own model is to hold afterwards.
        """
        present, idle = self.exchange.nodes(), self.idle
        there = [i for i in sorted(self.roster.nodes) if self.roster.nodes[i] in present and i not in idle]
        scores: dict[int, Score] = {}
        for index, arrival in self._ask(number + 1, there, MessageType.EVALUATE, number):
            part = "evaluate"
            try:
                if (score := wire.unpack_score(arrival.content())) is not None:
                    scores[index] = score
            except FedtuneError as error:
                part = "failed"
                self.view.note(f"client {index} could not be evaluated: {error}")
            self._book_arrival(number, index, part, arrival)
        self.workspace.install(heard, memory={})  # clients in this process had the model meanwhile
        self.folder.append_clients(number, scores)
        counted = self.aggregator.weights([self.roster.peers[index].samples for index in scores])
        return mean_score(dict(zip(scores, counted, strict=True)), scores)

    def _summarise(self, error: BaseException | None = None) -> dict[str, Any]:
        scores = self.folder.scores()
        if limit := self._spent(self.done):
            scores["ended_by"] = limit
        if self.memory_bytes is not None:
            scores["memory_bytes"] = round(self.memory_bytes)
        if error is not None:
            scores["error"] = f"{type(error).__name__}: {error}"
        if self.clock.excluded:
            scores["left_out"] = {str(index): reason for index, reason in self.clock.excluded.items()}
        summary = summarise(self.workspace, self.status, self.done, self.ledger.totals, self.state_sha256, scores)
        self.folder.write_summary(summary)
        return summary
