"""A budget ends a run where another round like the last would go beyond it."""

import csv
import json
from pathlib import Path

import pytest
from conftest import PAIRS

from fedtune.commands.main import main
from fedtune.config.schema import BudgetSpec
from fedtune.core.errors import ConfigError
from fedtune.server.budget import Spent, ended_by

pytestmark = pytest.mark.slow

RUN = (
    "run",
    "model=tiny",
    "population.clients=4",
    "population.cohort=2",
    "train.steps=1",
    "runtime.threads=1",
    "evaluate.examples=8",
    "evaluate.exactness=false",
    f"data.path={PAIRS}",
    "data.partition=iid",
)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open() as stream:
        return list(csv.DictReader(stream))


def spent(folder: Path, until: int) -> int:
    """Wire bytes up to and with a round, from the ledger's lines."""
    lines = rows(folder, "ledger.csv")
    return sum(int(line["wire_bytes"]) for line in lines if int(line["round"]) <= until and line["part"] != "evaluate")


@pytest.mark.parametrize(
    ("limits", "spent", "ended"),
    [
        ({}, Spent(9, 10**12, 1e9, 0.0), None),
        ({"bytes": 100}, Spent(3, 75, 0, 1.0, round_bytes=25), None),
        ({"bytes": 100}, Spent(3, 76, 0, 1.0, round_bytes=25), "budget.bytes=100"),
        ({"bytes": 100}, Spent(9, 0, 0, 1.0), None),
        ({"seconds": 2.5}, Spent(1, 0, 1.5, round_seconds=1.0), None),
        ({"seconds": 2.5}, Spent(1, 0, 1.6, round_seconds=1.0), "budget.seconds=2.5"),
        ({"loss": 1.0}, Spent(1), None),
        ({"loss": 1.0}, Spent(1, loss=1.01), None),
        ({"loss": 1.0}, Spent(1, loss=1.0), "budget.loss=1"),
        ({"loss": 1.0, "rounds": 3}, Spent(2, loss=0.5), None),
        ({"loss": 1.0, "rounds": 3}, Spent(3, loss=0.5), "budget.loss=1"),
    ],
)
def test_which_limit_ends_a_run(limits, spent, ended):
    assert ended_by(BudgetSpec(**limits), spent) == ended


@pytest.mark.parametrize("limits", [{"bytes": 0}, {"seconds": -1.0}, {"loss": 0.0}, {"rounds": -1}])
def test_limits_that_make_no_sense(limits):
    with pytest.raises(ConfigError, match=rf"budget\.{next(iter(limits))}"):
        BudgetSpec(**limits)


def test_a_run_ends_when_its_bytes_are_spent_and_goes_on_with_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A round costs about 49 kB here, and 120 kB have room for two. With a larger budget the run goes on to the bits of
    one that never stopped."""
    out = tmp_path / "run"
    assert main([*RUN, "rounds=9", "budget.bytes=120e3", f"out={out}"]) == 0
    last = int(rows(out, "metrics.csv")[-1]["round"])
    assert 0 < last < 9
    assert spent(out, last) <= 120e3 < 2 * spent(out, last) - spent(out, last - 1)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["ended_by"]) == ("finished", "budget.bytes=120000")
    assert f"ended after round {last} of 9: budget.bytes=120000 has no room for another" in capsys.readouterr().out
    assert main(["run", f"resume={out}"]) == 0
    assert int(rows(out, "metrics.csv")[-1]["round"]) == last, "nothing is left to spend"
    assert main(["run", f"resume={out}", "budget.bytes=null", "rounds=4"]) == 0
    assert main([*RUN, "rounds=4", f"out={tmp_path / 'whole'}"]) == 0
    states = [json.loads((folder / "summary.json").read_text())["state_sha256"] for folder in (out, tmp_path / "whole")]
    assert states[0] == states[1]


def test_a_run_ends_by_the_virtual_clock_and_by_its_loss(tmp_path: Path):
    timed, good = tmp_path / "timed", tmp_path / "good"
    assert main([*RUN, "rounds=9", "population=mixed", f"out={tmp_path / 'all'}"]) == 0
    every = rows(tmp_path / "all", "metrics.csv")
    clock = [float(row["virtual_seconds"] or 0) for row in every]
    ends = next(n for n in range(1, 9) if 2 * clock[n] - clock[n - 1] > clock[4])
    limit = clock[4]
    assert main([*RUN, "rounds=9", "population=mixed", f"budget.seconds={limit}", f"out={timed}"]) == 0
    assert [row["virtual_seconds"] for row in rows(timed, "metrics.csv")] == [
        row["virtual_seconds"] for row in every[: ends + 1]
    ]
    loss = float(every[2]["eval_loss"])
    assert main([*RUN, "rounds=9", "population=mixed", f"budget.loss={loss}", f"out={good}"]) == 0
    first = next(int(row["round"]) for row in every if float(row["eval_loss"]) <= loss)
    assert int(rows(good, "metrics.csv")[-1]["round"]) == first


def test_a_run_without_limited_devices_says_what_memory_a_turn_takes(tmp_path: Path):
    assert main([*RUN, "rounds=1", f"out={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["memory_bytes"] > 1e6
