"""From words to settings: Hydra composes conf/*.yaml and what was typed into an `Experiment`.

Below this module nobody sees Hydra or an untyped config.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.checks import nearest
from fedtune.errors import ConfigError, FedtuneError
from fedtune.schema import Experiment, SafeLoader

CONF = Path(__file__).resolve().parent.parent / "conf"

# The two directions share one folder of codecs; `codec=` sets both.
ALIASES = {
    "codec_up": ("codec@codec_up",),
    "codec_down": ("codec@codec_down",),
    "codec": ("codec@codec_up", "codec@codec_down"),
}


def choices(group: str) -> list[str]:
    """The names that a config group offers, e.g. `choices("model")`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def compose(overrides: Sequence[str]) -> Experiment:
    """Build the experiment that `key=value` words describe.

    Raises:
        ConfigError: for a word that isn't key=value, an unknown key or choice (with its neighbours), or a value of the
            wrong type or out of range.
    """
    for word in overrides:
        if not re.match(r"[A-Za-z_][\w.@]*=", word):
            raise ConfigError(f"{word}: expected key=value, as in train.lr=1e-3 (fedtune run --help lists the keys)")
    words = [word for override in overrides for word in _expand(override)]
    for group in ("model", "data"):
        # A path is a base or a data set of one's own: the default group's other settings don't apply to it.
        given = [word for word in words if word.startswith((f"{group}.path=", f"{group}="))]
        if given and all(word.startswith(f"{group}.path=") for word in given):
            words.append(f"{group}=custom")
    return _to_experiment(_compose(words), list(overrides))


def load(text: str, where: str = "config.yaml") -> Experiment:
    """Read back what `Experiment.text` wrote.

    Raises:
        ConfigError: if the text isn't such a config; `where` names it in the message.
    """
    try:
        given = yaml.load(text, SafeLoader)
        if not isinstance(given, dict):
            raise ConfigError(f"{where}: expected settings as 'key: value', got {type(given).__name__}")
        return _to_experiment(OmegaConf.merge(_schema(), given), None)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where} can't be read: {_first_line(error)}") from error


def load_file(path: Path) -> Experiment:
    """`load` of a run's config.yaml.

    Raises:
        ConfigError: if it can't be read or isn't UTF-8 text, as whatever fedtune writes is.
    """
    try:
        return load(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error}): put back what the run wrote") from error


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """The experiment that a Flower run carries: its whole text, or the words that compose it."""
    if text := run_config.get("config"):
        return load(str(text), "the run's config")
    overrides = str(run_config.get("overrides", ""))
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides={overrides!r} can't be split into words: {error}") from error
    # Who comes this way was started by Flower, on whatever it runs
    return compose(words if any(word.startswith("runtime=") for word in words) else ["runtime=flower", *words])


def build(spec: Mapping[str, Any], what: str) -> Any:
    """Make the object that a `_target_` entry describes.

    Raises:
        ConfigError: if the class can't be found or refuses its arguments.
    """
    try:
        return instantiate(dict(spec))
    except FedtuneError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, FedtuneError):
            raise cause from None
        raise ConfigError(f"{what}: {spec.get('_target_')} can't be made: {_first_line(cause)}") from error


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Where two nested dicts differ, as `train.lr: 0.001 -> 0.01`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


def describe_keys() -> Iterator[tuple[str, Any, str]]:
    """(key, default, help) of every setting, for `fedtune run --help`."""
    for outer in fields(Experiment):
        factory = outer.default_factory
        if factory is not MISSING and is_dataclass(factory):
            for inner in fields(factory):
                if "help" in inner.metadata and inner.default is not MISSING:
                    yield f"{outer.name}.{inner.name}", inner.default, inner.metadata["help"]
        elif "help" in outer.metadata and outer.default is not MISSING:
            yield outer.name, outer.default, outer.metadata["help"]


def _expand(override: str) -> list[str]:
    """Turn `codec_up=int8` into Hydra's `codec@codec_up=int8`, and empty what it would merge; leave all else alone."""
    key, equals, value = override.partition("=")
    if key in ALIASES:
        return [f"{target}{equals}{value}" for target in ALIASES[key]]
    if key.startswith("codec."):
        return [f"{target}.{key.removeprefix('codec.')}{equals}{value}" for target in ("codec_up", "codec_down")]
    if key == "population.devices":  # Hydra would add them to those of a mix
        return [f"{key}=null", override]
    return [override]


@cache
def _schema() -> DictConfig:
    """The dataclasses as an OmegaConf schema, which Hydra and OmegaConf copy before they fill it in. Frozen dataclasses
    come out read-only, which would stop Hydra from that, so that flag is taken off."""
    schema: DictConfig = OmegaConf.structured(Experiment)
    _thaw(schema)
    return schema


def _thaw(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _thaw(child)


def _compose(words: list[str]) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=_schema())
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed: DictConfig = hydra_compose("config", overrides=words)
            return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, words)) from error


def _to_experiment(composed: Any, overrides: list[str] | None) -> Experiment:
    try:
        if overrides is not None:
            composed.overrides = overrides
        experiment = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        # A check in __post_init__ arrives wrapped.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise cause or ConfigError(_first_line(error)) from None
    assert isinstance(experiment, Experiment)
    return experiment


def _explain(error: Exception, words: list[str]) -> str:
    """Hydra's refusal in our words: the key that is wrong and what was meant."""
    text = str(error)
    if match := re.match(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1), [word for word in words if not word.startswith(match.group(1))])
    if match := re.search(r"Could not find '([^']+)/([^']+)'", text):
        group, name = match.groups()
        known = choices(group)
        return f"{group}={name} is not known: expected {', '.join(known)}{nearest(name, known)}"
    if "Could not override" in text or "Could not find" in text or "No match in the defaults list" in text:
        return f"{_first_line(error)} Known: {', '.join(sorted({*groups(), *top_level_keys()}))}"
    if match := re.match(r"Error (?:merging override|parsing override) '?(.+?)'?(?:\n|$)", text):
        detail = _first_line(error.__cause__) if error.__cause__ else "expected key=value"
        return f"{match.group(1)}: {detail[0].lower()}{detail[1:]}"
    if bad := next((word for word in words if not _parses(word)), None):
        return f"{bad}: expected key=value; a value with special characters wants quotes, as in 'key=\"a=b\"'"
    return _first_line(error)


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _unknown_key(key: str, others: list[str]) -> str:
    node: Any = _compose(others)
    path = key.split(".")
    for depth, part in enumerate(path):
        known = [str(name) for name in node] if isinstance(node, DictConfig) else []
        if part not in known:
            known = [name for name in known if name not in ("_target_", "overrides")]
            if depth == 0:
                known = sorted({*known, *groups(), *ALIASES, "resume"})
            inside = f" in '{'.'.join(path[:depth])}'" if depth else ""
            named = f"'{part}'{inside} (from '{key}')" if depth or len(path) > 1 else f"'{part}'"
            return f"unknown setting {named}{nearest(part, known)} Known here: {', '.join(known) or 'none'}"
        node = node[part]
    return f"'{key}' can't be set"


def top_level_keys() -> list[str]:
    return [item.name for item in fields(Experiment) if item.name != "overrides"]


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
