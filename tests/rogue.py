"""A registered node that does not play by the rules, for tests: it speaks Flower's fleet protocol itself.

    python rogue.py SUPERLINK CA_CERTIFICATE KEY GREETING

It answers the handshake with the content in the file GREETING, and then

    round 1   answers a message that nobody sent, answers in another node's name, and answers its own message with NaN,
              and then once more, with something else
    round 2   answers with objects that are no objects
    round 3   announces an answer and never sends its objects
    round 4   answers round 3 at last, and its own message with a content of another form
"""

import hashlib
import signal
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response

from fedtune.codecs.raw import Raw
from fedtune.core.protocol import Update
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import content_from_bytes


def main() -> None:
    superlink, authority, key_file, greeting = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # says goodbye: else later runs wait for its greeting
    private = load_ssh_private_key(Path(key_file).read_bytes(), None)
    keys = private, private.public_key()
    with http_request_response(superlink, False, Path(authority).read_bytes(), keys) as connection:
        node, receive, send, _, _, pull_object, push_object, confirm = connection
        print("SuperNode ID:", node, flush=True)

        def answer(question, content, **forged):
            """Push a reply, with some of its metadata forged."""
            reply = Message(content, reply_to=question)
            for name, value in forged.items():
                reply.metadata.__dict__[f"_{name}"] = value
            reply.metadata.__dict__["_message_id"] = reply.object_id
            wanted, session = send(reply, get_object_tree(reply), 1.0)
            for object_id, each in get_all_nested_objects(reply).items():
                if object_id in wanted:
                    push_object(reply.metadata.run_id, session, object_id, each.deflate())
            print("answered", question.metadata.group_id, forged, "wanted" if wanted else "refused", flush=True)

        late = None
        while True:
            if (received := receive()) is None:
                time.sleep(0.2)
                continue
            head, tree = received
            run = head.metadata.run_id
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, 1
            question = pull_and_inflate_object_from_tree(
                tree,
                lambda object_id, run=run: pull_object(run, object_id),
                lambda object_id, run=run: confirm(run, object_id),
                return_type=Message,
            )
            question.metadata.__dict__["_message_id"] = tree.object_id
            if question.metadata.message_type == "query":
                answer(question, content_from_bytes(Path(greeting).read_bytes()))
                continue
            instruction, _ = wire.unpack_instruction(question.content, Raw())
            honest = wire.pack_update(Update(instruction.tensors, 1), Raw(), 0)
            broken = {name: tensor * float("nan") for name, tensor in instruction.tensors.items()}
            number = int(question.metadata.group_id)
            if number == 1:
                answer(question, honest, reply_to_message_id="f" * 64)
                answer(question, honest, src_node_id=node ^ 1)
                answer(question, wire.pack_update(Update(broken, 1), Raw(), 0))
                answer(question, honest)
            elif number == 2:
                body = bytes(range(256))  # under a head that the SuperLink finds nothing wrong with
                garbage = f"Message  {len(body)}".encode() + b"\x00" + body
                object_id = hashlib.sha256(garbage).hexdigest()
                reply = Message(RecordDict(), reply_to=question)
                reply.metadata.__dict__["_message_id"] = object_id
                _, session = send(reply, ObjectTree(object_id=object_id), 1.0)
                push_object(run, session, object_id, garbage)
                print("answered 2 with garbage", flush=True)
            elif number == 3:
                late = question, honest
                half = Message(honest, reply_to=question)
                half.metadata.__dict__["_message_id"] = half.object_id
                send(half, get_object_tree(half), 1.0)
                print("announced 3", flush=True)
            else:
                answer(*late)
                answer(question, RecordDict({"surprise": ConfigRecord({"x": 1})}))


if __name__ == "__main__":
    main()
