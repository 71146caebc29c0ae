"""A run folder as arrays: the numbers are those of its files, and no file can be too damaged to be left out."""

import csv
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.config.compose import load
from fedtune.core.errors import RunFolderError
from fedtune.runs import csv_columns as tables
from fedtune.runs.metrics_columns import CLOCK, METRICS
from fedtune.runs.read import find, read
from fedtune.runs.run_folder import RunFolder
from simulations.benchmarks import report as benchmark

FILES = ("metrics.csv", "ledger.csv", "clock.csv", "clients.csv", "summary.json")


@pytest.fixture
def made(shared_run, tmp_path):
    """A copy of a finished run, with the tables of unequal devices and of clients' own models beside it."""
    folder = tmp_path / "made"
    shutil.copytree(shared_run("method=fedit", rounds=3), folder)
    lines = [f"{r},{p},0.0,pi,1,2,3,4,5,{memory},8e9,16,4,2,2,10,0," for r, p, memory in
             [(1, 0, 100.5), (2, 1, 300.0), (3, 0, 200.0), (4, 0, 999.0)]]  # fmt: skip
    (folder / "clock.csv").write_text("\n".join([",".join(CLOCK), *lines, ""]))
    (folder / "clients.csv").write_text(
        "round,peer,eval_loss,eval_accuracy,tokens\n2,0,9,0.1,5\n3,1,2.5,0.5,7\n3,0,2.25,,7\n4,0,1,1,7\n"
    )
    return folder


def test_what_is_read_is_what_the_files_say(shared_run):
    folder = shared_run("method=fedit", rounds=3)
    run = read(folder)
    metrics, ledger = rows(folder, "metrics.csv"), rows(folder, "ledger.csv")
    assert run.status == "finished"
    assert (run.error, run.notes, run.clients) == (None, (), None)
    assert run.experiment == load((folder / "config.yaml").read_text())
    assert run.rounds.tolist() == [0, 1, 2, 3]
    for name in METRICS:
        expected = [float(row[name]) if row[name] else math.nan for row in metrics]
        np.testing.assert_array_equal(run.metrics[name], expected)
    for kind, found in (("wire_bytes", run.wire), ("payload_bytes", run.payload)):
        sums = defaultdict(lambda: [0] * 4)
        for row in ledger:
            sums[row["direction"], row["part"]][int(row["round"])] += int(row[kind])
        assert {key: sizes.tolist() for key, sizes in found.items()} == sums
    for way in ("up", "down"):
        sent = [sum(int(row["wire_bytes"]) for row in ledger if row["direction"] == way and int(row["round"]) <= r)
                for r in range(4)]  # fmt: skip
        assert run.spent(way).tolist() == sent
    np.testing.assert_array_equal(run.spent(), run.spent("up") + run.spent("down"))
    took = [sum(float(row["seconds"]) for row in metrics[: r + 1]) for r in range(4)]
    np.testing.assert_allclose(run.seconds(), took)
    assert not run.is_virtual
    assert run.memory_bytes == json.loads((folder / "summary.json").read_text())["memory_bytes"]


def test_measuring_costs_nothing_and_the_virtual_clock_comes_first(made):
    """Down: 1000 B in round 2 that only measure are in `wire` and not in what is spent. The clock shows nothing at
    round 0, then 4, 4 (a round that nobody answered has no line) and 9."""
    before = read(made).spent()
    ledger = (made / "ledger.csv").read_text()
    (made / "ledger.csv").write_text(ledger + "2,0,down,evaluate,900,1000,77,0.1\n")
    lines = list(csv.reader((made / "metrics.csv").open()))
    at = lines[0].index("virtual_seconds")
    for line, shown in zip(lines[1:], ("", "4.0", "", "9.0"), strict=True):
        line[at] = shown
    (made / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    run = read(made)
    assert run.wire["down", "evaluate"].tolist() == [0, 0, 1000, 0]
    np.testing.assert_array_equal(run.spent(), before)
    assert run.is_virtual
    assert run.seconds().tolist() == [0, 4, 4, 9]


def test_clients_and_memory_are_those_of_rounds_that_ended(made):
    """Round 4 has no line in metrics.csv, so the last scores are round 3's, and 300 B the most memory."""
    run = read(made)
    assert run.clients is not None
    assert run.clients.round == 3
    assert run.clients.peers.tolist() == [0, 1]
    assert run.clients.loss.tolist() == [2.25, 2.5]
    np.testing.assert_array_equal(run.clients.accuracy, [math.nan, 0.5])
    assert run.memory_bytes == 300
    (made / "clock.csv").unlink()
    summary = json.loads((made / "summary.json").read_text())
    for told, expected in ((512, 512.0), ("much", math.nan), (True, math.nan), (-1, math.nan)):
        (made / "summary.json").write_text(json.dumps(summary | {"memory_bytes": told}))
        np.testing.assert_equal(read(made).memory_bytes, expected)


def test_a_round_that_did_not_end_does_not_count(made):
    lines = (made / "metrics.csv").read_text().splitlines(keepends=True)
    whole = read(made)
    (made / "metrics.csv").write_text("".join(lines[:3]) + lines[3][:20])
    run = read(made)
    assert run.rounds.tolist() == [0, 1]
    np.testing.assert_array_equal(run.spent(), whole.spent()[:2])
    assert "metrics.csv: the last line is cut off" in run.notes
    assert any(note.startswith("ledger.csv: ") and "rounds that didn't end" in note for note in run.notes)


def test_bytes_that_nobody_knows_are_not_0(made):
    """The ledger ends in round 2: what had been spent by then and later isn't known."""
    kept = [line for line in (made / "ledger.csv").read_text().splitlines() if not line.startswith(("2,", "3,"))]
    (made / "ledger.csv").write_text("\n".join([*kept, "2,0,down,train,5,6,0,0.1", ""]))
    run = read(made)
    assert np.isfinite(run.spent()).tolist() == [True, True, False, False]
    assert any("their bytes are unknown" in note for note in run.notes)
    (made / "ledger.csv").unlink()
    assert not np.isfinite(read(made).spent()).any()


def test_columns_of_other_versions(made):
    """One that isn't known is a column all the same; one that isn't there is empty, and so are cells that are no
    numbers."""
    lines = [line.split(",") for line in (made / "metrics.csv").read_text().splitlines()]
    at = lines[0].index("virtual_seconds")
    for place, line in enumerate(lines):
        line[at] = ["rouge", "nan", "0.25", "inf", "many"][place]
    (made / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    run = read(made)
    np.testing.assert_array_equal(run.metrics["rouge"], [math.nan, 0.25, math.nan, math.nan])
    assert np.isnan(run.metrics["virtual_seconds"]).all()
    assert not run.is_virtual


@pytest.mark.parametrize("content", [b"", b"round", b"\xff\xfe\x00\n\n", b"peer,part\n1,train\n", b'"a\n"b,"\n'])
def test_files_of_garbage(made, content):
    for name in FILES:
        (made / name).write_bytes(content)
    run = read(made)
    assert run.status == "cut off"
    assert len(run.rounds) == len(run.spent()) == len(run.seconds()) == 0
    assert "summary.json can't be read" in run.notes
    for name in FILES:
        (made / name).unlink()
    assert read(made).notes == ("summary.json is missing",)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES), share=st.floats(0, 1), garbage=st.sampled_from([b"", b"\xff", b'"', b",,\n", b"\0\n"])
)
def test_a_file_that_is_cut_off_anywhere_is_read_up_to_there(made, name, share, garbage):
    """Every round that is still there has the numbers of the whole file, or NaN where a number can't be known."""
    path, content = made / name, (made / name).read_bytes()
    whole = read(made)
    try:
        path.write_bytes(content[: int(share * len(content))] + garbage)
        run = read(made)
    finally:
        path.write_bytes(content)
    count = len(run.rounds)
    assert run.rounds.tolist() == list(range(count))
    assert count == 4 or name == "metrics.csv"
    for column in METRICS:
        np.testing.assert_array_equal(run.metrics[column], whole.metrics[column][:count])
    known = np.isfinite(run.spent())
    np.testing.assert_array_equal(run.spent()[known], whole.spent()[:count][known])
    assert known.all() or name == "ledger.csv"
    assert run.status in ("finished", "cut off")
    assert math.isnan(run.memory_bytes) or run.memory_bytes <= 300 or run.memory_bytes == run.summary["memory_bytes"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(share=st.floats(0, 1))
def test_a_config_that_is_cut_off_is_no_run_or_a_run(made, share):
    content = (made / "config.yaml").read_bytes()
    try:
        (made / "config.yaml").write_bytes(content[: int(share * len(content))])
        assert read(made).rounds.tolist() == [0, 1, 2, 3]
    except RunFolderError as error:
        assert "config" in str(error)  # noqa: PT017
    finally:
        (made / "config.yaml").write_bytes(content)


STRANGE = {
    "asks by its name": (lambda text: text.replace("name: run", "name: ${oc.env:SECRET}"), "'name' has"),
    "asks elsewhere": (
        lambda text: text.replace("targets: null", "targets: ['${oc.env:SECRET}']"),
        "'adapter.targets'",
    ),
    "a number of 5,000 digits": (lambda text: text.replace("seed: 0", f"seed: {'7' * 5000}"), "can't be read"),
    "brackets that end the parser": (lambda text: "[" * 60_000, "deeper than 50 levels"),
}


@pytest.mark.parametrize(("change", "part"), STRANGE.values(), ids=STRANGE)
def test_a_strangers_config_looks_nothing_up_and_ends_nothing(made, monkeypatch, change, part):
    monkeypatch.setenv("SECRET", "hunter2")
    text = (made / "config.yaml").read_text()
    (made / "config.yaml").write_text(change(text))
    with pytest.raises(RunFolderError) as caught:
        read(made)
    assert part in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_fast_way_and_the_careful_way_agree(made, monkeypatch):
    """A ledger of 20,000 lines takes the first, the same with one line of garbage the second."""
    entries = (made / "ledger.csv").read_text().splitlines()[1:]
    header = "round,peer,direction,part,payload_bytes,wire_bytes,overhead_bytes,seconds"
    text = "\n".join([header, *(entries * (20_000 // len(entries))), ""])
    (made / "ledger.csv").write_text(text)
    fast = read(made)
    (made / "ledger.csv").write_text(text + "1,0,down,train,garbage,1,0,0.5\n1,0,down\n1,0,up,train,-5,1,0,0.5\n")
    careful = read(made)
    monkeypatch.setattr(tables, "SMALL", 0)
    (made / "ledger.csv").write_text(text)
    assert fast.notes == ()
    assert careful.notes == ("ledger.csv: 3 lines can't be read",)
    for run in (careful, read(made)):
        assert run.wire.keys() == fast.wire.keys()
        for key, sizes in run.wire.items():
            np.testing.assert_array_equal(sizes, fast.wire[key])


def test_runs_of_one_kind_keep_what_is_their_own(shared_run):
    """Settings that runs share are looked at once; seed, name and folder are each one's own."""
    found = [read(shared_run(f"seed={seed}", f"name=run{seed}", rounds=1)) for seed in (3, 4)]
    for seed, run in zip((3, 4), found, strict=True):
        assert (run.experiment.seed, run.experiment.name) == (seed, f"run{seed}")
        assert run.experiment == load((run.path / "config.yaml").read_text())


def test_runs_are_found_below_and_not_in_runs(tmp_path):
    for name in ("out/a/seed-0", "out/a/seed-0/start", "out/tune/a", "out/.hidden/a", "other/tune/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("seed: 0")
    (tmp_path / "out" / "comparison.json").write_text("{}")
    out, other = tmp_path / "out", tmp_path / "other"
    assert find([out]) == [out / "a" / "seed-0"]
    assert find([other, out / "a" / "seed-0", out]) == [other / "tune" / "b", out / "a" / "seed-0"]
    assert find([out / "tune"]) == [out / "tune" / "a"]


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, why in (("nowhere", "doesn't exist"), ("empty", "holds no run"), ("file", "is a file")):
        with pytest.raises(RunFolderError, match=f"{path} {why}"):
            find([tmp_path / path])
    with pytest.raises(RunFolderError, match="holds no run"):
        read(Path(tmp_path / "empty"))
    RunFolder(tmp_path / "empty").close()
    for content in ("seed: [1]", "a: 1", "method: {strategy: {}}", "- 1", "\t", "seed: -1", "seed: ${nothing}"):
        (tmp_path / "empty" / "config.yaml").write_text(content)
        with pytest.raises(RunFolderError, match="config"):
            read(tmp_path / "empty")


@pytest.mark.slow
def test_the_benchmark_reads_what_it_made(capsys):
    benchmark.main(["runs=2", "rounds=2", "clients=3"])
    shown = capsys.readouterr().out
    assert shown.startswith("2 runs of 2 rounds with 3 clients")
    assert "reading" in shown
    assert "comparing" in shown
