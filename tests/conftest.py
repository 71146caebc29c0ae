"""What the tests share: an offline, quiet environment and small real runs."""

import csv
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
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
    FEDTUNE_COMPILE="0",  # kernels take each process 7 s, and give the same bits: the fixture `compiled` has them
)

import forked
import hypothesis
import pytest
from flwr.clientapp import ClientApp
from hydra.utils import get_class
from omegaconf import OmegaConf

from fedtune.config.compose import CONF, compose
from fedtune.config.schema import Experiment, ModelSpec
from fedtune.core.lean_imports import import_bitsandbytes
from fedtune.core.protocol import Traits
from fedtune.models.base import locate
from fedtune.random_directions import hash_noise as noise
from fedtune.runtime.app import make_server_app
from fedtune.runtime.local import LocalGrid, run_local, server_context
from fedtune.server import round_loop

forked.prepare()
import_bitsandbytes()  # before a test imports peft, which would import a compiler with it

# No deadlines: a busy machine is no failure. `pytest --hypothesis-profile=thorough` looks four times as far
hypothesis.settings.register_profile("fedtune", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)
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


# They wait for Flower and Ray most of the time, so they go first. The system prefers them to those that run beside
# them, or a process of Ray's may take minutes to start
LONG = ("test_deploy.py", "test_fleet.py", "test_sockets.py", "test_bundle.py", "test_fleet_ends.py", "test_ray.py")


# A test that comes by one of these is `slow` without saying so
RUNS = {"run_local", "run_on", "run_ray", "subprocess", "forked"}


def _plays(item: pytest.Item) -> bool:
    """Whether a test, its fixtures, or the functions that they call play runs or start processes."""
    assert isinstance(item, pytest.Function)
    fixtures = [found.func for of in item._fixtureinfo.name2fixturedefs.values() for found in of]
    property_based = getattr(item.function, "hypothesis", None)
    called, seen = [property_based.inner_test if property_based else item.function, *fixtures], set()
    while called:
        function = called.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen or "/tests/" not in code.co_filename:
            continue
        seen.add(code)
        inner = [constant for constant in code.co_consts if hasattr(constant, "co_names")]
        names = {name for part in (code, *inner) for name in part.co_names}
        if names & RUNS:
            return True
        called += [function.__globals__.get(name) for name in names]
    return False


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _plays(item) and not item.get_closest_marker("quick"):
            item.add_marker("slow")
    items.sort(key=lambda item: _turn(item.path.name))


def _turn(name: str) -> int:
    first = (*LONG, "test_noise.py")  # compiles what test_fedkseed.py finds then
    return first.index(name) if name in first else len(first)


def pytest_collection_finish() -> None:
    """Whatever is imported and collected stays to the end: 900,000 objects, which a full collection of garbage walks in
    half a second. The engine collects once a run, which is as long as a small run takes, and freezes what it has loaded
    and lets go of it again, which would let go of these as well: here one run in ten collects."""
    gc.collect()
    gc.freeze()
    runs = itertools.count()
    round_loop.gc = SimpleNamespace(
        collect=lambda: None if next(runs) % 10 else gc.collect(), freeze=lambda: None, unfreeze=lambda: None
    )


_file: list[Path] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a file's tests imported, as a compiler, stays as well. Those that wait most of the time are not to wait for
    the others."""
    if _file != [item.path]:
        _file[:] = [item.path]
        if item.path.name not in LONG and not os.nice(0):
            os.nice(10)
        gc.collect()
        gc.freeze()


# What each file costs: --cpu prints it, and docs/testing.md has it
_spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
_before = [0.0, 0.0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", action="store_true", help="print CPU seconds by file, most first, in lines of a table")


def _used() -> list[float]:
    """CPU seconds of this process, and of those of its children that have ended and were waited for; the server that
    forks (tests/forked.py) and its children among them."""
    times = os.times()
    return [times.user + times.system, times.children_user + times.children_system + forked.cpu_seconds()]


def pytest_runtest_logstart() -> None:
    _before[:] = _used()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report: Any = yield
    now = _used()
    report.cpu = [one - other for one, other in zip(now, _before, strict=True)]
    _before[:] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "cpu"):  # where a worker ran it, this is called in both processes
        seen = (report.when == "call", *report.cpu, report.duration)
        spent = _spent[report.nodeid.partition("::")[0]]
        spent[:] = [one + other for one, other in zip(spent, seen, strict=True)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--cpu"):
        total = [sum(column) for column in zip(*_spent.values(), strict=True)]
        lines = sorted(_spent.items(), key=lambda item: -sum(item[1][1:3]))
        for name, (tests, own, children, seconds) in [("all", total), *lines]:
            line = f"| {name} | {tests:.0f} | {own + children:.1f} | {children:.1f} | {seconds:.1f} |"
            terminalreporter.write_line(line)


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


@pytest.fixture(scope="module")
def short_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2's embeddings and its first two blocks of 30: what is said of real weights, of their shapes
    and of their quantized forms holds of these as well, in a fraction of the time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = locate(ModelSpec(name="smollm2", path="HuggingFaceTB/SmolLM2-135M-Instruct")).path
    folder = tmp_path_factory.mktemp("short-smollm2")
    AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    """Seeded noise by compiled kernels, as users have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDTUNE_COMPILE")
        noise._compiled.cache_clear()
        yield
    noise._compiled.cache_clear()


@pytest.fixture
def forking() -> Iterator[None]:
    """`subprocess` starts processes that have imported everything."""
    with forked.everywhere():
        yield


@pytest.fixture
def folder_for_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's sockets have long names, and pytest's folders too. In a folder of its own it finds no other test's Ray."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own is 15, behind all that computes beside it
        monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # one for each core, none of which plays a client
        yield


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
        command = [sys.executable, "-m", "fedtune", *words]
        return forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, **options)

    return call


def many() -> hypothesis.settings:
    """For a property with many ways to fail and examples that take no time, as bytes of strangers: four times as many
    examples as others have."""
    return hypothesis.settings(max_examples=4 * hypothesis.settings.default.max_examples)


@cache
def settings_of_method(method: str) -> Any:
    """What a method's file in conf/ says: composing every method takes a third of a second each."""
    found = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return found.get("method", found)


def strategy_of(method: str) -> Any:
    return settings_of_method(method).strategy


def traits_of_method(method: str) -> Traits:
    return _traits_of(strategy_of(method))


TYPICAL = ("fedit", "flora", "fedbuff", "fedkseed", "flexlora")  # of their kinds; of others the first


def of_each_kind(methods: Iterable[str]) -> list[str]:
    """A method for all of the same traits, but for what is only printed, and the same class of clients: the engine does
    the same with all of these."""
    found: dict[Any, str] = {}
    for method in sorted(methods, key=lambda name: (name not in TYPICAL, name)):
        traits = replace(traits_of_method(method), title="", control=False)
        found.setdefault((traits, settings_of_method(method).client["_target_"]), method)
    return sorted(found.values())


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
