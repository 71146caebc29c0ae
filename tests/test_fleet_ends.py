"""A deployment on loopback that ends, however it does: nothing of it stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from answering import write_app

from fedtune.core.errors import RunFolderError
from simulations.fleet import Fleet, Site, processes
from simulations.fleet.processes import MARK, cut, marked, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return write_app(tmp_path_factory.mktemp("app"))


def test_nothing_is_left_of_a_fleet_that_ends_in_the_middle_of_a_run(app, tmp_path):
    others = set(psutil.Process().children(recursive=True))
    with Fleet(tmp_path / "fleet", [Site("site-0")], app=app, secure=False) as fleet:
        fleet.begin({"nodes": 1, "seconds": 60.0})
        assert wait_until(fleet.nodes[0].client_apps, 60)
        family = set(psutil.Process().children(recursive=True)) - others
        ports = [fleet.superlink.port, fleet.nodes[0].port]
        assert {process.pid for process in family} >= set(marked(fleet.mark))
        began = time.monotonic()
    assert time.monotonic() - began < 30  # the run would have gone on for a minute
    assert not [process for process in family if still_runs(process)]
    assert not marked(fleet.mark)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def still_runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nothing_is_left_of_a_command_that_ends_early(app, tmp_path, number):
    command = [sys.executable, "-m", "simulations.fleet", "--insecure", "--nodes=1"]
    command += [f"--app={app}", f"--folder={tmp_path / 'fleet'}"]
    # Whoever starts these tests in the background hands down an ignored Ctrl-C
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": hear_ctrl_c}
    with subprocess.Popen(command, **options) as process:
        while "started site-0" not in (line := process.stdout.readline()):
            assert line
        marks = [Path(f"/proc/{child.pid}/environ").read_text() for child in psutil.Process(process.pid).children()]
        mark = next(text.partition(f"{MARK}=")[2].partition("/")[0] for text in marks if f"{MARK}=" in text)
        assert marked(mark)
        process.send_signal(number)
        process.wait(60)  # with its output still open, which it may be about to write to
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert wait_until(lambda: not marked(mark), 10)


def test_a_folder_in_use_is_refused(app, tmp_path):
    (tmp_path / "anything").touch()
    with pytest.raises(RunFolderError, match="not empty"), Fleet(tmp_path, [], app=app):
        pass


def test_a_power_cut_finds_what_left_its_group_and_ignores_requests():
    environment = {**os.environ, MARK: "t35t/part"}
    stubborn = "trap '' TERM; setsid sleep 60 & sleep 60"
    with subprocess.Popen(["sh", "-c", stubborn], env=environment) as process:
        assert wait_until(lambda: len(marked("t35t/part")) == 3, 10)
        assert not marked("t35t/par")
        elsewhere = {pid for pid, values, _ in processes._processes_elsewhere() if values.get(MARK) == "t35t/part"}
        assert elsewhere == set(marked("t35t"))
        cut("t35t")
        assert not marked("t35t")
    assert process.returncode == -signal.SIGKILL
