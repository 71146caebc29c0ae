"""A cell, a line or a setting that a disk or a hand spoilt: a line on the page says so, and nothing else changes."""

import csv
import io
import shutil
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedtune.comparisons.plan import PlannedRun
from fedtune.comparisons.play import is_done
from fedtune.comparisons.state import now
from fedtune.core.errors import ConfigError, RunFolderError
from fedtune.report.comparison import load, write_results
from fedtune.report.page import lay_out, render
from fedtune.report.serve import Watch
from fedtune.runs.read import read

CELLS = (
    "", "nan", "-1", "1e308", "-1e308", "inf", "1e20", "9" * 20, "9" * 5000, "abc", "=1+1", "\0", "é", "1e-320", '"',
)  # fmt: skip
NOT_UTF8 = {
    "bytes": lambda text: b"\xff\xfe" + text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("name: ", "name: \xe9", 1).encode("latin-1"),
}


@pytest.fixture
def made(shared_run, tmp_path):
    """Two copies of a run, as two seeds; the first may be spoilt."""
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        shutil.copytree(shared_run("method=fedit", rounds=3), folder, ignore=shutil.ignore_patterns("checkpoint"))
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    (tmp_path / "seed-0" / "clients.csv").write_text(
        "round,peer,eval_loss,eval_accuracy,tokens\n3,0,2.25,0.5,7\n3,1,2.5,0.5,7\n"
    )
    return tmp_path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(name="metrics.csv", column=4, line=1, cell="-1")  # seconds: a logarithm of less than nothing
@example(name="metrics.csv", column=1, line=1, cell="1e308")
@example(name="metrics.csv", column=10, line=1, cell="9" * 20)
@example(name="ledger.csv", column=5, line=20, cell="1e308")
@given(
    name=st.sampled_from(("metrics.csv", "ledger.csv", "clients.csv")),
    column=st.integers(0, 21),
    line=st.integers(1, 20),
    cell=st.sampled_from(CELLS),
)
def test_a_damaged_cell_spoils_no_page_and_no_other_run(made, name, column, line, cell):
    """No warning of NumPy's either: what overflows has spoilt a number."""
    path, content = made / "seed-0" / name, (made / "seed-0" / name).read_text()
    lines = list(csv.reader(io.StringIO(content)))
    row = lines[1 + (line - 1) % (len(lines) - 1)]
    row[column % len(row)] = cell
    whole = read(made / "seed-1")
    try:
        path.write_text("".join(",".join(cells) + "\n" for cells in lines))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = load([made])
            lay_out(found)
            write_results(found, made / "report")
    finally:
        path.write_text(content)
    (entry,) = found.groups[0].entries
    assert entry.runs[1].metrics["eval_loss"].tolist() == whole.metrics["eval_loss"].tolist()
    assert entry.runs[1].spent().tolist() == whole.spent().tolist()
    if name == "metrics.csv" and cell in ("abc", "1e308") and column:
        assert any("metrics.csv: 1 cell can't be read" in note for note in found.notes)


def test_a_direction_that_nobody_knows_costs_nothing_and_is_said(made):
    """5000 bytes that go sideways aren't spent; a line whose direction was spoilt is missed, as metrics.csv has it."""
    path, before = made / "seed-0" / "ledger.csv", read(made / "seed-0").spent()
    content = path.read_text()
    path.write_text(content + "2,0,sideways,train,5000,5000,0,0.1\n")
    run = read(made / "seed-0")
    assert run.spent().tolist() == before.tolist()
    assert run.notes == ("ledger.csv: left out what goes neither up nor down, in 1 of its lines",)
    path.write_text(content.replace("3,0,up,", "3,0,u\x1bp,").replace("3,1,up,", "3,1,u\x1bp,"))
    run = read(made / "seed-0")
    assert "ledger.csv lacks messages up of 1 rounds: their bytes are unknown" in run.notes
    assert run.spent()[:3].tolist() == before[:3].tolist()
    assert "left out what goes neither up nor down" in render(load([made]))


@pytest.mark.parametrize("encode", NOT_UTF8.values(), ids=NOT_UTF8)
def test_a_config_that_is_not_utf8_is_one_line(made, encode):
    """In a report, on the page that is served, and when a comparison comes by it again."""
    path = made / "seed-0" / "config.yaml"
    path.write_bytes(encode(path.read_text()))
    said = f"{path} can't be read: it isn't UTF-8 text"
    with pytest.raises(RunFolderError, match="it isn't UTF-8 text"):
        read(path.parent)
    found = load([made])
    assert any(said in note for note in found.notes)
    assert [entry.seeds for entry in found.groups[0].entries] == [(1,)]
    assert b"UTF-8 text" in Watch(made, lambda folder: load([folder])).page()
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        is_done(PlannedRun("fedit", path.parent, 0, ("model=tiny",)))


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999", '"9"', "[]", "9" * 5000])
def test_what_a_summary_says_of_a_run_that_goes_on_may_be_anything(tmp_path, number):
    (tmp_path / "summary.json").write_text(f'{{"rounds": {number}, "totals": {{"up_wire_bytes": 1}}}}')
    assert now(tmp_path) is None
