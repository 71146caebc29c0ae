"""What methods declare: read from their files without importing them, it is what their classes say."""

from pathlib import Path

import pytest
from conftest import strategy_of
from hydra.utils import get_class

from fedtune.config.compose import choices, compose
from fedtune.config.targets import ROOT, declared_traits, name_of
from fedtune.core.protocol import Traits

METHODS = choices("method")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_what_the_class_says(method):
    target = strategy_of(method)["_target_"]
    read, declared = declared_traits(target), get_class(target).traits
    if isinstance(declared, property):  # a server optimizer, whose other traits are those of what is inside
        declared = Traits(title=get_class(target).title)
    assert read == declared
    assert read.title
    assert name_of(target) == method


def test_the_controls():
    assert [name for name in METHODS if declared_traits(strategy_of(name)["_target_"]).control] == [
        "centralized", "full_delta", "local_only", "mezo",
    ]  # fmt: skip
    for name in METHODS:  # which a paper's method isn't, and its file says so as well
        target = strategy_of(name)["_target_"]
        first = Path(ROOT, *target.split(".")[:-1]).with_suffix(".py").read_text().partition("\n")[0]
        assert ("control" in first) == declared_traits(target).control


def test_what_a_class_of_ones_own_declares(tmp_path, monkeypatch):
    """By itself, by the class that it is made from, or not at all; its file is read and not run."""
    (tmp_path / "mine.py").write_text(
        "raise SystemExit\nfrom strategies.scaffold import Scaffold\nfrom fedtune.core.protocol import Traits\n"
        "class Own:\n    traits = Traits(title='Own way', control=True, lossy_up=False, unheard_of=1)\n"
        "class Based(Scaffold):\n    pass\n"
        "class Bare:\n    pass\n"
        "class Loop(Loop):\n    traits = make()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert declared_traits("mine.Own") == Traits(title="Own way", control=True, lossy_up=False)
    assert declared_traits("mine.Based") == Traits(title="SCAFFOLD", averages=True, population_size="clients")
    for name in ("mine.Bare", "mine.Loop", "mine.Gone", "nowhere.Bare"):
        assert declared_traits(name) == Traits(title=name.rpartition(".")[2])
    assert declared_traits("../../etc.X; rm") == Traits(title="X; rm")
    assert name_of("mine.Own") == "Own"


@pytest.mark.slow
def test_pooling_changes_what_the_method_says():
    """Of 6 clients, 3 a round: one client takes the steps of three, and SCAFFOLD's server counts one."""
    few = ["population.clients=6", "population.cohort=3"]
    words = ["method=mezo", *few, "method.strategy.rules.local_steps=5"]
    assert compose(words).method.strategy["rules"]["local_steps"] == 15
    assert compose(words).local_steps == 15
    pooled = compose(["method=scaffold", *few, "method.pooled=true", "train.steps=2"])
    assert pooled.method.strategy["clients"] == 1
    assert pooled.method.client["steps"] == pooled.train.steps == pooled.local_steps == 6
