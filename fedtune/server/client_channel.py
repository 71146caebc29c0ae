"""The server's channel to its clients: instructions out, updates in, and both recorded."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType

from fedtune.config.compatibility import traits_of
from fedtune.core.errors import CapacityError, ClientError, FedtuneError
from fedtune.core.protocol import ClientInfo, Instruction, Tensors, Update, is_lossless, same_instruction, same_tensors
from fedtune.lowrank.residual import VERSION
from fedtune.planning.turn_times import Timed
from fedtune.runs.ledger import Ledger, LedgerRow, Part
from fedtune.server.client_registry import ClientRegistry
from fedtune.server.plausibility import norm_of_change
from fedtune.server.progress import View
from fedtune.server.round import Round
from fedtune.server.state import ServerState
from fedtune.server.update_similarity import signs_of
from fedtune.server.virtual_clock import Clock
from fedtune.wire import messages as wire
from fedtune.wire.transport import Reply, Transport
from fedtune.workspace.downlink import Downlink, SentInstruction
from fedtune.workspace.uplink import ReceivedUpdate, Uplink
from fedtune.workspace.workspace import Workspace

# What becomes of a valid update, given what its client was sent
Take = Callable[[ClientInfo, ReceivedUpdate, SentInstruction], None]


@dataclass(frozen=True)
class _Shared:
    """What some of a round's clients are sent alike."""

    since: int  # the broadcast that they hold
    sent: SentInstruction
    kept: SentInstruction  # as far as the answer needs it


class ClientChannel:
    """What a server sends to its clients and takes from them, whatever its rounds are like.

    Attributes:
        registry: the clients that said who they are.
        ledger: what crossed the wire.
        downlink: the server's end of it; likewise `uplink`.

    Args:
        keeps_decoded: whether what a client was sent is needed when it answers, whatever the codec.
    """

    def __init__(
        self,
        transport: Transport,
        workspace: Workspace,
        known: ServerState,
        clock: Clock,
        view: View,
        keeps_decoded: bool,
    ):
        experiment = workspace.experiment
        self.transport = transport
        self.ledger = Ledger()
        self.downlink, self.uplink = Downlink(workspace), Uplink(workspace)
        self._workspace = workspace
        self._experiment = experiment
        self._known = known
        self._clock = clock
        self._view = view
        # In a simulation the server divided the data itself; a device may have its own
        self._knows_samples = experiment.runtime.name != "flower"
        samples = workspace.samples if self._knows_samples else None
        layout, data = workspace.model.layout, workspace.data.sha256
        self.registry = ClientRegistry(transport, experiment, layout, self.record, view.note, data, samples)
        self._lossy_up = traits_of(workspace.strategy).lossy_up
        lossless = is_lossless(workspace.codec_up) and is_lossless(workspace.codec_down)
        self._exact = lossless and not (keeps_decoded or experiment.evaluate.similarity)
        self._awaited: dict[int, SentInstruction] = {}  # what those were sent who haven't answered

    def record(self, entry: LedgerRow) -> None:
        """Put a message into the ledger."""
        self.ledger.record(entry)

    def ask(
        self, number: int, cohort: Iterable[int], kind: str = MessageType.TRAIN, label: int | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Send each client its instruction, and yield what comes, with whom it is from.

        Args:
            number: the round that the instructions are made for.
            label: the round under which they are recorded, if that is another.
        """
        index_of = {self.registry.nodes[index]: index for index in cohort}
        messages = list(self._messages(number, index_of.values(), kind, number if label is None else label))
        self.downlink.release()
        try:
            for arrival in self.transport.send(messages, self._experiment.runtime.timeout):
                index = index_of[arrival.node]
                yield index, arrival
                del self._awaited[index]  # its tensors are a state's that has gone
        finally:
            self._awaited.clear()

    def _messages(self, number: int, cohort: Iterable[int], kind: str, label: int) -> Iterator[Message]:
        """A message for each client, recorded. Clients that are sent the same share one content."""
        shared: list[_Shared] = []
        chained = self.downlink.chained(self._known.strategy_state, number)
        for index in cohort:
            begun = time.perf_counter()
            peer = self.registry.peers[index]
            try:
                instruction = self._clock.instructions.make(self._known.strategy_state, number, peer)
            except CapacityError:
                if kind == MessageType.EVALUATE:  # a device that can take no part holds no model to score
                    continue
                raise
            if kind == MessageType.TRAIN and index in self._clock.timed:
                instruction = self._clock.shortened(peer, instruction)
            last = self._known.sent if chained and same_tensors(chained.tensors, instruction.tensors) else None
            since = peer.broadcast if last else 0
            known = next(
                (made for made in shared if made.since == since and same_instruction(made.kept.original, instruction)),
                None,
            )
            if known is None:
                sent = self.downlink.encode(instruction, number, self._known.run_id, last, since)
                known = _Shared(since, sent, sent.for_the_answer(self._exact))
                shared.append(known)
            if last and kind == MessageType.TRAIN:  # taken back if this client fails
                self.registry.peers[index] = replace(peer, broadcast=last.number)
            message = Message(known.sent.content, self.registry.nodes[index], kind, group_id=str(label))
            size = wire.wire_bytes(message, known.sent.content_bytes)
            self._awaited[index] = known.kept
            framing = self.transport.lines.down(message, size)
            seconds = time.perf_counter() - begun
            self.record(LedgerRow(label, index, "down", Part(kind), known.sent.payload_bytes, size, framing, seconds))
            yield message

    def receive(self, index: int, arrival: Reply, played: Round, take: Take) -> None:
        """Check one reply and hand it on, or record its failure."""
        peer, sent = self.registry.peers[index], self._awaited[index]
        part, payload, size = Part.FAILED, 0, None
        try:
            content = arrival.content()
            blob = wire.blob_of(content)
            payload = len(blob)

            def validate(update: Update) -> None:
                self._workspace.strategy.validate(self._known.strategy_state, played.number, peer, update)

            received = self.uplink.decode(content, blob, peer, sent.decoded, validate, self._knows_samples)
            size = received.content_bytes
            self._check_time(index, sent, size, played)
        except FedtuneError as error:
            self.fail(index, played, str(error))
            self._doubt(index)
        else:
            self._believe(peer, received, sent, played)
            take(peer, received, sent)
            part = Part.TRAIN
        self.record_reply(played.number, index, part, arrival, payload, size)

    def _believe(self, peer: ClientInfo, received: ReceivedUpdate, sent: SentInstruction, played: Round) -> None:
        """What a valid update says of its client, and how far it is from where it started."""
        index, told = peer.index, sent.decoded
        played.told[index] = (told.tensors or sent.original.tensors) if self._lossy_up else {}
        played.norms[index] = norm_of_change(received.update.tensors, played.told[index])
        if (version := int(told.settings.get(VERSION, 0))) != peer.base_version:
            self.registry.peers[index] = replace(peer, base_version=version)
        self._known.trust(index, True)

    def _check_time(self, index: int, sent: SentInstruction, size: int, played: Round) -> None:
        """Have the virtual clock see the reply.

        Raises:
            ClientError: if by that clock it never came, or came too late.
        """
        reason = ""
        if self._clock.drops_out(played.number, index):
            reason = f"it dropped out, as population.dropout={self._experiment.population.dropout:g} has it"
        if index in self._clock.timed:
            turn = self._clock.turn(self.registry.peers[index], sent.original, sent.content_bytes, size)
            self._clock.measure(sent.original, sent.content_bytes, size)
            reason = reason or self._clock.late(turn)
            played.turns.append(Timed(index, turn, self._clock.progress.seconds, excluded_reason=reason))
        if reason:
            raise ClientError(reason)

    def count(self, index: int, update: Update, blob: bytes, told: Tensors, played: Round) -> None:
        """Take a valid update into the round's figures."""
        played.count(index, update)
        if self._experiment.evaluate.similarity:
            start = told if self._lossy_up else None
            known = self.uplink.known(Instruction(told))
            played.signs[index] = signs_of(update.tensors, blob, self._workspace.codec_up, start, known)

    def exclude(self, index: int, played: Round, reason: str) -> None:
        """Take back an update that was counted and can't be believed: the round goes on as if it had been refused."""
        played.forget(index, reason)
        self.refuse(index, played, reason)

    def refuse(self, index: int, played: Round, reason: str) -> None:
        """Record an update that came, and was recorded so, as failed after all."""
        self.fail(index, played, reason)
        self.ledger.fail(played.number, index)
        self._doubt(index)

    def forget_versions(self, indices: Iterable[int]) -> None:
        """Send these clients everything next time, whatever they say they hold."""
        for index in indices:
            self.registry.peers[index] = replace(self.registry.peers[index], base_version=0, broadcast=0)

    def _doubt(self, index: int) -> None:
        """Nobody knows what a client kept of a round in which it failed: next time it is sent everything."""
        self.forget_versions([index])
        self._known.trust(index, False)

    def record_reply(
        self, number: int, index: int, part: Part, arrival: Reply, payload: int = 0, size: int | None = None
    ) -> None:
        """Put what came of a message into the ledger.

        Args:
            payload: bytes of the blob.
            size: bytes of the message's content, where they are known; else they are measured.
        """
        sent = framing = 0
        if arrival.message is not None and arrival.crossed:
            sent = wire.wire_bytes(arrival.message, size)
            framing = self.transport.lines.up(arrival.node, arrival.message, sent)
        self.record(LedgerRow(number, index, "up", part, payload, sent, framing, arrival.seconds))

    def record_idle(self, number: int) -> None:
        """Put what connections moved beside messages into the ledger."""
        index_of = {node: index for index, node in self.registry.nodes.items()}
        for node, moved in self.transport.lines.drain_idle_bytes(index_of).items():
            if moved and node in index_of:
                self.record(LedgerRow(number, index_of[node], "up", Part.IDLE, 0, 0, moved, 0.0))

    def miss(self, index: int, played: Round) -> None:
        """Record a client of the cohort whose node isn't there to be asked."""
        self.fail(index, played, "its node is not connected")
        self.record(LedgerRow(played.number, index, "up", Part.FAILED, 0, 0, 0, 0.0))
        self._view.reply(played.mean("train_loss"), len(played.failures), self.ledger.totals)

    def fail(self, index: int, played: Round, reason: str) -> None:
        """Say and remember why a client's update doesn't count."""
        played.fail(index, reason)
        self._view.failure(played.number, index, reason)
