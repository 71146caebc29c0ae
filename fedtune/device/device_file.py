"""device.toml: what the owner of a device says of it, and what others' runs may do there.

It lies in the device's home ($FEDTUNE_HOME), or where --node-config 'device-file="/path/device.toml"' says, and is read
anew for every message, so a change counts from the next one on. `fedtune doctor --write` makes one.
"""

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedtune.config.schema import ADAPTERS
from fedtune.core.checks import nearest
from fedtune.core.errors import ConfigError

FILE = "device.toml"
HASH = "sha256:"


@dataclass(frozen=True)
class DataHere:
    """The rows that this device trains on; they never leave it."""

    # Files, folders or patterns, relative to the file that says so; none: no data of its own
    path: tuple[str, ...] = ()
    split: str | None = None
    prompt_column: str | None = None  # what the columns are called, where a run's own names don't fit
    completion_column: str | None = None


@dataclass(frozen=True)
class BaseHere:
    """The base models that runs may use."""

    # Hub ids, folders, names, or sha256:... of a base's weights; none: any that it can open
    allow: tuple[str, ...] = ()
    path: str | None = None  # where an allowed one lies on this device, instead of at the hub


@dataclass(frozen=True)
class Limits:
    """How much a run may ask for."""

    methods: tuple[str, ...] = ()  # none: all
    adapters: tuple[str, ...] = ()  # kinds; none: all
    steps: int | None = None  # of the optimizer, in a round
    examples: int | None = None  # in a round, each as often as it is seen
    seconds: float | None = None  # of training, in a round
    memory_bytes: float | None = None  # that training is predicted to take
    message_bytes: int | None = None  # of one message, either way
    rounds_a_day: int | None = None
    bytes_a_day: int | None = None  # both ways

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{item.name} should be above 0, got {value}")
        if unknown := next((kind for kind in self.adapters if kind not in ADAPTERS), None):
            raise ValueError(f"adapters: '{unknown}' is not known: expected {', '.join(ADAPTERS)}")


@dataclass(frozen=True)
class DeviceFile:
    """What a device.toml says."""

    name: str = ""  # shown beside the client's figures, on the server too
    index: int | None = None  # which client this is, where --node-config has no partition-id
    data: DataHere = field(default_factory=DataHere)
    base: BaseHere = field(default_factory=BaseHere)
    limits: Limits = field(default_factory=Limits)


SECTIONS: dict[str, type[Any]] = {"data": DataHere, "base": BaseHere, "limits": Limits}
LISTS = ("path", "allow", "methods", "adapters")  # of which one may stand alone


def find_device_file(node_config: Mapping[str, Any], home: Path) -> Path | None:
    """The device's file, or None if it has none.

    Raises:
        ConfigError: if its node config names one that isn't there.
    """
    if named := node_config.get("device-file"):
        path = Path(str(named)).expanduser()
        if not path.is_file():
            raise ConfigError("--node-config: device-file names a file that isn't there")
        return path
    path = home / FILE
    return path if path.is_file() else None


def read_device_file(path: Path) -> DeviceFile:
    """Read a device.toml.

    Raises:
        ConfigError: naming what in it is not understood.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    made = {}
    for name, kind in SECTIONS.items():
        section = given.pop(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: expected a section [{name}], got {name} = {section!r}")
        made[name] = _made(kind, section, f"{path}: [{name}] ")
    found: DeviceFile = _made(DeviceFile, given, f"{path}: ", made)
    beside = path.resolve().parent
    places = tuple(_beside(place, beside) for place in found.data.path)
    base = None if found.base.path is None else _beside(found.base.path, beside)
    return DeviceFile(
        found.name[:80],
        found.index,
        DataHere(places, found.data.split, found.data.prompt_column, found.data.completion_column),
        BaseHere(found.base.allow, base),
        found.limits,
    )


def _beside(place: str, folder: Path) -> str:
    return os.path.join(folder, os.path.expanduser(place))  # noqa: PTH111, PTH118 (it may be a pattern)


def _made(kind: type[Any], given: Mapping[str, Any], where: str, more: Mapping[str, Any] | None = None) -> Any:
    known = {item.name: item for item in fields(kind) if item.name not in SECTIONS}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{where}{name} is not known: expected {', '.join(known)}{nearest(name, list(known))}")
        if name in LISTS and "tuple" in str(known[name].type):
            value = tuple(value) if isinstance(value, list) else (value,)
            right = all(isinstance(item, str) and item for item in value)
        else:
            right = _fits(str(known[name].type), value)
        if not right:
            raise ConfigError(f"{where}{name}: expected {_expected(str(known[name].type))}, got {given[name]!r}")
        values[name] = value
    assert all(item.default is not MISSING or item.default_factory is not MISSING for item in fields(kind))
    try:
        return kind(**values, **(more or {}))
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _fits(type: str, value: object) -> bool:
    if isinstance(value, bool):
        return False
    if "int" in type:
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float) if "float" in type else isinstance(value, str)


def _expected(type: str) -> str:
    if "tuple" in type:
        return "a text or a list of texts"
    return "a whole number" if "int" in type else "a number" if "float" in type else "a text"


HEAD = """\
# What others' runs may do on this device. fedtune reads it anew for every message: docs/deploy.md
"""
EXAMPLES = {
    "name": '"clinic-3"',
    "index": "3",
    "data.path": '"mine.jsonl"',
    "data.split": '"train"',
    "data.prompt_column": '"question"',
    "data.completion_column": '"answer"',
    "base.allow": '["HuggingFaceTB/SmolLM2-135M-Instruct", "sha256:..."]',
    "base.path": '"/srv/models/smollm2"',
    "limits.methods": '["fedit", "flora"]',
    "limits.adapters": '["lora"]',
    "limits.steps": "100",
    "limits.examples": "400",
    "limits.seconds": "600",
    "limits.memory_bytes": "4e9",
    "limits.message_bytes": "50_000_000",
    "limits.rounds_a_day": "48",
    "limits.bytes_a_day": "1_000_000_000",
}
NOTES = {
    "name": "shown beside this client's figures, on the server too",
    "index": "which client this is, where --node-config has no partition-id",
    "data.path": "a file, a folder or a pattern, or a list of these, from this file's folder; the rows never leave",
    "base.allow": "models that runs may use, by hub id, folder or hash; without it whatever this device can open",
    "base.path": "where the allowed one lies here",
    "limits.methods": "without it all; likewise adapters",
    "limits.steps": "of the optimizer, in a round",
    "limits.examples": "in a round, each as often as it is seen",
    "limits.seconds": "of training, in a round",
    "limits.memory_bytes": "that training is predicted to take",
    "limits.message_bytes": "of one message, either way",
    "limits.bytes_a_day": "both ways",
}


def written(file: DeviceFile) -> str:
    """The text of a device.toml that says this, with what else it may say as comments."""
    lines = [HEAD]
    for section, kind in (("", DeviceFile), *SECTIONS.items()):
        if section:
            lines.append(f"\n[{section}]")
        own = getattr(file, section) if section else file
        for item in fields(kind):
            if item.name in SECTIONS:
                continue
            key, value = (f"{section}.{item.name}" if section else item.name), getattr(own, item.name)
            said = item.name + " = " + (EXAMPLES[key] if value in (None, "", ()) else _toml(value))
            lines += [f"# {NOTES[key]}"] if key in NOTES else []
            lines.append(("#   " if value in (None, "", ()) else "") + said)
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
