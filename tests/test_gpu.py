"""simulations.gpu at a toy size, on whatever device is here; what becomes of steps that fail, hang or come too late."""

import json

import pytest

from simulations.gpu import __main__ as command
from simulations.gpu import steps
from simulations.gpu.results import NOT_MEASURED, Outcome, Row, line, read, table, write
from simulations.gpu.steps import STEPS, Place


def test_a_row_is_read_as_it_was_written():
    rows = [Row("a", 1.5, "s", "half"), Row("b", "words"), Row("c", None)]
    assert read("\n".join(map(line, rows)) + '\n{"what": "cut o') == rows
    assert [row.said for row in rows] == ["1.5 s", "words", NOT_MEASURED]
    assert Row("tokens", 123456.7, "tokens/s").said == "123,457 tokens/s"


def test_the_files_have_every_step(tmp_path):
    outcomes = [
        Outcome("one", "the first", "done", rows=[Row("rate | speed", 2.0, "GB/s", "peak")]),
        Outcome("two", "the second", "failed", note="RuntimeError: no"),
    ]
    write(tmp_path, outcomes)
    assert [step["status"] for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]] == ["done", "failed"]
    assert (tmp_path / "gpu.md").read_text().splitlines() == list(table(outcomes))
    assert "| one | rate \\| speed | 2 GB/s | peak |" in table(outcomes)
    assert "| two | the second | failed | RuntimeError: no |" in table(outcomes)


def test_every_step_has_its_function():
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert callable(step.run)
        assert step.least <= step.most


def fails(place: Place):
    yield Row("before", 1.0)
    raise RuntimeError("a card is broken\nand more")


def test_a_step_that_fails_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.Step, "run", property(lambda step: fails))
    assert command._one("machine", tmp_path, tiny=True) == 1
    assert read((tmp_path / "rows").read_text()) == [Row("before", 1.0)]
    assert (tmp_path / "error").read_text() == "RuntimeError: a card is broken"
    assert "in fails" in (tmp_path / "trace").read_text()


def test_steps_without_time_are_skipped_and_unknown_ones_refused(tmp_path, capsys):
    assert command.main(["--tiny", "--minutes", "0", "--only", "machine,qlora", "--out", str(tmp_path)]) == 0
    assert [s["status"] for s in json.loads((tmp_path / "gpu.json").read_text())["steps"]] == ["skipped"] * 2
    with pytest.raises(SystemExit):
        command.main(["--only", "cohort", "--out", str(tmp_path)])
    assert "there is no step 'cohort'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped(tmp_path):
    outcome = Outcome("machine", "the card", NOT_MEASURED)
    step = next(step for step in STEPS if step.name == "machine")
    command._apart(step, outcome, 0.01, True, tmp_path / "errors.log")
    assert (outcome.status, outcome.note) == ("failed", "it was stopped after 0 s")


@pytest.mark.slow
def test_two_steps_from_end_to_end(tmp_path, capsys):
    assert command.main(["--tiny", "--only", "machine,tests", "--out", str(tmp_path)]) == 0
    found = {step["name"]: step for step in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert found["machine"]["status"] == "done"
    assert {row["what"] for row in found["machine"]["rows"]} >= {"card", "torch", "bfloat16 matrix product"}
    assert found["tests"]["status"] == NOT_MEASURED
    assert "| machine | torch |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [step.name for step in STEPS if step.function.startswith("training.")])
def test_training_is_measured(name, tmp_path, monkeypatch):
    """In this process: each figure is a number above 0, or words, or what only a GPU has."""
    step = next(step for step in STEPS if step.name == name)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    rows = list(step.run(Place(tmp_path, tiny=True)))
    assert len(rows) > 3
    assert all(isinstance(row.value, str) or row.value is None or row.value > 0 for row in rows)
