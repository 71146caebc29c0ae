"""The settings of an experiment: these dataclasses are the schema, conf/*.yaml supplies their values.

A check here runs whenever settings are made, from words, from YAML or in code, and names the setting by its key.
Nothing here imports torch, so a wrong setting is answered at once.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from fedtune.config.data import OWN
from fedtune.config.data import DataSpec as DataSpec
from fedtune.config.keep import KeepSpec
from fedtune.config.model import ADAPTERS as ADAPTERS
from fedtune.config.model import ALL_LINEAR as ALL_LINEAR
from fedtune.config.model import FULL as FULL
from fedtune.config.model import AdapterSpec as AdapterSpec
from fedtune.config.model import ModelSpec as ModelSpec
from fedtune.config.population import PopulationSpec
from fedtune.config.targets import TARGET, declared_traits, name_of
from fedtune.config.train import TrainSpec as TrainSpec
from fedtune.config.train import both_said
from fedtune.core.checks import above_zero, at_least, one_of, option
from fedtune.core.errors import ConfigError
from fedtune.core.settings import EngineSetting


@dataclass(frozen=True)
class MethodSpec:
    strategy: dict[str, Any] = option({}, "the server's side: a class and its hyper-parameters")
    client: dict[str, Any] = option({}, "the client's side: a class and its hyper-parameters")
    pooled: bool = option(False, "one client gets the data of all, and takes the steps of a whole cohort")


# Settings that came later: left out of `fixed` where all is as it always was, so that older runs go on
_LATER = {
    "train": (
        "schedule",
        "lr_end",
        "warmup_rounds",
        "schedule_interval",
        "epochs",
        "micro_batch_size",
        "checkpoint_activations",
    ),
    "model": ("attention",),
    "adapter": ("path", "sha256"),
    "data": ("user_column", "heldout_path"),
    "population": ("connected", "min_clients"),
}
# Those in C, where PyYAML has them, are four times as fast, and seven times
SafeDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class EvaluateSpec:
    every: int = option(1, "rounds between evaluations of the global model; 0 never evaluates")
    examples: int = option(200, "held-out examples to use, at most; 0 uses all")
    batch_size: int = option(16, "examples per forward pass")
    clients: bool = option(False, "each client also scores what it received on its own held-out data")
    exactness: bool = option(True, "measure each round how far the server's update is from the mean of the clients'")
    similarity: bool = option(False, "write each round how much the signs of clients' updates agree: similarity.csv")
    generate: int = option(0, "held-out examples that are answered, for exact match and ROUGE-L; 0: none")
    max_new_tokens: int = option(64, "tokens of such an answer, at most")
    extract: str | None = option(None, "a regular expression: exact match compares its last match, or first group")
    peers: str = option("none", "all clients score the model on their own data: none, after the last round, or every")

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 0)
        at_least("evaluate.examples", self.examples, 0)
        at_least("evaluate.batch_size", self.batch_size, 1)
        at_least("evaluate.generate", self.generate, 0)
        at_least("evaluate.max_new_tokens", self.max_new_tokens, 1)
        one_of("evaluate.peers", self.peers, ("none", "last", "every"))
        try:
            re.compile(self.extract or "")
        except re.error as error:
            raise ConfigError(f"evaluate.extract={self.extract} is no regular expression: {error}") from error


@dataclass(frozen=True)
class BudgetSpec:
    """A run ends when another round like the last would go beyond one of these, and after `rounds` at the latest."""

    bytes: float | None = option(None, "wire bytes, both ways, without those of evaluation")
    seconds: float | None = option(None, "of the virtual clock where devices have limits, else as measured")
    loss: float | None = option(None, "held-out loss to come down to")
    rounds: int = option(0, "rounds to play whatever they cost, so that equal rounds can be compared as well")

    def __post_init__(self) -> None:
        for name in ("bytes", "seconds", "loss"):
            if (value := getattr(self, name)) is not None:
                above_zero(f"budget.{name}", value)
        at_least("budget.rounds", self.rounds, 0)


@dataclass(frozen=True)
class RuntimeSpec:
    name: str = option("local", "where clients run: local is this process")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    deterministic: bool = option(
        True, "on a GPU: the same bits each time; false: faster, and open to models with operations that can't"
    )
    threads: int = option(0, "CPU threads, part of the result's bits; 0 takes all cores and records how many")
    cohort: Any = option(
        "auto",
        "runtime=local: how many clients of a round are trained in one pass over the base they share; 1: one by one; "
        "auto: on a CPU, where it changes no bits, as many as have 512 tokens, at most 8 and what memory allows; on a "
        "GPU 1",
    )
    timeout: float = option(3600.0, "seconds to wait for a round's replies")
    wait: float = option(600.0, "seconds to wait for clients to come, and for each to say who it is")
    cpus: float = option(1.0, "ray: CPU cores that a client takes")
    gpus: float = option(0.0, "ray: share of a GPU that a client takes, as in 0.25")
    address: str | None = option(None, "ray: a running cluster, as in 10.0.0.5:6379 or auto; null starts one here")
    superlink: str | None = option(
        None, "flower: the connection's name in Flower's config.toml; null takes its default"
    )

    def __post_init__(self) -> None:
        one_of("runtime", self.name, ("local", "ray", "flower"))
        at_least("runtime.threads", self.threads, 0)
        if self.cohort != "auto" and not (type(self.cohort) is int and self.cohort >= 1):
            raise ConfigError(f"runtime.cohort={self.cohort}: expected auto, or a number of clients from 1 on")
        above_zero("runtime.timeout", self.timeout)
        above_zero("runtime.wait", self.wait)
        above_zero("runtime.cpus", self.cpus)
        at_least("runtime.gpus", self.gpus, 0)
        if self.threads == 0:
            object.__setattr__(self, "threads", os.cpu_count() or 1)


@dataclass(frozen=True)
class TrackerSpec:
    name: str = option("none", "who else is told of a run's figures: none, tensorboard, wandb or mlflow")
    uri: str | None = option(None, "mlflow: a server or store; null: mlflow.db beside the run's folder")
    experiment: str = option("fedtune", "mlflow: the experiment that the run is put into")
    project: str = option("fedtune", "wandb: the project that the run is put into")
    mode: str = option("offline", "wandb: offline (files, for wandb sync) or online")

    def __post_init__(self) -> None:
        one_of("tracker", self.name, ("none", "tensorboard", "wandb", "mlflow"))
        one_of("tracker.mode", self.mode, ("offline", "online"))


@dataclass(frozen=True)
class Experiment:
    """All that decides a run. Written to config.yaml, and read back from it on resume."""

    method: MethodSpec = field(default_factory=MethodSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    data: DataSpec = field(default_factory=DataSpec)
    population: PopulationSpec = field(default_factory=PopulationSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    tracker: TrackerSpec = field(default_factory=TrackerSpec)
    keep: KeepSpec = field(default_factory=KeepSpec)
    server_optimizer: dict[str, Any] = option(
        {}, "how the server steps towards the clients' average; empty: all the way"
    )
    codec_up: dict[str, Any] = option({}, "what an update looks like on the wire")
    codec_down: dict[str, Any] = option({}, "what a broadcast looks like on the wire")
    rounds: int = option(3, "rounds to run")
    seed: int = option(0, "every random draw follows from it")
    name: str = option("run", "label of the run")
    out: str | None = option(None, "run folder; null makes runs/NAME, runs/NAME-2, ...")
    overrides: list[str] = field(default_factory=list)  # what was typed

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        at_least("seed", self.seed, 0)
        if self.adapter.kind == FULL and self.model.quantization != "none":
            raise ConfigError(
                f"adapter=none trains the base's own weights, and with model.quantization={self.model.quantization} "
                "these are codes that no small step can be put into: take model.quantization=none, or an adapter"
            )
        if self.adapter.kind == FULL and self.model.dtype == "float16":
            raise ConfigError(
                "adapter=none trains the base's own weights, and float16 has no room for the steps of an optimizer: "
                "take model.dtype=float32 or bfloat16, or an adapter, which is held in float32"
            )
        if self.adapter.kind == "prefix_tuning" and self.train.checkpoint_activations:
            raise ConfigError(
                "adapter=prefix_tuning hands keys and values to the blocks from outside, which is lost where "
                "activations are computed anew: leave out train.checkpoint_activations, or take another adapter"
            )
        if self.train.warmup_rounds >= self.rounds:
            raise ConfigError(
                f"train.warmup_rounds={self.train.warmup_rounds} leave none of rounds={self.rounds} at the full rate: "
                "take fewer"
            )
        said = [word for word in self.overrides if word.partition("=")[0] in ("train.steps", "method.client.steps")]
        if self.train.epochs is not None and said:
            raise both_said(said[-1], self.train.epochs)
        if self.evaluate.generate and self.data.loss_on == "all":
            raise ConfigError(
                "evaluate.generate answers prompts, and with data.loss_on=all what is asked is learnt like the answer: "
                "take data.loss_on=completion, or evaluate.generate=0"
            )
        if self.evaluate.peers != "none" and not self.data.client_heldout:
            raise ConfigError(
                f"evaluate.peers={self.evaluate.peers}: data.client_heldout=0 leaves clients nothing to score a model "
                "with. Set it above 0, or evaluate.peers=none"
            )
        self._check_who_comes()
        if self.keep.best and not (self.evaluate.every and (self.data.heldout or self.data.is_brought)):
            raise ConfigError(
                f"keep.best=true goes by the held-out loss, and evaluate.every={self.evaluate.every} with "
                f"data.heldout={self.data.heldout:g} measures none: set both above 0, or leave out keep.best"
            )
        if self.adapter.path is not None and self.population.ranks is not None:
            raise ConfigError(
                f"adapter.path={self.adapter.path} is of one rank, and population.ranks={self.population.ranks} would "
                "have clients start from parts of it: leave out one of them"
            )
        if self.method.pooled and not self.population.pooled:  # else it was pooled already: this is a run's own config
            self._pool()
        if isinstance(self.population.ranks, list) and "alpha" in ADAPTERS[self.adapter.kind]:
            # The global adapter is as wide as the widest; where the scaling is equal for all, its alpha grows with it
            adapter, rank = self.adapter, max(self.population.ranks)
            wider = math.sqrt(rank / adapter.rank) if adapter.kind == "rslora" else rank / adapter.rank
            grown = adapter.alpha * wider if self.population.scaling == "equal" else adapter.alpha
            object.__setattr__(self, "adapter", replace(adapter, rank=rank, alpha=grown))

    def _check_who_comes(self) -> None:
        """What concerns clients that bring their data, or whose number nobody knows."""
        if self.data.partition == OWN and self.runtime.name != "flower":
            raise ConfigError(
                f"data.partition=own: each device reads its own data, and runtime={self.runtime.name} has no devices. "
                "Take runtime=flower; or data.path= and data.partition=files to simulate it, a file a client"
            )
        if self.data.is_brought and (self.method.pooled or self.population.pooled):
            raise ConfigError(
                f"method={self.method_name} has the data of all in one place, and with data.partition="
                f"{self.data.partition} each client keeps its own: give data.path= and data.partition=iid"
            )
        if not self.population.connected:
            return
        if self.runtime.name != "flower":
            raise ConfigError(
                f"population.clients=connected: clients come and go on devices, and with runtime={self.runtime.name} "
                "they are made by this run. Take runtime=flower, or say how many there are"
            )
        if declared_traits(str(self.method.strategy.get(TARGET))).population_size:
            raise ConfigError(
                f"method={self.method_name} goes by the number of all clients, which population.clients=connected "
                "leaves open: say how many there are, or take another method"
            )

    def _pool(self) -> None:
        """Make all clients one, which takes as many steps a round as a cohort would have taken together."""
        population, method, cohort = self.population, self.method, self.population.cohort_size
        together = replace(
            population, clients=1, cohort=1, pooled=population.clients, selection="uniform", candidates=None
        )
        object.__setattr__(self, "population", together)
        client, strategy, epochs = dict(method.client), dict(method.strategy), self.train.epochs
        if epochs is not None:  # of the data of all, as many examples as a cohort sees of its own
            object.__setattr__(self, "train", replace(self.train, epochs=epochs * cohort / population.clients))
        else:
            object.__setattr__(self, "train", replace(self.train, steps=self.train.steps * cohort))
        if EngineSetting.STEPS in client and epochs is None:
            client[EngineSetting.STEPS] *= cohort
        said = declared_traits(str(strategy.get(TARGET)))
        strategy = _changed(strategy, said.population_size, lambda clients: 1)
        strategy = _changed(strategy, said.local_steps, lambda steps: steps * cohort)
        object.__setattr__(self, "method", replace(method, client=client, strategy=strategy))

    @property
    def method_name(self) -> str:
        """The name under `method=`; of a strategy of one's own, its class's."""
        return name_of(str(self.method.strategy[TARGET]))

    @property
    def server_optimizer_name(self) -> str | None:
        """The name under `server_optimizer=`, or None."""
        return name_of(str(self.server_optimizer[TARGET])) if self.server_optimizer else None

    @property
    def local_steps(self) -> int:
        """The steps that a client takes in a round."""
        found = setting_of(self.method.strategy, declared_traits(str(self.method.strategy.get(TARGET))).local_steps)
        return self.train.steps if found is None else int(found)

    @property
    def learning_rate(self) -> float | None:
        """The rate of the method's clients, wherever it is set; None if they have none."""
        name = declared_traits(str(self.method.strategy.get(TARGET))).learning_rate
        found = setting_of(self.method.strategy, name) if name else self.method.client.get("lr")
        return None if found is None else float(found)

    @property
    def strategy(self) -> dict[str, Any]:
        """The server's whole side: the method's, within the server optimizer's if there is one."""
        inner = self.method.strategy
        return {**self.server_optimizer, "base": inner} if self.server_optimizer else inner

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its beginning: they decide the result's bits, or where
        clients find what they kept. Where the learning rate follows a schedule, `rounds` is what it is spread over."""
        free = ("rounds", "budget", "tracker", "keep", "out", "overrides")
        kept = {key: value for key, value in to_dict(self).items() if key not in free}
        if self.train.schedule != "constant":
            kept["rounds"] = self.rounds
        for section, names in _LATER.items():
            default = {item.name: item.default for item in fields(getattr(self, section))}
            as_ever = {name for name in names if kept[section][name] == default[name]}
            kept[section] = {name: value for name, value in kept[section].items() if name not in as_ever}
        runtime = {key: kept["runtime"][key] for key in ("name", "device", "threads")}
        # Settings that came later are left out where nothing is other than it always was: older runs go on
        if not self.runtime.deterministic:
            runtime["deterministic"] = False
        # On a GPU the last bits depend on who is trained together
        if self.runtime.device != "cpu" and self.runtime.cohort not in ("auto", 1):
            runtime["cohort"] = self.runtime.cohort
        return {**kept, "runtime": runtime}

    @cached_property
    def sha256(self) -> str:
        """A hash of `fixed`."""
        return hashlib.sha256(json.dumps(self.fixed(), sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """The whole experiment as YAML; `load` reads it back."""
        return yaml.dump(to_dict(self), Dumper=SafeDumper, sort_keys=False, allow_unicode=True, width=120)


def setting_of(spec: Mapping[str, Any], name: str) -> Any:
    """A setting by its dotted name, as "rules.lr"; None if there is none, or the name is ""."""
    found: Any = spec
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _changed(spec: Mapping[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The settings with the one of that dotted name changed, if it is there."""
    if setting_of(spec, name) is None:
        return dict(spec)
    first, _, rest = name.partition(".")
    return {**spec, first: _changed(spec[first], rest, change) if rest else change(spec[first])}


def to_dict(value: Any) -> Any:
    """Dataclasses as plain dicts, for YAML and JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_dict(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, list | tuple) else value


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
