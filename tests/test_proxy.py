"""The counting proxy, against a plain echo server."""

import socket
import threading
from contextlib import contextmanager

import pytest

from simulations.proxy import CountingProxy


@contextmanager
def answering(answer):
    """A server that reads a whole request, then sends `answer(request)` and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(answer(read(client)))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def read(source):
    return b"".join(iter(lambda: source.recv(1 << 16), b""))


def ask(proxy, request):
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return read(client)


def test_bytes_pass_unchanged_and_are_counted_each_way():
    request = bytes(range(256)) * 12_000  # 3 MB: many reads
    with answering(lambda asked: asked[::-1] + b"!") as target, CountingProxy(target) as proxy:
        assert ask(proxy, request) == request[::-1] + b"!"
        assert ask(proxy, b"abc") == b"cba!"
    assert (proxy.up, proxy.down) == (len(request) + 3, len(request) + 5)
    assert [(each.up, each.down) for each in proxy.connections] == [(3_072_000, 3_072_001), (3, 4)]


def test_it_listens_on_loopback_alone():
    with answering(bytes) as target, CountingProxy(target) as proxy:
        assert proxy.address == f"127.0.0.1:{proxy.port}"


def test_a_target_that_is_not_there_counts_nothing():
    with answering(bytes) as target:
        pass
    with CountingProxy(target) as proxy:
        assert ask(proxy, b"") == b""
    assert not proxy.connections


def test_closing_cuts_open_connections_and_stops_listening():
    with answering(bytes) as target:
        proxy = CountingProxy(target)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            client.sendall(b"half a request")
            while not proxy.up:
                pass
            proxy.close()
            assert read(client) == b""
        with pytest.raises(ConnectionRefusedError):
            ask(proxy, b"")
    assert proxy.up == 14
