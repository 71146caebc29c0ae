"""Who the clients are: the catalogue, its shares, files of one's own, and what reaches the server."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.compose import choices, compose, load
from fedtune.config.devices import CATALOGUE, GIB, apportion, read_devices, write_devices
from fedtune.config.population import PopulationSpec
from fedtune.core.errors import ConfigError, WireError
from fedtune.core.protocol import ClientInfo, DeviceProfile
from fedtune.planning.population import profile_of
from fedtune.wire import messages as wire
from fedtune.workspace import client_handler as turns

ROOT = Path(__file__).resolve().parent.parent
HEADER = "device,memory_bytes,flop_per_s,up_bytes_per_s,down_bytes_per_s"

limits = st.floats(min_value=1e-300, exclude_min=True) | st.just(math.inf)
capabilities = st.builds(
    DeviceProfile,
    device=st.text(max_size=64).filter(str.isprintable),
    memory_bytes=limits,
    backprop=st.booleans(),
    max_rank=limits,
    flop_per_s=limits,
    read_bytes_per_s=limits,
    up_bytes_per_s=limits,
    down_bytes_per_s=limits,
    availability=st.floats(0, 1, exclude_min=True),
)
shares = st.dictionaries(st.sampled_from(sorted(CATALOGUE)), st.floats(1e-6, 1e6), min_size=1)


def test_the_catalogue_is_what_it_says():
    """Pi 5: 4 x 2.4e9 x 2 x 4 x 2 = 153.6e9; Galaxy A55: 4 x 2.75e9 x 2 x 8 x 2 = 352e9; S24 Ultra: (3.3 x 4 + 3 x 3.2
    x 2 + 2 x 3.0 x 2) x 16 = 44.4 x 16 = 710.4; Jetsons: 67 / 4 and 170 / 4. Memory:
    LPDDR4X-4267 x 4 bytes = 17.068e9; LPDDR5 6.4e9 x 4 = 25.6e9; LPDDR5X 9.6e9 x 8 = 76.8e9."""
    reads = {name: device.peak_read_bytes_per_s for name, device in CATALOGUE.items()}
    assert reads["raspberry_pi_5"] == reads["raspberry_pi_5_4gb"] == pytest.approx(4.267e9 * 4)
    assert (reads["galaxy_a55"], reads["galaxy_s24_ultra"]) == pytest.approx((6.4e9 * 4, 9.6e9 * 8))
    peaks = {name: device.peak_flop_per_s for name, device in CATALOGUE.items()}
    assert peaks["raspberry_pi_5"] == peaks["raspberry_pi_5_4gb"] == 4 * 2.4e9 * 2 * 4 * 2
    assert peaks["galaxy_a55"] == 4 * 2.75e9 * 2 * 8 * 2
    assert peaks["galaxy_s24_ultra"] == pytest.approx((3.3 * 4 + 3 * 3.2 * 2 + 2 * 3.0 * 2) * 16e9)
    assert (peaks["jetson_orin_nano"], peaks["jetson_agx_orin"]) == (67e12 / 4, 170e12 / 4)
    for name, device in CATALOGUE.items():
        able = device.capability(0.3)
        assert device.name == name == able.device
        assert 0 < able.memory_bytes < device.memory_bytes
        assert able.flop_per_s == device.peak_flop_per_s * 0.3
        assert able.read_bytes_per_s == device.peak_read_bytes_per_s * 0.3
        assert device.up_bytes_per_s <= device.down_bytes_per_s
        assert device.source
        assert device.network


def table():
    """The catalogue as docs/devices.md has it, in Markdown."""
    rows = [
        "| Name | Device; what the peak is of | Memory, GiB | For training | Peak, TFLOP/s | Memory, GB/s | Up, "
        "MB/s | Down, MB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for device in CATALOGUE.values():
        memory, peak = device.memory_bytes / GIB, device.peak_flop_per_s / 1e12
        read, up, down = device.peak_read_bytes_per_s / 1e9, device.up_bytes_per_s / 1e6, device.down_bytes_per_s / 1e6
        cells = f"{memory:g} | {device.usable:.0%} | {peak:g} | {read:.4g} | {up:.4g} | {down:.4g}"
        rows.append(f"| `{device.name}` | {device.title} | {cells} |")
    return "\n".join(rows)


@pytest.mark.slow
def test_the_docs_have_the_catalogue():
    text = (ROOT / "docs" / "devices.md").read_text()
    assert table() in text
    for device in CATALOGUE.values():
        assert device.source in text
        assert device.network in text
    for name in choices("population"):
        spec = compose([f"population={name}"]).population
        assert f"| `{name}` | {spec.clients} |" in text


def test_the_schema_needs_no_torch():
    code = "import sys, fedtune.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_largest_remainders():
    """Of 10 clients at 5:3:1: 5.56, 3.33 and 1.11 are 5, 3 and 1, and the one that is left goes to the largest rest."""
    assert apportion({"a": 5, "b": 3, "c": 1}, 10) == {"a": 6, "b": 3, "c": 1}
    assert apportion({"b": 0.1, "a": 0.1, "c": 0.1}, 4) == {"a": 2, "b": 1, "c": 1}


@given(shares, st.integers(1, 500))
def test_all_clients_are_somebody(asked, clients):
    counts = apportion(asked, clients)
    assert sum(counts.values()) == clients
    whole = sum(asked.values())
    assert all(abs(counts[name] - clients * share / whole) < 1 + 1e-9 for name, share in asked.items())


@pytest.mark.slow
def test_who_is_which_follows_from_the_seed_alone():
    devices = {"rtx_4090": 0.25, "raspberry_pi_5": 0.75}
    words = ["population.clients=1000", "seed=1"]
    one = compose([*words, "population.devices={rtx_4090: 0.25, raspberry_pi_5: 0.75}"])
    other = replace(one, population=replace(one.population, devices=dict(reversed(devices.items()))))
    dealt = [profile_of(index, one).device for index in range(1000)]
    assert Counter(dealt) == {"raspberry_pi_5": 750, "rtx_4090": 250}
    assert dealt == [profile_of(index, other).device for index in range(1000)]
    assert dealt != [profile_of(index, replace(one, seed=2)).device for index in range(1000)]
    assert dealt != sorted(dealt)
    assert load(one.text()) == one


def test_a_list_is_taken_in_turn_and_no_devices_are_no_limits():
    experiment = compose(["population.devices=[rtx_4090, raspberry_pi_5]", "population.efficiency=0.5"])
    assert [profile_of(index, experiment).device for index in range(3)] == ["rtx_4090", "raspberry_pi_5", "rtx_4090"]
    assert profile_of(1, experiment).flop_per_s == 153.6e9 / 2
    assert profile_of(3, compose([])) == DeviceProfile()


@pytest.mark.slow
def test_the_mixes_are_what_they_say():
    mixed = compose(["population=mixed"])
    counts = Counter(profile_of(index, mixed).device for index in range(40))
    assert counts == mixed.population.devices
    own = {"[rtx_4090]": ["rtx_4090"], "{rtx_4090: 2}": {"rtx_4090": 2}, "null": None, "mine.csv": "mine.csv"}
    for word, devices in own.items():  # instead of the mix's, not beside them
        assert compose([f"population.devices={word}", "population=mixed"]).population.devices == devices
    assert compose(["population=mixed", "method=centralized"]).population.clients == 1


def test_a_csv_is_taken_in_turn_and_read_again_when_it_changed(tmp_path):
    path = tmp_path / "mine.csv"
    experiment = compose([f"population.devices={path}"])
    path.write_text(f"{HEADER},availability\ntablet,3e9,4e11,1e6,5e6,0.5\nserver,,,,,\n")
    assert profile_of(2, experiment) == profile_of(0, experiment)
    assert profile_of(0, experiment) == DeviceProfile(
        "tablet", memory_bytes=3e9, flop_per_s=4e11, up_bytes_per_s=1e6, down_bytes_per_s=5e6, availability=0.5
    )
    assert profile_of(1, experiment) == DeviceProfile("server")
    path.write_text(f"{HEADER}\nother,1e9,1e9,1e9,1e9\n")
    assert profile_of(1, experiment).device == "other"
    path.unlink()
    with pytest.raises(ConfigError, match="is no file"):
        profile_of(0, experiment)


def test_what_a_device_measured(tmp_path):
    experiment = compose(["population=measured"])
    for home in (None, tmp_path):
        with pytest.raises(ConfigError, match="run fedtune doctor"):
            profile_of(0, experiment, home)
    own = DeviceProfile("bench", memory_bytes=5e9, backprop=False)
    write_devices(tmp_path / "device.csv", [own])
    assert profile_of(7, experiment, tmp_path) == own


@given(st.lists(capabilities, min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, devices):
    path = tmp_path_factory.getbasetemp() / "round.csv"
    write_devices(path, devices)
    assert read_devices(path) == devices
    header = "device,memory_bytes,flop_per_s,read_bytes_per_s,up_bytes_per_s,down_bytes_per_s,backprop,availability"
    assert path.read_text().splitlines()[0].removesuffix(",max_rank") == header


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "sheet.csv"
    path.write_bytes(b"\xef\xbb\xbfbackprop," + HEADER.encode() + b'\r\nFALSE,"a, b",8e9, ,1,1\r\n\r\n')
    assert read_devices(path) == [DeviceProfile("a, b", 8e9, False, up_bytes_per_s=1, down_bytes_per_s=1)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "column device, memory_bytes, flop_per_s, up_bytes_per_s, down_bytes_per_s is missing: expected device,"),
        (b"device,memory_bytes,down_bytes_per_s\n", "column flop_per_s, up_bytes_per_s is missing: expected device,"),
        (f"{HEADER},backprob\n".encode(), "column 'backprob' is not known.*did you mean backprop"),
        (f"{HEADER},device\n".encode(), "column device stands there twice"),
        (f"{HEADER}\n".encode(), "has a header and no device"),
        (f"{HEADER}\na,1,1,1,1\nb,0,1,1,1\n".encode(), "line 3: memory_bytes should be a number above 0"),
        (f"{HEADER}\na,1,-2,1,1\n".encode(), "line 2: flop_per_s should be a number above 0"),
        (f"{HEADER}\na,1,1,nan,1\n".encode(), "line 2: up_bytes_per_s should be a number above 0"),
        (f"{HEADER}\na,1,1,1,fast\n".encode(), "line 2, column down_bytes_per_s: expected a number .* got 'fast'"),
        (f"{HEADER},backprop\na,1,1,1,1,maybe\n".encode(), "line 2, column backprop: expected true, false or nothing"),
        (f"{HEADER},availability\na,1,1,1,1,2\n".encode(), "line 2: availability is a share"),
        (f"{HEADER}\n{'x' * 65},1,1,1,1\n".encode(), "line 2: device should be a label of at most 64"),
        (f"{HEADER}\na,1,1\n".encode(), "line 2: expected 5 cells, as the header has, got 3"),
        (f'{HEADER}\n"a,1,1,1,1\n'.encode(), "no CSV"),
        (b"\xff\xfe" + HEADER.encode(), "is no text in UTF-8"),
        (b"x" * 10_000_001, "more than 10,000,000 bytes"),
    ],
)
def test_a_csv_that_is_wrong_is_refused_by_line_and_column(tmp_path, content, said):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_devices(path)
    with pytest.raises(ConfigError, match="is no file"):
        read_devices(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["population.devices={rtx_490: 1}"], ["'rtx_490' is not known", "did you mean rtx_4090", "docs/devices.md"]),
        (["population.devices=[raspbery_pi_5]"], ["did you mean raspberry_pi_5"]),
        (["population.devices={rtx_4090: 0}"], ["the share of rtx_4090 should be a number above 0, got 0"]),
        (["population.devices={rtx_4090: -1}"], ["got -1"]),
        (["population.devices={rtx_4090: many}"], ["got 'many'"]),
        (["population.devices={rtx_4090: nan}"], ["got nan"]),
        (["population.devices={rtx_4090: inf}"], ["got inf"]),
        (["population.devices={rtx_4090: true}"], ["got True"]),
        (["population.devices=[]"], ["names no device"]),
        (["population.devices={}"], ["names no device"]),
        (["population.devices=rtx_4090"], ["population.devices=[rtx_4090]"]),
        (["population.devices=mesured"], ["did you mean measured?"]),
        (["population.devices=3"], ["population.devices=3: expected"]),
        (["population.efficiency=0"], ["population.efficiency=0.0 must be above 0 and at most 1"]),
        (["population.efficiency=1.5"], ["population.efficiency=1.5"]),
        (["population.deadline=0"], ["population.deadline=0.0 must be above 0"]),
        (["population.straggler=drop"], ["population.straggler=drop", "set population.deadline"]),
        (["population.straggler=partial"], ["set population.deadline"]),
        (["population.straggler=weit"], ["did you mean wait?"]),
        (["population.dropout=1"], ["population.dropout=1.0 must be a fraction"]),
        (["population.selection=speed"], ["population.selection=speed is not known"]),
        (["population.candidates=12"], ["population.candidates=12 means nothing to population.selection=uniform"]),
        (["population.selection=power_of_choice", "population.candidates=9"], ["at least the cohort (10)"]),
        (["population.selection=power_of_choice", "population.candidates=21"], ["population.clients=20"]),
        (["population.tiers=0"], ["population.tiers=0 is too small"]),
        (["population.selection=speed_tier", "population.tiers=21"], ["more groups than there are clients"]),
    ],
)
def test_a_population_that_is_none_is_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        compose(words)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.slow
def test_rounds_of_unequal_clients_are_set():
    words = ["population.straggler=drop", "population.deadline=60", "population.selection=power_of_choice"]
    experiment = compose([*words, "population.dropout=0.1"])
    assert experiment.population.drawn == 20
    assert load(experiment.text()) == experiment
    assert PopulationSpec(clients=100, cohort=8).drawn == 16
    assert PopulationSpec(clients=100, cohort=8, selection="power_of_choice", candidates=30).drawn == 30
    assert PopulationSpec(clients=10, cohort=8).drawn == 10
    pooled = compose([*words, "population.candidates=15", "method=centralized"]).population
    assert (pooled.selection, pooled.candidates) == ("uniform", None)


def test_what_the_owner_declares_goes_first_key_by_key():
    assigned = CATALOGUE["raspberry_pi_5"].capability(0.3)
    declared = {"partition-id": 3, "device": "bench Pi", "memory-bytes": 6_000_000_000, "availability": 0.5}
    able = turns.capability_of(declared, assigned)
    assert able == replace(assigned, device="bench Pi", memory_bytes=6_000_000_000, availability=0.5)
    assert turns.capability_of({"partition-id": 3}) == DeviceProfile()
    for wrong in ({"memory-bytes": math.nan}, {"availability": 1.5}, {"device": 5}, {"flop-per-s": "fast"}):
        with pytest.raises(ConfigError, match="--node-config"):
            turns.capability_of(declared | wrong, assigned)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["[jetson_orin_nano]", "measured"])
def test_a_client_greets_as_what_it_was_assigned(tmp_path, monkeypatch, devices):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    write_devices(tmp_path / "device.csv", [DeviceProfile("mine", 1e9)])
    experiment = compose(["model=tiny", "population.clients=2", "data.partition=iid", f"population.devices={devices}"])
    node = {"partition-id": 1, "up-bytes-per-s": 9.0}
    reply = turns.handle_message("query", "0", RecordDict(), {"config": experiment.text()}, node).content
    layout = turns.workspace_of({"config": experiment.text()}).model.layout.sha256
    peer = wire.unpack_greeting(reply, 2, layout)
    assert peer.capability == replace(profile_of(1, experiment, tmp_path), up_bytes_per_s=9.0)


@given(capabilities)
def test_a_greeting_carries_all_of_it(able):
    peer = ClientInfo(2, 10, able)
    assert wire.unpack_greeting(wire.pack_greeting(peer, "x"), 4, "x") == peer


@pytest.mark.parametrize(
    "hostile",
    [
        {"device": "x" * 65},
        {"device": "a\x1b[2J"},
        {"device": b"pi"},
        {"device": 7},
        {"device": ["a"]},
        {"availability": 0.0},
        {"availability": 1.01},
        {"availability": math.nan},
        {"availability": math.inf},
        {"availability": True},
        {"memory_bytes": math.nan},
        {"flop_per_s": -math.inf},
        {"up_bytes_per_s": "x" * 10**6},
        {"down_bytes_per_s": [1.0]},
    ],
)
def test_a_greeting_that_lies_is_refused(hostile):
    record = {"index": 0, "samples": 1, "layout": "x", **hostile}
    with pytest.raises(WireError, match=next(iter(hostile))) as caught:
        wire.unpack_greeting(RecordDict({"greeting": ConfigRecord(record)}), 4, "x")
    assert len(str(caught.value)) < 400
