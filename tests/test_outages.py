"""Real nodes on loopback whose processes are killed, the server's too: the run goes on, to the bit."""

import os
import signal
import time

import mischief
import pytest
from conftest import rows, summary_of
from deployed import call, failures, in_one_process, round_is_done, run, three_nodes, words, working_on

from simulations.fleet.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with three_nodes(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


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
