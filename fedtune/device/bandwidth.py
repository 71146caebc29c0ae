"""How fast a link carries bytes: both ends of `fedtune doctor --server` and `fedtune doctor --listen`.

A connection measures one direction. The device opens it and says in one line which and for how long; the listener
answers in one line. Down: the listener sends until the time is over and closes. Up: the device sends, and the listener
says in a second line what arrived, since what a device has sent may still lie in its own buffers. The receiver counts,
and leaves out the first part, in which TCP finds out what the link can take.

    fedtune-bandwidth 1 down 3.0
    fedtune-bandwidth 1 ok
    fedtune-bandwidth 1 got 123456789 2.0001

Neither end trusts the other: a line has a limit, every wait has one, and what arrives is counted and thrown away.
"""

import contextlib
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedtune.core import text
from fedtune.core.errors import ConfigError, DeploymentError, WireError

MAGIC = "fedtune-bandwidth 1"
MAX_SECONDS = 30.0  # that a device may ask for
MAX_LINE = 80  # bytes
RAMP = 1 / 3  # of the time is left out at its beginning
CHUNK = 1 << 18

_ASKED = re.compile(rf"{MAGIC} (up|down) (\d{{1,3}}(?:\.\d{{1,6}})?)")
_GOT = re.compile(rf"{MAGIC} got (\d{{1,18}}) (\d{{1,3}}\.\d{{1,9}})")


@dataclass(frozen=True)
class Limits:
    """How long either end waits for the other, in seconds.

    Attributes:
        connect: for a connection.
        turn: for the listener's first word: it may have another device before.
        line: for a line that is due.
    """

    connect: float = 10.0
    turn: float = MAX_SECONDS + 20.0
    line: float = 5.0


@dataclass(frozen=True)
class Bandwidth:
    """What a link carries, in bytes per second."""

    down: float
    up: float


def parse_address(key: str, text: str, host: str | None = None) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, or of `PORT` alone where there is a default host.

    Args:
        key: the option that the text is from, for the error.

    Raises:
        ConfigError: if the text has another form.
    """
    name, colon, port = text.rpartition(":")
    name = name.removeprefix("[").removesuffix("]") if colon else host or ""
    if not name or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        form = "HOST:PORT, as in server.example.org:9000" if host is None else "PORT or HOST:PORT, as in 0.0.0.0:9000"
        raise ConfigError(f"{key} {text}: expected {form}")
    return name, int(port)


def check_seconds(seconds: float) -> None:
    """Refuse a time of listening that is no time, or too long.

    Raises:
        ConfigError: if it is no time that a listener takes.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(f"--seconds {seconds:g}: expected more than 0 and at most {MAX_SECONDS:g}")


def measure(host: str, port: int, seconds: float = 3.0, limits: Limits | None = None) -> Bandwidth:
    """Measure the link to a listener, down and then up.

    Args:
        seconds: for each direction.

    Raises:
        ConfigError: if the time is none that a listener takes.
        DeploymentError: if nobody listens there, or the listener falls silent or goes away.
        WireError: if something else answers there.
    """
    check_seconds(seconds)
    limits = limits or Limits()
    with _called(host, port, limits) as link:
        _ask(link, "down", seconds, limits)
        down = _rate(*_receive(link, seconds, limits), seconds)
    with _called(host, port, limits) as link:
        _ask(link, "up", seconds, limits)
        sent = _send(link, time.monotonic() + seconds)
        with contextlib.suppress(OSError):  # gone already; what it said is still to be read
            link.shutdown(socket.SHUT_WR)
        line = _read_line(link, time.monotonic() + limits.line)
        if (got := _GOT.fullmatch(line)) is None:
            raise WireError(f"should say what arrived ('{MAGIC} got BYTES SECONDS'), got {line!r}")
        arrived, lasted = int(got[1]), float(got[2])
        if arrived > sent or lasted > seconds + limits.line:
            raise WireError(f"says that {arrived} bytes came in {lasted:g} s; {sent} were sent, in {seconds:g} s")
        up = _rate(arrived, lasted, seconds)
        with contextlib.suppress(OSError):  # what is still on its way would keep the link busy for whoever is next
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Bandwidth(down, up)


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that devices can call.

    Args:
        port: 0 takes any that is free.

    Raises:
        DeploymentError: if there is no such address here or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=8)
    except OSError as error:
        raise DeploymentError(
            f"--listen {host}:{port} can't be had: {error.strerror or error}. Take another port above 1023, and an "
            "address of this machine (0.0.0.0 is all of them)"
        ) from error


def serve(listener: socket.socket, say: Callable[[str], None], limits: Limits | None = None) -> None:
    """Serve one device after another, until the process is interrupted."""
    while True:
        serve_one(listener, say, limits)


def serve_one(listener: socket.socket, say: Callable[[str], None], limits: Limits | None = None) -> None:
    """Serve the next device, and say in a line what came of it. Nothing that it does is an error here.

    Args:
        say: takes the line, in which nothing stands that a stranger could put on a terminal.
    """
    try:
        link, address = listener.accept()
    except OSError as error:  # it gave up while it waited, or this process has no more files to open
        say(f"nobody: {error.strerror or error}")
        time.sleep(0.1)
        return
    with link:
        try:
            done = _serve(link, limits or Limits())
        except (OSError, WireError, DeploymentError) as error:
            done = f"dropped: {getattr(error, 'strerror', None) or error}"
    say(f"{address[0]}:{address[1]}  {done}")


def _serve(link: socket.socket, limits: Limits) -> str:
    line = _read_line(link, time.monotonic() + limits.line)
    asked = _ASKED.fullmatch(line)
    if asked is None or not 0 < float(asked[2]) <= MAX_SECONDS:
        _write_line(link, f"expected 'up' or 'down' and at most {MAX_SECONDS:g} seconds", limits)
        raise WireError(f"expected '{MAGIC} up|down SECONDS' with at most {MAX_SECONDS:g} seconds, got {line!r}")
    seconds = float(asked[2])
    _write_line(link, "ok", limits)
    if asked[1] == "down":
        sent = _send(link, time.monotonic() + seconds)
        return f"down: sent {sent:,} bytes in {seconds:g} s"
    count, lasted = _receive(link, seconds, limits)
    rate = _rate(count, lasted, seconds)
    _write_line(link, f"got {count} {lasted:.9f}", limits)
    _drain(link, time.monotonic() + limits.line)
    return f"up: {text.rate(rate)}"


@contextlib.contextmanager
def _called(host: str, port: int, limits: Limits) -> Iterator[socket.socket]:
    """A connection to the listener, whose every failure names it."""
    try:
        link = socket.create_connection((host, port), timeout=limits.connect)
    except (OSError, UnicodeError) as error:  # the latter of a name that can't be one
        raise DeploymentError(
            f"nobody answers at {host}:{port}: {getattr(error, 'strerror', None) or error}. "
            f"Start `fedtune doctor --listen 0.0.0.0:{port}` there, and open the port"
        ) from error
    with link:
        try:
            yield link
        except OSError as error:
            raise DeploymentError(f"{host}:{port} broke the test off: {error.strerror or error}") from error
        except (DeploymentError, WireError) as error:
            raise type(error)(f"{host}:{port} {error}") from error


def _ask(link: socket.socket, direction: str, seconds: float, limits: Limits) -> None:
    link.settimeout(limits.line)
    link.sendall(f"{MAGIC} {direction} {seconds:.6f}\n".encode())
    line = _read_line(link, time.monotonic() + limits.turn)
    if line != f"{MAGIC} ok":
        raise WireError(f"should answer '{MAGIC} ok', got {line!r}: is it `fedtune doctor --listen`?")


def _receive(link: socket.socket, seconds: float, limits: Limits) -> tuple[int, float]:
    """Bytes and seconds after the first part, up to the end of the time or of what is sent."""
    room = bytearray(CHUNK)
    begun = mark = last = time.monotonic()
    deadline = begun + seconds + limits.line  # for the first bytes to come
    count, waiting = 0, True
    while last < deadline:
        link.settimeout(deadline - last)
        try:
            got = link.recv_into(room)
        except TimeoutError:
            return count, deadline - mark
        last = time.monotonic()
        if not got:
            break
        if waiting:
            waiting, begun, deadline = False, last, last + seconds
        if last - begun < RAMP * seconds:
            mark = last
        else:
            count += got
    return count, last - mark


def _send(link: socket.socket, deadline: float) -> int:
    """Send until the deadline, or until the other end has had enough; returns the bytes that were taken."""
    block = memoryview(os.urandom(CHUNK))  # which no tunnel can compress
    sent = 0
    with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
        while (left := deadline - time.monotonic()) > 0:
            link.settimeout(left)
            sent += link.send(block)
    return sent


def _drain(link: socket.socket, deadline: float) -> None:
    """Throw away what still comes: closing before it has come would take the last line away from the other end."""
    room = bytearray(CHUNK)
    with contextlib.suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
            link.settimeout(left)
            if not link.recv_into(room):
                return


def _rate(count: int, lasted: float, seconds: float) -> float:
    """Bytes per second of what `_receive` counted in a test of so many seconds."""
    if not count or lasted < (1 - RAMP) * seconds / 2:
        raise DeploymentError("broke the test off, or let too little through to be measured: try more --seconds")
    return count / lasted


def _write_line(link: socket.socket, words: str, limits: Limits) -> None:
    link.settimeout(limits.line)
    link.sendall(f"{MAGIC} {words}\n".encode())


def _read_line(link: socket.socket, deadline: float) -> str:
    """A line, byte by byte, so that nothing behind it is taken.

    Raises:
        DeploymentError: if it doesn't come in time, or the connection ends before it does.
        WireError: if it is too long or no text.
    """
    line = b""
    while not line.endswith(b"\n"):
        if (left := deadline - time.monotonic()) <= 0:
            raise DeploymentError("says nothing: no line came in time")
        link.settimeout(left)
        try:
            byte = link.recv(1)
        except TimeoutError:
            raise DeploymentError("says nothing: no line came in time") from None
        if not byte:
            raise DeploymentError("broke the connection off where a line was due")
        line += byte
        if len(line) > MAX_LINE:
            raise WireError(f"a line of at most {MAX_LINE} bytes was due, got {line[:40]!r}...")
    return line[:-1].decode("ascii", "backslashreplace")
