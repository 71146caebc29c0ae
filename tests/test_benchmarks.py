"""Benchmarks and tools of simulations/ that have no file of their own here run from end to end, at a tiny size; their
figures are for a quiet machine."""

import re

import pytest
import torch
from conftest import SMALL, small

from fedtune.runtime.local import run_local
from fedtune.workspace.workspace import Workspace
from simulations import family, picture
from simulations.benchmarks import cohort, costs


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Those of the other tests stay."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_a_picture_is_drawn_of_a_run(shared_run, tmp_path):
    picture.draw(shared_run(), tmp_path / "new" / "run.svg")
    assert "held-out" in (tmp_path / "new" / "run.svg").read_text(encoding="utf-8").replace("&#160;", " ")


@pytest.mark.slow
def test_cohorts_are_measured_beside_clients_one_by_one(tmp_path, capsys):
    rows = cohort.measure(Workspace(small(out=tmp_path)), 3, [1, 3], steps=1, repeats=1)
    assert [row.way for row in rows] == ["padded", "1", "3"]
    assert all(row.loss == pytest.approx(rows[0].loss, rel=1e-5) for row in rows)
    assert rows[1].loss == rows[2].loss
    asked = ["--clients", "2", "--sizes", "2", "--steps", "1", "--repeats", "1"]
    cohort.main([*asked, *SMALL, "population.cohort=2", "population.clients=20"])
    assert "times padded" in re.sub(r"[\s│┃]+", " ", capsys.readouterr().out)


@pytest.mark.slow
def test_the_family_is_one_table(tmp_path, capsys, forking):
    run_local(small("rounds=1", out=tmp_path / "fedit"))  # what is finished isn't run again
    assert family.main(["methods=fedit,flora", f"out={tmp_path}", *SMALL, "rounds=1"]) == 0
    told = capsys.readouterr()
    assert "[2/2] flora" in told.err
    assert "[1/2]" not in told.err
    assert re.search(r"^\| `fedit` \| \d+\.\d \| \d+\.\d \| ", told.out, re.MULTILINE)
    assert "| `flora` | " in told.out


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_costs_are_predicted_beside_what_is_measured(quantization, short_smollm2, capsys):
    setting = costs.Setting(1, 16, quantization, costs.QV, 1, 4)
    found = costs.measure(setting, 1, str(short_smollm2))
    assert all(value > 0 for value in found.values())
    costs.report([setting], 1, {"flop_per_s": 1e10, "read_bytes_per_s": 1e9}, lambda place: found)
    assert re.search(r"worst: memory \d+%, time \d+%", capsys.readouterr().out)
