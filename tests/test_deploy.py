"""Real nodes on loopback, with TLS and node authentication: the bits of one process, and a run that outlives what
breaks."""

import os
import signal
import time
from pathlib import Path

import mischief
import pytest
import remembering
from conftest import SMALL, rows, summary_of
from deployed import call, failures, run

from fedtune.config import compose
from fedtune.runtime.local import run_local
from simulations.fleet import Fleet, Site
from simulations.fleet.processes import marked, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
CLIENTS = ("population.clients=3", "population.cohort=3", "population.quorum=0.3")
PROFILES = (
    {"memory-bytes": 8_000_000_000, "flop-per-s": 1e11},
    {"memory-bytes": 4_000_000_000, "up-bytes-per-s": 1_250_000},
    {"memory-bytes": 2_000_000_000, "backprop": False, "max-rank": 4},
)
# Which turns go wrong, and how, by the seed of the run
PLAN = (
    "raise:2:1:0 die-once:2:1:1 nan:2:1:2 hang:2:2:1 hang:2:2:2",
    "hang:3:1:0 raise:3:3:0 raise:3:3:1 raise:3:3:2",
    "slow:4:3:0 slow:4:3:1 slow:4:3:2",
    "hang:5:1:0",
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    environment = {
        "PYTHONPATH": str(HERE),  # the clients of these tests are in no bundle
        "MISCHIEF": " ".join(PLAN),
        "MISCHIEF_DONE": str(folder.with_name("died")),
    }
    sites = [Site(f"site-{index}", profile) for index, profile in enumerate(PROFILES)]
    with Fleet(folder, sites, app=HERE.parent, env=environment) as fleet:
        yield fleet


def words(folder, *more):
    return [*SMALL, *CLIENTS, "runtime=flower", "runtime.threads=1", "runtime.wait=120", f"out={folder}", *more]


def in_one_process(folder, monkeypatch, lost, *more):
    """The same experiment in this process, in which the same turns fail."""
    seed = next(word.removeprefix("seed=") for word in more if word.startswith("seed="))
    monkeypatch.setenv("MISCHIEF", " ".join(f"raise:{seed}:{round}:{index}" for round, index in lost))
    run_local(compose([*SMALL, *CLIENTS, f"out={folder}", *more]))
    return summary_of(folder)["state_sha256"]


def working_on(node, number):
    """Whether the node's ClientApp of that round is running; the one of the round before takes a while to go."""
    _, found, after = node.log().rpartition(f"ROUND {number}]")
    return found and "Start `flwr-clientapp` process" in after and len(node.client_apps()) == 1


def round_is_done(folder, number):
    return len(rows(folder, "metrics.csv")) > number


def test_a_fleet_gives_the_bits_of_one_process_and_resumes_exactly(fleet, tmp_path, monkeypatch):
    """Three rounds, of which the third is in a new Flower run; the clients remember what they learnt. In between,
    somebody tries to go on with other settings."""
    folder = tmp_path / "run"
    more = (*remembering.WORDS, "seed=1")
    code, out = run(fleet, *words(folder, *more, "rounds=2"))
    assert code == 0, out
    overrides = " ".join(words(folder, *more, "train.lr=0.5"))
    refused = fleet.run({"overrides": overrides, "resume": str(folder)}, seconds=100)
    assert refused.status == "finished:failed"
    assert "train.lr: 0.001 -> 0.5" in refused.log.read_text()
    code, out = run(fleet, f"resume={folder}", "rounds=3")
    assert code == 0, out
    assert "resumed after round 2" in out
    whole = in_one_process(tmp_path / "whole", monkeypatch, [], *more, "rounds=3")
    assert summary_of(folder)["state_sha256"] == whole
    assert failures(folder) == {}
    metrics = rows(folder, "metrics.csv")
    assert [row["clients"] for row in metrics] == ["0", "3", "3", "3"]
    for row, other in zip(metrics, rows(tmp_path / "whole", "metrics.csv"), strict=True):
        assert {row[name] == other[name] for name in ("eval_loss", "train_loss", "up_payload_bytes")} == {True}


def test_a_run_outlives_what_breaks_on_its_nodes(fleet, tmp_path, monkeypatch):
    """Round 1: client 0 raises, client 1's worker is killed (and started again), client 2 sends NaN. Round 2: client
    1's process is killed, client 2's machine loses its power and comes back with its key. In the end all are there, and
    the result is to the bit that of one process in which the same turns fail."""
    folder = tmp_path / "run"
    more = (*mischief.WORDS, "seed=2", "rounds=7")
    process = call(fleet, *words(folder, *more, "runtime.timeout=150"))
    second, third = fleet.nodes[1], fleet.nodes[2]
    node_id = third.node_id
    assert wait_until(lambda: round_is_done(folder, 1), 200)
    assert wait_until(lambda: all(working_on(node, 2) for node in (second, third)), 60)
    time.sleep(2)
    for pid in second.client_apps():
        os.kill(pid, signal.SIGKILL)
    third.kill()
    third.start(patience=120)
    assert third.node_id == node_id
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    lost = failures(folder)
    away = {(round, 2) for round in (3, 4, 5)}  # how long it takes to come back is not ours to say
    assert {(1, 0), (1, 2), (2, 1), (2, 2)} <= lost.keys() <= {(1, 0), (1, 2), (2, 1), (2, 2), *away}
    assert lost[1, 0] == "ConnectionError: the battery is flat"
    assert "values that are not finite" in lost[1, 2]
    assert "its client process died" in lost[2, 1]
    assert "its node went away" in lost[2, 2] or "its node was started again" in lost[2, 2]
    assert (fleet.folder.with_name("died")).exists()  # client 1's worker, whose turn was taken again
    assert "the worker died; starting it again, once" in second.log()
    assert rows(folder, "metrics.csv")[-1]["clients"] == "3"
    booked = {(int(r["round"]), int(r["peer"])) for r in rows(folder, "ledger.csv") if r["part"] == "failed"}
    assert booked == lost.keys()
    assert summary_of(folder)["state_sha256"] == in_one_process(tmp_path / "local", monkeypatch, lost, *more)


def test_a_late_client_starves_no_later_round_and_when_all_fail_the_run_says_so(fleet, tmp_path):
    """Client 0 hangs in round 1, takes part in round 2; in round 3 every client raises."""
    folder = tmp_path / "run"
    code, out = run(fleet, *words(folder, *mischief.WORDS, "seed=3", "rounds=5", "runtime.timeout=45"))
    assert code == 1
    assert "round 3: 0 of 3 clients gave a usable update" in out
    assert "the battery is flat" in out
    assert "finished:failed" in out
    lost = failures(folder)
    assert lost.keys() == {(1, 0), (3, 0), (3, 1), (3, 2)}
    assert "no reply within 45 s" in lost[1, 0] or "the worker did not answer within 45 s" in lost[1, 0]
    assert summary_of(folder)["status"] == "failed"
    assert summary_of(folder)["rounds"] == 2


def test_a_node_that_is_started_again_at_once_loses_its_turn_and_no_time(fleet, tmp_path):
    """Flower takes it back before it has missed it, so only we notice that its message is gone. The log's stream breaks
    off too, as it does when the SuperLink is busy; each line of the log is shown once all the same."""
    folder = tmp_path / "run"
    process = call(fleet, *words(folder, *mischief.WORDS, "seed=5", "rounds=3", "runtime.timeout=500"))
    node = fleet.nodes[0]
    assert wait_until(lambda: round_is_done(folder, 0) and working_on(node, 1), 120)
    watching = [pid for pid, line in marked(f"{fleet.mark}/operator").items() if "--stream" in line]
    for pid in watching:
        os.kill(pid, signal.SIGKILL)
    node.stop()
    node.start()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert watching
    assert [out.count(f"\nround {number} ") for number in range(4)] == [1, 1, 1, 1], out
    lost = failures(folder)
    assert lost.keys() - {(2, 0)} == {(1, 0)}
    assert "its node was started again" in lost[1, 0] or "its node went away" in lost[1, 0]
    asked = [row["round"] for row in rows(folder, "ledger.csv") if row["part"] == "handshake" and row["peer"] == "0"]
    assert asked in (["0", "0", "2", "2"], ["0", "0", "3", "3"])  # it may have come back as somebody else


def test_a_server_that_was_killed_is_resumed_in_a_new_run(fleet, tmp_path, monkeypatch):
    """Killed once as round 1 ends, and once inside round 3."""
    folder = tmp_path / "run"
    more = (*mischief.WORDS, "seed=4", "rounds=4")
    for number in (1, 2):
        process = call(fleet, *(words(folder, *more) if number == 1 else [f"resume={folder}"]))
        assert wait_until(lambda number=number: round_is_done(folder, number), 200)
        if number == 2:
            assert wait_until(lambda: any(working_on(node, 3) for node in fleet.nodes), 60)
        fleet.superlink.kill()
        process.communicate(timeout=60)
        assert process.returncode != 0
        fleet.superlink.start()
    assert wait_until(lambda: list(fleet.online().values()).count("online") == 3, 60)
    code, out = run(fleet, f"resume={folder}")
    assert code == 0, out
    assert failures(folder) == {}
    assert summary_of(folder)["state_sha256"] == in_one_process(tmp_path / "local", monkeypatch, [], *more)
