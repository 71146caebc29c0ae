"""The live page's server: it answers this machine about its own page, and nothing else."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import forked
import pytest

from fedtune.core.errors import DeploymentError
from fedtune.report.comparison import load
from fedtune.report.serve import Server, Watch


@contextmanager
def serving(folder):
    server = Server(Watch(folder, lambda path: load([path])), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


@pytest.fixture(scope="module")
def served(shared_run):
    with serving(shared_run(rounds=1)) as server:
        yield server


def test_the_page_and_its_version(served):
    answer, content = ask(served)
    _, version = ask(served, "/version")
    assert answer.status == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert f'data-version="{version.decode()}"'.encode() in content
    assert b"connect-src &#39;self&#39;" in content


def test_a_figure_that_the_page_has(served):
    assert ask(served, "/figures/loss.svg")[1].startswith(b"<svg")
    assert ask(served, "/figures/loss.png")[1].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/metrics.csv",
        "/../config.yaml",
        "/figures/../config.yaml",
        "/figures/%2e%2e/config.yaml",
        "/figures/loss.yaml",
        "/figures/",
        "//etc/passwd",
        "/figures/none.svg",
    ],
)
def test_nothing_else_is_there(served, path):
    assert ask(served, path)[0].status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}", ""]
)
def test_a_page_whose_name_was_made_to_point_here_gets_nothing(served, host):
    assert ask(served, Host=host.format(port=served.server_address[1]))[0].status == 403


def test_it_may_be_called_localhost(served):
    assert ask(served, Host=f"localhost:{served.server_address[1]}")[0].status == 200


def test_it_reads_only(served):
    answer, content = ask(served, method="HEAD")
    assert (answer.status, content) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 100_000
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(served, method=method)[0].status == 501


def test_it_listens_on_this_machine_alone(served):
    assert served.server_address[0] == "127.0.0.1"


def test_it_waits_for_what_is_not_there_yet_and_makes_a_page_once_for_each_state(tmp_path, shared_run):
    folder, made = tmp_path / "later", []

    def gather(path):
        made.append(path)
        return load([path])

    watch = Watch(folder, gather)
    before = watch.state()
    assert b"No run has begun here yet" in watch.page()
    assert watch.page() is watch.page()
    assert len(made) == 1
    shutil.copytree(shared_run(rounds=1), folder / "run", ignore=shutil.ignore_patterns("checkpoint"))
    assert watch.state() != before
    assert b"No run has begun here yet" not in watch.page()
    watch.page()
    assert len(made) == 2


def test_the_state_is_of_what_the_page_is_made_from(tmp_path, shared_run):
    folder = tmp_path / "run"
    shutil.copytree(shared_run(rounds=1), folder)
    watch = Watch(tmp_path, lambda path: load([path]))
    before = watch.state()
    (folder / "checkpoint" / "other").write_text("x")
    (tmp_path / "report.html").write_text("x")
    assert watch.state() == before
    with (folder / "metrics.csv").open("a") as stream:
        stream.write("9")
    assert watch.state() != before


def test_a_taken_port_is_said(served):
    with pytest.raises(
        DeploymentError, match=f"port {served.server_address[1]} is taken by another program: name another"
    ):
        Server(served.watch, served.server_address[1])


def test_no_port_is_said(served):
    with pytest.raises(DeploymentError, match="--port 70000 is no port"):
        Server(served.watch, 70000)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent otherwise elsewhere")
def test_ctrl_c_ends_the_command(tmp_path):
    words = [sys.executable, "-m", "fedtune", "serve", str(tmp_path / "none"), "--port", "0"]
    process = forked.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert "http://127.0.0.1:" in lines[1]
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
