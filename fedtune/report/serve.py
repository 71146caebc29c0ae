"""The page of runs that go on, on this machine alone.

Whoever can reach a port of 127.0.0.1 may read the page: any program here, but no web page elsewhere, since a request
has to name this server as its host.
"""

import errno
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedtune.core.errors import DeploymentError, FedtuneError, RunFolderError
from fedtune.core.files import LOCK, is_held
from fedtune.report.comparison import Comparison
from fedtune.report.page import image, lay_out, render
from fedtune.report.sections import Question
from fedtune.runs.comparison_file import COMPARISON

WATCHED = ("config.yaml", "metrics.csv", "ledger.csv", "clients.csv", "summary.json", COMPARISON)
TYPES = {"svg": "image/svg+xml", "png": "image/png"}


class Watch:
    """The page of whatever is below a folder, made anew when something there has changed. Threads may share it."""

    def __init__(self, folder: Path, gather: Callable[[Path], Comparison], question: Question | None = None):
        """Args:
        gather: reads and compares the runs below a folder; raises RunFolderError if there are none.
        """
        self._folder, self._gather, self._question = folder, gather, question
        self._lock = threading.Lock()
        self._made: tuple[str, bytes, Comparison] | None = None

    def state(self) -> str:
        """A short hash of the sizes and times of the files that the page is made from, and of who is at work."""
        seen = hashlib.sha256()
        for parent, folders, names in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if name not in ("checkpoint", "adapter", "start"))
            for name in sorted(set(names).intersection(WATCHED)):
                path = Path(parent, name)
                try:
                    found = path.stat()
                except OSError:
                    continue
                seen.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
            if LOCK in names:  # a process that was killed changes no file
                seen.update(f"{parent}\0{is_held(Path(parent))}\n".encode())
        return seen.hexdigest()[:16]

    def page(self) -> bytes:
        return self._now()[1]

    def figure(self, name: str) -> bytes | None:
        """A figure's file by its name, as "loss.svg"; None if the page has no such figure."""
        stem, _, kind = name.rpartition(".")
        found = [
            (part, figure) for known, part, figure in lay_out(self._now()[2], self._question).figures() if known == stem
        ]
        if not found or kind not in TYPES:
            return None
        return image(*found[0])[list(TYPES).index(kind)]

    def _now(self) -> tuple[str, bytes, Comparison]:
        with self._lock:
            state = self.state()
            if self._made is None or self._made[0] != state:
                comparison = self._read()
                self._made = (state, self._render(comparison, state), comparison)
            return self._made

    def _read(self) -> Comparison:
        try:
            return self._gather(self._folder)
        except FedtuneError as error:
            known = () if isinstance(error, RunFolderError) and not self._folder.exists() else (str(error),)
            return Comparison((), (), known, None)

    def _render(self, comparison: Comparison, state: str) -> bytes:
        try:
            return render(comparison, self._question, live=True, state=state).encode()
        except FedtuneError as error:
            return render(Comparison((), (), (str(error),), None), None, live=True, state=state).encode()


class Server(ThreadingHTTPServer):
    """Serves a watch on 127.0.0.1, to who asks for it by that name."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port

    def __init__(self, watch: Watch, port: int):
        """Args:
        port: 0 takes a free one.

        Raises:
            DeploymentError: if the port is taken, or not for this user.
        """
        self.watch = watch
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OverflowError as error:
            raise DeploymentError(f"--port {port} is no port: expected 0 to 65535") from error
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken by another program" if taken else f"can't be used: {error.strerror or error}"
            raise DeploymentError(f"port {port} {why}: name another with --port, or 0 for any that is free") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that went away is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedtune", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(*self._find())

    def do_HEAD(self) -> None:
        self._answer(*self._find())

    def _find(self) -> tuple[HTTPStatus, str, bytes]:
        port = self.server.server_address[1]
        # A page from elsewhere whose name was made to point here would still send that name
        if self.headers.get_all("Host") not in [[f"{host}:{port}"] for host in ("127.0.0.1", "localhost")]:
            return HTTPStatus.FORBIDDEN, "text/plain", b"ask for this server by 127.0.0.1 and its port\n"
        path = self.path.partition("?")[0]
        if path == "/":
            return HTTPStatus.OK, "text/html", self.server.watch.page()
        if path == "/version":
            return HTTPStatus.OK, "text/plain", self.server.watch.state().encode()
        name = path.removeprefix("/figures/")
        if name != path and (content := self.server.watch.figure(name)) is not None:
            return HTTPStatus.OK, TYPES[name.rpartition(".")[2]], content
        return HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n"

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind if kind == "image/png" else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: Path, port: int, gather: Callable[[Path], Comparison]) -> None:
    """Serve the page of a folder until Ctrl-C.

    Raises:
        DeploymentError: if the port can't be had.
    """
    server = Server(Watch(folder, gather), port)
    print(f"watching {folder}")
    print(f"page     {server.url}   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nended")
    finally:
        server.server_close()
