"""What a deployment moves around a message: every byte between SuperNode and SuperLink beyond `wire_bytes`.

A SuperNode asks for everything, in HTTP calls with protobuf bodies, none of them compressed:

    a message down   pull-messages, pull-object for each object of it, confirm-message-received
    its reply up     push-messages, push-object for each object of it
    meanwhile        pull-messages every 3 s while it has nothing to do, send-node-heartbeat every 20 s
    once             register-node (without node authentication), activate-node; for each run get-run and get-fab

Bodies are Flower's own protobufs, serialised here; heads are the text below, which tests compare with what Flower's
client and server write. TLS adds to each record and each new connection. Retries, errors of HTTP and what TCP and IP
add are left out. Private to Flower like `fedtune.flower`, and tested with flwr 1.41.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedtune.wire.flower_private import SERVER_NODE, Run

# The heads of every call. Of the signature's DER form, random to a byte or two, the mean length in base 64 is taken
REQUEST = (
    "POST /v1/fleet/{call} HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
    "User-Agent: python-httpx/0.28.1\r\ncontent-type: application/protobuf\r\naccept: application/protobuf\r\n"
    "Content-Length: {length}\r\nflwr-package-name: flwr\r\nflwr-package-version: 1.41.0\r\n"
    "flwr-component-name: SuperNode\r\nflwr-public-key: {key}\r\nflwr-timestamp: 2026-01-01T00:00:00.000000+00:00\r\n"
    "flwr-signature: {signature}\r\n\r\n"
)
RESPONSE = (
    "HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: {length}\r\n"
    "content-type: application/protobuf\r\n\r\n"
)
PUBLIC_KEY = "k" * 215  # a P-384 key in PEM, as SuperNodes make for themselves
KEY = "k" * 288  # the same in base 64
SIGNATURE = "s" * 139

RECORD_BYTES = 16_384  # plaintext in a TLS record, at most
RECORD_EXTRA = 22  # TLS 1.3: 5 of head, 16 of tag, 1 of type
HELLO_UP = 597  # a handshake: ClientHello of 517, change of cipher, Finished
HELLO_DOWN = 834  # ServerHello, Finished, two tickets, the closing alert; all but the server's certificate

ID = "0" * 64  # SHA-256 in hexadecimal: messages and objects are known by their hash
SESSION = "0" * 36  # a UUID
POLL_SECONDS = 3.05  # 3 s of sleep and a call
HEARTBEAT_SECONDS = 20.0  # 17.5 to 22.5, drawn anew each time
KEEP_ALIVE_SECONDS = 5.0  # both ends drop an idle connection after this
KEY_BYTES = 2048  # of what is remembered of one message
PARALLEL = 2  # calls at once for a message's objects, hence connections


class Proto(Protocol):
    """Any protobuf."""

    def ByteSize(self) -> int: ...


@dataclass(frozen=True)
class Crossing:
    """Bytes that crossed between a SuperNode and its SuperLink."""

    down: int = 0  # to the node
    up: int = 0  # from it

    @property
    def total(self) -> int:
        return self.down + self.up

    def __add__(self, other: "Crossing") -> "Crossing":
        return Crossing(self.down + other.down, self.up + other.up)

    def __mul__(self, times: int) -> "Crossing":
        return Crossing(self.down * times, self.up * times)


@dataclass(frozen=True)
class Objects:
    """What Flower cuts a content into: each record, array and 5 MB of an array is an object that travels by itself."""

    lengths: tuple[int, ...] = ()  # bytes of each
    tree: bytes = b""  # the tree of their ids, with every id blanked so that equal structures are equal


def objects_of(message: Message) -> Objects:
    """The objects of a message's content; none of an error.

    Every object is hashed, as Flower does too: about 1 s for 1 GB. A broadcast needs it once.
    """
    if not message.has_content():
        return Objects()
    with no_object_id_recompute():
        objects = get_all_nested_objects(message.content)
        lengths = tuple(len(each.deflate()) for each in objects.values())
        return Objects(lengths, _blank(get_object_tree(message.content)).SerializeToString())


def link_of(grid: Grid) -> "Link | None":
    """The link that a deployed ServerApp's nodes use, as far as its own connection tells; None where clients are in
    the same process or in Flower's simulation."""
    if "flwr.superlink.grid" not in sys.modules:  # seconds, which a run in one process can do without
        return None
    from flwr.superlink.grid import HttpGrid

    return Link(tls=not grid._insecure, host=grid._addr) if isinstance(grid, HttpGrid) else None


@dataclass(frozen=True)
class Link:
    """How nodes reach the SuperLink."""

    tls: bool = False
    host: str = "127.0.0.1:8000"  # as the nodes write it: its length is in every call
    certificate: int = 1_045  # bytes: the server's certificate chain in DER, and a signature by its key (RSA 2048: 256)

    def down(self, message: Message, objects: Objects, wire_bytes: int, connections: int = 0) -> Crossing:
        """What carrying `message` to its node takes beyond `wire_bytes`, which are taken off `down`.

        Args:
            connections: how many TCP connections are opened for it.
        """
        moved = _remembered(_pulled, self, _envelope(message), objects) + self.handshake * connections
        return Crossing(moved.down - wire_bytes, moved.up)

    def up(self, reply: Message, objects: Objects, wire_bytes: int, connections: int = 0) -> Crossing:
        """What carrying `reply` from its node takes beyond `wire_bytes`, which are taken off `up`. Nothing if the
        SuperLink wrote it itself, for a node that is gone."""
        if reply.metadata.src_node_id == SERVER_NODE:
            return Crossing()
        moved = _remembered(_pushed, self, _envelope(reply), objects) + self.handshake * connections
        return Crossing(moved.down, moved.up - wire_bytes)

    def poll(self, node: int) -> Crossing:
        """One question for messages when there are none."""
        return self.call("pull-messages", PullMessagesRequest(node=Node(node_id=node)), PullMessagesResponse())

    def heartbeat(self, node: int) -> Crossing:
        """One sign of life."""
        request = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30)
        return self.call("send-node-heartbeat", request, SendNodeHeartbeatResponse(success=True))

    def join(self, node: int, run: Run, fab: int, register: bool = False) -> Crossing:
        """What a node moves before its first message of its first run.

        Args:
            fab: bytes of the Flower App Bundle.
            register: whether the node makes its own key, as it does without node authentication.
        """
        key, at = PUBLIC_KEY.encode(), Node(node_id=node)
        app = Fab(hash_str=ID, content=bytes(fab), verifications={"valid_license": ""})
        joined = self.call(
            "activate-node",
            ActivateNodeRequest(public_key=key, heartbeat_interval=30),
            ActivateNodeResponse(node_id=node),
        )
        joined += self.call("get-run", GetRunRequest(node=at, run_id=run.run_id), GetRunResponse(run=run_to_proto(run)))
        joined += self.call("get-fab", GetFabRequest(node=at, hash_str=ID, run_id=run.run_id), GetFabResponse(fab=app))
        if register:
            request = RegisterNodeFleetRequest(public_key=key)
            joined += self.call("register-node", request, RegisterNodeFleetResponse(node_id=node))
        return joined + self.handshake * 2  # polls and the first heartbeat begin at once

    def call(self, name: str, request: Proto, response: Proto, content_up: int = 0, content_down: int = 0) -> Crossing:
        """One HTTP call: heads, bodies and TLS records.

        Args:
            content_up: bytes of the request's `object_content`, which is left out of `request`.
            content_down: likewise of the response.
        """
        asked = request.ByteSize() + _field(content_up)
        answered = response.ByteSize() + _field(content_down)
        head = REQUEST.format(call=name, host=self.host, length=asked, key=KEY, signature=SIGNATURE)
        return Crossing(
            len(RESPONSE.format(length=answered)) + answered + self._records(answered),
            len(head) + asked + self._records(asked),
        )

    @property
    def handshake(self) -> Crossing:
        """A new connection; without TLS it moves nothing that a socket's owner sees."""
        return Crossing(HELLO_DOWN + self.certificate, HELLO_UP) if self.tls else Crossing()

    def _records(self, body: int) -> int:
        # The head is a record of its own; an empty body is none
        return RECORD_EXTRA * (1 + ceil(body / RECORD_BYTES)) if self.tls else 0


class Line:
    """One node's connection over time, as far as the server can tell from when it sends and receives.

    A node polls from the end of one message to the beginning of the next, and not while it works; its heart beats all
    the time. A connection that was quiet for 5 s is gone, and the next call opens a new one. Times are seconds on one
    clock; the node is taken to be polling since `now`.
    """

    def __init__(self, link: Link, node: int, now: float):
        self.link = link
        self.node = node
        self._next_poll = self._last_objects = now
        self._next_beat = now + HEARTBEAT_SECONDS / 2  # it beats already, who knows since when
        self._works_since: float | None = None

    def idle(self, now: float) -> Crossing:
        """Polls and heartbeats since the last time this was asked."""
        due = self._next_beat
        beats, self._next_beat = _ticks(due, now, HEARTBEAT_SECONDS)
        moved = self.link.heartbeat(self.node) * beats
        if self._works_since is not None:
            # No poll keeps a connection open for them: all but the early ones open their own
            early, _ = _ticks(due, min(now, self._works_since + KEEP_ALIVE_SECONDS), HEARTBEAT_SECONDS)
            return moved + self.link.handshake * (beats - early)
        polls, self._next_poll = _ticks(self._next_poll, now, POLL_SECONDS)
        return moved + self.link.poll(self.node) * polls

    def down(self, message: Message, objects: Objects, wire_bytes: int, now: float) -> Crossing:
        """`Link.down` for a message sent now. Ask `idle` first: the node finds the message with its next poll."""
        # The polls keep one connection open, the second one for objects is gone if the last objects were long ago
        lapsed = self._next_poll - self._last_objects > KEEP_ALIVE_SECONDS
        self._works_since = max(now, self._next_poll)
        return self.link.down(message, objects, wire_bytes, PARALLEL - 1 if lapsed else 0)

    def up(self, reply: Message, objects: Objects, wire_bytes: int, now: float) -> Crossing:
        """`Link.up` for a reply received now. Ask `idle` first."""
        lapsed = self._works_since is not None and now - self._works_since > KEEP_ALIVE_SECONDS
        # A heart that has just beaten leaves one open. When it beats is drawn at random, so this is right on average
        beaten = now - (self._next_beat - HEARTBEAT_SECONDS) < KEEP_ALIVE_SECONDS
        self._works_since, self._next_poll, self._last_objects = None, now, now
        return self.link.up(reply, objects, wire_bytes, PARALLEL - beaten if lapsed else 0)


class Lines:
    """The lines of all nodes that a deployed server has sent something to; in one process and in Flower's simulation
    there are none, and everything here is 0."""

    def __init__(self, grid: Grid):
        self._link = link_of(grid)
        self._lines: dict[int, Line] = {}
        self._idle: Counter[int] = Counter()
        self._content: RecordDict | None = None  # of the last message, whose objects are those below
        self._objects = Objects()

    @property
    def deployed(self) -> bool:
        """Whether there are sockets at all."""
        return self._link is not None

    def forget_content(self) -> None:
        """Let go of the content that was sent last."""
        self._content = None

    def down(self, message: Message, wire_bytes: int) -> int:
        """Bytes that sending `message` now takes beyond its own."""
        if self._link is None:
            return 0
        node, now = message.metadata.dst_node_id, time.monotonic()
        self._catch_up(node, now)
        if message.content is not self._content:
            self._content, self._objects = message.content, objects_of(message)
        return self._lines[node].down(message, self._objects, wire_bytes, now).total

    def up(self, node: int, reply: Message, wire_bytes: int) -> int:
        """Bytes that `node` took, beyond the reply's own, to bring this one."""
        if self._link is None:
            return 0
        now = time.monotonic()
        self._catch_up(node, now)
        return self._lines[node].up(reply, objects_of(reply), wire_bytes, now).total

    def drain_idle_bytes(self, nodes: Iterable[int]) -> dict[int, int]:
        """Bytes of polls and heartbeats of these nodes, each since it was last asked for."""
        if self._link is None:
            return {}
        now = time.monotonic()
        for node in nodes:
            self._catch_up(node, now)
        moved, self._idle = dict(self._idle), Counter()
        return moved

    def _catch_up(self, node: int, now: float) -> None:
        if self._link is not None and node not in self._lines:
            self._lines[node] = Line(self._link, node, now)
        self._idle[node] += self._lines[node].idle(now).total


def _ticks(due: float, now: float, every: float) -> tuple[int, float]:
    """How many of the ticks that are due at `due` and then `every` so often are past, and when the next is due."""
    ticks = max(0, int((now - due) // every) + 1)
    return ticks, due + ticks * every


def _envelope(message: Message) -> bytes:
    """The message without content, as it travels ahead of its objects. What changes with each message but not its
    length is blanked, so that it can be a key: the receivers of a broadcast differ in their node ids alone."""
    proto = message_to_proto(make_message(message.metadata, RecordDict()) if message.has_content() else message)
    at = proto.metadata
    at.message_id, at.group_id, at.reply_to_message_id = ID, "0" * len(at.group_id), "0" * len(at.reply_to_message_id)
    at.ttl = at.created_at = 1.0
    return bytes(proto.SerializeToString(deterministic=True))


def _remembered(measure: Any, link: Link, envelope: bytes, objects: Objects) -> Crossing:
    """What `measure` finds; it remembers only what is as small as ours is, as a peer's may be anything."""
    small = len(envelope) + len(objects.tree) + 8 * len(objects.lengths) <= KEY_BYTES
    found: Crossing = (measure if small else measure.__wrapped__)(link, envelope, objects)
    return found


@lru_cache(maxsize=1 << 14)
def _pulled(link: Link, envelope: bytes, objects: Objects) -> Crossing:
    proto, head, tree = _opened(envelope, objects)
    node, run = Node(node_id=proto.metadata.dst_node_id), proto.metadata.run_id
    moved = link.call(
        "pull-messages",
        PullMessagesRequest(node=node),
        PullMessagesResponse(messages_list=[proto], message_object_trees=[tree]),
    )
    request = PullObjectRequest(node=node, run_id=run, object_id=ID)
    found = PullObjectResponse(object_found=True, object_available=True)
    for length in (*objects.lengths, head):
        moved += link.call("pull-object", request, found, content_down=length)
    confirmed = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=ID)
    return moved + link.call("confirm-message-received", confirmed, ConfirmMessageReceivedResponse())


@lru_cache(maxsize=1 << 14)
def _pushed(link: Link, envelope: bytes, objects: Objects) -> Crossing:
    proto, head, tree = _opened(envelope, objects)
    node, run = Node(node_id=proto.metadata.src_node_id), proto.metadata.run_id
    lengths = (*objects.lengths, head)
    moved = link.call(
        "push-messages",
        PushMessagesRequest(
            node=node, messages_list=[proto], message_object_trees=[tree], clientapp_runtime_list=[1.0]
        ),
        PushMessagesResponse(
            reconnect=Reconnect(reconnect=5),
            results={ID: 0},
            objects_to_push=[ID] * len(lengths),
            session_id=SESSION,
        ),
    )
    request = PushObjectRequest(node=node, run_id=run, object_id=ID, session_id=SESSION)
    for length in lengths:
        moved += link.call("push-object", request, PushObjectResponse(stored=True), content_up=length)
    return moved


def _opened(envelope: bytes, objects: Objects) -> tuple[ProtoMessage, int, ObjectTree]:
    """The envelope; the length of the object that the message itself is; and the whole tree of ids."""
    proto = ProtoMessage.FromString(envelope)
    children = [ObjectTree.FromString(objects.tree)] if objects.tree else []
    return proto, len(message_from_proto(proto).deflate()), ObjectTree(object_id=ID, children=children)


def _blank(tree: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=ID, children=[_blank(child) for child in tree.children])


@lru_cache(maxsize=1 << 12)
def _field(content: int) -> int:
    """Bytes that `content` bytes take as a field of a protobuf: themselves, a tag and their length."""
    return int(PullObjectResponse(object_content=bytes(content)).ByteSize())
