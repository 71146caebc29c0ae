"""Real nodes on loopback, with TLS and node authentication: a run that outlives what breaks."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import forked
import mischief
import pytest
from conftest import SMALL, rows, summary_of
from deployed import CALMLY, call, failures

from fedtune.config.compose import compose
from fedtune.core.errors import DeploymentError, QuorumError
from fedtune.runtime.local import run_local
from simulations.fleet import Fleet, Site
from simulations.fleet.processes import marked, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
CLIENTS = ("population.clients=4", "population.cohort=4", "population.quorum=0.25")
PROFILES = (
    {"memory-bytes": 8_000_000_000, "flop-per-s": 1e11},
    {"memory-bytes": 4_000_000_000, "up-bytes-per-s": 1_250_000},
    {"memory-bytes": 2_000_000_000, "max-rank": 4},
    {},
)
TIMEOUT = 85  # longer than Flower needs to miss a node that is killed while it works, 66 s
# Which turns go wrong, and how: HOW:SEED:ROUND:CLIENT
PLAN = (
    "raise:2:1:0 die-once:2:1:1 nan:2:1:2",
    "hang:2:2:0 hang:2:2:1 hang:2:2:2",
    "wait:2:3:0 hang:2:3:3",  # by the next round they are all back
    "raise:2:5:0 raise:2:5:1 raise:2:5:2 raise:2:5:3",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What clients leave for one another, and wait for."""
    return tmp_path_factory.mktemp("done")


@pytest.fixture(scope="module")
def fleet(done, tmp_path_factory):
    """Without a database: the SuperLink's end is in test_fleet.py."""
    environment = {
        "PYTHONPATH": str(HERE),  # the clients of these tests are in no bundle
        "FEDTUNE_TARGETS": "mischief.Mischief",
        "MISCHIEF": " ".join(PLAN),
        "MISCHIEF_DONE": str(done),
        **CALMLY,
    }
    sites = [Site(f"site-{index}", profile) for index, profile in enumerate(PROFILES)]
    folder = tmp_path_factory.mktemp("fleet")
    with forked.everywhere(), Fleet(folder, sites, app=HERE.parent, env=environment, database=False) as fleet:
        yield fleet


def words(folder, *more):
    deployed = ("runtime=flower", "runtime.threads=1", "runtime.wait=120", f"runtime.timeout={TIMEOUT}")
    return [*SMALL, *CLIENTS, *mischief.WORDS, *deployed, f"out={folder}", *more]


def run_here(folder, monkeypatch, lost, *more):
    """The same experiment in this process, in which the lost turns fail."""
    monkeypatch.setenv("MISCHIEF", " ".join(f"raise:2:{round}:{index}" for round, index in lost))
    run_local(compose([*SMALL, *CLIENTS, *mischief.WORDS, f"out={folder}", *more]))


def working_on(node, number):
    """Whether the node's ClientApp of that round is running; the one of the round before takes a while to go."""
    _, found, after = node.log().rpartition(f"ROUND {number}]")
    return found and "Start `flwr-clientapp` process" in after and len(node.client_apps()) == 1


def round_is_done(folder, number):
    return len(rows(folder, "metrics.csv")) > number


@dataclass(frozen=True)
class Mishaps:
    """What is known of a run after it has ended."""

    folder: Path
    code: int
    out: str
    lost: dict  # (round, client) -> what failures.csv says
    log_of_second: str
    log_streams_cut: int


@pytest.fixture(scope="module")
def mishaps(fleet, done, tmp_path_factory):
    """One run for all that breaks.

    Round 1: client 0 raises, client 1's worker is killed (and started again), client 2 sends NaN.
    Round 2: client 0 hangs until its time is up, client 1's process is killed, client 2's machine loses its power. It
    stays away until the round is over: if it came back between two looks of the server (every 3 s), Flower would not
    notice. The stream of the run's log breaks off, as it does when the SuperLink is busy.
    Round 3: client 2's machine comes back with its key. Client 3's node is stopped and started again at once. Client 0
    waits for both, so that all are there for round 4.
    Round 5: they all raise.
    """
    folder = tmp_path_factory.mktemp("mishaps") / "run"
    process = call(fleet, *words(folder, "seed=2", "rounds=6"))
    _, second, third, fourth = fleet.nodes
    was = third.node_id
    assert wait_until(lambda: round_is_done(folder, 1), 200)
    assert wait_until(lambda: all(working_on(node, 2) for node in (second, third)), 60)
    time.sleep(2)
    for pid in second.client_apps():
        os.kill(pid, signal.SIGKILL)
    third.kill()
    watching = [pid for pid, line in marked(f"{fleet.mark}/operator").items() if "--stream" in line]
    for pid in watching:
        os.kill(pid, signal.SIGKILL)
    assert not fleet.node_process_ids(2)
    with pytest.raises(DeploymentError, match="Exit Code: 305"):  # Flower takes it for one that is there already
        third.start()
    assert wait_until(lambda: round_is_done(folder, 2), TIMEOUT + 60)
    third.start(patience=60)
    assert third.node_id == was
    assert fleet.online()[was] == "online"
    assert wait_until(lambda: working_on(fourth, 3), 60)
    fourth.stop()
    fourth.start()
    (done / "go-3").touch()
    out, _ = process.communicate(timeout=240)
    return Mishaps(folder, process.returncode, out, failures(folder), second.log(), len(watching))


def test_only_turns_that_broke_are_lost(mishaps):
    """A worker that died is started again, and a late client starves no later round."""
    broken = {(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (3, 3), *((5, index) for index in range(4))}
    away = {(3, 2)}  # how long it takes to come back is not ours to say
    assert broken <= mishaps.lost.keys() <= broken | away, mishaps.out
    assert rows(mishaps.folder, "metrics.csv")[-1]["clients"] == "4"
    assert "the worker died; starting it again, once" in mishaps.log_of_second
    booked = {(int(r["round"]), int(r["client"])) for r in rows(mishaps.folder, "ledger.csv") if r["part"] == "failed"}
    assert booked == mishaps.lost.keys()


def test_every_lost_turn_has_its_reason(mishaps):
    lost = mishaps.lost
    assert lost[1, 0] == "ConnectionError: the battery is flat"
    assert "values that are not finite" in lost[1, 2]
    late = (f"no reply within {TIMEOUT} s", f"the worker did not answer within {TIMEOUT} s")
    assert any(reason in lost[2, 0] for reason in late)
    assert "its client process died" in lost[2, 1]
    assert "its node went away" in lost[2, 2]
    assert "its node was started again" in lost[3, 3] or "its node went away" in lost[3, 3]


def test_what_broke_changes_no_bit_of_the_rest(mishaps, tmp_path, monkeypatch):
    with pytest.raises(QuorumError, match="round 5: 0 of 4 clients"):
        run_here(tmp_path / "local", monkeypatch, mishaps.lost, "seed=2", "rounds=6")
    assert summary_of(mishaps.folder)["state_sha256"] == summary_of(tmp_path / "local")["state_sha256"]


def test_a_node_that_is_started_again_at_once_is_not_waited_for(mishaps):
    """Flower takes it back before it has missed it, so only we notice that its message is gone. It is asked again who
    it is: it may have come back as somebody else."""
    assert "no reply within" not in mishaps.lost[3, 3]
    ledger = rows(mishaps.folder, "ledger.csv")
    asked = [row["round"] for row in ledger if row["part"] == "handshake" and row["client"] == "3"]
    assert asked == ["0", "0", "4", "4"]


def test_a_log_that_breaks_off_is_watched_on_and_each_line_is_shown_once(mishaps):
    assert mishaps.log_streams_cut
    assert "the log broke off" in mishaps.out
    assert [mishaps.out.count(f"\nround {number} ") for number in range(6)] == [1] * 5 + [0], mishaps.out


def test_when_all_fail_the_run_says_so(mishaps):
    assert mishaps.code == 1
    assert "round 5: 0 of 4 clients gave a usable update" in mishaps.out
    assert "the battery is flat" in mishaps.out
    assert "finished:failed" in mishaps.out
    assert summary_of(mishaps.folder)["status"] == "failed"
    assert summary_of(mishaps.folder)["rounds"] == 4
