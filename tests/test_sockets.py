"""What really crosses the sockets of a deployment: all bytes, hostile ones, and very many."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bulky
import mischief
import psutil
import pytest
from conftest import SMALL, rows, summary_of
from deployed import failures, run
from flwr.cli.build import build_fab_from_disk

from fedtune.config import compose
from fedtune.flower import Run, content_to_bytes
from fedtune.framing import Link
from fedtune.party import Party
from fedtune.protocol import Peer
from fedtune.runtime.local import run_local
from fedtune.wire import pack_greeting
from simulations.fleet import Fleet, Site
from simulations.fleet.credentials import make_node_key
from simulations.fleet.processes import wait_until
from simulations.fleet.runs import LINK
from simulations.proxy import CountingProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
MEGABYTES = 500


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A secure fleet of two nodes that reach the SuperLink through a proxy each."""
    environment = {"PYTHONPATH": str(HERE), "MEGABYTES": str(MEGABYTES)}
    with Fleet(tmp_path_factory.mktemp("fleet"), [], app=HERE.parent, env=environment) as fleet:
        target = ("127.0.0.1", fleet.superlink.port)
        with CountingProxy(target) as one, CountingProxy(target) as two:
            fleet.proxies = [one, two]
            for index, proxy in enumerate(fleet.proxies):
                fleet.add(Site(f"site-{index}", superlink=f"127.0.0.1:{proxy.port}")).start()
            yield fleet


def words(folder, clients, *more):
    population = [f"population.clients={clients}", f"population.cohort={clients}", "population.quorum=0.3"]
    return [*SMALL, *population, "runtime=flower", "runtime.threads=1", "runtime.wait=120", f"out={folder}", *more]


def test_the_ledger_is_what_crossed_the_sockets(fleet, tmp_path):
    """Two nodes, three rounds of 0.15 MB each way over TLS: wire and framing bytes together are within 2 % of what two
    proxies counted, once the app bundle and the way to the first message are added, which no round causes."""
    folder = tmp_path / "run"
    before = [(proxy.up, proxy.down) for proxy in fleet.proxies]
    code, out = run(fleet, *words(folder, 2, "adapter.rank=24", "adapter.targets=[all-linear]", "rounds=3"))
    assert code == 0, out
    counted = sum(proxy.up + proxy.down for proxy in fleet.proxies) - sum(map(sum, before))
    bundle = len(build_fab_from_disk(HERE.parent))
    link = Link(tls=True, host=fleet.proxies[0].address)
    joined = sum(link.join(node.node_id, Run.create_empty(1), bundle).total for node in fleet.nodes)
    totals = summary_of(folder)["totals"]
    wire = totals["up_wire_bytes"] + totals["down_wire_bytes"]
    booked = wire + totals["framing_bytes"]
    print(
        f"{counted=} {joined=} {wire=} framing={totals['framing_bytes']} off by {(booked + joined) / counted - 1:+.4f}"
    )
    assert abs(booked + joined - counted) < 0.02 * (counted - joined)
    assert sum(int(row["framing_bytes"]) for row in rows(folder, "ledger.csv")) == totals["framing_bytes"]
    assert {row["part"] for row in rows(folder, "ledger.csv")} == {"handshake", "train", "idle"}


def test_a_node_that_does_not_play_by_the_rules_changes_nothing(fleet, tmp_path, monkeypatch):
    """What it sends is late, doubled, forged, malformed or NaN; the result is to the bit that of a run in which its
    client just raises."""
    folder = tmp_path / "run"
    more = (*mischief.WORDS, "rounds=4")
    experiment = compose([*words(folder, 3, *more)])
    party = Party(experiment)
    greeting = tmp_path / "greeting"
    greeting.write_bytes(content_to_bytes(pack_greeting(Peer(2, party.samples(2)), party.model.layout.sha256)))
    fleet.flwr("supernode", "register", str(make_node_key(tmp_path / "key")), LINK)
    command = [sys.executable, str(HERE / "rogue.py"), fleet.superlink.address, str(fleet.authority)]
    log = tmp_path / "rogue.log"
    with log.open("w") as stream:
        rogue = subprocess.Popen(
            [*command, str(tmp_path / "key"), str(greeting)], stdout=stream, stderr=stream, env={**os.environ, **PATHS}
        )
    try:
        assert wait_until(lambda: "SuperNode ID" in log.read_text(), 30), log.read_text()
        code, out = run(fleet, *words(folder, 3, *more, "runtime.timeout=25"))
    finally:
        rogue.send_signal(signal.SIGTERM)
        rogue.wait(20)
    assert code == 0, out + log.read_text()
    lost = failures(folder)
    assert lost.keys() == {(1, 2), (2, 2), (3, 2), (4, 2)}
    assert "values that are not finite" in lost[1, 2]
    assert "its reply can't be unpacked" in lost[2, 2]
    assert lost[3, 2] == "no reply within 25 s"
    assert "expected a record 'payload'" in lost[4, 2]
    told = log.read_text()
    assert told.count("refused") >= 2  # by the SuperLink: in another's name, and to nobody
    monkeypatch.setenv("MISCHIEF", " ".join(f"raise:0:{round}:2" for round in (1, 2, 3, 4)))
    population = ["population.clients=3", "population.cohort=3", "population.quorum=0.3"]
    run_local(compose([*SMALL, *population, *more, f"out={tmp_path / 'local'}"]))
    assert summary_of(folder)["state_sha256"] == summary_of(tmp_path / "local")["state_sha256"]


PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


class Peaks(threading.Thread):
    """The most memory that each part of a fleet held, in bytes, all its processes together."""

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.fleet = fleet
        self.most = {}
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.25):
            for process in psutil.process_iter():
                try:
                    mark = process.environ().get("FEDTUNE_FLEET", "")
                    if mark.startswith(f"{self.fleet.mark}/"):
                        name = " ".join(process.cmdline()[:4])
                        name = next((known for known in PARTS if known in name), "other")
                        self.most[name] = max(self.most.get(name, 0), process.memory_info().rss)
                except psutil.Error:
                    continue


PARTS = ("flower-superlink", "flwr-serverapp", "flower-supernode", "flwr-clientapp", "fedtune.runtime.worker")


def test_half_a_gigabyte_passes_each_way(fleet, tmp_path):
    """One client is sent 500 MB and sends them back, in 5 MB objects. Each process holds a few copies, not many."""
    folder = tmp_path / "run"
    peaks = Peaks(fleet)
    peaks.start()
    begun = time.monotonic()
    code, out = run(fleet, *words(folder, 2, *bulky.WORDS, "population.cohort=1", "rounds=1"), seconds=500)
    seconds = time.monotonic() - begun
    peaks.done.set()
    assert code == 0, out
    (up,) = [row for row in rows(folder, "ledger.csv") if row["direction"] == "up" and row["part"] == "train"]
    assert int(up["payload_bytes"]) > MEGABYTES * 1_000_000
    print(f"{seconds:.0f} s,", {name: f"{most / 1e9:.2f} GB" for name, most in sorted(peaks.most.items())})
    for name, most in peaks.most.items():
        assert most < 5e9, name
