"""Disks that fill up, flip bits and lose lines: a run ends with a line that says what to do, or goes on to the same
bits."""

import csv
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import rows, small, summary_of
from hypothesis import given
from hypothesis import strategies as st
from remembering import WORDS as REMEMBERING

from fedtune.config.compose import load_file
from fedtune.core.errors import ClientError, ConfigError, RunFolderError
from fedtune.runs.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fedtune.runs.run_folder import RunFolder
from fedtune.runtime.local import run_local
from fedtune.training.client_state import ClientStateStore
from strategies.fedit import State

RUN = "0" * 16
# A run that writes every table: devices with limits, dropouts, similarity, everybody's scores, memories
EVERYTHING = (
    "population.cohort=4",
    "population.dropout=0.3",
    "population.quorum=0.3",
    "evaluate.similarity=true",
    "evaluate.peers=every",
    "evaluate.examples=2",
    "train.steps=1",
    *REMEMBERING,
)
DEVICES = (
    "device,flop_per_s,read_bytes_per_s,up_bytes_per_s,down_bytes_per_s,memory_bytes\n" + 4 * "a,1e9,1e9,1e6,1e6,1e9\n"
)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of 8 MB."""
    place = tmp_path_factory.mktemp("disk")
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can't be mounted here: that takes root, and a system that lets it")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


class Filler:
    """Fills a disk at the moment when a file of that name is opened for the `left`-th time."""

    def __init__(self):
        self.left = 0
        self.name = ""
        self.ballast = None
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event != "open" or not self.left or not isinstance(arguments[0], str | Path):
            return
        if Path(arguments[0]).name.removeprefix(".").removesuffix(".unfinished") != self.name:
            return
        self.left -= 1
        if not self.left:
            with suppress(OSError), self.ballast.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1 << 16))


FILLER = Filler()  # a hook of Python's can't be taken away again


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Words for a run that writes every file, and the run that nothing befell."""
    place = tmp_path_factory.mktemp("whole")
    (place / "devices.csv").write_text(DEVICES)
    words = (*EVERYTHING, f"population.devices={place / 'devices.csv'}", "rounds=1")
    run_local(small(*words, out=place / "run"))
    return words, place / "run"


def plain(folder, name):
    """A table without what depends on how fast this machine is."""
    return [
        {key: cell for key, cell in row.items() if "seconds" not in key or key.startswith("virtual")}
        for row in rows(folder, name)
    ]


TABLES = ("metrics.csv", "ledger.csv", "failures.csv", "clients.csv", "clock.csv", "similarity.csv")


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("config.yaml", 1),
        *((table, 1) for table in TABLES),
        ("summary.json", 3),
        ("adapter_model.safetensors", 1),  # in start/
        ("adapter_model.safetensors", 3),  # in adapter/, after round 1
        ("adapter_config.json", 2),
        ("state.safetensors", 1),
        ("state.safetensors", 2),
        ("1.safetensors", 2),  # what the second client keeps
    ],
)
def test_a_disk_that_fills_at_any_file_costs_no_bits(small_disk, everything, name, time):
    """One line that names the file and the way out; with room again the run ends as one that never stopped."""
    words, whole = everything
    folder, FILLER.ballast = small_disk / "run", small_disk / "ballast"
    try:
        FILLER.name, FILLER.left = name, time
        with pytest.raises(RunFolderError) as caught:
            run_local(small(*words, out=folder))
        assert FILLER.left == 0
        said = str(caught.value)
        assert name in said
        assert "can't be written: No space left on device" in said
        assert f"fedtune run resume={folder}" in said or (name, f"out={folder}" in said) == ("config.yaml", True)
        FILLER.ballast.unlink()
        begun = (folder / "config.yaml").exists()
        run_local(small(*words, out=folder), resume=str(folder) if begun else None)
        assert summary_of(folder)["state_sha256"] == summary_of(whole)["state_sha256"]
        for table in TABLES:
            if table != "ledger.csv":  # which also has the handshakes of the resume
                assert plain(folder, table) == plain(whole, table)
    finally:
        FILLER.left = 0
        for path in small_disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_any_flipped_bit_of_a_checkpoint_is_noticed_or_makes_no_difference(tmp_path):
    """Every byte of a checkpoint, one after the other, with one of its bits flipped."""
    path = tmp_path / "state.safetensors"
    state = State({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16), "more": {"flags": [True, 3, "x"]}})
    kept = Checkpoint(7, "c0", state, RUN, progress=Progress(1.5, {"0": 0.25}), tables={"metrics.csv": [3, "ab"]})
    save_checkpoint(path, kept)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            back = load_checkpoint(path, State({}))
        except RunFolderError:
            noticed += 1
        else:
            assert repr(back) == repr(kept)
    assert noticed > 0.9 * len(whole)  # blanks at the header's end may be other blanks


@given(st.integers(0, 1 << 20), st.integers(0, 7))
def test_any_flipped_bit_of_a_memory_is_noticed(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("memory")
    memory = ClientStateStore(folder)
    for round in (1, 2):
        memory.save(RUN, 0, round, {"a": torch.arange(9.0), "turns": torch.tensor(round)})
    path = folder / RUN / "0" / "2.safetensors"
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        assert memory.load(RUN, 0, 3)["a"].tolist() == list(range(9))
    except ClientError:  # it has forgotten the turn before as well: that was of another time
        assert memory.load(RUN, 0, 3) == {}


def resume(folder, rounds=2):
    run_local(small(f"rounds={rounds}", out=folder), resume=str(folder))


@pytest.fixture
def done(shared_run, tmp_path):
    """A copy of a run of one round."""
    return Path(shutil.copytree(shared_run(rounds=1), tmp_path / "copy"))


def without(number):
    return lambda lines: lines[:number] + lines[number + 1 :]


def cell(line, column, text):
    def change(lines):
        cells = lines[line].split(",")
        cells[column] = text
        return [*lines[:line], ",".join(cells), *lines[line + 1 :]]

    return change


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("metrics.csv", without(1), "round 0 is not in it"),
        ("metrics.csv", without(2), "round 1 is not in it"),
        ("metrics.csv", without(0), "its first line should name the columns"),
        ("metrics.csv", cell(1, 1, "5.8x"), "line 2, eval_loss: expected a number, got '5.8x'"),
        ("metrics.csv", cell(2, 1, "5.5"), "lines were taken out or changed"),
        ("metrics.csv", lambda lines: [], "it is gone"),
        ("ledger.csv", without(3), "lines were taken out or changed"),
        ("ledger.csv", lambda lines: lines[:-6], "round 1 is not in it"),
        ("ledger.csv", cell(2, 2, "sideways"), "line 3, direction: expected up or down, got 'sideways'"),
        ("ledger.csv", cell(2, 1, "\ufeff0"), "line 3, client: expected a number from 0 up"),
        ("ledger.csv", lambda lines: ["\udcff", *lines], "it is no CSV in UTF-8"),
    ],
)
def test_a_table_that_is_not_what_the_run_wrote_stops_the_resume(done, name, change, why):
    path = done / name
    path.write_bytes(
        "".join(f"{line}\n" for line in change(path.read_text().splitlines())).encode(errors="surrogateescape")
    )
    if not path.stat().st_size:
        path.unlink()
    with pytest.raises(RunFolderError) as caught:
        resume(done)
    assert f"{path} is not what this run wrote up to round 1: {why}" in str(caught.value)


def test_a_table_that_is_gone_before_the_first_checkpoint_is_none(done):
    """The disk filled as the file was made, and the run was killed: an empty file is no table without a header."""
    for path in (*done.glob("*.csv"), done / "checkpoint" / "state.safetensors"):
        path.unlink()
    (done / "ledger.csv").touch()
    resume(done, rounds=1)
    with (done / "ledger.csv").open() as stream:
        assert next(csv.reader(stream))[:3] == ["round", "client", "direction"]


def test_greetings_of_a_resume_stay_in_the_ledger(done):
    """They belong to round 1, after whose checkpoint they were written."""
    resume(done)
    again = [row for row in rows(done, "ledger.csv") if row["part"] == "handshake" and row["round"] == "1"]
    assert len(again) == 8
    resume(done, rounds=3)
    assert [row for row in rows(done, "ledger.csv") if row["part"] == "handshake" and row["round"] == "1"] == again


@pytest.mark.parametrize("content", [b"name: \xff\xfe\n", "name: ü\n".encode("utf-16")])
def test_a_config_that_is_no_text_is_named(done, content):
    (done / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is no text in UTF-8 .* put back what the run wrote"):
        load_file(done / "config.yaml")


def test_one_clients_damaged_memory_costs_that_client_its_memory(small_run, tmp_path, capsys):
    """Found at the handshake of a resume: a line, and in its next turn it begins with nothing. The others go on."""
    words = (*REMEMBERING, "population.cohort=4")
    folder = small_run(*words, rounds=2)
    (path,) = (folder / "clients").glob("*/2/2.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    run_local(small(*words, "rounds=4", out=folder), resume=str(folder))
    assert "client 2 can't read what it kept: it starts anew, and is told everything" in capsys.readouterr().out
    assert rows(folder, "failures.csv") == []
    kept = {
        path.parts[-2]: ClientStateStore(folder / "clients").load(path.parts[-3], int(path.parts[-2]), 9)["turns"]
        for path in (folder / "clients").glob("*/*/4.safetensors")
    }
    assert kept == {"0": 4, "1": 4, "2": 2, "3": 4}


def test_a_memory_damaged_between_two_rounds_costs_a_turn(tmp_path):
    """The turn that finds it fails, and the next one is as a first: with what it kept before, it would be neither."""
    memory = ClientStateStore(tmp_path)
    memory.save(RUN, 4, 1, {"a": torch.ones(3)})
    memory.save(RUN, 4, 2, {"a": torch.ones(3)})
    path = tmp_path / RUN / "4" / "2.safetensors"
    path.write_bytes(b"")
    with pytest.raises(
        ClientError, match=r"client 4 can't read what it kept in .*2\.safetensors: it is damaged.* starts anew"
    ):
        memory.load(RUN, 4, 3)
    assert memory.load(RUN, 4, 3) == {}
    assert [file.name for file in path.parent.iterdir()] == ["2.damaged"]


def test_the_runs_own_disk_is_no_clients_failure(tmp_path):
    (tmp_path / "clients").write_text("")
    with pytest.raises(RunFolderError, match=r"make room, then: fedtune run resume="):
        ClientStateStore(tmp_path / "clients", tmp_path).save(RUN, 0, 1, {"a": torch.ones(1)})


def test_a_folder_that_takes_nothing_is_named_before_anything_is_loaded(done):
    (done / ".lock").unlink()
    (done / ".lock").mkdir()
    with pytest.raises(RunFolderError, match=r"resume=.* can't be written to: Is a directory"):
        RunFolder.open(str(done))
