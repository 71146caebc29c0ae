"""Send messages, and take what comes of each, with a limit to every wait."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import ClientError, FedtuneError
from fedtune.flower import SERVER_NODE, explain_error, pull_one
from fedtune.framing import Lines

POLL_SECONDS = 0.1  # between two looks for replies, where clients are elsewhere; longer where many are awaited


@dataclass(frozen=True)
class Arrival:
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


class Exchange:
    """The server's end of the wire.

    Attributes:
        lines: what a deployment moves around the messages.

    Args:
        stop: set it to end every wait here, as Ctrl-C does.
    """

    def __init__(self, grid: Grid, stop: Event | None = None):
        self._grid = grid
        self._stop = stop or Event()
        self._in_turn = getattr(grid, "takes_turns", False)
        self.lines = Lines(grid)

    def nodes(self) -> list[int]:
        """The nodes that are connected now."""
        self.check_stop()
        return list(self._grid.get_node_ids())

    def pause(self, seconds: float) -> None:
        """Wait, but not for somebody who has pressed Ctrl-C."""
        self._stop.wait(seconds)
        self.check_stop()

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt

    def send(self, messages: list[Message], seconds: float) -> Iterator[Arrival]:
        """Send the messages and yield what comes of each, as it comes; at the time limit, those that never came."""
        if not messages:
            return
        sent = last = time.monotonic()
        targets = [message.metadata.dst_node_id for message in messages]
        pending: dict[str, int] = {}
        for message_id, node in zip(self._grid.push_messages(messages), targets, strict=True):
            if message_id is None:
                yield Arrival(node, None, 0.0, "its node is not connected")
            else:
                pending[message_id] = node
        while pending and time.monotonic() < sent + seconds:
            self.check_stop()
            arrived = False
            for message_id in list(pending):
                # One at a time: a reply that can't be unpacked spoils no other, and one is held at a time
                try:
                    replies = pull_one(self._grid, message_id)
                except FedtuneError as error:
                    node = pending.pop(message_id)
                    yield Arrival(node, None, time.monotonic() - sent, str(error))
                    continue
                for reply in replies:
                    # A reply is known by the message that it answers: an error may come under another node's id
                    answered = pending.pop(reply.metadata.reply_to_message_id, None)
                    if answered is None:
                        continue
                    arrived, now = True, time.monotonic()
                    yield Arrival(answered, reply, now - (last if self._in_turn else sent))
                    last = time.monotonic()
            if not arrived and pending:
                self.pause(POLL_SECONDS * min(10, max(1, len(pending) / 10)))
        for node in pending.values():
            yield Arrival(node, None, time.monotonic() - sent, f"no reply within {seconds:g} s")
