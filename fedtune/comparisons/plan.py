"""What a comparison runs: words become cells, each a run with a folder of its own.

    methods=[fedit,flora] codecs=[raw,compeft] seeds=[0,1,2] train.lr=1e-3
      -> OUT/fedit-raw/seed-0, OUT/fedit-compeft/seed-0, ...

An item may bring settings of its own, and a label: 'methods=[fedit,"slow: fedit train.lr=1e-4",flora]'.
"""

import itertools
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.config.compose import choices, compose
from fedtune.config.schema import setting_of
from fedtune.config.targets import TARGET, declared_traits
from fedtune.core.checks import nearest
from fedtune.core.errors import ConfigError
from fedtune.runs.comparison_file import TRIALS

OWN = ("methods", "codecs", "seeds", "jobs", "out", "tune.seed", "tune.rounds")
DEFAULT_OUT = "runs/compare"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    label: str  # of its entry: "fedit compeft"
    folder: Path
    seed: int
    words: tuple[str, ...]  # what `fedtune run` would be given, without out=

    @property
    def command(self) -> str:
        return shlex.join(["fedtune", "run", *self.words, f"out={self.folder}"])


@dataclass(frozen=True)
class NamedChoice:
    """A method or a codec, as named."""

    label: str
    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class PlannedEntry:
    """What is compared with others, each of its seeds a cell."""

    label: str
    words: tuple[str, ...]  # that make it what it is


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison as it was asked for."""

    entries: tuple[PlannedEntry, ...]
    seeds: tuple[int, ...]
    common: tuple[str, ...]  # words for every cell
    tuned: dict[str, tuple[str, ...]]  # setting -> values to try, the same for every entry; "lr" is each method's own
    tuning_seed: int
    tuning_rounds: int | None  # that a trial has; None: as many as a run
    out: Path
    jobs: int
    words: tuple[str, ...]  # as typed

    @property
    def command(self) -> str:
        return shlex.join(["fedtune", "compare", *self.words])

    def cell(self, entry: PlannedEntry, seed: int, chosen: Sequence[str] = ()) -> PlannedRun:
        """The run of this entry with this seed: its words, and the folder that it is played in.

        Args:
            chosen: the words that tuning came to.
        """
        words = (*self.common, *entry.words, *chosen, f"seed={seed}")
        return PlannedRun(entry.label, self.out / slug(entry.label) / f"seed-{seed}", seed, words)

    def trials(self, entry: PlannedEntry) -> list[tuple[tuple[str, ...], PlannedRun]]:
        """The values to try for this entry, and the run of each.

        Raises:
            ConfigError: if the method has no learning rate to tune.
        """
        key, own = learning_rate(self, entry) if "lr" in self.tuned else ("", 0.0)
        found = []
        for values in itertools.product(*self.tuned.values()):
            chosen = tuple(
                f"{key}={_rate(value, own)}" if name == "lr" else f"{name}={value}"
                for name, value in zip(self.tuned, values, strict=True)
            )
            words = (*self.common, *entry.words, *chosen, *self._shorter(), f"seed={self.tuning_seed}")
            folder = self.out / TRIALS / slug(entry.label) / slug(" ".join(chosen))
            found.append((chosen, PlannedRun(entry.label, folder, self.tuning_seed, words)))
        return found

    def _shorter(self) -> list[str]:
        if self.tuning_rounds is None:
            return []
        return [f"rounds={self.tuning_rounds}", f"budget.rounds={self.tuning_rounds}"]


def plan(words: Sequence[str]) -> ComparisonPlan:
    """Read the words of `fedtune compare` into all that is to be run.

    Raises:
        ConfigError: for a list that can't be read, an unknown method or codec, or settings that fit no entry.
    """
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word}: expected key=value, as in 'methods=[fedit,flora]' (fedtune compare --help)")
    given = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in OWN or word.startswith("tune."))
    common = [word for word in words if word.split("=", 1)[0] not in given]
    for single, several in (("method", "methods"), ("codec", "codecs"), ("seed", "seeds")):
        if any(word.startswith(f"{single}=") for word in common):
            raise ConfigError(f"{single}= is what a comparison varies: name all of them by '{several}=[...]'")
    entries = _entries(
        _items("methods", given.get("methods", "[fedit]"), "method"),
        _items("codecs", given["codecs"], "codec") if "codecs" in given else [],
    )
    seeds = _whole_numbers("seeds", given.get("seeds", "[0,1,2]"))
    tuned = {
        key.removeprefix("tune."): tuple(_list(key, value))
        for key, value in given.items()
        if key.startswith("tune.") and key not in OWN
    }
    tuning_seed = _whole_numbers("tune.seed", given.get("tune.seed", str(max(seeds) + 1)))[0]
    if tuned and tuning_seed in seeds:
        raise ConfigError(
            f"tune.seed={tuning_seed} is among seeds={list(seeds)}: what is tuned on a seed's data looks better on it "
            "than it is. Take another"
        )
    if not any(word.startswith("runtime.threads=") for word in common):
        common.insert(0, "runtime.threads=1")  # part of the result's bits, so not by this machine or `jobs`
    jobs = _whole_numbers("jobs", given["jobs"])[0] if "jobs" in given else default_jobs()
    if jobs < 1:
        raise ConfigError(f"jobs={jobs} must be at least 1")
    out = Path(given.get("out", DEFAULT_OUT)).expanduser()
    tuning_rounds = _whole_numbers("tune.rounds", given["tune.rounds"])[0] if "tune.rounds" in given else None
    made = ComparisonPlan(entries, seeds, tuple(common), tuned, tuning_seed, tuning_rounds, out, jobs, tuple(words))
    _check(made)
    return made


def default_jobs() -> int:
    """A run for each core; one where a GPU does the work."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def learning_rate(plan: ComparisonPlan, entry: PlannedEntry) -> tuple[str, float]:
    """The setting that holds the learning rate of this method's clients, and its value.

    Raises:
        ConfigError: if it has none.
    """
    method = compose([*plan.common, *entry.words]).method
    if "lr" in method.client:
        return "method.client.lr", float(method.client["lr"])
    name = declared_traits(str(method.strategy.get(TARGET))).learning_rate
    if (rate := setting_of(method.strategy, name)) is not None:
        return f"method.strategy.{name}", float(rate)
    raise ConfigError(f"tune.lr: {entry.label} has no learning rate of its clients; tune another setting of it by name")


def slug(label: str) -> str:
    """A label as a folder's name."""
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", label).strip("-.") or "run"


def _rate(text: str, own: float) -> str:
    """A learning rate as written, or, of 3x, three times `own`."""
    try:
        times = text.endswith("x")
        rate = float(text.removesuffix("x"))
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(
            f"tune.lr: expected a number above 0, as 1e-3, or how many times the method's own, as 3x; got {text}"
        )
    return f"{own * rate:.6g}" if times else text


def _entries(methods: Sequence[NamedChoice], codecs: Sequence[NamedChoice]) -> tuple[PlannedEntry, ...]:
    made = []
    for method, codec in itertools.product(methods, codecs or [NamedChoice("", "default", ())]):
        label = f"{method.label} {codec.label}" if len(codecs) > 1 else method.label
        words = [f"method={method.name}", *method.words]
        words += [f"codec={codec.name}"] if codec.name != "default" else []
        made.append(PlannedEntry(label, (*words, *codec.words)))
    labels = [entry.label for entry in made]
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"'{doubled}' is there twice: name each method and each codec once")
    return tuple(made)


def _items(key: str, text: str, group: str) -> list[NamedChoice]:
    known = [*choices(group), *(["default"] if group == "codec" else [])]
    if text.strip("[] ") == "all":
        return [NamedChoice(name, name, ()) for name in choices(group)]
    return [_item(key, item, known) for item in _list(key, text)]


def _item(key: str, text: str, known: Sequence[str]) -> NamedChoice:
    label, colon, rest = text.partition(": ")
    name, *words = _split(key, rest if colon else text) or [""]
    if name not in known:
        raise ConfigError(f"{key}: {name!r} is not known: expected {', '.join(known)}{nearest(name, known)}")
    if wrong := next((word for word in words if "=" not in word), None):
        raise ConfigError(f"{key}: '{text}': expected key=value after the name, got {wrong!r}")
    return NamedChoice(label.strip() if colon else " ".join([name, *words]), name, tuple(words))


def _split(key: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} can't be split into words: {error}") from error


def _list(key: str, text: str) -> list[str]:
    text = text.strip()
    try:
        found: Any = yaml.safe_load(text if text.startswith("[") else f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}={text} can't be read: expected a list, as in '{key}=[a,b]' (with the quotes)"
        ) from error
    if not found or any(isinstance(item, list | dict) or item is None for item in found):
        raise ConfigError(f"{key}={text}: expected a list of single values, as in '{key}=[a,b]' (with the quotes)")
    return [str(item) for item in found]


def _whole_numbers(key: str, text: str) -> tuple[int, ...]:
    items = _list(key, text)
    if wrong := next((item for item in items if not re.fullmatch(r"\d+", item)), None):
        raise ConfigError(f"{key}={text}: expected whole numbers from 0, got {wrong!r}")
    return tuple(dict.fromkeys(map(int, items)))


def _check(plan: ComparisonPlan) -> None:
    """
    Raises:
        ConfigError: if the words describe no run for any entry: what one entry alone refuses is its own failure.
    """
    first: ConfigError | None = None
    for entry in plan.entries:
        try:
            compose(plan.cell(entry, plan.seeds[0]).words)
            return
        except ConfigError as error:
            first = first or error
    assert first is not None
    raise first
