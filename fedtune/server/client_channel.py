"""A server's talk with its clients: instructions out, updates in, and both booked."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from fedtune.config.compatibility import traits_of
from fedtune.core.errors import CapacityError, ClientError, FedtuneError
from fedtune.core.protocol import Instruction, Tensors, Update, is_lossless, same_instruction, same_tensors
from fedtune.core.seeds import derive_seed
from fedtune.lowrank.residual import VERSION
from fedtune.runs.ledger import Ledger, LedgerRow
from fedtune.server.client_registry import ClientRegistry
from fedtune.server.plausibility import check_examples, norm_of_change
from fedtune.server.progress import View
from fedtune.server.round import Asked, Round, Take
from fedtune.server.update_similarity import signs_of
from fedtune.server.virtual_clock import Clock, Timed
from fedtune.training.apply_instruction import SCALING, check_scaling
from fedtune.wire import messages as wire
from fedtune.wire.broadcast_chain import BroadcastChain
from fedtune.wire.delta_coding import left_out
from fedtune.wire.flower_private import content_bytes
from fedtune.wire.transport import Reply, Transport
from fedtune.workspace.workspace import Party


@dataclass(frozen=True)
class _Packed:
    """What some of a round's clients are sent alike."""

    asked: Asked
    since: int  # the broadcast that they hold
    content: RecordDict
    payload_bytes: int


class Talk:
    """What a server says and hears, whatever its rounds are like.

    Attributes:
        state: the strategy's.
        sent: the last broadcast, where broadcasts build on one another.
    """

    def __init__(self, exchange: Transport, workspace: Party, view: View):
        self.exchange = exchange
        self.workspace = workspace
        self.experiment = workspace.experiment
        self.strategy = workspace.strategy
        self.view = view
        self.clock = Clock(workspace)
        self.ledger = Ledger()
        # In a simulation the server divided the data itself; a device may have its own
        self.knows_samples = self.experiment.runtime.name != "flower"
        known = workspace.samples if self.knows_samples else None
        layout, data = workspace.model.layout, workspace.data.sha256
        self.roster = ClientRegistry(exchange, self.experiment, layout, self._book, view.note, data, known)
        self.state: Any = None
        self.sent = BroadcastChain()
        self._asked: dict[int, Asked] = {}  # the clients whose answers are awaited

    @property
    def keeps_told(self) -> bool:
        """Whether what a client was told is needed when it answers, whatever the codec."""
        return self.experiment.evaluate.similarity

    @property
    def idle(self) -> set[int]:
        """The clients without training data: by their own word, and before they came by the division."""
        known, peers = set(self.workspace.data.idle), self.roster.peers
        return {index for index in known | peers.keys() if not (peers[index].samples if index in peers else 0)}

    @property
    def cohort_size(self) -> int:
        """How many clients a round asks: no more than have data."""
        population = self.experiment.population
        return min(population.cohort_size, population.clients - len(self.idle))

    def _book(self, entry: LedgerRow) -> None:
        self.ledger.book(entry)

    def _ask(
        self, number: int, cohort: Iterable[int], kind: str = MessageType.TRAIN, label: int | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Send each client its instruction, and yield what comes, with whom it is from.

        Args:
            number: the round that the instructions are made for.
            label: the round under which they are booked, if that is another.
        """
        index_of = {self.roster.nodes[index]: index for index in cohort}
        messages = list(self._instructions(number, index_of.values(), kind, number if label is None else label))
        try:
            for arrival in self.exchange.send(messages, self.experiment.runtime.timeout):
                index = index_of[arrival.node]
                yield index, arrival
                del self._asked[index]  # its tensors are a state's that has gone
        finally:
            self._asked.clear()

    def _instructions(self, number: int, cohort: Iterable[int], kind: str, label: int) -> Iterator[Message]:
        """A message for each client, booked. Clients that are sent the same tensors and settings share one content."""
        packed: list[_Packed] = []
        key = derive_seed(self.experiment.seed, "down", number)
        announced = self.workspace.announced(self.state, number)
        for index in cohort:
            begun = time.perf_counter()
            peer = self.roster.peers[index]
            try:
                instruction = self.strategy.configure(self.state, number, peer)
            except CapacityError:
                if kind == MessageType.EVALUATE:  # a device that can take no part holds no model to score
                    continue
                raise
            if kind == MessageType.TRAIN and index in self.clock.timed:
                instruction = self.clock.shortened(peer, instruction)
            last = self.sent if announced and same_tensors(announced.tensors, instruction.tensors) else None
            since = peer.heard if last else 0
            known = next(
                (made for made in packed if made.since == since and same_instruction(made.asked.meant, instruction)),
                None,
            )
            if known is None:
                content, heard = self.workspace.tell(instruction, key, self.roster.run, last, since)
                lost = {} if is_lossless(self.workspace.codec_down) else left_out(instruction.tensors, heard.tensors)
                exact = is_lossless(self.workspace.codec_up) and is_lossless(self.workspace.codec_down)
                if exact and not self.keeps_told:
                    # Nothing of it is needed with the answer
                    heard = Instruction({}, heard.settings)
                asked = Asked(instruction, heard, lost, content_bytes(content))
                known = _Packed(asked, since, content, wire.payload_bytes(content))
                packed.append(known)
            if last and kind == MessageType.TRAIN:  # taken back if its turn fails
                self.roster.peers[index] = replace(peer, heard=last.number)
            message = Message(known.content, self.roster.nodes[index], kind, group_id=str(label))
            sent = wire.wire_bytes(message, known.asked.content_bytes)
            self._asked[index] = known.asked
            framing = self.exchange.lines.down(message, sent)
            seconds = time.perf_counter() - begun
            self._book(LedgerRow(label, index, "down", kind, known.payload_bytes, sent, framing, seconds))
            yield message

    def _receive(self, index: int, arrival: Reply, played: Round, take: Take) -> None:
        """Check one reply and hand it on, or book its failure."""
        peer, asked = self.roster.peers[index], self._asked[index]
        part, payload, size = "failed", 0, None
        try:
            content = arrival.content()
            blob = wire.blob_of(content)
            payload = len(blob)
            told = asked.heard
            known = self.workspace.known(told)
            update = wire.unpack_update(content, blob, self.workspace.codec_up, known)
            check_examples(update, peer, self.knows_samples)
            check_scaling(update, float(told.settings.get(SCALING, self.workspace.model.layout.scaling)))
            self.strategy.validate(self.state, played.number, peer, update)
            size = wire.update_bytes(blob, update)
            self._check_time(index, asked, size, played)
        except FedtuneError as error:
            self._fail(index, played, str(error))
            self._doubt(index)
        else:
            played.told[index] = (told.tensors or asked.meant.tensors) if traits_of(self.strategy).lossy_up else {}
            played.norms[index] = norm_of_change(update.tensors, played.told[index])
            if (version := int(told.settings.get(VERSION, 0))) != peer.base_version:
                self.roster.peers[index] = replace(peer, base_version=version)
            self._trust(index, True)
            take(peer, update, blob, asked)
            part = "train"
        self._book_arrival(played.number, index, part, arrival, payload, size)

    def _check_time(self, index: int, asked: Asked, size: int, played: Round) -> None:
        """
        Raises:
            ClientError: if by the virtual clock this reply never came, or came too late.
        """
        reason = ""
        if self.clock.drops_out(played.number, index):
            reason = f"it dropped out, as population.dropout={self.experiment.population.dropout:g} has it"
        if index in self.clock.timed:
            turn = self.clock.turn(self.roster.peers[index], asked.meant, asked.content_bytes, size)
            self.clock.measure(asked.meant, asked.content_bytes, size)
            reason = reason or self.clock.late(turn)
            played.turns.append(Timed(index, turn, self.clock.progress.seconds, excluded_reason=reason))
        if reason:
            raise ClientError(reason)

    def _count(self, index: int, update: Update, blob: bytes, told: Tensors, played: Round) -> None:
        """Take a valid update into the round's figures."""
        played.count(index, update)
        if self.experiment.evaluate.similarity:
            start = told if traits_of(self.strategy).lossy_up else None
            known = self.workspace.known(Instruction(told))
            played.signs[index] = signs_of(update.tensors, blob, self.workspace.codec_up, start, known)

    def _leave_out(self, index: int, played: Round, reason: str) -> None:
        """Take back an update that was counted and can't be believed: the round goes on as if it had been refused."""
        played.forget(index, reason)
        self._refuse(index, played, reason)

    def _refuse(self, index: int, played: Round, reason: str) -> None:
        """Book an update that came, and was booked so, as failed after all."""
        self._fail(index, played, reason)
        self.ledger.fail(played.number, index)
        self._doubt(index)

    def _doubt(self, index: int) -> None:
        """Nobody knows what a client kept of a turn that failed: next time it is sent everything."""
        self.roster.peers[index] = replace(self.roster.peers[index], base_version=0, heard=0)
        self._trust(index, False)

    def _trust(self, index: int, sure: bool) -> None:
        """Whether it is known what a client keeps. It is asked after a resume too, and says what it keeps, but not of
        which turn: so who is to be sent everything is remembered."""
        progress = self.clock.progress
        if sure is (index in progress.state_unknown):
            others = {other for other in progress.state_unknown if other != index}
            self.clock.progress = replace(progress, state_unknown=sorted(others if sure else others | {index}))

    def _book_arrival(
        self, number: int, index: int, part: str, arrival: Reply, payload: int = 0, size: int | None = None
    ) -> None:
        """Args:
        payload: bytes of the blob.
        size: bytes of the message's content, where they are known; else they are measured.
        """
        sent = framing = 0
        if arrival.message is not None and arrival.crossed:
            sent = wire.wire_bytes(arrival.message, size)
            framing = self.exchange.lines.up(arrival.node, arrival.message, sent)
        self._book(LedgerRow(number, index, "up", part, payload, sent, framing, arrival.seconds))

    def _miss(self, index: int, played: Round) -> None:
        """A client of the cohort whose node isn't there to be asked."""
        self._fail(index, played, "its node is not connected")
        self._book(LedgerRow(played.number, index, "up", "failed", 0, 0, 0, 0.0))
        self.view.reply(played.mean("train_loss"), len(played.failures), self.ledger.totals)

    def _fail(self, index: int, played: Round, reason: str) -> None:
        played.fail(index, reason)
        self.view.failure(played.number, index, reason)
