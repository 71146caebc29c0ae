"""Runs whose process ended: told to, or without a word. What is said of them is that they stopped, and how to go on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import forked
import pytest
from conftest import SMALL

from fedtune.core.errors import RunFolderError
from fedtune.core.files import LOCK, hold, is_held
from fedtune.core.signals import ENDINGS, as_ctrl_c
from fedtune.report.comparison import load
from fedtune.report.page import render
from fedtune.report.serve import Watch
from fedtune.runs.read import read
from fedtune.runs.run_folder import RunFolder


@pytest.fixture
def handlers():
    numbers = (signal.SIGINT, *ENDINGS)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_what_ends_a_process_does_what_ctrl_c_does_and_once(number, ctrl_c, handlers):
    """Also where a shell lets Ctrl-C be ignored. The second of them doesn't disturb what the first has begun."""
    signal.signal(signal.SIGINT, ctrl_c)
    signal.signal(number, signal.SIG_DFL)
    with as_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        for again in ENDINGS:
            signal.raise_signal(again)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_nohup_lets_be_ignored_stays_so(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with as_ctrl_c():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_handler_of_a_runtime_is_the_one_that_is_called(handlers):
    """Ray's sets an event, as the run goes on in another thread."""
    called = []
    with as_ctrl_c():
        signal.signal(signal.SIGINT, lambda *_: called.append("stop"))
        signal.raise_signal(signal.SIGTERM)
    assert called == ["stop"]


def test_a_lock_says_who_is_at_work(tmp_path):
    assert is_held(tmp_path) is False
    folder = RunFolder(tmp_path)
    assert is_held(tmp_path) is True
    with pytest.raises(RunFolderError, match="is being written by another fedtune"):
        RunFolder(tmp_path)
    folder.close()
    assert is_held(tmp_path) is False
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    assert is_held(tmp_path) is None


def test_who_only_asks_keeps_nobody_from_the_lock(tmp_path):
    """Whoever asks has it for an instant, together with others who ask."""
    asking = (tmp_path / LOCK).open("a")
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert is_held(tmp_path) is False
    timer = threading.Timer(0.03, asking.close)
    timer.start()
    hold(tmp_path).release()
    timer.join()


HOLDER = """
import os, sys, time
from pathlib import Path
from fedtune.core.files import hold
from fedtune.core.errors import RunFolderError
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
try:
    held = hold(Path(sys.argv[1]))
except RunFolderError as error:
    sys.exit(f"refused: {error}")
if not os.fork():
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def test_of_processes_that_want_a_folder_at_once_one_has_it_until_it_is_killed(tmp_path, forking):
    """Until then alone: what it has forked lives on, and doesn't keep the folder from whoever goes on with the run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    every = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        (tmp_path / "go").touch()
        said = [process.stdout.readline() for process in every]
        assert sorted(said) == ["", "", "", "held\n"]
        assert is_held(tmp_path) is True
        winner = every[said.index("held\n")]
        for process in every:
            if process is not winner:
                assert f"refused: {tmp_path} is being written by another fedtune" in process.communicate()[1]
        os.kill(winner.pid, signal.SIGKILL)
        winner.wait()
        os.killpg(winner.pid, 0)  # its child is still there
        assert is_held(tmp_path) is False
        hold(tmp_path).release()
    finally:
        for process in every:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_run_that_was_told_to_end_and_one_that_was_killed(tmp_path):
    """Both stop in the middle of 9000 rounds. TERM is written down as Ctrl-C is; of kill -9 the lock tells, and a page
    that is watched changes though no file does."""
    told, killed = tmp_path / "told", tmp_path / "killed"
    command = [sys.executable, "-m", "fedtune", "run", *SMALL, "rounds=9000"]
    runs = []
    try:
        for folder in (told, killed):
            with (tmp_path / f"{folder.name}.txt").open("w") as said:
                runs.append(forked.Popen([*command, f"out={folder}"], stdout=subprocess.DEVNULL, stderr=said))
        for run, folder in zip(runs, (told, killed), strict=True):
            _wait_until((folder / "metrics.csv").exists, run)
        assert [read(folder).status for folder in (told, killed)] == ["running", "running"]
        assert not any("resume=" in note for note in load([tmp_path]).notes)
        for run, number in zip(runs, (signal.SIGTERM, signal.SIGKILL), strict=True):
            run.send_signal(number)
        assert [run.wait(60) for run in runs] == [130, -signal.SIGKILL]
    finally:
        for run in runs:
            run.kill()
    assert f"go on with: fedtune run resume={told}" in (tmp_path / "told.txt").read_text()
    assert json.loads((told / "summary.json").read_text())["status"] == "interrupted"
    assert json.loads((killed / "summary.json").read_text())["status"] == "running", "nobody was there to write it"
    for folder in (told, killed):
        run = read(folder)
        assert run.status == "interrupted"
        note = f"interrupted after round {run.rounds[-1]} of 9000; go on with: fedtune run resume={folder}"
        found = load([folder])
        assert any(note in line for line in found.notes)
        assert note in render(found)
    assert "its process ended without writing that down" in read(killed).error
    watch = Watch(tmp_path, lambda path: load([path]))
    stopped = watch.state()
    held = hold(killed)
    assert watch.state() != stopped
    assert read(killed).status == "running", "somebody goes on with it"
    held.release()
    assert watch.state() == stopped


def _wait_until(true, process):
    deadline = time.monotonic() + 240
    while not true():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
