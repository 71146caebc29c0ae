"""Who takes part: which node runs which client.

Flower's node ids are random and change when a node comes back without its key; a client's index, which is its share of
the data, does not. So every node is asked who it is before it is given work.
"""

import time
from collections.abc import Callable, Mapping

from flwr.app import Message, MessageType

from fedtune.config.schema import Experiment
from fedtune.core.errors import FedtuneError, QuorumError, WireError
from fedtune.core.protocol import ClientInfo, Layout
from fedtune.planning.population import assign_rank
from fedtune.runs.ledger import LedgerRow, Part
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import content_bytes, raised_by_client
from fedtune.wire.transport import POLL_SECONDS, Reply, Transport

AGAIN_SECONDS = 5.0  # after which a node that didn't answer is asked again


class ClientRegistry:
    """The clients that said who they are.

    Attributes:
        peers: by index.
        nodes: Flower's node id of each index, as last known.
        run: the run's id, by which clients find what they kept.

    Args:
        layout: the server's, whose manifest every client's has to equal.
        record: takes the ledger's entry of each greeting.
        say: takes what a person should know.
        data_sha256: of the data that all divide alike; "" where clients may hold others.
        samples: how many examples each client has, where the server knows that itself.
    """

    def __init__(
        self,
        exchange: Transport,
        experiment: Experiment,
        layout: Layout,
        record: Callable[[LedgerRow], None],
        say: Callable[[str], None],
        data_sha256: str = "",
        samples: Callable[[int], int] | None = None,
    ):
        self.peers: dict[int, ClientInfo] = {}
        self.nodes: dict[int, int] = {}
        self._index_of: dict[int, int] = {}  # by node, the inverse of `nodes`: there may be ten thousand
        self._exchange = exchange
        population = experiment.population
        self._most, self._connected = population.clients, population.connected
        self._wanted = population.min_clients if population.connected else population.clients
        self._needed = self._wanted if population.connected else population.min_replies(self._wanted)
        self._seconds = experiment.runtime.wait
        self._layout = layout
        self._experiment = experiment
        self.run = ""
        self._record = record
        self._say = say
        self._data_sha256 = data_sha256
        self._samples = samples
        self._asked: dict[int, str] = {}  # the nodes that said who they are, or could not: when they were started
        self._wrong: dict[int, FedtuneError] = {}  # of these, the nodes that are set up wrongly
        self._again: dict[int, float] = {}  # the nodes that didn't come to say it: when they are to be asked again

    def gather(self, done: int) -> None:
        """Wait until every client is there, or the time for that is up and a quorum is.

        Args:
            done: the last finished round, under which the greetings are booked.

        Raises:
            QuorumError: if too few came.
            FedtuneError: if so many can't take part (a wrong index, other trainable tensors, other data) that the
                others are no quorum: it is no use to wait until somebody sets them up rightly.
        """
        deadline = time.monotonic() + self._seconds
        told = False
        while len(self.peers) < self._wanted:
            late = time.monotonic() > deadline
            present = self._exchange.nodes()
            newcomers = self._unknown_nodes(present)
            if newcomers and (late or len(self.peers) + len(self._wrong) + len(newcomers) >= self._wanted):
                self._handshake(newcomers, present, done, done + 1)
                self._check_wrong()
            elif self._is_complete(present):
                break
            elif not told and not self._again:
                self._say(f"waiting for {self._wanted} clients ({len(self.peers) + len(newcomers)} are there) ...")
                told = True
            if late:
                break
            self._exchange.pause(POLL_SECONDS if len(self.peers) < self._wanted else 0)
        if len(self.peers) >= self._wanted:
            return
        if self._connected:
            can_not = f", and {len(self._wrong)} that can't take part" if self._wrong else ""
            raise QuorumError(
                f"{len(self.peers)} clients came within runtime.wait={self._seconds:g} s{can_not}; "
                f"population.min_clients asks for {self._wanted}"
            )
        missing = [index for index in range(self._wanted) if index not in self.peers]
        named = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        came = f"{len(self.peers)} of {self._wanted} clients came within runtime.wait={self._seconds:g} s"
        if self._wrong:
            came += f", and {len(self._wrong)} that can't take part"
        if len(self.peers) < self._needed:
            raise QuorumError(f"{came}, population.quorum asks for {self._needed}; not there: {named}")
        self._say(f"{came}; going on without client {named}")

    def refresh(self, round: int) -> set[int]:
        """Ask nodes that appeared since, and return the indices whose nodes are connected now."""
        present = self._exchange.nodes()
        if newcomers := self._unknown_nodes(present):
            self._handshake(newcomers, present, round, round)
        return {index for index, node in self.nodes.items() if node in present}

    def _unknown_nodes(self, present: Mapping[int, str]) -> list[int]:
        """Nodes that were not asked since they were started: a node may come back as somebody else."""
        self._asked = {node: started for node, started in self._asked.items() if present.get(node) == started}
        self._wrong = {node: error for node, error in self._wrong.items() if node in self._asked}
        now = time.monotonic()
        return [node for node in present if node not in self._asked and self._again.get(node, now) <= now]

    def _is_complete(self, present: Mapping[int, str]) -> bool:
        """Whether nobody else will come, as in a process that holds all clients: then there is nothing to wait for."""
        return not self._exchange.lines.deployed and len(present) >= self._wanted and not present.keys() - self._asked

    def _check_wrong(self) -> None:
        """
        Raises:
            FedtuneError: that of the first node which is set up wrongly, if so many are that no quorum is left.
        """
        if not self._connected and self._wanted - len(self._wrong) < self._needed:
            first = next(iter(self._wrong.values()))
            raise type(first)(
                f"{len(self._wrong)} of the {self._wanted} clients that are wanted can't take part, and "
                f"population.quorum asks for {self._needed}: {first}"
            )

    def _handshake(self, nodes: list[int], present: Mapping[int, str], round: int, next_round: int) -> None:
        at_start = next_round > round
        question = wire.pack_question(self.run, next_round)
        messages = [Message(question, node, MessageType.QUERY, group_id=str(round)) for node in nodes]
        size = content_bytes(question)
        sizes = {message.metadata.dst_node_id: wire.wire_bytes(message, size) for message in messages}
        lines = self._exchange.lines
        around = {node: lines.down(message, sizes[node]) for node, message in zip(nodes, messages, strict=True)}
        for arrival in self._exchange.send(messages, self._seconds):
            try:
                content = arrival.content()
                peer = wire.unpack_greeting(content, self._most, self._layout.sha256, self._data_sha256)
                self._admit(peer, arrival.node, present)
                if wire.has_lost(content):
                    self._say(f"client {peer.index} can't read what it kept: it starts anew, and is told everything")
            except FedtuneError as error:
                wrong = _needs_a_person(arrival, error)
                if wrong or not at_start:  # it had its chance
                    self._asked[arrival.node] = present[arrival.node]
                    self._forget(arrival.node)
                if wrong:
                    self._wrong[arrival.node] = error
                self._again[arrival.node] = time.monotonic() + AGAIN_SECONDS
                self._say(f"a node that came can't take part: {error}")
                continue
            assert arrival.message is not None
            size = wire.wire_bytes(arrival.message)
            framing = lines.up(arrival.node, arrival.message, size)
            self._record(
                LedgerRow(round, peer.index, "down", Part.HANDSHAKE, 0, sizes[arrival.node], around[arrival.node], 0.0)
            )
            self._record(LedgerRow(round, peer.index, "up", Part.HANDSHAKE, 0, size, framing, arrival.seconds))

    def _check_samples(self, peer: ClientInfo) -> None:
        """
        Raises:
            WireError: if a client says it has other data than the server, who divided them, knows.
        """
        if self._samples is not None and peer.samples != (known := self._samples(peer.index)):
            raise WireError(f"client {peer.index} says it has {peer.samples} samples; the division gives it {known}")

    def _admit(self, peer: ClientInfo, node: int, present: Mapping[int, str]) -> None:
        holder = self.nodes.get(peer.index, node)
        if holder != node and holder in present:
            raise WireError(f"two nodes say they are client {peer.index}: give each its own partition-id")
        self._check_samples(peer)
        if peer.name and self._exchange.lines.deployed and peer.index not in self.peers:
            self._say(f"client {peer.index} is {peer.name}: {peer.samples:,} examples, {peer.tokens:,} tokens")
        if holder != node:
            self._say(f"client {peer.index} is back, on another node")
        self._forget(node)
        self.peers[peer.index] = assign_rank(peer, self._experiment, self._layout)
        self._forget(self.nodes.get(peer.index, node))
        self.nodes[peer.index] = node
        self._index_of[node] = peer.index
        self._asked[node] = present[node]

    def _forget(self, node: int) -> None:
        """Nobody's node any more, whose it was."""
        if (index := self._index_of.pop(node, None)) is not None:
            self.nodes.pop(index, None)


def _needs_a_person(arrival: Reply, error: FedtuneError) -> bool:
    """Whether it is no use to wait: the node is there, and it is set up wrongly."""
    if arrival.message is None:
        return False
    return isinstance(error, WireError) or (arrival.message.has_error() and raised_by_client(arrival.message.error))
