"""The parts of Flower that are not its public interface, in one place, so that an upgrade has one file to check (and
fedtune/wire/http_overhead.py, for deployments).

Tested with flwr 1.41.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import httpx
from flwr.app import Message, Metadata, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage  # pylint: disable=no-name-in-module
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # pylint: disable=no-name-in-module
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.core.errors import ClientTimeout, ConfigError, FedtuneError, RunFolderError, WireError, printable
from fedtune.core.text import first_line

__all__ = [
    "SERVER_NODE",
    "Error",
    "ErrorCode",
    "Run",
    "activations",
    "as_message",
    "assume_identity",
    "content_bytes",
    "content_from_bytes",
    "content_to_bytes",
    "envelope_bytes",
    "explain_error",
    "pull_one",
    "push",
    "raised_by_client",
    "retry_on_server_error",
    "set_message_id",
    "simulate",
    "suppress_logs",
]

Answer = TypeVar("Answer")

SERVER_NODE = 1  # Flower's own id for the server

_EXPLAINED = {
    ErrorCode.UNKNOWN: "its process died",
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its ClientApp can't be loaded",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message to it was lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply was lost",
    ErrorCode.NODE_UNAVAILABLE: "its node went away",
    ErrorCode.CLIENT_APP_CRASHED: "its client process died",
}

PAUSES = (0.5, 1, 2, 4, 8)  # seconds between the times a SuperLink with an error of its own is asked again
MAX_KIND = 64  # characters of a message's type, whose length is remembered
MAX_REASON = 440  # characters of a client's complaint that are kept, so that what happened to it has room too

# The forms in which Flower passes on what a client raised, in a deployment and from Ray
_RAISED = re.compile(r"^<class '(?:[\w.]+\.)?((?!ClientAppException)\w+)'>:<'(.*)'>$", re.DOTALL)
_RAISED_ON_RAY = re.compile(r"Exception ClientAppException occurred\. Message: (.*)'>$", re.DOTALL)


def explain_error(error: Error) -> str:
    """What an error reply means: for what a client raised its own words, else what happened to it, in ours first."""
    said = error.reason or f"Flower error {error.code}"
    if (found := _RAISED.search(said)) or (found := _RAISED_ON_RAY.search(said)):
        said = ": ".join(text.strip() for text in found.groups())
        said = re.sub(r"^ClientError: (?=\w+: )", "", said)  # a device's worker has named the kind already
    said = printable(said, MAX_REASON)
    happened = _EXPLAINED.get(error.code)
    return f"{happened} ({said})" if happened else said


def raised_by_client(error: Error) -> bool:
    """Whether the client's own code is at fault, rather than its machine, its speed or the way to it."""
    at_fault = (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    return error.code in at_fault and not explain_error(error).startswith(f"{ClientTimeout.__name__}: ")


def retry_on_server_error(ask: Callable[[], Answer], pauses: Iterable[float] = PAUSES) -> Answer:
    """What the SuperLink answers, asked again while it has an error of its own (HTTP 5xx).

    A busy one has: its database is locked for longer than it waits. Flower 1.41 repeats what broke on the way, but such
    an answer would end the run.

    Raises:
        httpx.HTTPStatusError: of the last answer, if none is better.
    """
    for pause in pauses:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            if not error.response.is_server_error:
                raise
        time.sleep(pause)
    return ask()


def activations(grid: Grid) -> dict[int, str]:
    """When each connected node of a deployment was last started, in the SuperLink's words."""
    return {node.node_id: node.last_activated_at for node in retry_on_server_error(grid.get_nodes)}


def push(grid: Grid, messages: list[Message]) -> list[str | None]:
    """Send the messages; the id of each, or None for one that wasn't taken. A SuperLink takes no message twice."""
    return list(retry_on_server_error(lambda: grid.push_messages(messages)))


def pull_one(grid: Grid, message_id: str) -> Iterable[Message]:
    """What has come in answer to this message, if anything.

    Raises:
        WireError: if what came can't be unpacked. A SuperLink that can't be reached is not that: it ends the run.
    """
    try:
        return list(retry_on_server_error(lambda: grid.pull_messages([message_id])))
    except (httpx.HTTPError, OSError, RunFolderError):
        raise
    except Exception as error:  # Flower raises what it likes on objects that don't fit together
        raise WireError(f"its reply can't be unpacked ({type(error).__name__}: {error})") from error


def assume_identity(run_id: int) -> None:
    """Make this process the server of run `run_id`. Flower builds no message before it knows who sends it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = SERVER_NODE
    TaskIdentity.node_id = SERVER_NODE


def set_message_id(message: Message, message_id: str) -> None:
    """Name a message, as a SuperLink does on arrival; `Metadata` has no setter for it."""
    message.metadata.__dict__["_message_id"] = message_id


def simulate(server_app: ServerApp, client_app: ClientApp, clients: int, backend: dict[str, Any]) -> None:
    """Run the apps on Flower's simulation engine, as `flwr.simulation.run_simulation` does, which is deprecated.

    Args:
        backend: `init_args` for ray.init, and `client_resources`, the options of Ray's actors.

    Raises:
        ConfigError: if Ray has no room for a single client, or the cluster can't be reached.
        FedtuneError: what the ServerApp raised.
    """
    from flwr.simulation.run_simulation import _run_simulation  # imports Ray: seconds
    from flwr.supercore.telemetry import EventType

    # Every failed client is reported by the round loop, without a traceback
    level = logging.NOTSET if os.environ.get("FEDTUNE_DEBUG") else logging.CRITICAL
    try:
        with suppress_logs(level):
            _run_simulation(
                num_supernodes=clients,
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                client_app=client_app,
                server_app=server_app,
                backend_config=backend,
            )
    except FedtuneError:
        raise
    except (RuntimeError, ConnectionError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, FedtuneError):
            raise cause from None
        raise ConfigError(
            f"Ray can't run these clients: {first_line(cause)} "
            "Look at runtime.cpus, runtime.gpus and runtime.address; FEDTUNE_DEBUG=1 shows everything"
        ) from error


def content_to_bytes(content: RecordDict) -> bytes:
    """The content as Flower's protobuf."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def content_from_bytes(data: bytes) -> RecordDict:
    """What `content_to_bytes` made."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def as_message(content: RecordDict) -> Message:
    """A message that was never sent, from nobody to nobody, for code of Flower's that reads nothing but the content."""
    metadata = Metadata(0, "", 0, 0, "", "", 1.0, 1.0, "train")
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


@contextmanager
def suppress_logs(level: int = logging.WARNING) -> Iterator[None]:
    """Flower logs no progress within, only what is wrong."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
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
    at = message.metadata
    if message.has_error() or len(at.message_type) > MAX_KIND:  # which is a stranger's word, and not kept
        return _measure_envelope(at, message.error if message.has_error() else None)
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
