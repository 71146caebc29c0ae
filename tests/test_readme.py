"""What README shows in Python runs as it stands there."""

import math
import re
from pathlib import Path

import torch
from conftest import rows, summary_of

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def block_with(word):
    """The one Python block of README that has this word."""
    (found,) = [
        block for block in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if word in block
    ]
    return found


def test_the_strategy_in_15_lines_plays_two_rounds(small_run, tmp_path, monkeypatch):
    block = block_with("aggregate")
    assert len([line for line in block.splitlines() if line]) <= 15
    (words,) = re.findall(r"fedtune run (method.strategy._target_=\S+) model=tiny rounds=2", README)
    module = words.partition("=")[2].partition(".")[0]
    (tmp_path / f"{module}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    folder = small_run(words, rounds=2)
    losses = [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert summary_of(folder)["method"] == "Median"
    assert not rows(folder, "failures.csv")


def test_the_run_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # those of the other tests stay
    names = {}
    exec(block_with("load_model"), names)
    assert list(names["run"].metrics["round"]) == [0, 1, 2]
    tokens = names["tokenizer"]("hello", return_tensors="pt")["input_ids"]
    assert math.isfinite(float(names["model"](tokens).logits.sum()))
