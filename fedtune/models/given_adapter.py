"""A PEFT adapter that a run goes on from (adapter.path): its settings become the run's, its tensors the start.

Every party reads the folder where it is itself, and the tensors' hash is in the run's config and in the layout's, so
nobody trains from another start than the others. Tensors are read from safetensors alone, which hold no code.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedtune.config.schema import AdapterSpec, Experiment
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.protocol import Slot, Tensors, describe
from fedtune.models.base import Origin

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LONGEST = 1_000_000  # bytes of an adapter_config.json; PEFT writes about a thousand

# By PEFT's name for the kind: ours, and PEFT's names for our settings. VeRA's projections follow from a run's own seed
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "LORA": ("lora", {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
    "IA3": ("ia3", {}),
    "OFT": ("oft", {"block_size": "oft_block_size"}),
    "MISS": ("bone", {"rank": "r", "dropout": "miss_dropout"}),
    "ADAPTION_PROMPT": ("adaption_prompt", {"tokens": "adapter_len", "layers": "adapter_layers"}),
    "PROMPT_TUNING": ("prompt_tuning", {"tokens": "num_virtual_tokens"}),
    "PREFIX_TUNING": ("prefix_tuning", {"tokens": "num_virtual_tokens"}),
}
LAYERED = ("lora", "rslora", "dora", "ia3", "oft", "bone")  # kinds that name layers
# What says nothing of how the tensors are to be read, or which the tensors' own names say
_UNREAD = (
    "alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules feedforward_modules "
    "inference_mode init_ia3_weights init_lora_weights init_weights layers_pattern layers_to_transform loftq_config "
    "lora_dropout megatron_config megatron_core miss_dropout module_dropout peft_type peft_version prompt_tuning_init "
    "prompt_tuning_init_text qalora_group_size rank_pattern revision runtime_config target_modules task_type "
    "token_dim tokenizer_kwargs tokenizer_name_or_path"
)
# Starts that leave the base as it is; with others (pissa, olora, loftq, ...) the tensors are of a changed base
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def with_given_adapter(experiment: Experiment) -> Experiment:
    """The experiment with what the folder of `adapter.path` says of its adapter; as it is where no folder is given.

    Raises:
        ConfigError: if there is no such adapter, fedtune can't go on from its kind, or what was typed, or the run began
            with, is something else.
    """
    spec = experiment.adapter
    if spec.path is None:
        return experiment
    typed = {word.partition("=")[0] for word in experiment.overrides}
    folder, begun = folder_of(spec.path), spec.sha256 is not None and "adapter.sha256" not in typed
    found = replace(_settings_of(folder, spec.path), path=spec.path, sha256=_sha256(folder))
    if spec.sha256 not in (None, found.sha256):
        raise ConfigError(
            f"adapter.path={spec.path}: {TENSORS} there has sha256 {str(found.sha256)[:16]}..., and the run goes on "
            f"from one with {str(spec.sha256)[:16]}...: put that there"
        )
    if begun or "adapter.dropout" in typed:  # of training alone, and so the user's to choose
        found = replace(found, dropout=spec.dropout)
    for item in fields(AdapterSpec):
        asked, has = getattr(spec, item.name), getattr(found, item.name)
        said = f"adapter.{item.name}" in typed or (item.name == "kind" and "adapter" in typed)
        if item.name == "targets":
            asked = sorted(asked) if asked is not None else asked
        if item.name != "sha256" and (begun or said) and asked != has:
            raise ConfigError(
                f"adapter.{item.name}={asked}, and the adapter in adapter.path={spec.path} has {has}: leave out "
                f"adapter.{item.name}, or go on from another adapter"
            )
    return replace(experiment, adapter=found)


def folder_of(given: str) -> Path:
    """The adapter's own folder: the one that is named, or of a run the adapter in it.

    Raises:
        ConfigError: if there is no adapter, or one that isn't held in safetensors.
    """
    named = Path(given).expanduser()
    folder = next((each for each in (named, named / "adapter") if (each / CONFIG).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"adapter.path={given}: no {CONFIG} is there, nor in adapter/: give the folder of a PEFT adapter, or of a "
            "run that has one"
        )
    if not (folder / TENSORS).is_file():
        raise ConfigError(
            f"adapter.path={given}: no {TENSORS} is there. Pickles (adapter_model.bin) are not opened, as they can "
            "hold code: have PEFT write the adapter again, with safe_serialization=True"
        )
    return folder


@contextmanager
def fitting(spec: AdapterSpec) -> Iterator[None]:
    """Name the folder where its adapter is none for this base."""
    try:
        yield
    except ModelError as error:
        if spec.path is None:
            raise
        raise ModelError(f"adapter.path={spec.path} is no adapter for this base: {error}") from error


def hints(spec: AdapterSpec, origin: Origin) -> list[str]:
    """What is to be said of the base that the adapter's folder names, which is a hint and no more."""
    if spec.path is None:
        return []
    named = _read(folder_of(spec.path), spec.path).get("base_model_name_or_path")
    if not named or named in (origin.hub_id, origin.path):
        return []
    return [
        f"adapter.path: the adapter names {str(named)[:100]} as its base, and this run's is {origin.source}. Its "
        "layers and shapes fit; whether the weights are those that it was tuned on, nobody can tell"
    ]


def given_values(module: Any, slots: Sequence[Slot], spec: AdapterSpec) -> Tensors:
    """The folder's tensors as the values that every party starts from, in the layout's dtypes.

    Args:
        module: what the adapter of these settings was attached to.

    Raises:
        ModelError: if they are not this model's, one by one, or PEFT would read them otherwise than this model does.
    """
    assert spec.path is not None
    folder, where = folder_of(spec.path), f"adapter.path={spec.path}"
    _check_config(_read(folder, spec.path), module.peft_config["default"].to_dict(), where)
    try:
        content = (folder / TENSORS).read_bytes()
        tensors: Tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{where}: {TENSORS} can't be read ({error}): get the adapter again, whole") from error
    if hashlib.sha256(content).hexdigest() != spec.sha256:
        raise ModelError(f"{where}: {TENSORS} was changed while it was read: start again")
    with fitting(spec):
        expected = {slot.name for slot in slots}
        if more := sorted(tensors.keys() - expected):
            raise ModelError(f"it has '{more[0]}' ({len(more)} such), and this model has no such tensor")
        if less := sorted(expected - tensors.keys()):
            raise ModelError(f"it lacks '{less[0]}' ({len(less)} such), which this model trains")
        for slot in slots:
            tensor = tensors[slot.name]
            if tuple(tensor.shape) != slot.shape or not tensor.is_floating_point():
                raise ModelError(f"'{slot.name}' should be {slot.shape} numbers, and is {describe(tensor)}")
            if not torch.isfinite(tensor).all():
                raise ModelError(f"'{slot.name}' has numbers that aren't finite")
    return {slot.name: tensors[slot.name].to(getattr(torch, slot.dtype)) for slot in slots}


def _settings_of(folder: Path, given: str) -> AdapterSpec:
    config = _read(folder, given)
    where, named = f"adapter.path={given}", str(config.get("peft_type"))[:40]
    if named not in KINDS:
        raise ConfigError(f"{where} is a {named} adapter, and fedtune goes on from {', '.join(KINDS)}")
    kind, names = KINDS[named]
    if kind == "lora" and (config.get("use_rslora") or config.get("use_dora")):
        kind = "dora" if config.get("use_dora") else "rslora"
    _check_start(config, where)
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(name):
            raise ConfigError(
                f"{where} has {name}={str(config[name])[:100]}, and fedtune trains one rank and scaling, and adapters "
                "alone: go on from an adapter without"
            )
    settings: dict[str, Any] = {"kind": kind}
    for name, theirs in names.items():
        value, whole = config.get(theirs), name not in ("alpha", "dropout")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"{where}: '{theirs}' in {CONFIG} should be a number, and is {str(value)[:40]!r}")
        settings[name] = value if whole else float(value)
    if kind in LAYERED:
        targets = config.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ConfigError(
                f"{where}: 'target_modules' in {CONFIG} should be a list of layers' names, and is "
                f"{str(targets)[:100]!r}"
            )
        settings["targets"] = sorted(targets)
    try:
        return AdapterSpec(**settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_start(config: Mapping[str, Any], where: str) -> None:
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise ConfigError(
            f"{where} has init_lora_weights={str(start)[:40]}, which took a part out of the base's weights: convert it "
            "with PEFT's path_initial_model_for_weight_conversion, then go on from that"
        )


def _check_config(config: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """Raises:
    ModelError: if a field by which PEFT reads the tensors is another than this model has. Of a field that this
        PEFT doesn't know, anything that is set.
    """
    for name, value in config.items():
        if name not in _UNREAD.split() and (value or ours.get(name)) and value != ours.get(name):
            raise ModelError(
                f"{where} has {name}={str(value)[:60]}, and fedtune's adapter of this kind {ours.get(name)}: it "
                "can't be gone on from"
            )


def _read(folder: Path, given: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > LONGEST:
            raise ConfigError(f"adapter.path={given}: {CONFIG} is no adapter's, it has more than {LONGEST} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"adapter.path={given}: {CONFIG} can't be read ({error}): get the adapter again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"adapter.path={given}: {CONFIG} should hold settings by name, got {type(config).__name__}")
    return config


def _sha256(folder: Path) -> str:
    try:
        with (folder / TENSORS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{folder / TENSORS} can't be read: {error.strerror or error}") from error
