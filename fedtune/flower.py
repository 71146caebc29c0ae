"""The parts of Flower that are not its public interface, in one place, so that an upgrade has one file to check.

Tested with flwr 1.41.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from flwr.app import Message, Metadata, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_to_proto
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage  # pylint: disable=no-name-in-module
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SERVER_NODE",
    "Error",
    "ErrorCode",
    "Run",
    "as_message",
    "assume_identity",
    "content_bytes",
    "envelope_bytes",
    "quietly",
    "set_message_id",
]

SERVER_NODE = 1  # Flower's own id for the server


def assume_identity(run_id: int) -> None:
    """Make this process the server of run `run_id`. Flower builds no message before it knows who sends it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = SERVER_NODE
    TaskIdentity.node_id = SERVER_NODE


def set_message_id(message: Message, message_id: str) -> None:
    """Name a message, as a SuperLink does on arrival; `Metadata` has no setter for it."""
    message.metadata.__dict__["_message_id"] = message_id


def as_message(content: RecordDict) -> Message:
    """A message that was never sent, from nobody to nobody, for code of Flower's that reads nothing but the content."""
    metadata = Metadata(0, "", 0, 0, "", "", 1.0, 1.0, "train")
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


@contextmanager
def quietly() -> Iterator[None]:
    """Flower logs no progress within, only what is wrong."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def content_bytes(content: RecordDict) -> int:
    """Length of the content's part of a serialised message."""
    return int(ProtoMessage(content=recorddict_to_proto(content)).ByteSize())


def envelope_bytes(message: Message) -> int:
    """Length of the rest: addresses, and the error if there is one. The message's own id is left out, as Flower leaves
    it out when it sends."""
    if message.has_error():
        return _measure_envelope(message.metadata, message.error)
    at = message.metadata
    return _envelope_bytes(
        at.run_id,
        at.src_node_id,
        at.dst_node_id,
        at.src_task_id,
        at.dst_task_id,
        at.message_type,
        len(at.group_id),
        len(at.reply_to_message_id),
    )


@lru_cache(maxsize=1 << 16)
def _envelope_bytes(
    run: int,
    source: int,
    target: int,
    source_task: int | None,
    target_task: int | None,
    kind: str,
    group: int,
    answers: int,
) -> int:
    # Times are doubles, always eight bytes, so the length depends on nothing else: measured once a node
    metadata = Metadata(run, "", source, target, "0" * answers, "0" * group, 1.0, 1.0, kind, source_task, target_task)
    return _measure_envelope(metadata, None)


def _measure_envelope(metadata: Metadata, error: Error | None) -> int:
    proto = ProtoMessage(metadata=metadata_to_proto(metadata), error=error_to_proto(error) if error else None)
    proto.metadata.message_id = ""
    return int(proto.ByteSize())
