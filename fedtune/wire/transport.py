"""Send messages, and take what comes of each, with a limit to every wait."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.core.errors import ClientError, WireError
from fedtune.core.optional import SequentialGrid
from fedtune.wire.flower_private import SERVER_NODE, activations, explain_error, pull_one, push
from fedtune.wire.http_overhead import Lines

POLL_SECONDS = 0.1  # between two looks for replies, where clients are elsewhere
LONGEST_POLL_SECONDS = 1.0  # however long a reply has been awaited
RESTART_SECONDS = 3.0  # between two looks for nodes that were started again
NOBODY = -1  # no node's id
MAX_PULLS_PER_SECOND = 100  # so that awaiting many doesn't keep a SuperLink busy


@dataclass(frozen=True)
class Reply:
    """What came of a message: a reply, or the reason why there is none."""

    node: int  # Flower's id of the node that was asked
    message: Message | None
    seconds: float
    problem: str = ""

    @property
    def crossed(self) -> bool:
        """Whether something came from the node; a SuperLink answers for nodes that are gone."""
        return self.message is not None and self.message.metadata.src_node_id != SERVER_NODE

    def content(self) -> RecordDict:
        """The reply's content.

        Raises:
            ClientError: if there is no reply, or it is an error.
        """
        if self.message is None:
            raise ClientError(self.problem)
        if self.message.has_error():
            raise ClientError(explain_error(self.message.error))
        return self.message.content


class Transport:
    """The server's end of the wire.

    Attributes:
        lines: what a deployment moves around the messages.

    Args:
        stop: set it to end every wait here, as Ctrl-C does.
    """

    def __init__(self, grid: Grid, stop: Event | None = None):
        self._grid = grid
        self._stop = stop or Event()
        self._in_turn = isinstance(grid, SequentialGrid) and grid.takes_turns
        self.lines = Lines(grid)

    def nodes(self) -> dict[int, str]:
        """The nodes that are connected now, and in a deployment when each was started."""
        self.check_stop()
        return activations(self._grid) if self.lines.deployed else dict.fromkeys(self._grid.get_node_ids(), "")

    def pause(self, seconds: float) -> None:
        """Wait, but not for somebody who has pressed Ctrl-C."""
        self._stop.wait(seconds)
        self.check_stop()

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt

    def send(self, messages: list[Message], seconds: float) -> Iterator[Reply]:
        """Send the messages and yield what comes of each, as it comes; at the time limit, those that never came.

        The list is emptied.
        """
        if not messages:
            return
        sent = time.monotonic()
        targets = [message.metadata.dst_node_id for message in messages]
        started = self.nodes() if self.lines.deployed else {}
        identified = push(self._grid, messages)
        identified += [None] * (len(targets) - len(identified))  # Flower names none of those that are too many at once
        messages.clear()  # on their way: half a gigabyte need not stay here while they are worked on
        self.lines.forget_content()
        pending: dict[str, int] = {}
        for message_id, node in zip(identified, targets, strict=True):
            if message_id is None:
                yield Reply(node, None, 0.0, "the SuperLink took no message for its node")
            else:
                pending[message_id] = node
        deadline = sent + seconds
        beside = self.lines.deployed
        pulled = self._pull_beside(pending, started, deadline) if beside else self._pull_in_turn(pending, deadline)
        for message_id, came in pulled:
            now = time.monotonic()
            # A reply is known by the message that it answers: an error may come under another node's id
            node = pending.pop(message_id if isinstance(came, WireError) else came.metadata.reply_to_message_id, NOBODY)
            if node == NOBODY:
                continue
            if isinstance(came, WireError):
                yield Reply(node, None, now - sent, str(came))
            else:
                yield Reply(node, came, self._turn_seconds() if self._in_turn else now - sent)
        for node in pending.values():
            yield Reply(node, None, time.monotonic() - sent, f"no reply within {seconds:g} s")

    def _turn_seconds(self) -> float:
        assert isinstance(self._grid, SequentialGrid)
        return self._grid.turn_seconds

    def _pull_in_turn(self, pending: Mapping[str, int], deadline: float) -> Iterator[tuple[str, Message | WireError]]:
        """What comes, for grids whose replies are there at once or not at all. One at a time, so that one is held."""
        while pending and time.monotonic() < deadline:
            self.check_stop()
            arrived = False
            for message_id in list(pending):
                try:
                    for reply in pull_one(self._grid, message_id):
                        arrived = True
                        yield message_id, reply
                except WireError as error:
                    yield message_id, error
            if not arrived and pending:
                self.pause(POLL_SECONDS)

    def _pull_beside(
        self, pending: Mapping[str, int], started: Mapping[int, str], deadline: float
    ) -> Iterator[tuple[str, Message | WireError]]:
        """What comes, from nodes elsewhere. A reply can be pulled as soon as its first byte is at the SuperLink, and
        pulling it takes as long as its node takes to send the rest, which may be forever: so each has a thread.

        Args:
            started: when each node was started, before it was sent anything. A node that is started again has forgotten
                what it was sent, and if it is back soon enough Flower doesn't notice.
        """
        found: Queue[tuple[str, Message | Exception]] = Queue()
        over = Event()
        shortest, begun = max(POLL_SECONDS, len(pending) / MAX_PULLS_PER_SECOND), time.monotonic()

        def pause() -> float:
            """A tenth of the wait so far: a look costs the SuperLink 10 ms of a core, and four clients that are looked
            for ten times a second half of it."""
            return max(shortest, min((time.monotonic() - begun) / 10, LONGEST_POLL_SECONDS))

        def look(message_id: str) -> None:
            answered = False
            while not answered and not over.wait(pause()):
                try:
                    for reply in pull_one(self._grid, message_id):
                        found.put((message_id, reply))
                        answered = reply.metadata.reply_to_message_id == message_id
                except Exception as error:  # the round loop's to raise
                    found.put((message_id, error))
                    return

        for message_id in pending:
            Thread(target=look, args=(message_id,), daemon=True).start()
        try:
            looked = time.monotonic()
            while pending and (left := deadline - time.monotonic()) > 0:
                self.check_stop()
                if time.monotonic() - looked > RESTART_SECONDS:
                    looked, now = time.monotonic(), self.nodes()
                    for message_id in [
                        key for key, node in pending.items() if now.get(node, "") > started.get(node, "")
                    ]:
                        yield message_id, WireError("its node was started again and knows nothing of the message")
                with suppress(Empty):
                    message_id, came = found.get(timeout=min(left, POLL_SECONDS))
                    if isinstance(came, Exception) and not isinstance(came, WireError):
                        raise came
                    yield message_id, came
        finally:
            over.set()
