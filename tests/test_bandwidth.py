"""The bandwidth test: real sockets, and peers that don't keep to the protocol."""

import contextlib
import socket
import threading
import time

import pytest

from fedtune.core.errors import ConfigError, DeploymentError, FedtuneError, WireError
from fedtune.device.bandwidth import CHUNK, MAGIC, Limits, measure, open_listener, parse_address, serve_one

SHORT = Limits(connect=2.0, turn=2.0, line=0.3)


@pytest.fixture
def listener():
    """A listener that serves whoever comes, and what it said of them."""
    said = []
    with open_listener("127.0.0.1", 0) as listening:
        listening.settimeout(0.2)  # so that its thread sees the end; what it accepts has limits of its own

        def serve():
            while listening.fileno() != -1:
                serve_one(listening, lambda line: None if line.startswith("nobody") else said.append(line), SHORT)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1], said
    thread.join(10)
    assert not thread.is_alive()


@contextlib.contextmanager
def answering(behave):
    """A port at which each connection is handed to `behave`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listening.accept()
                    with link, contextlib.suppress(OSError):
                        behave(link)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def line(link):
    text = b""
    while not text.endswith(b"\n"):
        text += link.recv(1)
    return text.decode()


def swallow(link):
    while link.recv(CHUNK):
        pass


@pytest.mark.slow
def test_both_directions_are_measured(listener):
    port, said = listener
    found = measure("127.0.0.1", port, 0.5)
    assert found.down > 1e6  # a loopback carries more than 1 MB/s
    assert found.up > 1e6
    until(lambda: len(said) == 2)
    assert "down: sent" in said[0]
    assert "up: " in said[1]


@pytest.mark.slow
def test_a_slow_link_is_measured_as_slow():
    """A listener that sends 20 blocks of 1000 bytes a second for 0.9 s: 20,000 bytes per second."""

    def behave(link):
        direction = line(link).split()[2]
        link.sendall(f"{MAGIC} ok\n".encode())
        if direction == "down":
            for _ in range(20):
                link.sendall(b"x" * 1000)
                time.sleep(0.05)
        else:
            swallow(link)
            link.sendall(f"{MAGIC} got 60000 0.600000000\n".encode())

    with answering(behave) as port:
        found = measure("127.0.0.1", port, 0.9, SHORT)
    assert found.down == pytest.approx(20_000, rel=0.4)  # on a busy machine a sleep is longer
    assert found.up == pytest.approx(100_000)


def until(true, seconds=5):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" * 100_000,  # longer than any line
        f"{MAGIC} down 1e9\n".encode(),
        f"{MAGIC} down 31\n".encode(),
        f"{MAGIC} down 0\n".encode(),
        f"{MAGIC} sideways 1\n".encode(),
        b"fedtune-bandwidth 2 down 1\n",
        b"\x1b[2J\n",
        b"",
    ],
)
def test_the_listener_outlives_rubbish(listener, rubbish):
    port, said = listener
    with socket.create_connection(("127.0.0.1", port)) as link, contextlib.suppress(OSError):
        link.sendall(rubbish)
        link.shutdown(socket.SHUT_WR)
        swallow(link)
    until(lambda: said)
    assert "dropped" in said[0]
    assert said[0].isprintable()
    assert measure("127.0.0.1", port, 0.1).down > 0


@pytest.mark.parametrize("direction", ["up", "down", None])
def test_a_silent_device_holds_the_listener_only_for_so_long(listener, direction):
    """It asks and then neither sends nor reads, or doesn't even ask; who comes next is served."""
    port, said = listener
    with socket.create_connection(("127.0.0.1", port)) as link:
        if direction:
            link.sendall(f"{MAGIC} {direction} 0.2\n".encode())
        assert measure("127.0.0.1", port, 0.1).up > 0
    assert ("down: sent" if direction == "down" else "dropped") in said[0]


def test_a_device_that_sends_a_letter_at_a_time_is_dropped(listener):
    port, said = listener
    with socket.create_connection(("127.0.0.1", port)) as link, contextlib.suppress(OSError):
        for letter in f"{MAGIC} down 0.2\n":
            link.sendall(letter.encode())
            time.sleep(0.05)
    until(lambda: said)
    assert "says nothing" in said[0]


def after_ok(*pieces, then=lambda link: None):
    def behave(link):
        line(link)
        link.sendall(f"{MAGIC} ok\n".encode())
        for piece in pieces:
            link.sendall(piece)
        then(link)

    return behave


def up_says(text):
    """A listener that is honest downwards, and then says this of what arrived."""

    def behave(link):
        direction = line(link).split()[2]
        link.sendall(f"{MAGIC} ok\n".encode())
        if direction == "down":
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                link.sendall(b"x" * 10_000)
        else:
            swallow(link)
            link.sendall(text.encode())

    return behave


def forever(link):
    while True:
        link.sendall(b"A" * CHUNK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behave", "kind", "part"),
    [
        (lambda link: time.sleep(3), DeploymentError, "says nothing"),
        (lambda link: link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), WireError, "is it `fedtune doctor --listen`?"),
        (forever, WireError, "a line of at most 80 bytes"),
        (lambda link: None, DeploymentError, "broke the"),
        (after_ok(), DeploymentError, "broke the test off"),
        (after_ok(b"x" * 1000), DeploymentError, "broke the test off"),
        (after_ok(then=lambda link: time.sleep(2)), DeploymentError, "too little through"),
        (up_says(f"{MAGIC} got 999999999999999999 0.133000000\n"), WireError, "were sent"),
        (up_says(f"{MAGIC} got 1000 999.000000000\n"), WireError, "were sent"),
        (up_says(f"{MAGIC} got 1000 0.000000001\n"), DeploymentError, "broke the test off"),
        (up_says(f"{MAGIC} got 0 0.133000000\n"), DeploymentError, "broke the test off"),
        (up_says(f"{MAGIC} got nan inf\n"), WireError, "should say what arrived"),
        (up_says(""), DeploymentError, "where a line was due"),
    ],
)
def test_what_answers_wrongly_is_a_named_error_in_time(behave, kind, part):
    begun = time.monotonic()
    with answering(behave) as port, pytest.raises(kind) as caught:
        measure("127.0.0.1", port, 0.2, SHORT)
    assert part in str(caught.value)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert time.monotonic() - begun < 10


def test_a_listener_that_never_stops_sending_is_cut_off():
    with answering(after_ok(then=forever)) as port:
        begun = time.monotonic()
        with pytest.raises(FedtuneError):  # it doesn't listen upwards
            measure("127.0.0.1", port, 0.2, SHORT)
        assert time.monotonic() - begun < 5


def test_nobody_there():
    with pytest.raises(DeploymentError, match=r"nobody answers at 127.0.0.1:1: .*Start `fedtune doctor --listen"):
        measure("127.0.0.1", 1)
    with pytest.raises(DeploymentError, match="nobody answers"):
        measure("a..b", 1)


def test_a_port_that_is_taken():
    with open_listener("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        with pytest.raises(DeploymentError, match=f"--listen 127.0.0.1:{port} can't be had"):
            open_listener("127.0.0.1", port)


@pytest.mark.parametrize("seconds", [0, -1, 31, float("nan"), float("inf")])
def test_seconds_have_a_range(seconds):
    with pytest.raises(ConfigError, match="--seconds"):
        measure("127.0.0.1", 1, seconds)


@pytest.mark.parametrize(
    ("text", "host", "expected"),
    [
        ("9000", "127.0.0.1", ("127.0.0.1", 9000)),
        ("0.0.0.0:9000", "127.0.0.1", ("0.0.0.0", 9000)),
        ("site.example.org:9000", None, ("site.example.org", 9000)),
        ("[::1]:9000", None, ("::1", 9000)),
    ],
)
def test_addresses(text, host, expected):
    assert parse_address("--server", text, host) == expected


@pytest.mark.parametrize("text", ["9000", "site", "site:", ":9000", "site:x", "site:70000", "site:-1", "site:²"])
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_address("--server", text)
