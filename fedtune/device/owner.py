"""What the owner of a machine lets others' runs do on it.

A run's config and its messages come from whoever can reach the server. What is made of them, read for them, and how
much they may ask for is for the owner of the device to say, in the environment of its SuperNode:

    FEDTUNE_TARGETS   classes that may be made besides fedtune's own, as `mine.Strategy,mine.Client`
    FEDTUNE_FOLDERS   folders that files may be read from, with ":" between them as in PATH (";" on Windows)

A simulation on one's own machine has no such owner: what is typed there is the user's own.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import ADAPTERS, AdapterSpec, Experiment, flat, to_dict
from fedtune.config.targets import check
from fedtune.core.errors import CapacityError, ConfigError
from fedtune.core.limits import check_values

TARGETS, FOLDERS = "FEDTUNE_TARGETS", "FEDTUNE_FOLDERS"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?|xpu(:\d{1,3})?")
NUMBER_BYTES = 8  # of an adapter's number, with its gradient
# Settings whose values are the names of files on the machine that they are read on
FILES = ("model.path", "data.path", "adapter.path", "population.devices")


@dataclass(frozen=True)
class Owner:
    """What the owner of a machine allows an experiment from elsewhere.

    Attributes:
        targets: classes that may be made besides those of `fedtune.config.targets.table`.
        folders: where files may be read; None: anywhere, as on a server, whose operator starts the runs.
    """

    targets: frozenset[str] = frozenset()
    folders: tuple[str, ...] | None = ()

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
        for key in FILES:
            section, _, name = key.partition(".")
            for given in _paths(getattr(getattr(experiment, section), name)):
                if not (key == "population.devices" and not given.lower().endswith(".csv")):
                    self._check_path(key, given)

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


def device_owner() -> Owner:
    """What the environment of a device's SuperNode says."""
    named = os.environ.get(FOLDERS, "").split(os.pathsep)
    return Owner(_targets(), tuple(filter(None, named)))


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
