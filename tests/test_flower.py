"""What is asked again of a SuperLink, over a real HTTP connection."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest

from fedtune.wire.flower_private import retry_on_server_error


@pytest.fixture
def ask():
    """A request to a server that answers with these status codes in turn; it keeps those that it hasn't used."""
    codes = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(codes.pop(0))
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()

    def request():
        return httpx.post(f"http://127.0.0.1:{server.server_port}").raise_for_status().status_code

    yield request, codes
    server.shutdown()
    server.server_close()


def test_an_error_of_the_superlinks_own_is_outlasted(ask):
    request, codes = ask
    codes += [500, 503, 200]
    assert retry_on_server_error(request, pauses=(0, 0)) == 200
    assert codes == []


@pytest.mark.parametrize(("code", "left"), [(500, []), (403, [500, 500])])
def test_what_does_not_pass_is_raised(ask, code, left):
    """An error that stays, after the last pause; a refusal, at once."""
    request, codes = ask
    codes += [code, 500, 500]
    with pytest.raises(httpx.HTTPStatusError, match=str(code)):
        retry_on_server_error(request, pauses=(0, 0))
    assert codes == left
