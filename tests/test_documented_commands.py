"""Every command that the pages print does what it says, at a tiny size; and every benchmark runs from end to end.

What needs a network, a fleet or a cluster of its own is only read: its words have to be those of a real setting.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import PAIRS

from fedtune.comparisons.plan import plan
from fedtune.config.compose import compose
from fedtune.core.checks import nearest
from fedtune.runtime.local import run_local
from simulations import results
from simulations.benchmarks import engine

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^ {4}(?:\.venv/bin/)?((?:fedtune|python -m|make) .*)$", re.MULTILINE)
# Appended to a run's own words
TINY = (
    "model=tiny",
    "model.path=null",
    "model.quantization=none",
    f"data.path={PAIRS}",
    "data.prompt_column=null",
    "data.completion_column=null",
    "data.partition=iid",
    "data.partition_by=null",
    "data.user_column=null",
    "population.clients=4",
    "population.cohort=4",
    "rounds=1",
    "train.steps=1",
    "evaluate.examples=8",
    "evaluate.max_new_tokens=4",
    "runtime.threads=1",
    "out=null",
)


def commands():
    """(page, words) of every command, without what a `#` after two blanks says of it."""
    for page in PAGES:
        for match in LINE.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            yield page.name, tuple(shlex.split(re.sub(r"\s{2,}#.*", "", match.group(1))))


def of(*head):
    """The words after this head, of every command that has it, and an id for it."""
    found = {}
    for page, words in commands():
        if words[: len(head)] == head:
            found.setdefault(words[len(head) :], f"{page}: {' '.join(words[len(head) :])}"[:80])
    return [pytest.param(words, id=name) for words, name in found.items()]


def settings_of(words):
    """A documented run's words without those that stand for something else."""
    return [word for word in words if "=" in word and not re.search(r"=(NAME|value|DIR)$", word)]


RUNS = [case for case in of("fedtune", "run") if not any(w.startswith(("resume=", "-")) for w in case.values[0])]


@pytest.mark.parametrize("words", RUNS)
def test_a_run_that_a_page_prints_runs(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = settings_of(words)
    compose(said)
    if any(word in ("runtime=ray", "runtime=flower") for word in said):
        return
    tracker = [] if "tracker=tensorboard" in said else ["tracker=none"]
    answers = ["evaluate.generate=2"] if any(word.startswith("evaluate.generate=") for word in said) else []
    smaller = {"method.strategy.rules.local_steps": "2", "adapter.rank": "16", "population.ranks": "[16,8,4]"}
    keys = {word.partition("=")[0] for word in said if "capability" not in word}
    steps = [f"{key}={value}" for key, value in smaller.items() if key in keys]
    run_local(compose([*said, *TINY, *tracker, *answers, *steps]))
    assert [path.name for path in (tmp_path / "runs").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("words", of("fedtune", "compare"))
def test_a_comparison_that_a_page_prints_is_one(words):
    assert plan(settings_of(words)).entries


@pytest.mark.parametrize("words", of("fedtune", "plan"))
def test_a_plan_that_a_page_prints_is_one(words):
    said = settings_of(words)
    assert f"method={compose(said).method_name}" in said


def test_the_comparison_of_the_results_page_is_one():
    assert len(plan(results.words([])).entries) > 30


def test_what_else_the_pages_call_is_there():
    """Subcommands, modules and make's targets."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    subcommands = {
        "run",
        "methods",
        "export",
        "compare",
        "report",
        "serve",
        "evaluate",
        "plan",
        "doctor",
        "compress",
        "chat",
        "push",
    }
    for page, words in commands():
        if words[0] == "make":
            assert words[1] in targets, (page, words)
        elif words[0] == "fedtune":
            known = {*subcommands, "decompress"}
            assert words[1] in known, f"{page}: {words}{nearest(words[1], sorted(known))}"
        elif words[2].startswith("simulations."):
            place = ROOT / words[2].replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), (page, words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The toy as a Hugging Face folder, for what loads a base by its path."""
    from fedtune.config.schema import ModelSpec
    from fedtune.models.base import load_base

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # those of the other tests stay
    base = load_base(ModelSpec(name="tiny"), torch.device("cpu"))
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
def test_the_engines_benchmark_runs(folder):
    words = [f"model.path={folder}", f"data.path={PAIRS}", "data.partition=iid"]
    idle = engine.idle(words, clients=5, ray=False)
    assert re.search(r"\d+ ms a round", idle[0][1])
    bare = engine.bare(words, clients=2)
    assert re.search(r"[\d.]+x bare", bare[1][2])
    template = engine.template([*words, "population.clients=4"], turns=1)
    assert [row[0].rpartition(", ")[2] for row in template[::2]] == ["none", "nf4"]
    assert all(re.fullmatch(r"[\d.]+x ours", row[2]) for row in template[1::2])
