"""What the tests on real nodes share."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from conftest import SMALL, rows, summary_of

from fedtune.config import compose
from fedtune.runtime.local import run_local
from simulations.fleet import Fleet, Site

HERE = Path(__file__).parent
CLIENTS = ("population.clients=3", "population.cohort=3", "population.quorum=0.3")
PROFILES = (
    {"memory-bytes": 8_000_000_000, "flop-per-s": 1e11},
    {"memory-bytes": 4_000_000_000, "up-bytes-per-s": 1_250_000},
    {"memory-bytes": 2_000_000_000, "backprop": False, "max-rank": 4},
)
# Which turns go wrong, and how, by the seed of the run
PLAN = (
    "raise:2:1:0 die-once:2:1:1 nan:2:1:2 hang:2:2:1 slow:2:2:2",
    "hang:3:1:0 raise:3:3:0 raise:3:3:1 raise:3:3:2",
    "slow:4:3:0 slow:4:3:1 slow:4:3:2",
    "hang:5:1:0",
)


@contextmanager
def three_nodes(folder):
    """A secure fleet whose nodes differ in what they can do, and fail as planned."""
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


def call(fleet, *arguments):
    """`fedtune run ...`, as the operator of the fleet."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli", "run", *arguments],
        cwd=fleet.operator,
        env=fleet.environment(fleet.operator, f"{fleet.mark}/operator"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(fleet, *arguments, seconds=240):
    process = call(fleet, *arguments)
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def failures(folder):
    return {(int(row["round"]), int(row["peer"])): row["error"] for row in rows(folder, "failures.csv")}
