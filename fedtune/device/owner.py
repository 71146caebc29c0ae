"""What the owner of a machine lets others' runs do on it.

A run's config and its messages come from whoever can reach the server. What is made of them, read for them, and how
much they may ask for is for the owner of the device to say, in the environment of its SuperNode:

    FEDTUNE_TARGETS   classes that may be made besides fedtune's own, as `mine.Strategy,mine.Client`
    FEDTUNE_FOLDERS   folders that files may be read from, with ":" between them as in PATH (";" on Windows)

and in its device.toml (fedtune/device/device_file.py): data of its own, bases, limits.

A simulation on one's own machine has no such owner: what is typed there is the user's own.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedtune.config.data import OWN
from fedtune.config.schema import ADAPTERS, AdapterSpec, DataSpec, Experiment, ModelSpec, flat, to_dict
from fedtune.config.targets import check
from fedtune.core.errors import CapacityError, ConfigError
from fedtune.core.limits import check_values
from fedtune.device.device_file import HASH, DeviceFile, find_device_file, read_device_file
from fedtune.device.home import home

TARGETS, FOLDERS = "FEDTUNE_TARGETS", "FEDTUNE_FOLDERS"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?|xpu(:\d{1,3})?")
NUMBER_BYTES = 8  # of an adapter's number, with its gradient
# Settings whose values are the names of files on the machine that they are read on
FILES = ("model.path", "data.path", "adapter.path", "population.devices")
COLUMNS = ("split", "prompt_column", "completion_column")


@dataclass(frozen=True)
class Owner:
    """What the owner of a machine allows an experiment from elsewhere.

    Attributes:
        targets: classes that may be made besides those of `fedtune.config.targets.table`.
        folders: where files may be read; None: anywhere, as on a server, whose operator starts the runs.
        file: what the device's device.toml says.
        index: which client this device is.
    """

    targets: frozenset[str] = frozenset()
    folders: tuple[str, ...] | None = ()
    file: DeviceFile = field(default_factory=DeviceFile)
    index: int | None = None

    @property
    def is_device(self) -> bool:
        return self.folders is not None

    def check(self, experiment: Experiment) -> None:
        """Look at a run's config before anything of it is made or opened.

        Raises:
            ConfigError: naming the setting that asks for more than is allowed.
        """
        check_targets(experiment, "the run's config: ", self.targets)
        if self.folders is None:
            return
        check_values(flat({**to_dict(experiment), "overrides": []}))
        if not DEVICE.fullmatch(experiment.runtime.device):
            raise ConfigError(f"runtime.device={experiment.runtime.device[:40]!r}: expected auto, cpu, cuda or cuda:N")
        self._check_data(experiment)
        self._check_limits(experiment)
        for key in FILES:
            section, _, name = key.partition(".")
            for given in _paths(getattr(getattr(experiment, section), name)):
                if not (key == "population.devices" and not given.lower().endswith(".csv")):
                    self._check_path(key, given)

    def _check_data(self, experiment: Experiment) -> None:
        if experiment.data.partition == OWN and not self.file.data.path:
            raise ConfigError(
                "data.partition=own: this device has no data of its own. Its owner names a file in device.toml: "
                '[data] path = "mine.jsonl"'
            )
        if experiment.data.partition != OWN and self.file.data.path:
            raise ConfigError(
                f"data.partition={experiment.data.partition}: this device trains on its owner's data and on nothing "
                "that a run names. Set data.partition=own, and leave data.path out"
            )

    def _check_limits(self, experiment: Experiment) -> None:
        """What the config alone shows to be beyond the owner's limits."""
        limits, base = self.file.limits, self.file.base
        if limits.methods and experiment.method_name not in limits.methods:
            raise ConfigError(_refused(f"method={experiment.method_name}", f"methods = {list(limits.methods)}"))
        if limits.adapters and experiment.adapter.kind not in limits.adapters:
            raise ConfigError(_refused(f"adapter={experiment.adapter.kind}", f"adapters = {list(limits.adapters)}"))
        hashes = [item for item in base.allow if item.startswith(HASH)]
        if base.allow and not hashes and not self._allows(experiment.model):
            asked = experiment.model.path or experiment.model.name
            raise ConfigError(_refused(f"model.path={asked[:200]}", f"[base] allow = {list(base.allow)}"))

    def _allows(self, model: ModelSpec) -> bool:
        return (model.path or model.name) in self.file.base.allow

    def check_base(self, asked: ModelSpec, sha256: str) -> None:
        """Check a base that was loaded, by the hash of its weights.

        Raises:
            ConfigError: if the owner allows certain bases, and this is none of them.
        """
        allow = self.file.base.allow
        if allow and not self._allows(asked) and f"{HASH}{sha256}" not in allow:
            raise ConfigError(_refused(f"a base with sha256 {sha256}", f"[base] allow = {list(allow)}"))

    def model(self, asked: ModelSpec) -> ModelSpec:
        """The base that is loaded where a run asks for `asked`: the owner's own copy of it, where there is one."""
        own = self.file.base.path
        return replace(asked, path=own, revision=None) if own is not None and self._allows(asked) else asked

    def data(self, asked: DataSpec) -> DataSpec:
        """The data that are read where a run asks for `asked`."""
        own = self.file.data
        if not own.path:
            return asked
        named = {name: value for name in COLUMNS if (value := getattr(own, name)) is not None}
        return replace(asked, partition="iid", path=list(own.path), heldout_path=None, **named)

    @property
    def own_data(self) -> tuple[int, str] | None:
        """The index and the name under which this device's own rows are known; None if it has none.

        Raises:
            ConfigError: if nothing says which client this is.
        """
        if not self.file.data.path:
            return None
        if self.index is None:
            raise ConfigError(
                "nothing says which client this device is: index = 3 in device.toml, or partition-id=3 in --node-config"
            )
        return self.index, self.file.name or f"client {self.index}"

    def check_turn(self, steps: int, examples: int, memory_bytes: float) -> None:
        """Check what a message asks for, before it is done.

        Args:
            steps: of the optimizer.
            examples: that these steps see.
            memory_bytes: that they are predicted to take.

        Raises:
            CapacityError: if it is beyond the owner's limits.
        """
        asked = {"steps": steps, "examples": examples, "memory_bytes": memory_bytes}
        for name, value in asked.items():
            most = getattr(self.file.limits, name)
            if most is not None and value > most:
                raise CapacityError(_refused(f"{value:,.0f} {name.replace('_', ' ')} in a round", f"{name} = {most:g}"))

    def _check_path(self, key: str, given: str) -> None:
        """Raises:
        ConfigError: if this names a file, and in none of the folders that the owner named.
        """
        try:
            path = Path(given).expanduser()
            if HUB_ID.fullmatch(given) and ".." not in given and not path.exists():
                return
            whole = path.resolve()
            if any(whole.is_relative_to(Path(folder).expanduser().resolve()) for folder in self.folders or ()):
                return
        except (OSError, ValueError, RuntimeError):  # no name that a file can have, or no such user's home
            pass
        raise ConfigError(
            f"{key}={given[:200]}: this device opens only files in folders that its owner has named, and takes a hub "
            f"id as OWNER/NAME. If the file is to be used, name its folder on the device: {FOLDERS}=/path/to/folder"
        )


def check_targets(experiment: Experiment, where: str, allowed: frozenset[str]) -> None:
    """Check the classes that an experiment from elsewhere would have made on this machine.

    Raises:
        ConfigError: if the experiment has a class made that is neither fedtune's nor allowed.
    """
    for what, spec in (
        ("method.strategy", experiment.strategy),
        ("method.client", experiment.method.client),
        ("codec_up", experiment.codec_up),
        ("codec_down", experiment.codec_down),
    ):
        check(spec, f"{where}{what}", allowed)


def _refused(asked: str, limit: str) -> str:
    return f"{asked}: this device's owner allows {limit} (device.toml)"


def device_owner(node_config: Mapping[str, Any] | None = None) -> Owner:
    """What the environment of a device's SuperNode says, and its device.toml.

    Raises:
        ConfigError: if that file can't be read.
    """
    node_config = node_config or {}
    named = os.environ.get(FOLDERS, "").split(os.pathsep)
    path = find_device_file(node_config, home())
    file = DeviceFile() if path is None else read_device_file(path)
    index = node_config.get("partition-id", file.index)
    index = index if isinstance(index, int) and not isinstance(index, bool) else None
    return Owner(_targets(), tuple(filter(None, named)), file, index)


def user() -> Owner:
    """Who runs a command on their own machine, about what may be another's: what the environment says of classes."""
    return Owner(_targets(), None)


def _targets() -> frozenset[str]:
    return frozenset(filter(None, re.split(r"[,\s]+", os.environ.get(TARGETS, ""))))


def _paths(given: object) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | tuple):
        yield from (item for item in given if isinstance(item, str))


def check_room(model: Any, spec: AdapterSpec) -> None:
    """Check that the adapter that an experiment asks for fits this machine's memory, before it is made.

    Raises:
        CapacityError: if an adapter has more numbers than this machine has room for, whatever else it holds.
    """
    from fedtune.device.memory import host_memory  # which imports torch

    layers = [layer for layer in model.modules() if hasattr(layer, "in_features") and hasattr(layer, "out_features")]
    sizes = [(int(layer.in_features), int(layer.out_features)) for layer in layers]
    widest, whole = max(map(sum, sizes), default=0), sum(map(sum, sizes))
    depth = int(getattr(model.config, "num_hidden_layers", 1))
    each = {"vera": widest, "bone": whole}.get(spec.kind, whole if "rank" in ADAPTERS[spec.kind] else 0)
    numbers = spec.rank * each if each else spec.tokens * widest * depth if "tokens" in ADAPTERS[spec.kind] else 0
    found = host_memory()
    if found is not None and NUMBER_BYTES * numbers > found.total:
        asked = f"adapter.rank={spec.rank}" if each else f"adapter.tokens={spec.tokens}"
        raise CapacityError(
            f"{asked} on this base takes {NUMBER_BYTES * numbers:.1e} bytes and more; this device has {found.total:.1e}"
        )
