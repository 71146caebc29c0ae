"""A tuned model as one small file: what a newcomer would be sent, and all else that it takes beside the base.

A model that moves along seeded directions is its base and some numbers, so the file is as small as one message: 4 bytes
a direction and about 2 kB of settings. `fedtune export` makes a model folder of it wherever the base is.

It is one safetensors file. Its tensors are the instruction's; under "fedtune" its metadata holds this JSON:

    format    1
    round     the last round that is in it
    settings  the instruction's
    config    the experiment, as in config.yaml, but not where and by whom it was run
    base      source, sha256 and hub_id as in summary.json; dtype

Such a file may come from a stranger. What is read here is checked, and nothing in it can have code run that isn't
fedtune's own (fedtune/config/targets.py).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedtune.config.compose import load
from fedtune.config.schema import Experiment, RuntimeSpec
from fedtune.core.errors import MALFORMED, ClientError, ConfigError, DivergedError, ExportError, ModelError, WireError
from fedtune.core.protocol import Instruction, Tensors
from fedtune.core.text import first_line
from fedtune.device.owner import check_targets, user
from fedtune.models.base import Origin
from fedtune.wire.messages import check_finite

NAME = "model.fedtune"  # in a run folder
FORMAT = 2  # 1 went along other directions (fedtune/random_directions/hash_noise.py)
KEY = "fedtune"
LONGEST = 100_000  # characters of a config; ours have about 2,000


@dataclass(frozen=True)
class TunedModel:
    """All that it takes to make a tuned model from its base."""

    experiment: Experiment
    instruction: Instruction
    origin: Origin  # the base's
    dtype: str  # the base's, "float32" or "bfloat16": w is rounded to it
    round: int


def dump(tuned: TunedModel) -> bytes:
    """The file's content, the same for the same model."""
    shared = replace(tuned.experiment, out=None, overrides=[], runtime=RuntimeSpec(threads=1))
    about = {
        "format": FORMAT,
        "round": tuned.round,
        "settings": dict(tuned.instruction.settings),
        "config": shared.text(),
        "base": {
            "source": tuned.origin.source,
            "sha256": tuned.origin.sha256,
            "hub_id": tuned.origin.hub_id,
            "dtype": tuned.dtype,
        },
    }
    # Decoded tensors may lie in one buffer, which safetensors refuses
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tuned.instruction.tensors.items()}
    return save(tensors, metadata={KEY: json.dumps(about)})


def read(path: Path) -> TunedModel:
    """Read what `dump` made.

    Raises:
        ExportError: if the file is damaged, isn't fedtune's, or is of a format that this fedtune doesn't know.
        ConfigError: if its config can't be read, or names a class that isn't fedtune's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, UnicodeError) as error:
        raise ExportError(f"{path} can't be read as a .fedtune file: {error}. Get it again, whole") from error
    if KEY not in metadata:
        raise ExportError(f"{path} is no .fedtune file: its metadata has no '{KEY}'. Give a run's folder or {NAME}")
    with malformed(path):
        about = json.loads(metadata[KEY])
        if not isinstance(about, dict) or not isinstance(version := about.get("format"), int):
            raise ExportError(f"{path}: expected metadata with a 'format', got {str(about)[:60]!r}")
        if version != FORMAT:
            raise ExportError(f"{path} is of format {version}; this fedtune reads {FORMAT}: take the fedtune it is of")
        text, base = str(_typed(path, about, "config", str)), _typed(path, about, "base", dict)
        settings = _typed(path, about, "settings", dict)
        for name, value in settings.items():
            if not isinstance(value, int | float | str | bool):
                raise ExportError(f"{path}: setting '{name}' should be a number, text or truth value, got {value!r}")
        hub_id, dtype = base.get("hub_id"), base.get("dtype")
        origin = Origin(_typed(path, base, "source", str), _typed(path, base, "sha256", str), None, hub_id)
        if dtype not in ("float32", "bfloat16") or not isinstance(hub_id, str | None):
            raise ExportError(f"{path}: expected a base of float32 or bfloat16, and a name, got {dtype!r}, {hub_id!r}")
        if not re.fullmatch("[0-9a-f]{64}", origin.sha256):
            raise ExportError(f"{path}: expected the base's sha256, got {origin.sha256[:70]!r}")
        number = _typed(path, about, "round", int)
        check_finite(tensors)
        if len(text) > LONGEST:
            raise ConfigError(f"{path}: its config is no run's: longer than {LONGEST} characters")
        experiment = load(text, f"{path}: its config")
        check_targets(experiment, f"{path}: its ", user().targets)
    return TunedModel(experiment, Instruction(tensors, settings), origin, dtype, number)


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Name the file where data of another form than expected makes something fail, however it does."""
    try:
        yield
    except (ClientError, DivergedError, ModelError, WireError) as error:
        raise ExportError(f"{path} makes no model here: {error}") from error
    except MALFORMED as error:
        reason = first_line(error)[:200]
        raise ExportError(f"{path} makes no model here: {type(error).__name__}: {reason}") from error


def _typed(path: Path, tree: Mapping[str, Any], name: str, kind: type) -> Any:
    value = tree.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ExportError(f"{path}: '{name}' should be {kind.__name__}, got {str(value)[:60]!r}")
    return value
