"""What the tests share: an offline, quiet environment and small real runs."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # several test files run at a time
)

import hypothesis
import pytest
from flwr.clientapp import ClientApp
from hydra.utils import get_class
from omegaconf import OmegaConf

from fedtune.config.compose import CONF, compose
from fedtune.config.schema import Experiment
from fedtune.core.protocol import Traits
from fedtune.runtime.app import make_server_app
from fedtune.runtime.local import LocalGrid, run_local, server_context

hypothesis.settings.register_profile("fedtune", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("fedtune")

# Few and short examples: tokenising the default data takes longer than such a run
PAIRS = Path(__file__).with_name("pairs.jsonl")
# A few small clients on the toy model: a run takes under a second once everything is imported
SMALL = (
    "model=tiny",
    f"data.path={PAIRS}",
    "data.partition=iid",
    "population.clients=4",
    "population.cohort=3",
    "train.steps=2",
    "evaluate.examples=16",
    "runtime.threads=1",
)


# They wait for Flower most of the time, so they go first and the others beside them
LONG = ("test_deploy.py", "test_sockets.py", "test_fleet.py")
LAST = "test_ray.py"  # its processes take minutes to start beside those of the first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.path.name))


def _turn(name: str) -> int:
    return LONG.index(name) if name in LONG else len(LONG) + (name == LAST)


def small(*overrides: str, out: Path) -> Experiment:
    """A small experiment. Hydra takes a third of a small run's time, and is asked once for the same words; no other
    setting follows from these two."""
    plain = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("rounds", "seed"):
            plain[key] = int(value)
    composed = _composed(tuple(word for word in overrides if word.partition("=")[0] not in plain))
    return replace(composed, **plain, out=str(out), overrides=[*SMALL, *overrides, f"out={out}"])


@cache
def _composed(overrides: tuple[str, ...]) -> Experiment:
    return compose([*SMALL, *overrides])


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., Path]:
    """Run a small experiment in this process; returns its folder."""

    def run(*overrides: str, name: str = "run", rounds: int = 2) -> Path:
        folder = tmp_path / name
        run_local(small(f"rounds={rounds}", *overrides, out=folder))
        return folder

    return run


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Small experiments that are run once for all tests of a file, which write nowhere near their folders."""

    @cache
    def run(*overrides: str, rounds: int = 2) -> Path:
        folder = tmp_path_factory.mktemp("shared") / "run"
        run_local(small(f"rounds={rounds}", *overrides, out=folder))
        return folder

    return run


@pytest.fixture
def devices(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Words for a population of these lines of a CSV: as many clients as lines, all of them in every round."""
    header = "device,flop_per_s,read_bytes_per_s,up_bytes_per_s,down_bytes_per_s,memory_bytes,backprop,availability\n"

    def write(lines: str, *more: str) -> tuple[str, ...]:
        path, count = tmp_path / "devices.csv", lines.count("\n")
        path.write_text(header + lines)
        return f"population.clients={count}", f"population.cohort={count}", f"population.devices={path}", *more

    return write


@pytest.fixture
def fedtune(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The real command, in a process of its own, in an empty folder."""

    def call(*words: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtune", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )

    return call


def strategy_of(method: str) -> Any:
    """A method's strategy as its file in conf/ has it: composing every method takes a third of a second each."""
    found = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return found.get("method", found).strategy


def traits_of_method(method: str) -> Traits:
    return _traits_of(strategy_of(method))


def _traits_of(spec: Any) -> Traits:
    declared = getattr(get_class(spec["_target_"]), "traits", Traits())
    # A server optimizer has those of the strategy inside, but that it averages
    return declared if isinstance(declared, Traits) else replace(_traits_of(spec["base"]), averages=False)


def run_on(grid_class: type[LocalGrid], app: ClientApp, folder: Path, *overrides: str) -> LocalGrid:
    """Run a small experiment on a Grid and a ClientApp of the test's own; returns the Grid."""
    experiment = small(*overrides, out=folder)
    config = {"config": experiment.text()}
    grid = grid_class(app, experiment.population.clients, config)
    make_server_app()(grid=grid, context=server_context(config))
    return grid


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The lines of a run folder's table; none if it hasn't been written yet."""
    path = folder / name
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def setting(*path: Any, value: Any) -> Callable[[Any], None]:
    """What puts `value` in this place of a file's head, for files of strangers."""

    def change(head: Any) -> None:
        for key in path[:-1]:
            head = head[key]
        head[path[-1]] = value

    return change
