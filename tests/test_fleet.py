"""A deployment on loopback: what passes, what is refused, what comes back, and the bits of one process."""

import hashlib

import mischief
import pytest
from answering import write_app
from conftest import SMALL, rows, summary_of
from deployed import CALMLY, HERE, call, failures, run

from fedtune.config.compose import compose
from fedtune.core.errors import DeploymentError, RunFolderError
from fedtune.runtime.local import run_local
from simulations.benchmarks.worker import figures
from simulations.fleet import Fleet, Site
from simulations.fleet.credentials import make_certificates
from simulations.fleet.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REMEMBERING = ("population.clients=2", "population.cohort=2", *mischief.WORDS)


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
        "MISCHIEF": "wait:1:2:1",
        "MISCHIEF_DONE": str(done),
        **CALMLY,
    }
    app = write_app(tmp_path_factory.mktemp("app"))
    with Fleet(tmp_path_factory.mktemp("fleet"), sites, app=app, env=environment) as fleet:
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


def words(folder, *more):
    return [*SMALL, *REMEMBERING, "runtime=flower", "runtime.wait=120", f"out={folder}", *more]


def has_done(node, number):
    return f"fedtune: round {number}, train" in node.log()


def round_is_done(folder, number):
    return len(rows(folder, "metrics.csv")) > number


def test_a_fleet_gives_the_bits_of_one_process_and_resumes_exactly(fleet, done, tmp_path):
    """The SuperLink is killed inside round 2, in which some clients have learnt already, and they remember what they
    learnt, what they left out of their answers, and the broadcast that the next will build on. Somebody tries to go on
    with other settings; then a new Flower run goes on, for a round more than was asked for at first."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    asked = ("seed=1", "codec=compeft", "codec_up.feedback=true")
    process = call(fleet, *words(folder, *asked, "rounds=2"))
    assert wait_until(lambda: round_is_done(folder, 1), 200)
    assert wait_until(lambda: has_done(fleet.nodes[0], 2), 60)
    fleet.superlink.kill()
    (done / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not round_is_done(folder, 2)
    with pytest.raises(RunFolderError, match=r"was started with other settings: .*train\.lr: 0\.001 -> 0\.5"):
        run_local(compose(words(folder, *asked, "rounds=2", "train.lr=0.5")), resume=str(folder))
    fleet.superlink.start()
    code, out = run(fleet, f"resume={folder}", "rounds=3")
    assert code == 0, out
    assert "resumed after round 1" in out
    run_local(compose([*SMALL, *REMEMBERING, f"out={whole}", *asked, "rounds=3"]))
    assert summary_of(folder)["state_sha256"] == summary_of(whole)["state_sha256"]
    assert failures(folder) == {}
    metrics = rows(folder, "metrics.csv")
    assert [row["clients"] for row in metrics] == ["0", "2", "2", "2"]
    same = ("eval_loss", "train_loss", "up_payload_bytes", "down_payload_bytes")
    for row, other in zip(metrics, rows(whole, "metrics.csv"), strict=True):
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
    # The benchmark of workers reads a node's log
    measured = figures(fleet.nodes[0].log())
    assert [number for number, *_ in measured] == [1, 2, 2, 3]
    assert all(seconds >= 0 for _, *times in measured for seconds in times)
