"""The worker that stays on a node: real processes and real sockets."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import mischief
import psutil
import pytest
from conftest import PAIRS, SMALL
from fedtune.workspace.workspace import party_of
from flwr.app import Context, Message, RecordDict

from fedtune.codecs.raw import Raw
from fedtune.config.compose import compose
from fedtune.core.errors import ClientError
from fedtune.core.protocol import Instruction
from fedtune.runtime import worker
from fedtune.runtime.worker import ask, place_of
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import assume_identity

NODE = 4711
RUN = "0" * 16


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A node's place under a short path; whatever worker sits there is ended afterwards."""
    base = Path("/tmp") / f"ft{os.getpid()}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDTUNE_TARGETS", "mischief.Mischief")
    monkeypatch.setenv("FEDTUNE_FOLDERS", str(Path(__file__).parent))
    place = place_of(NODE)
    yield place
    for process in workers(place):
        process.kill()
    for path in place.folder.iterdir():
        path.unlink()
    place.folder.rmdir()
    base.rmdir()


def workers(place):
    found = []
    for process in psutil.process_iter():
        try:
            if "fedtune.runtime.worker" in process.cmdline() and place.name in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def messages(tmp_path, *more, **node_config):
    """A query and a train message as a ClientApp gets them, and its context."""
    assume_identity(99)
    text = compose([*SMALL, *mischief.WORDS, f"out={tmp_path / 'run'}", *more]).text()
    adapter = party_of({"config": text}).model.layout.initial
    context = Context(99, NODE, {"partition-id": 1, **node_config}, RecordDict(), {"config": text})
    query = Message(RecordDict(), NODE, "query", group_id="0")
    content = wire.pack_instruction(Instruction(adapter), Raw(), 0, RUN)
    return query, Message(content, NODE, "train", group_id="1"), context


@pytest.mark.parametrize("kind", ["file", "fifo", "dangling link", "link", "open to all"])
def test_a_place_that_somebody_else_has_taken_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    taken = tmp_path / f"fedtune-{os.getuid()}"
    if kind == "file":
        taken.touch()
    elif kind == "fifo":
        os.mkfifo(taken)
    elif kind == "open to all":
        taken.mkdir()
        taken.chmod(0o777)
    else:
        if kind == "link":
            (tmp_path / "there").mkdir()
        taken.symlink_to(tmp_path / "there")
    with pytest.raises(ClientError, match=r"must be a folder that only this user can enter.*XDG_RUNTIME_DIR") as caught:
        place_of(NODE)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_worker_answers_as_this_process_would_and_stays(place, tmp_path):
    query, train, context = messages(tmp_path)
    greeting = ask(query, context)
    (first,) = workers(place)
    update = ask(train, context)
    begun = time.monotonic()
    again = ask(train, context)
    assert time.monotonic() - begun < 5
    assert workers(place) == [first]
    here = Context(99, NODE, {**context.node_config, "worker": False}, RecordDict(), context.run_config)
    assert ask(query, here)["greeting"] == greeting["greeting"]
    assert wire.blob_of(ask(train, here)) == wire.blob_of(update) == wire.blob_of(again)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.folder.iterdir()}
    assert files[f"{place.name}.secret"] == 0o600
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_strangers_at_the_socket_change_nothing(place, tmp_path):
    """One without the secret, one that says nothing that makes sense, one that hangs up."""
    query, _, context = messages(tmp_path)
    greeting = ask(query, context)["greeting"]
    with pytest.raises(AuthenticationError):
        Client(place.socket, family="AF_UNIX", authkey=b"guess")
    for speech in (b"", b"\x80\x04pickle", os.urandom(1000)):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(place.socket)
            stranger.sendall(speech)
    with Client(place.socket, family="AF_UNIX", authkey=place.secret.read_bytes()) as mad:
        mad.recv_bytes()
        mad.send_bytes(b"no JSON")
    (process,) = workers(place)
    assert ask(query, context)["greeting"] == greeting
    assert workers(place) == [process]


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_once(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MISCHIEF", "die-once:0:1:1 die:0:2:1")
    monkeypatch.setenv("MISCHIEF_DONE", str(tmp_path))
    _, train, context = messages(tmp_path)
    with caplog.at_level("WARNING", logger="flwr"):
        update = ask(train, context)
    assert (tmp_path / "die-once").exists()
    assert wire.blob_of(update)
    train.metadata.__dict__["_group_id"] = "2"
    with pytest.raises(ClientError, match="the worker died twice; the end of its log"):
        ask(train, context)


@pytest.mark.slow
def test_a_worker_that_is_being_killed_counts_as_none(place, tmp_path):
    """The system closes its connections before the socket on which it listens: whoever comes in between is let in and
    then cut off."""
    query, _, context = messages(tmp_path)
    place.secret.write_bytes(b"of the dead")
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(place.socket)
        dying.listen()

        def hang_up():
            caller, _ = dying.accept()
            caller.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert ask(query, context)["greeting"]
        thread.join(10)
    assert len(workers(place)) == 1


@pytest.mark.slow
def test_a_worker_that_takes_too_long_is_stopped(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MISCHIEF", "hang:0:1:1")
    query, train, context = messages(tmp_path, "runtime.timeout=20")
    ask(query, context)
    begun = time.monotonic()
    with pytest.raises(ClientError, match="did not answer within 20 s; it was stopped"):
        ask(train, context)
    assert 20 <= time.monotonic() - begun < 40
    assert not psutil.wait_procs(workers(place), timeout=10)[1]


@pytest.mark.slow
def test_what_a_client_raises_is_told_and_the_worker_stays(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MISCHIEF", "raise:0:1:1")
    query, train, context = messages(tmp_path)
    for _ in range(2):
        with pytest.raises(ClientError, match=r"^ConnectionError: the battery is flat$"):
            ask(train, context)
    assert len(workers(place)) == 1
    nobody = Context(99, NODE, {}, RecordDict(), context.run_config)
    with pytest.raises(ClientError, match="this node has no partition-id"):
        ask(query, nobody)


@pytest.mark.slow
def test_a_worker_of_another_version_gives_way(place, tmp_path, monkeypatch):
    query, _, context = messages(tmp_path)
    ask(query, context)
    (old,) = workers(place)
    for name in ("fedtune", "strategies", "clients", "conf"):
        shutil.copytree(worker.CODE / name, tmp_path / "newer" / name)
    monkeypatch.setattr(worker, "CODE", tmp_path / "newer")
    ask(query, context)
    psutil.wait_procs([old], timeout=10)
    (new,) = workers(place)
    assert new.pid != old.pid
    ask(query, context)
    assert workers(place) == [new]


@pytest.mark.slow
def test_a_worker_ends_with_its_node_and_when_it_is_idle(place, tmp_path):
    query, _, context = messages(tmp_path, **{"worker-idle": 2.0})
    ask(query, context)
    (process,) = workers(place)
    assert not psutil.wait_procs([process], timeout=10)[1]
    assert "nothing came for 2 s" in place.log.read_text()
    assert {path.name for path in place.folder.iterdir()} == {place.log.name}

    place.secret.write_bytes(b"x" * 32)
    node = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    command = [sys.executable, "-m", "fedtune.runtime.worker", str(place.folder), place.name, str(node.pid), "1000"]
    lasting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    assert lasting.poll() is None
    node.kill()  # and nobody asks how it ended
    _, said = lasting.communicate(timeout=20)
    node.wait()
    assert f"the process that wanted this worker ({node.pid}) has ended" in said


def test_a_folder_that_others_can_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = place_of(NODE).folder
    folder.chmod(0o755)
    with pytest.raises(ClientError, match=r"must be a folder that only this user can enter .*mode 755"):
        place_of(NODE)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ClientError, match="must be a folder that only this user can enter"):
        place_of(NODE)


def test_the_device_app_imports_nothing_heavy():
    code = (
        "import sys, fedtune.runtime.app, fedtune.runtime.worker\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'ray', 'hydra', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_hostile_server_learns_nothing_from_a_worker_and_ends_none(place, tmp_path, monkeypatch):
    """A class of Python's, a secret, a file, and a text that ends PyYAML's C parser: tests/test_hostile_server.py has
    the rest. What a worker raises crosses a socket, and comes without the folders of the device."""
    monkeypatch.setenv("SECRET", "hunter2")
    query, _, context = messages(tmp_path)
    text = str(context.run_config["config"])
    hostile = {
        "wants 'shutil.copy' made": text.replace("mischief.Mischief", "shutil.copy"),
        "'data.path' has": text.replace(str(PAIRS), "${oc.env:SECRET}"),
        "opens only files in folders": text.replace(str(PAIRS), "/etc/passwd"),
        "deeper than 50 levels": "[" * 90_000,
        "pairs.jsonl line 1": text.replace("prompt_column: null", "prompt_column: nothing"),
    }
    greeting = ask(query, context)["greeting"]
    (process,) = workers(place)
    for part, config in hostile.items():
        with pytest.raises(ClientError) as caught:
            ask(query, Context(99, NODE, context.node_config, RecordDict(), {"config": config}))
        assert part in str(caught.value)
        assert "hunter2" not in str(caught.value)
        assert str(PAIRS.parent) not in str(caught.value)
    assert ask(query, context)["greeting"] == greeting
    assert workers(place) == [process]
