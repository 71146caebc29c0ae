"""A deployment on loopback: what passes, what is refused, what comes back, and the bits of one process."""

import hashlib

import forked
import mischief
import pytest
from answering import write_app
from conftest import PAIRS, SMALL, rows, summary_of
from deployed import CALMLY, HERE, call, failures

from fedtune.config.compose import compose
from fedtune.core.errors import DeploymentError, RunFolderError
from fedtune.runtime.local import run_local
from simulations.benchmarks.worker import figures
from simulations.fleet import Fleet, Site
from simulations.fleet.credentials import make_certificates
from simulations.fleet.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What clients leave for one another, and wait for."""
    return tmp_path_factory.mktemp("done")


@pytest.fixture(scope="module")
def fleet(done, tmp_path_factory):
    """It plays our app as well, which `fedtune run` brings along."""
    sites = [Site("site-0"), Site("site-1", {"profile": 'a "phone"', "memory-bytes": 1 << 31})]
    environment = {
        "PYTHONPATH": str(HERE),  # the clients of these tests are in no bundle
        "FEDTUNE_TARGETS": "mischief.Mischief",
        "MISCHIEF": "wait:1:2:1 wait:1:3:0 wait:1:5:0",
        "MISCHIEF_DONE": str(done),
        **CALMLY,
    }
    app = write_app(tmp_path_factory.mktemp("app"))
    with forked.everywhere(), Fleet(tmp_path_factory.mktemp("fleet"), sites, app=app, env=environment) as fleet:
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


def has_done(node, number):
    return f"fedtune: round {number}, train" in node.log()


def round_is_done(folder, number):
    return len(rows(folder, "metrics.csv")) > number


def test_devices_with_files_of_their_own_that_come_and_go_give_the_bits_of_a_simulation(
    fleet, done, tmp_path, monkeypatch
):
    """Unequal files, which the server never sees; it knows neither how many clients there will be. The SuperLink is
    killed inside round 2, in which some have learnt already, and they remember what they learnt, what they left out of
    their answers, and the broadcast that the next will build on. Somebody tries to go on with other settings; then a
    new Flower run goes on, for more rounds than were asked for at first. Then a third device joins, and in round 5 the
    second leaves. In the simulation over the same files the turns of who isn't there fail."""
    lines, files, test = PAIRS.read_text().splitlines(), tmp_path / "files", tmp_path / "test.jsonl"
    files.mkdir()
    for index, (begin, end) in enumerate(((0, 12), (12, 40), (40, 100))):
        (files / f"{index}.jsonl").write_text("\n".join(lines[begin:end]) + "\n")
    test.write_text("\n".join(lines[100:]) + "\n")
    first, second = fleet.nodes[:2]
    for index, node in enumerate((first, second)):
        node.own(files / f"{index}.jsonl")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    asked = ("seed=1", "codec=compeft", "codec_up.feedback=true", f"data.heldout_path={test}", *mischief.WORDS)
    plain = [word for word in SMALL if not word.startswith(("data.", "population."))]
    theirs = ("data.partition=own", "population.clients=connected", "population.cohort=3", "runtime=flower")
    deployed = [*plain, *asked, *theirs, "runtime.wait=120", f"out={folder}"]
    process = call(fleet, *deployed, "rounds=2")
    assert wait_until(lambda: round_is_done(folder, 1), 200)
    assert wait_until(lambda: has_done(first, 2), 120)
    fleet.superlink.kill()
    (done / "go-2").touch()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not round_is_done(folder, 2)
    with pytest.raises(RunFolderError, match=r"was started with other settings: .*train\.lr: 0\.001 -> 0\.5"):
        run_local(compose([*deployed, "rounds=2", "train.lr=0.5"]), resume=str(folder))
    fleet.superlink.start()
    process = call(fleet, f"resume={folder}", "rounds=6")
    # Two have to be there to begin: were the third started now, the second might come back only after it
    assert wait_until(lambda: first.log().count("fedtune: round 2, train") == 2, 200)
    third = fleet.add(Site("site-2", {"partition-id": 2}, own=files / "2.jsonl"))
    third.start()
    assert wait_until(lambda: has_done(second, 3), 240)
    (done / "go-3").touch()
    assert wait_until(lambda: has_done(second, 5), 240)
    second.stop()
    (done / "go-5").touch()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "resumed after round 1" in out
    assert "client 2 is site-2: 54 examples" in out
    ledger = rows(folder, "ledger.csv")
    there = {(int(r["round"]), int(r["client"])) for r in ledger if (r["part"], r["direction"]) == ("train", "up")}
    absent = {(number, index) for number in range(1, 7) for index in range(3)} - there
    assert {(1, 2), (2, 2), (6, 1)} <= absent <= {(1, 2), (2, 2), (3, 2), (4, 2), (5, 1), (6, 1)}
    monkeypatch.setenv("MISCHIEF", " ".join(f"raise:1:{number}:{index}" for number, index in absent))
    same = ("population.cohort=3", "population.quorum=0.3", f"data.path={files}", "data.partition=files")
    run_local(compose([*plain, *asked, *same, f"out={whole}", "rounds=6"]))
    assert summary_of(folder)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert failures(folder).keys() <= {(5, 1)}  # it had learnt, and left before its answer was on its way
    metrics = rows(folder, "metrics.csv")
    assert [int(row["clients"]) for row in metrics] == [sum(one == n for one, _ in there) for n in range(7)]
    for row, other in zip(metrics, rows(whole, "metrics.csv"), strict=True):
        assert (row["eval_loss"], row["train_loss"]) == (other["eval_loss"], other["train_loss"])
    # The benchmark of workers reads a node's log
    measured = figures(fleet.nodes[0].log())
    assert [number for number, *_ in measured] == [1, 2, 2, 3, 4, 5, 6]
    assert all(seconds >= 0 for _, *times in measured for seconds in times)
