"""simulations/race.py on the toy model: both methods run, the table's figures are those of the run folders."""

import pytest
from conftest import PAIRS

from simulations import race


@pytest.mark.slow
def test_a_race_of_two_rounds(tmp_path, capsys, monkeypatch):
    words = [
        "model=tiny",
        f"data.path={PAIRS}",
        "data.partition=iid",
        "train.lr=5e-3",
        "adapter.targets=null",
        "population.clients=8",
        "population.cohort=4",
    ]
    monkeypatch.setattr("sys.argv", ["race", *words, f"out={tmp_path}", "rounds=2", "seeds=0,1"])
    race.main()
    said = capsys.readouterr().out
    for seed in (0, 1):
        rows = race.table(tmp_path / f"fedit-{seed}", "metrics.csv")
        assert [row["round"] for row in rows] == ["0", "1", "2"]
        assert f"{float(rows[2]['eval_loss']):.4f}" in said
        assert len(race.table(tmp_path / f"fedpipe-{seed}", "metrics.csv")) == 1 + 2 * race.MORE
        assert 0 < race.fullest(tmp_path / f"fedpipe-{seed}") <= 1
        target = float(rows[2]["eval_loss"])
        pipe = race.table(tmp_path / f"fedpipe-{seed}", "metrics.csv")
        there = [row for row in pipe if float(row["eval_loss"]) <= target]
        found = race.reached(tmp_path / f"fedpipe-{seed}", target)
        assert found == ((int(there[0]["round"]), float(there[0]["virtual_seconds"])) if there else None)
    # What is finished isn't run again
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.csv")}
    race.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.csv")} == before
