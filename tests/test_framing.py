"""What a deployment moves around a message, against Flower's own protobufs, client and server, without a deployment."""

import os
import re
import socket
import threading

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.runtime.local import LocalGrid
from fedtune.wire import http_overhead as framing
from fedtune.wire.flower_private import set_message_id
from fedtune.wire.http_overhead import Crossing, Line, Link, link_of, objects_of
from fedtune.wire.messages import wire_bytes

RUN, NODE, TASK = 1426442086723440585, 16654270556861581583, 8153456012136620559
SIZES = (0, 1_000, 18_000, 400_000, 5_242_880, 12_000_000)


def payload(size):
    record = ArrayRecord()
    record["blob"] = Array("uint8", (size,), "fedtune", os.urandom(size))
    return record


def instruction(size, node=NODE):
    content = RecordDict({"payload": payload(size), "settings": ConfigRecord({"lr": 0.001, "steps": 4})})
    metadata = Metadata(RUN, "", 1, node, "", "0", 1795309406.3602, 43200.0, "train", src_task_id=TASK)
    return make_message(metadata, content)


def update(size):
    content = RecordDict({"payload": payload(size), "metrics": MetricRecord({"examples": 4, "train_loss": 0.5})})
    metadata = Metadata(RUN, "", NODE, 1, "a" * 64, "0", 1795309408.9627, 43197.4, "train", dst_task_id=TASK)
    return make_message(metadata, content)


def heads(*calls):
    """Bytes of the heads of plain calls, from their names and the lengths of their bodies."""
    link = Link()
    asked = sum(
        len(framing.REQUEST.format(call=name, host=link.host, length=up, key="k" * 288, signature="s" * 139))
        for name, up, _ in calls
    )
    return Crossing(sum(len(framing.RESPONSE.format(length=down)) for *_, down in calls), asked)


def bodies(calls):
    lengths = [(name, request.ByteSize(), answer.ByteSize() if answer else 0) for name, request, answer in calls]
    moved = Crossing(sum(down for *_, down in lengths), sum(up for _, up, _ in lengths))
    return moved + heads(*lengths)


@pytest.mark.parametrize("size", SIZES)
def test_a_message_down_is_the_calls_that_flower_makes_for_it(size):
    message = instruction(size)
    set_message_id(message, message.object_id)
    node, tree = Node(node_id=NODE), get_object_tree(message)
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    outline = message_to_proto(remove_content_from_message(message))
    calls = [
        (
            "pull-messages",
            PullMessagesRequest(node=node),
            PullMessagesResponse(messages_list=[outline], message_object_trees=[tree]),
        )
    ]
    for name, content in objects.items():
        request = PullObjectRequest(node=node, run_id=RUN, object_id=name)
        found = PullObjectResponse(object_found=True, object_available=True, object_content=content)
        calls.append(("pull-object", request, found))
    confirmed = ConfirmMessageReceivedRequest(node=node, run_id=RUN, message_object_id=message.object_id)
    calls.append(("confirm-message-received", confirmed, None))

    wire = wire_bytes(message)
    assert Link().down(message, objects_of(message), wire) + Crossing(wire, 0) == bodies(calls)


@pytest.mark.parametrize("size", SIZES)
def test_a_message_up_is_the_calls_that_flower_makes_for_it(size):
    reply = update(size)
    set_message_id(reply, reply.object_id)
    node, tree, session = Node(node_id=NODE), get_object_tree(reply), "c7ddb393-8299-4e04-baa3-2cb763b44f2c"
    objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
    outline = message_to_proto(remove_content_from_message(reply))
    answer = PushMessagesResponse(
        reconnect=Reconnect(reconnect=5), results={reply.object_id: 0}, objects_to_push=[*objects], session_id=session
    )
    request = PushMessagesRequest(
        node=node, messages_list=[outline], message_object_trees=[tree], clientapp_runtime_list=[0.036]
    )
    calls = [("push-messages", request, answer)]
    for name, content in objects.items():
        pushed = PushObjectRequest(node=node, run_id=RUN, object_id=name, object_content=content, session_id=session)
        calls.append(("push-object", pushed, PushObjectResponse(stored=True)))

    wire = wire_bytes(reply)
    assert Link().up(reply, objects_of(reply), wire) + Crossing(0, wire) == bodies(calls)


@pytest.mark.parametrize(
    ("size", "down", "up"),
    [
        (0, (2_146, 6_427), (1_222, 7_056)),
        (1_000, (3_440, 7_359), (1_418, 9_182)),
        (2_000_000, (2_002_450, 7_355), (1_418, 2_008_188)),
        (12_000_000, (12_003_049, 9_219), (1_810, 12_010_449)),
    ],
)
def test_a_recorded_deployment(size, down, up):
    """What a counting proxy saw between a SuperNode and a SuperLink, flwr 1.41, plain HTTP, these very ids: heads and
    bodies of all calls for one message. Signatures differ by up to 4 bytes a call."""
    link, message, reply = Link(host="127.0.0.1:40357"), instruction(size), update(size)
    there = link.down(message, objects_of(message), 0)
    back = link.up(reply, objects_of(reply), 0)
    assert (there.down, back.down) == (down[0], up[0])
    assert there.up == pytest.approx(down[1], abs=4 * 10)
    assert back.up == pytest.approx(up[1], abs=4 * 10)


def test_a_request_has_the_head_that_a_supernode_writes():
    asked = []

    def answer(request):
        asked.append(request)
        return httpx.Response(200, content=b"")

    key = ec.generate_private_key(ec.SECP384R1())
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    with FleetHttpClient.from_server_address("10.0.0.7:8000", True, None, interceptors) as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        client.PullMessages(PullMessagesRequest(node=Node(node_id=NODE)))
    lines = [b"%s: %s" % (name, value) for name, value in asked[0].headers.raw]
    real = b"\r\n".join([b"POST %s HTTP/1.1" % asked[0].url.raw_path, *lines, b"", b""])
    signed = asked[0].headers["flwr-signature"]
    ours = framing.REQUEST.format(
        call="pull-messages", host="10.0.0.7:8000", length=13, key=framing.KEY, signature="s" * len(signed)
    )
    # An optional decoder (brotli, zstandard) on the node lengthens Accept-Encoding
    offered = re.compile(rb"(?i)accept-encoding: ([^\r]*)")
    assert offered.search(real).group(1).startswith(b"gzip, deflate")
    assert len(offered.sub(b"", real)) == len(offered.sub(b"", ours.encode()))


def test_an_answer_has_the_head_that_a_superlink_writes():
    async def app(scope, receive, send):
        headers = [(b"content-length", b"2"), (b"content-type", b"application/protobuf")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"\x08\x01"})

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            answer = b""
            while not answer.endswith(b"\x08\x01"):
                answer += client.recv(1 << 12)
        server.should_exit = True
        thread.join()
    assert len(answer) == len(framing.RESPONSE.format(length=2)) + 2


def test_tls_adds_22_bytes_to_each_record():
    """An empty poll: a head up, its body of 13 bytes, a head down: 22 + 22 and 22. A heartbeat has a body each way. An
    object of 400,000 bytes fills ceil(400,0xx / 16,384) = 25 records."""
    plain, tls = Link(), Link(tls=True)
    assert tls.poll(NODE) == plain.poll(NODE) + Crossing(22, 44)
    assert tls.heartbeat(NODE) == plain.heartbeat(NODE) + Crossing(44, 44)
    message = instruction(400_000)
    objects, wire = objects_of(message), wire_bytes(message)
    # pull-messages, 6 objects of which 5 fit into one record each, and confirm-message-received, answered by nothing
    down, up = 2 + 5 * 2 + (1 + 25) + 1, 8 * 2
    assert tls.down(message, objects, wire) == plain.down(message, objects, wire) + Crossing(22 * down, 22 * up)
    assert tls.down(message, objects, wire, connections=2).total == tls.down(message, objects, wire).total + 2 * 2476
    assert plain.handshake == Crossing()


def test_equal_chunks_travel_once():
    """12 MB of zeros are two equal chunks of 5 MB and a rest, each with a head of 20: Flower names an object by its
    hash."""
    record = ArrayRecord()
    record["blob"] = Array("uint8", (12_000_000,), "fedtune", bytes(12_000_000))
    message = make_message(instruction(0).metadata, RecordDict({"payload": record}))
    assert [length for length in objects_of(message).lengths if length > 1e6] == [5_242_880 + 20, 1_514_240 + 20]


def test_receivers_of_a_broadcast_share_its_objects_and_their_cost():
    message = instruction(18_000)
    objects = objects_of(message)
    assert objects == objects_of(instruction(18_000))  # other bytes, other ids, the same structure
    again = make_message(instruction(0, NODE + 1).metadata, RecordDict())
    assert Link().down(again, objects, 0) == Link().down(message, objects, 0)


def test_errors_travel_without_objects_and_those_of_the_superlink_not_at_all():
    link = Link()
    at = update(0).metadata
    failed = make_message(at, error=Error(2, "out of memory"))
    moved = link.up(failed, objects_of(failed), wire_bytes(failed))
    # Two calls, push-messages and push-object of the message itself
    assert 2 * 800 < moved.up < 2 * 1_200
    at.__dict__["_src_node_id"] = 1
    assert link.up(failed, objects_of(failed), wire_bytes(failed)) == Crossing()


def test_joining_moves_the_app():
    run = LocalGrid(ClientApp(), 1, {}).run
    small, large = (Link().join(NODE, run, fab) for fab in (10_000, 90_000))
    assert large.down - small.down == pytest.approx(80_000, abs=4)
    assert large.up == small.up
    registered = Link().join(NODE, run, 10_000, register=True)
    assert registered.total - small.total == pytest.approx(838 + 218 + 129 + 11, abs=4)  # as recorded


def test_a_node_polls_between_messages_and_beats_always():
    """A line from second 0: polls at 0, 3.05, 6.1; the heart beats at 10, 30, 50, ..."""
    link = Link(tls=True)
    poll, beat = link.poll(NODE), link.heartbeat(NODE)
    line = Line(link, NODE, 0.0)
    assert line.idle(7.0) == poll * 3
    assert line.idle(7.0) == Crossing()

    message, reply = instruction(1_000), update(1_000)
    objects = objects_of(message), objects_of(reply)
    # Found by the poll at 9.15; that is over 5 s after any objects, so the second connection is new
    assert line.down(message, objects[0], 0, 7.0) == link.down(message, objects[0], 0, 1)
    # Works from then until 40: no polls, beats at 10 and, on a connection of its own, at 30; two new ones for the reply
    assert line.idle(40.0) == beat * 2 + link.handshake
    assert line.up(reply, objects[1], 0, 40.0) == link.up(reply, objects[1], 0, 2)
    # Polls at 40 and finds the next message at 43.05, when both connections are still there
    assert line.idle(41.0) == poll
    assert line.down(message, objects[0], 0, 41.0) == link.down(message, objects[0], 0)
    assert line.idle(44.0) == Crossing()
    assert line.up(reply, objects[1], 0, 44.0) == link.up(reply, objects[1], 0)


def test_a_reply_right_after_a_heartbeat_finds_its_connection():
    """Beats at 10 and 30; a reply at 33."""
    link, reply = Link(tls=True), update(1_000)
    line, objects = Line(link, NODE, 0.0), objects_of(reply)
    line.idle(1.0)
    line.down(instruction(1_000), objects, 0, 1.0)
    line.idle(33.0)
    assert line.up(reply, objects, 0, 33.0) == link.up(reply, objects, 0, 1)


def test_only_a_deployed_app_has_a_link():
    assert link_of(LocalGrid(ClientApp(), 1, {})) is None
    assert link_of(HttpGrid("fl.example.org:8000", insecure=True, token="t")) == Link(False, "fl.example.org:8000")
    assert link_of(HttpGrid("127.0.0.1:8000", token="t")) == Link(True)
