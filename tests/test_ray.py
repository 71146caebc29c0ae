"""Clients in Ray's processes: the same bits as in one process, and a run that outlives what dies."""

import csv
import os
import signal
import subprocess
import sys
import time

import mischief
import psutil
import pytest
import remembering
from conftest import SMALL, summary_of
from deployed import PATHS

from fedtune.config.compose import compose
from fedtune.core.errors import ConfigError, QuorumError
from fedtune.runtime.ray import backend_config, run_ray

ON_RAY = ("runtime=ray", "runtime.wait=200")


pytestmark = pytest.mark.usefixtures("folder_for_ray")


def words(folder, *more):
    return [*SMALL, *ON_RAY, f"out={folder}", *more]


def failures(folder):
    with (folder / "failures.csv").open(newline="") as stream:
        return [(row["round"], row["client"], row["error"]) for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_the_virtual_clock_is_the_same_in_rays_processes(small_run, tmp_path):
    """Nodes have other ids there, and answers come in another order; the devices' order counts. Two are alike."""
    more = ("population=mixed", "population.clients=4", "population.devices=[galaxy_a55,rtx_4090,raspberry_pi_5]")
    more = (*more, "method=fedbuff", "method.strategy.buffer=2", "codec=int8", "population.dropout=0.2")
    local = small_run(*more, name="local", rounds=2)
    run_ray(compose(words(tmp_path / "ray", *more, "rounds=2")))
    assert summary_of(tmp_path / "ray")["state_sha256"] == summary_of(local)["state_sha256"]
    assert (tmp_path / "ray" / "clock.csv").read_text() == (local / "clock.csv").read_text()


@pytest.mark.slow
def test_a_ray_process_that_dies_costs_one_turn(tmp_path, monkeypatch, small_run):
    """Client 1 kills its process in round 1, and again when it is tried again, and raises in round 2; everything else
    goes on, in the replaced process too, and the result is that of a run in which client 1 just raised. In round 4 all
    raise, and the run says so and stops."""
    all_raise = " ".join(f"raise:0:4:{index}" for index in range(4))
    monkeypatch.setenv("MISCHIEF", f"die:0:1:1 raise:0:2:1 {all_raise}")
    more = (*mischief.WORDS, "population.cohort=4")
    with pytest.raises(QuorumError, match=r"round 4: 0 of 4 clients .* the battery is flat"):
        run_ray(compose(words(tmp_path / "ray", *more, "rounds=5")))
    lost = failures(tmp_path / "ray")
    assert [(round, peer) for round, peer, _ in lost] == [("1", "1"), ("2", "1"), *(("4", peer) for peer in "0123")]
    assert "its process died (Actor" in lost[0][2]
    assert "the battery is flat" in lost[1][2]
    assert "Traceback" not in lost[1][2]
    assert (summary_of(tmp_path / "ray")["status"], summary_of(tmp_path / "ray")["rounds"]) == ("failed", 3)
    monkeypatch.setenv("MISCHIEF", "raise:0:1:1 raise:0:2:1")
    local = small_run(*more, name="local", rounds=3)
    assert summary_of(local)["state_sha256"] == summary_of(tmp_path / "ray")["state_sha256"]


@pytest.mark.slow
def test_ray_stays_on_loopback_and_after_ctrl_c_goes_on_to_the_bits_of_one_process(small_run, tmp_path):
    folder = tmp_path / "run"
    more = (*remembering.WORDS, "codec=compeft", "codec_up.feedback=true")
    command = [sys.executable, "-m", "fedtune", "run", *words(folder, *more, "rounds=1000")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS["PYTHONPATH"]},  # the clients of these tests
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        mine = psutil.Process(process.pid).children(recursive=True)
        listening = [c.laddr.ip for p in mine for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
        psutil.wait_procs(mine, timeout=20)
        assert not [p for p in mine if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert f"go on with: fedtune run resume={folder}" in err
    assert summary_of(folder)["status"] == "interrupted"
    rounds = summary_of(folder)["rounds"] + 1
    alone = f"runtime.cpus={os.cpu_count()}"  # one process, for each takes 10 CPU seconds to import what it needs
    run_ray(compose(words(folder, *more, f"rounds={rounds}", alone)), resume=str(folder))
    whole = small_run(*more, name="whole", rounds=rounds)
    assert summary_of(folder)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert summary_of(folder)["totals"]["failed"] == 0
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_more_cores_than_there_are_is_said_at_once():
    with pytest.raises(ConfigError, match=r"runtime\.cpus=1000 asks for more cores"):
        run_ray(compose([*SMALL, "runtime=ray", "runtime.cpus=1000"]))


@pytest.mark.slow
def test_ray_stays_on_this_machine_unless_a_cluster_is_named():
    assert backend_config(compose(["runtime=ray"]).runtime)["init_args"]["_node_ip_address"] == "127.0.0.1"
    named = backend_config(compose(["runtime=ray", "runtime.address=10.0.0.5:6379", "runtime.gpus=0.25"]).runtime)
    assert named["init_args"]["address"] == "10.0.0.5:6379"
    assert "_node_ip_address" not in named["init_args"]
    assert named["client_resources"] == {"num_cpus": 1.0, "num_gpus": 0.25, "max_restarts": -1, "max_task_retries": 1}
