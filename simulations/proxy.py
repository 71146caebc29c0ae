"""A TCP proxy on loopback that counts what passes through: the truth that a ledger is compared with.

    with CountingProxy(("127.0.0.1", 8000)) as proxy:
        ...                       # point the clients at proxy.address
    proxy.up, proxy.down          # bytes towards the target and back

It never looks into the bytes, so TLS passes through untouched. What TCP and IP add below is not counted.
"""

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

CHUNK = 1 << 16  # bytes read at once


class Connection:
    """One connection through the proxy."""

    def __init__(self) -> None:
        self.opened = time.monotonic()  # seconds, on the monotonic clock
        self.up = 0  # bytes from the client to the target
        self.down = 0  # bytes back

    def seen(self, direction: str, data: bytes) -> None:
        """Count `data`, before it is passed on."""
        setattr(self, direction, getattr(self, direction) + len(data))


class CountingProxy:
    """Listens on a free port of 127.0.0.1 and passes every connection on to `target`, a host and a port.

    What was counted can be read at any time, and after the proxy is closed. A connection that the target refuses is
    closed at once and counts nothing.
    """

    def __init__(self, target: tuple[str, int], connection: type[Connection] = Connection):
        self.target = target
        self.connections: list[Connection] = []
        self._kind = connection
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def address(self) -> str:
        """What to give a client instead of the target's address."""
        return f"127.0.0.1:{self.port}"

    @property
    def up(self) -> int:
        """Bytes from all clients to the target so far."""
        return sum(connection.up for connection in list(self.connections))

    @property
    def down(self) -> int:
        """Bytes from the target to all clients so far."""
        return sum(connection.down for connection in list(self.connections))

    def close(self) -> None:
        """Stop listening and cut every connection."""
        with self._lock:
            self._closed = True
            held = [self._listener, *self._sockets]
        for each in held:
            with suppress(OSError):  # wakes the thread that waits on it, which a mere close would not
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self) -> "CountingProxy":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                target = socket.create_connection(self.target)
            except OSError:
                return
            with target:
                with self._lock:
                    if self._closed:
                        return
                    self._sockets |= {client, target}
                    connection = self._kind()
                    self.connections.append(connection)
                up = threading.Thread(target=_pump, args=(client, target, connection, "up"), daemon=True)
                up.start()
                _pump(target, client, connection, "down")
                up.join()
                with self._lock:
                    self._sockets -= {client, target}


def _pump(source: socket.socket, sink: socket.socket, connection: Connection, direction: str) -> None:
    """Pass bytes on until `source` says that there will be no more, then say so to `sink`."""
    with suppress(OSError):  # cut off by either end, or by `close`
        while data := source.recv(CHUNK):
            connection.seen(direction, data)
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
