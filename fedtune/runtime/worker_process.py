"""The worker's half of fedtune/runtime/worker.py: take requests one at a time and answer them."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import NoReturn

from flwr.app import MessageType

from fedtune.runtime.worker import CODE, Place
from fedtune.wire.flower_private import content_from_bytes, content_to_bytes

WATCH_SECONDS = 1.0
MAX_REQUEST = 1 << 24  # bytes of a request without its content


def serve(place: Place, parent: int, idle: float) -> NoReturn:
    """Answer until the process `parent` ends or nothing has come for `idle` seconds."""
    secret = place.secret.read_bytes()

    def leave(why: str) -> NoReturn:
        """End this process at once, whatever it is doing, and leave nothing but the log behind."""
        say(why)
        with suppress(OSError):
            if place.secret.read_bytes() == secret:  # else another worker has taken this place
                Path(place.socket).unlink(missing_ok=True)
                place.secret.unlink(missing_ok=True)
        os._exit(0)

    Watch(leave, parent, idle).start()
    signal.signal(signal.SIGTERM, lambda *_: leave("told to end"))
    # Before the first request: importing torch takes seconds, and ClientApps must not find a silent socket
    import fedtune.workspace.client_handler  # noqa: F401

    with Listener(place.socket, family="AF_UNIX", authkey=secret) as listener:
        Watch.since = time.monotonic()
        say(f"listening on {place.socket} for the app in {CODE}")
        while True:
            try:
                with listener.accept() as connection:
                    connection.send_bytes(json.dumps({"code": str(CODE), "pid": os.getpid()}).encode())
                    answer_one(connection)
            except Exception as error:  # a caller that goes away or makes no sense is not the end of this worker
                say(f"a caller was left: {type(error).__name__}: {error}")


def answer_one(connection: Connection) -> None:
    """Read a request, do the work, and send its answer or the error's text."""
    from fedtune.device.owner import device_owner
    from fedtune.workspace.client_handler import handle_message
    from fedtune.workspace.workspace import workspace_of

    request = json.loads(connection.recv_bytes(MAX_REQUEST))
    content = content_from_bytes(connection.recv_bytes())
    what = f"round {request['round']}, {request['kind']}"
    with end_with_caller(connection, what):
        try:
            owner = device_owner(request["node_config"])
            workspace = workspace_of(request["run_config"], owner)
            runtime = workspace.experiment.runtime
            # Loading the base for the first time may take longer than a turn: it is waited for as clients are
            limit = runtime.wait if request["kind"] == MessageType.QUERY else runtime.timeout
            connection.send_bytes(json.dumps({"limit": limit}).encode())
            done = handle_message(
                request["kind"], request["round"], content, request["run_config"], request["node_config"], owner
            )
        except Exception as error:  # whatever it is, the server is told, and the worker stays
            said = f"{type(error).__name__}: {error}"
            say(f"{what}: {said}")
            connection.send_bytes(json.dumps({"error": said}).encode())
            return
    connection.send_bytes(json.dumps({"training": done.training_seconds}).encode())
    connection.send_bytes(content_to_bytes(done.content))
    say(f"{what}: answered")


@contextmanager
def end_with_caller(connection: Connection, what: str) -> Iterator[None]:
    """End this process if the ClientApp does while it waits: nobody will take the answer, and the next message must not
    find the worker busy with it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if connection.poll() and not done.is_set():  # a caller that waits says nothing: this is its end
                say(f"{what}: the ClientApp that asked has ended")
                os._exit(1)

    Watch.since = None
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        Watch.since = time.monotonic()


class Watch(threading.Thread):
    """Ends this process when there is nobody left to work for."""

    since: float | None = None  # when the last request was answered; None while something is going on

    def __init__(self, leave: Callable[[str], NoReturn], parent: int, idle: float):
        super().__init__(daemon=True)
        self._leave = leave
        self._parent = parent
        self._idle = idle

    def run(self) -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if not is_alive(self._parent):
                self._leave(f"the process that wanted this worker ({self._parent}) has ended")
            since = Watch.since
            if since is not None and time.monotonic() - since > self._idle:
                self._leave(f"nothing came for {self._idle:g} s")


def is_alive(pid: int) -> bool:
    """Whether there is such a process. One that ended and was never asked how, as happens in containers, is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)
