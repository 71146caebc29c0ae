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

import forked
import mischief
import psutil
import pytest
from conftest import PAIRS, SMALL
from flwr.app import Context, Message, RecordDict

from fedtune.codecs.raw import Raw
from fedtune.config.compose import compose
from fedtune.core.errors import ClientError
from fedtune.core.protocol import Instruction
from fedtune.runtime import worker
from fedtune.runtime.worker import ask, place_of
from fedtune.wire import messages as wire
from fedtune.wire.flower_private import assume_identity
from fedtune.workspace.workspace import workspace_of

NODE = 4711
RUN = "0" * 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A node's place under a short path, and the environment of its worker, which takes 8 CPU seconds to start: a test
    takes over the one that the last has left, and starts one if that left none. They go wrong in turns of their own."""
    base = Path("/tmp") / f"ft{os.getpid()}"
    base.mkdir(mode=0o700)
    environment = {
        "XDG_RUNTIME_DIR": str(base),
        "PYTHONPATH": str(Path(__file__).parent),
        "FEDTUNE_HOME": str(tmp_path_factory.mktemp("home")),
        "FEDTUNE_TARGETS": "mischief.Mischief",
        "FEDTUNE_FOLDERS": str(Path(__file__).parent),
        "MISCHIEF": "raise:0:2:1 hang:0:3:1 die:0:4:1",
        "SECRET": "hunter2",
    }
    with pytest.MonkeyPatch.context() as patch, forked.everywhere():
        for name, value in environment.items():
            patch.setenv(name, value)
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


def messages(*more, round=1, **node_config):
    """A query and a train message as a ClientApp gets them, and its context."""
    assume_identity(99)
    text = compose([*SMALL, *mischief.WORDS, *more]).text()
    adapter = workspace_of({"config": text}).model.layout.initial
    context = Context(99, NODE, {"partition-id": 1, **node_config}, RecordDict(), {"config": text})
    query = Message(RecordDict(), NODE, "query", group_id="0")
    content = wire.pack_instruction(Instruction(adapter), Raw(), 0, RUN)
    return query, Message(content, NODE, "train", group_id=str(round)), context


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
def test_a_worker_answers_as_this_process_would_and_stays(place):
    query, train, context = messages()
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
def test_strangers_at_the_socket_change_nothing(place):
    """One without the secret, one that says nothing that makes sense, one that hangs up."""
    query, _, context = messages()
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
def test_what_a_client_raises_is_told_and_the_worker_stays(place):
    query, train, context = messages(round=2)
    for _ in range(2):
        with pytest.raises(ClientError, match=r"^ConnectionError: the battery is flat$"):
            ask(train, context)
    assert len(workers(place)) == 1
    nobody = Context(99, NODE, {}, RecordDict(), context.run_config)
    with pytest.raises(ClientError, match="this node has no partition-id"):
        ask(query, nobody)


@pytest.mark.slow
def test_a_hostile_server_learns_nothing_from_a_worker_and_ends_none(place):
    """A class of Python's, a secret, a file, and a text that ends PyYAML's C parser: tests/test_hostile_server.py has
    the rest. What a worker raises crosses a socket, and comes without the folders of the device."""
    query, _, context = messages()
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


@pytest.mark.slow
def test_a_worker_that_takes_too_long_is_stopped(place):
    query, train, context = messages("runtime.timeout=5", round=3)
    ask(query, context)
    begun = time.monotonic()
    with pytest.raises(ClientError, match="did not answer within 5 s; it was stopped"):
        ask(train, context)
    assert 5 <= time.monotonic() - begun < 25
    assert not psutil.wait_procs(workers(place), timeout=10)[1]


@pytest.mark.slow
def test_a_worker_that_is_being_killed_counts_as_none(place):
    """The system closes its connections before the socket on which it listens: whoever comes in between is let in and
    then cut off."""
    query, _, context = messages()
    for process in workers(place):
        process.kill()
        process.wait(10)
    Path(place.socket).unlink(missing_ok=True)
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
def test_a_worker_that_dies_is_started_again_once(place, caplog):
    """That the other one answers is seen in test_deploy.py."""
    _, train, context = messages(round=4)
    with (
        caplog.at_level("WARNING", logger="flwr"),
        pytest.raises(ClientError, match="the worker died twice; the end of its log"),
    ):
        ask(train, context)
    assert caplog.text.count("the worker died; starting it again, once") == 1
    assert not workers(place)


@pytest.mark.slow
def test_a_worker_of_another_version_gives_way_and_an_idle_one_ends(place, tmp_path, monkeypatch):
    query, _, context = messages()
    ask(query, context)
    (old,) = workers(place)
    for name in ("fedtune", "strategies", "clients", "conf"):
        shutil.copytree(worker.CODE / name, tmp_path / "newer" / name)
    monkeypatch.setattr(worker, "CODE", tmp_path / "newer")
    query, _, context = messages(**{"worker-idle": 5.0})
    ask(query, context)
    psutil.wait_procs([old], timeout=10)
    (new,) = workers(place)
    assert new.pid != old.pid
    ask(query, context)
    assert workers(place) == [new]
    assert not psutil.wait_procs([new], timeout=15)[1]
    assert "nothing came for 5 s" in place.log.read_text()
    assert {path.name for path in place.folder.iterdir()} == {place.log.name}


@pytest.mark.slow
def test_a_worker_ends_with_its_node(place):
    for process in workers(place):
        process.kill()
        process.wait(10)
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
    with forked.REAL([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0].strip() == "[]"
