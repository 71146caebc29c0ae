"""A worker that stays on the node, between the short lives of its ClientApps.

A SuperNode starts a process for every message. That process hands the message to the worker over a local socket and
waits; the worker keeps torch, the base and the tokenised data from one message to the next.

    ClientApp  connect -> hello (who are you) -> request -> its time limit -> answer
    worker     accept  -> hello -> handle_message -> answer; ends with its SuperNode, or after an idle time

The socket lies in a folder that only this user can enter, and both ends prove that they can read a secret in it. What
crosses it is JSON and Flower's protobuf; nothing is unpickled. This half is free of torch: it is what a ClientApp
imports.
"""

import hashlib
import json
import logging
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Context, Message, RecordDict

import fedtune
from fedtune.core.errors import ClientError, ClientTimeout
from fedtune.wire.flower_private import content_from_bytes, content_to_bytes

CODE = Path(fedtune.__file__).resolve().parent.parent  # a worker serves the app that it was started from
START_SECONDS = 120.0  # for a worker to import torch, answer hello, and read its instructions
IDLE_SECONDS = 3600.0
LOG_TAIL = 2000  # characters of the worker's log that this node's log repeats
LOG_END = 380  # and of these, those that cross the wire in an error

logger = logging.getLogger("flwr")  # so that a SuperNode prints it with its own lines


@dataclass(frozen=True)
class Place:
    """Where a node's worker listens, and what lies beside its socket."""

    folder: Path
    name: str

    @property
    def socket(self) -> str:
        return str(self.folder / f"{self.name}.sock")

    @property
    def secret(self) -> Path:
        return self.folder / f"{self.name}.secret"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"


def ask(message: Message, context: Context) -> RecordDict:
    """Have the node's worker answer a message, starting it if it isn't there.

    A node whose owner wants no process to stay (`--node-config 'worker=false'`) does the work here.

    Raises:
        ClientError: what the worker raised, or that it died twice, in words that say no more of this device than the
            server has to know (fedtune/device/owner.py). The whole stands in the device's own log.
        ClientTimeout: if it took too long.
    """
    if _is_ray():  # a simulation, whose processes stay by themselves
        from fedtune.workspace.client_handler import handle_message

        at = message.metadata
        return handle_message(
            at.message_type, at.group_id, message.content, context.run_config, context.node_config
        ).content
    try:
        return _ask(message, context)
    except Exception as error:
        from fedtune.device.privacy import for_the_server

        said = str(error) if isinstance(error, ClientError) else f"{type(error).__name__}: {error}"
        kind = ClientTimeout if isinstance(error, ClientTimeout) else ClientError
        raise kind(for_the_server(said, str(context.run_config.get("config", "")))) from error


def _ask(message: Message, context: Context) -> RecordDict:
    age, begun = _process_age(), time.monotonic()
    at = message.metadata
    run_config, node_config = dict(context.run_config), dict(context.node_config)
    if node_config.get("worker", True) is False:
        from fedtune.device.owner import device_owner
        from fedtune.workspace.client_handler import handle_message

        owner = device_owner(node_config)
        handled = handle_message(at.message_type, at.group_id, message.content, run_config, node_config, owner)
        content, training = handled.content, handled.training_seconds
    else:
        request = {"kind": at.message_type, "round": at.group_id, "run_config": run_config, "node_config": node_config}
        answer, reply = _ask_worker(place_of(context.node_id), request, content_to_bytes(message.content))
        content, training = content_from_bytes(reply), answer["training"]
    around = time.monotonic() - begun - training
    logger.info(
        "fedtune: round %s, %s: training %.2f s, around it %.2f s; before, Flower took %.1f s to start this process",
        at.group_id,
        at.message_type,
        training,
        around,
        age,
    )
    return content


def _ask_worker(place: Place, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    for attempt in ("first", "second"):
        worker = None
        try:
            worker = _connect(place) or _start(place, float(request["node_config"].get("worker-idle", IDLE_SECONDS)))
            return worker.converse(request, body)
        except (EOFError, ConnectionError) as error:
            if attempt == "second":
                logger.error("fedtune: the worker died twice; the end of its log: %s", _tail(place.log))
                raise ClientError(f"the worker died twice; the end of its log: {_tail(place.log, LOG_END)}") from error
            logger.warning(
                "fedtune: the worker died; starting it again, once. The end of its log: %s", _tail(place.log)
            )
        finally:
            if worker is not None:
                worker.connection.close()
    raise AssertionError("the second attempt returns or raises")


def place_of(node: int) -> Place:
    """Where the worker of this node listens.

    Raises:
        ClientError: if the folder isn't this user's alone.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(base) if base and Path(base).is_dir() else Path(tempfile.gettempdir())
    folder = parent / f"fedtune-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        what = "a link that leads nowhere" if folder.is_symlink() else "no folder"
        what = f"it is {what}" if os.path.lexists(folder) else error.strerror or str(error)
        raise ClientError(
            f"{folder} must be a folder that only this user can enter, and can't be made: {what}. Remove it, or name "
            "another place with XDG_RUNTIME_DIR"
        ) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ClientError(
            f"{folder} must be a folder that only this user can enter (it belongs to user {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):o}): remove it, or name another place with XDG_RUNTIME_DIR"
        )
    # A socket's path may have about a hundred characters, so names in it are short
    return Place(folder, hashlib.blake2b(str(node).encode(), digest_size=8).hexdigest())


@dataclass(frozen=True)
class Worker:
    """A worker that has said hello."""

    connection: Connection
    pid: int
    code: str  # the folder of its app

    def converse(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Send a request and take its answer.

        Raises:
            ClientError: what the client raised.
            ClientTimeout: if it took longer than the experiment's `runtime.timeout`, or `runtime.wait` for a handshake.
        """
        self.connection.send_bytes(json.dumps(request).encode())
        self.connection.send_bytes(body)
        answer = self._receive(START_SECONDS, "read its instructions")
        if "limit" in answer:
            answer = self._receive(answer["limit"], "answer")
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer, self.connection.recv_bytes()

    def _receive(self, seconds: float, what: str) -> dict[str, Any]:
        if not self.connection.poll(seconds):
            # It would still be at it when the next message comes
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            raise ClientTimeout(f"the worker did not {what} within {seconds:g} s; it was stopped")
        return dict(json.loads(self.connection.recv_bytes()))


def _connect(place: Place) -> Worker | None:
    """The node's worker, if there is one and it runs this version of the app; one of another version is told to end.

    Raises:
        ClientError: if there is one that does not answer.
    """
    try:
        secret = place.secret.read_bytes()
        connection = Client(place.socket, family="AF_UNIX")
    except (FileNotFoundError, ConnectionError):
        return None
    # As Client(authkey=) does it, which would wait forever
    if not connection.poll(START_SECONDS):
        raise ClientError(f"the worker at {place.socket} is there and silent: end it, and look into {place.log}")
    try:
        answer_challenge(connection, secret)
        deliver_challenge(connection, secret)
        worker = Worker(connection, **json.loads(connection.recv_bytes()))
    except (AuthenticationError, EOFError, ConnectionError):
        # None of ours, or one that was killed just now: the system closes its connections before the socket on which
        # it listened, so for a moment there is nobody behind it
        connection.close()
        return None
    if worker.code == str(CODE):
        return worker
    logger.info("fedtune: replacing the worker of another version of the app (%s)", worker.code)
    connection.close()
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGTERM)
    return None


def _start(place: Place, idle: float) -> Worker:
    """Start a worker and connect to it.

    Raises:
        ClientError: if it can't be started, with what it said.
    """
    for path in (Path(place.socket), place.secret):
        path.unlink(missing_ok=True)
    descriptor = os.open(place.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secrets.token_bytes(32))
    # The code that this ClientApp came with, which is not on the path of a new process
    paths = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-P", "-m", "fedtune.runtime.worker"]
    with place.log.open("wb") as log:
        process = subprocess.Popen(
            [*words, str(place.folder), place.name, str(os.getppid()), str(idle)],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    logger.info("fedtune: started a worker (pid %d, log %s)", process.pid, place.log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            logger.error("fedtune: the worker can't start: %s", _tail(place.log))
            raise ClientError(f"the worker can't start (exit {process.returncode}): {_tail(place.log, LOG_END)}")
        if (worker := _connect(place)) is not None:
            return worker
        time.sleep(0.05)
    process.kill()
    logger.error("fedtune: the worker did not listen: %s", _tail(place.log))
    raise ClientTimeout(f"the worker did not listen within {START_SECONDS:g} s: {_tail(place.log, LOG_END)}")


def _tail(log: Path, characters: int = LOG_TAIL) -> str:
    with suppress(OSError):
        return log.read_text(errors="replace", encoding="utf-8")[-characters:].strip() or "(empty)"
    return "(none)"


def _process_age() -> float:
    """Seconds since this process began; 0 where the system doesn't say."""
    with suppress(OSError, AttributeError, ValueError):
        started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return 0.0


def _is_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def main() -> NoReturn:
    """The worker's own process."""
    from fedtune.runtime.worker_process import serve

    folder, name, parent, idle = sys.argv[1:]
    serve(Place(Path(folder), name), int(parent), float(idle))


if __name__ == "__main__":
    main()
