"""The round loop: what the server does, on any Flower Grid.

    sample -> configure -> encode -> push ... pull -> check -> decode -> aggregate -> evaluate -> write -> checkpoint

A failed client is a line in the ledger and in failures.csv. The round counts while a quorum of its cohort replied.
"""

import gc
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune import wire
from fedtune.checkpoint import Checkpoint, state_sha256
from fedtune.errors import ClientError, DivergedError, FedtuneError, Interrupted, QuorumError, RunFolderError, WireError
from fedtune.export import adapter_config, adapter_weights
from fedtune.flower import content_bytes
from fedtune.keys import fold
from fedtune.ledger import Entry, Ledger, sums
from fedtune.party import Party
from fedtune.population import sample_cohort
from fedtune.progress import View, make_view
from fedtune.protocol import SERVER, Instruction, Peer, Update
from fedtune.replies import Replies
from fedtune.run_folder import RunFolder, check_vacant
from fedtune.summary import summarise

POLL_SECONDS = 0.1  # between two looks for replies, where clients are elsewhere


@dataclass
class Arrival:
    """A reply, or that none came."""

    index: int
    message: Message | None
    seconds: float


@dataclass
class Round:
    """What a round has come to so far."""

    number: int
    clients: int = 0  # whose updates count
    failures: list[tuple[int, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    _sums: dict[str, tuple[int, float]] = field(default_factory=dict)  # per metric: examples, and their weighted sum

    def count(self, update: Update) -> None:
        self.clients += 1
        for name, value in update.metrics.items():
            examples, total = self._sums.get(name, (0, 0.0))
            self._sums[name] = (examples + update.examples, total + update.examples * value)

    def fail(self, peer: int, reason: str) -> None:
        self.failures.append((self.number, peer, " ".join(reason.split())))

    def mean(self, name: str) -> float | None:
        """The clients' metric `name` so far, weighted by examples."""
        examples, total = self._sums.get(name, (0, 0.0))
        return total / examples if examples else None


def run(grid: Grid, party: Party, resume: str | None = None) -> None:
    """Run an experiment to its last round, or go on with the one in `resume`, and leave a run folder behind.

    Raises:
        FedtuneError: of whichever kind; everything up to the last finished round is then in the run folder.
    """
    experiment = party.experiment
    if resume is None and experiment.out is not None:
        check_vacant(experiment.out)
    view = make_view()
    try:
        view.loading(experiment)
        # Loaded before the folder is made: a wrong path leaves no half-made run behind
        party.model, party.data  # noqa: B018
        # What is loaded stays until the end. Unfrozen, every full collection walks it: a pause of 0.4 s
        gc.collect()
        gc.freeze()
        folder = RunFolder.open(resume) if resume else RunFolder.create(experiment.out, experiment.name)
        try:
            Server(grid, party, folder, view).run()
        finally:
            folder.close()
    finally:
        view.close()


class Server:
    """One run of one experiment: the state that lasts between rounds, and the steps of a round."""

    def __init__(self, grid: Grid, party: Party, folder: RunFolder, view: View):
        self.grid = grid
        self.party = party
        self.experiment = party.experiment
        self.folder = folder
        self.view = view
        self.strategy = party.strategy
        self.state: Any = None
        self.peers: dict[int, Peer] = {}
        self.nodes: dict[int, int] = {}  # Flower's node id of each client index
        self.ledger = Ledger()
        self.status = "running"
        self.done = -1  # the last finished round
        self.state_sha256 = ""  # of the state after it

    def run(self) -> None:
        """All rounds that are not done yet."""
        self._restore()
        self.folder.write_config(replace(self.experiment, out=str(self.folder.path)))
        self.folder.write_adapter("adapter_config.json", adapter_config(self.party.model))
        self._summarise()
        self.view.started(self.experiment, self.party, self.folder.path, self.done)
        try:
            if self.done < self.experiment.rounds:
                self._greet()
            if self.done < 0:
                self._finish_round(Round(0))
            for number in range(self.done + 1, self.experiment.rounds + 1):
                self._finish_round(self._play(number))
        except BaseException as error:
            self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(RunFolderError):  # the first error is the one to show
                self.folder.append_ledger(self.ledger.take_pending())
                self._summarise(error)
            if isinstance(error, KeyboardInterrupt):
                done = f"after round {self.done}" if self.done >= 0 else "before round 0 was done"
                raise Interrupted(f"interrupted {done}; go on with: fedtune run resume={self.folder.path}") from error
            raise
        self.status = "finished"
        self.view.finished(self._summarise(), self.folder.path)

    def _restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        self.state = self.strategy.init(self.party.model.layout)
        checkpoint = self.folder.load_checkpoint(self.state)
        if checkpoint is not None:
            if checkpoint.config_sha256 != self.experiment.sha256:
                raise RunFolderError(
                    f"{self.folder.path}/config.yaml is not what this run was started with: put it back, "
                    "or start a new run with another out="
                )
            self.state, self.done = checkpoint.state, checkpoint.round
            self.state_sha256 = state_sha256(self.state)
        self.ledger = Ledger(self.folder.forget_after(self.done))

    def _greet(self) -> None:
        """Wait for every client's node and learn who it is. A resumed run greets again, and books it."""
        number = max(self.done, 0)
        wanted = self.experiment.population.clients
        deadline = time.monotonic() + self.experiment.runtime.timeout
        while len(nodes := list(self.grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise QuorumError(f"{len(nodes)} of {wanted} clients came within {self.experiment.runtime.timeout:g} s")
            time.sleep(POLL_SECONDS)
        layout = self.party.model.layout.sha256
        messages = [Message(RecordDict(), node, MessageType.QUERY, group_id=str(number)) for node in nodes]
        sizes = {message.metadata.dst_node_id: wire.wire_bytes(message) for message in messages}
        for arrival in self._exchange(messages, dict(zip(nodes, nodes, strict=True))):
            node = arrival.index
            peer = wire.unpack_greeting(self._content(arrival), wanted, layout)
            if peer.index in self.peers:
                raise WireError(f"two nodes say they are client {peer.index}: give each its own partition-id")
            self.peers[peer.index] = peer
            self.nodes[peer.index] = node
            assert arrival.message is not None
            for direction, size, seconds in (
                ("down", sizes[node], 0.0),
                ("up", wire.wire_bytes(arrival.message), arrival.seconds),
            ):
                self.ledger.book(Entry(number, peer.index, direction, "handshake", 0, size, seconds))
        if len(self.peers) < wanted:
            raise QuorumError(f"only {len(self.peers)} of {wanted} clients are there")

    def _play(self, number: int) -> Round:
        """One round, up to the aggregated state."""
        experiment = self.experiment
        played = Round(number)
        begun = time.monotonic()
        cohort = sample_cohort(experiment.population.clients, experiment.population.per_round, experiment.seed, number)
        self.view.round_begins(number, len(cohort))
        messages = list(self._instructions(number, cohort))
        with closing(Replies(self.party.codec_up, self.folder.path)) as replies:
            for arrival in self._exchange(messages, {self.nodes[index]: index for index in cohort}):
                self._receive(arrival, played, replies)
                self.view.reply(played.mean("train_loss"), len(played.failures), self.ledger.totals)
            enough = experiment.population.enough(len(cohort))
            if len(replies) < enough:
                self.folder.append_failures(played.failures)
                first = next((f"; client {peer}: {reason}" for _, peer, reason in played.failures), "")
                raise QuorumError(
                    f"round {number}: {len(replies)} of {len(cohort)} clients gave a usable update, "
                    f"population.quorum asks for {enough}{first}"
                )
            replies.sort()
            self.state = self.strategy.aggregate(self.state, number, replies)
        played.seconds = time.monotonic() - begun
        return played

    def _instructions(self, number: int, cohort: Iterable[int]) -> Iterator[Message]:
        """A message for each client, booked. Clients that are sent the same tensors and settings share one content."""
        packed: list[tuple[Instruction, RecordDict, int, int]] = []
        key = fold(self.experiment.seed, "down", number)
        for index in cohort:
            begun = time.perf_counter()
            instruction = self.strategy.configure(self.state, number, self.peers[index])
            known = next((made for made in packed if _same(made[0], instruction)), None)
            if known is None:
                content = wire.pack_instruction(instruction, self.party.codec_down, key)
                known = (instruction, content, wire.payload_bytes(content), content_bytes(content))
                packed.append(known)
            _, content, payload, size = known
            message = Message(content, self.nodes[index], MessageType.TRAIN, group_id=str(number))
            sent = wire.wire_bytes(message, size)
            self.ledger.book(Entry(number, index, "down", "train", payload, sent, time.perf_counter() - begun))
            yield message

    def _exchange(self, messages: list[Message], index_of: Mapping[int, int]) -> Iterator[Arrival]:
        """Send the messages and yield what comes of each, as it comes; at the time limit, the ones that never came."""
        sent = last = time.monotonic()
        deadline = sent + self.experiment.runtime.timeout
        targets = [message.metadata.dst_node_id for message in messages]
        pending = dict(zip(self.grid.push_messages(messages), targets, strict=True))
        in_turn = getattr(self.grid, "takes_turns", False)
        while pending and time.monotonic() < deadline:
            arrived = False
            for reply in self.grid.pull_messages(pending):
                # A reply is known by the message that it answers: an error may come under another node's id
                target = pending.pop(reply.metadata.reply_to_message_id, None)
                if target is None:
                    continue
                arrived, now = True, time.monotonic()
                yield Arrival(index_of[target], reply, now - (last if in_turn else sent))
                last = time.monotonic()
            if not arrived:
                time.sleep(POLL_SECONDS)
        for target in pending.values():
            yield Arrival(index_of[target], None, time.monotonic() - sent)

    def _content(self, arrival: Arrival) -> RecordDict:
        if arrival.message is None:
            raise ClientError(f"no reply within runtime.timeout={self.experiment.runtime.timeout:g} s")
        if arrival.message.has_error():
            raise ClientError(arrival.message.error.reason or f"Flower error {arrival.message.error.code}")
        return arrival.message.content

    def _receive(self, arrival: Arrival, played: Round, replies: Replies) -> None:
        """Check one reply and keep it, or book its failure."""
        peer = self.peers[arrival.index]
        part, payload, size = "failed", 0, None
        try:
            content = self._content(arrival)
            blob = wire.blob_of(content)
            payload = len(blob)
            update = wire.unpack_update(content, blob, self.party.codec_up)
            if update.examples > peer.samples:
                raise WireError(f"it claims {update.examples} examples; at the handshake it had {peer.samples}")
            self.strategy.validate(self.state, played.number, peer, update)
        except FedtuneError as error:
            played.fail(arrival.index, str(error))
            self.view.failure(played.number, arrival.index, str(error))
        else:
            replies.add(peer, update, blob)
            played.count(update)
            part, size = "train", wire.update_bytes(blob, update)
        sent = wire.wire_bytes(arrival.message, size) if arrival.message is not None else 0
        self.ledger.book(Entry(played.number, arrival.index, "up", part, payload, sent, arrival.seconds))

    def _finish_round(self, played: Round) -> None:
        """Evaluate, then write everything down: lines first and the checkpoint last, so that a round counts as done
        only when all of it is on disk."""
        self.view.evaluating()
        begun = time.monotonic()
        number, every = played.number, self.experiment.evaluate.every
        self.party.install(self._broadcast(number + 1))
        found = self.party.evaluate() if every and number % every == 0 else None
        if found is not None and not math.isfinite(found.loss):
            raise DivergedError(
                f"round {number}: the held-out loss became {found.loss}. Start a new run with a lower train.lr "
                f"(now {self.experiment.train.lr:g})"
            )
        entries = self.ledger.take_pending()
        row = {
            "round": number,
            "eval_loss": found.loss if found else None,
            "eval_accuracy": found.accuracy if found else None,
            "train_loss": played.mean("train_loss"),
            "seconds": round(played.seconds, 3),
            "eval_seconds": round(time.monotonic() - begun, 3),
            "clients": played.clients,
            "failed": len(played.failures),
            **sums(entry for entry in entries if entry.round == number),
            "client_eval_loss": played.mean("client_eval_loss"),
            "client_eval_accuracy": played.mean("client_eval_accuracy"),
        }
        self.folder.append_ledger(entries)
        self.folder.append_failures(played.failures)
        self.folder.append_metrics(row)
        self.folder.write_adapter("adapter_model.safetensors", adapter_weights(self.party.model))
        self.folder.save_checkpoint(Checkpoint(number, self.experiment.sha256, self.state))
        self.done, self.state_sha256 = number, state_sha256(self.state)
        self._summarise()
        self.view.round_ends(row)

    def _broadcast(self, number: int) -> Instruction:
        """What a fully capable client would be sent in round `number`, through the wire's codec: the score and the
        exported adapter are of what clients decode."""
        instruction = self.strategy.configure(self.state, number, Peer(SERVER, 1))
        codec, key = self.party.codec_down, fold(self.experiment.seed, "down", number)
        return wire.unpack_instruction(wire.pack_instruction(instruction, codec, key), codec)

    def _summarise(self, error: BaseException | None = None) -> dict[str, Any]:
        scores = self.folder.scores()
        if error is not None:
            scores["error"] = f"{type(error).__name__}: {error}"
        summary = summarise(self.party, self.status, self.done, self.ledger.totals, self.state_sha256, scores)
        self.folder.write_summary(summary)
        return summary


def _same(one: Instruction, other: Instruction) -> bool:
    return one.tensors is other.tensors and one.settings == other.settings
