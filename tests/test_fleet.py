"""A deployment on loopback: what passes, what is refused, what comes back, and that nothing stays behind."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from deployed import CALMLY

from fedtune.core.errors import DeploymentError, RunFolderError
from simulations.fleet import Fleet, Site, processes
from simulations.fleet.credentials import make_certificates
from simulations.fleet.processes import MARK, cut, marked, wait_until

pytestmark = pytest.mark.slow

SETTINGS = """
[project]
name = "tiny-app"
version = "1.0.0"
description = "answers"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "fedtune.app:server"
clientapp = "fedtune.app:client"

[tool.flwr.app.config]
overrides = ""
mode = ""
nodes = 2
seconds = 0.0
"""

# The package has the name of one that is installed, to see whose code the nodes import
APP = """
import hashlib, json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    time.sleep(float(context.run_config["seconds"]))
    answer = {"file": __file__, "node": json.dumps(dict(context.node_config), sort_keys=True)}
    answer["text"] = hashlib.sha256(context.run_config["overrides"].encode()).hexdigest()
    return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)

@server.main()
def main(grid, context):
    if context.run_config["mode"] == "fail":
        raise RuntimeError("asked to fail")
    while len(nodes := list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.1)
    for reply in grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes]):
        answer = f"error {reply.error.code}" if reply.has_error() else json.dumps(dict(reply.content["answer"]))
        print("ANSWER", answer, flush=True)
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "pyproject.toml").write_text(SETTINGS)
    (folder / "fedtune").mkdir()
    (folder / "fedtune" / "__init__.py").touch()
    (folder / "fedtune" / "app.py").write_text(APP)
    return folder


@pytest.fixture(scope="module")
def fleet(app, tmp_path_factory):
    sites = [Site("site-0"), Site("site-1", {"profile": 'a "phone"', "memory-bytes": 1 << 31})]
    with Fleet(tmp_path_factory.mktemp("fleet"), sites, app=app, env=CALMLY) as fleet:
        yield fleet


def answers(text):
    return [line.removeprefix("ANSWER ") for line in text.splitlines() if line.startswith("ANSWER ")]


def test_a_run_passes_with_the_bundles_code_and_a_long_config(fleet, tmp_path):
    text = "".join(f"line{number}: 'quoted' \"twice\" # naïve\n" for number in range(150))
    assert len(text) > 3000
    with (tmp_path / "stream").open("w") as stream:
        result = fleet.run({"overrides": text}, stream, seconds=100)
    assert (result.status, result.exit_code) == ("finished:completed", 0)
    assert (tmp_path / "stream").read_text() == result.log.read_text()
    first, second = sorted(answers(result.log.read_text()), key=lambda line: "site-1" in line)
    assert all(hashlib.sha256(text.encode()).hexdigest() in answer for answer in (first, second))
    assert str(fleet.folder / "site-0" / "apps") in first
    assert str(fleet.folder / "site-1" / "apps") in second
    assert r"\"partition-id\": 1" in second
    assert r"\"num-partitions\": 2" in second
    assert "2147483648" in second


def test_a_failed_run_is_told_though_the_command_exits_with_0(fleet):
    result = fleet.run({"mode": "fail"}, seconds=100)
    assert (result.status, result.exit_code, result.completed) == ("finished:failed", 0, False)
    assert "asked to fail" in result.details


def test_a_setting_that_the_app_does_not_have_is_refused(fleet):
    with pytest.raises(DeploymentError, match=r"tool\.flwr\.app\.config"):
        fleet.run({"overide": "x"}, seconds=60)


def test_strangers_are_refused_in_both_directions(fleet, tmp_path):
    make_certificates(tmp_path / "ca.crt", tmp_path / "server.pem", tmp_path / "server.key")
    stranger = fleet.add(Site("stranger", registered=False))
    deceived = fleet.add(Site("deceived", registered=False, trusts=tmp_path / "ca.crt"))
    for node in (stranger, deceived):
        node.start(wait=False)
    with pytest.raises(DeploymentError, match=r"Exit Code: 305[^$]*Failed to activate SuperNode"):
        stranger.wait_online()
    with pytest.raises(DeploymentError, match=r"Exit Code: 305[^$]*certificate verify failed"):
        deceived.wait_online()
    assert fleet.online() == {node.node_id: "online" for node in fleet.nodes[:2]}


def test_secrets_are_for_their_owner_alone(fleet):
    for path in [*fleet.folder.glob("*/key"), *fleet.folder.glob("*/server.key")]:
        assert path.stat().st_mode & 0o777 == 0o600
    assert len(list(fleet.folder.rglob("*.key"))) == 1  # the server's; the CA's was never written


def test_a_taken_port_is_left_for_another(fleet):
    node = fleet.nodes[1]
    before = node.node_id
    node.stop()
    node.port = fleet.superlink.port
    node.start()
    assert node.port != fleet.superlink.port
    assert node.node_id == before


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
