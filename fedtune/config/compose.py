"""From words to settings: Hydra composes conf/*.yaml and what was typed into an `Experiment`.

Below this module nobody sees Hydra or an untyped config. What came from elsewhere, a file's text or a Flower run's
config, holds plain values: nothing in it is looked up on this machine.
"""

import copy
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.config.data import FILES, USERS
from fedtune.config.paths import PATHS, with_paths
from fedtune.config.plain_yaml import read_plain
from fedtune.config.population import CONNECTED, MOST_CONNECTED
from fedtune.config.schema import Experiment
from fedtune.config.targets import make
from fedtune.core.checks import nearest
from fedtune.core.errors import MALFORMED, ConfigError
from fedtune.core.text import first_line

CONF = Path(__file__).resolve().parents[2] / "conf"

# Of a word that came from elsewhere: characters, and brackets that open
LONGEST_WORD, MOST_BRACKETS = 20_000, 50

# The two directions share one folder of codecs; `codec=` sets both.
ALIASES = {
    "codec_up": ("codec@codec_up",),
    "codec_down": ("codec@codec_down",),
    "codec": ("codec@codec_up", "codec@codec_down"),
}


def choices(group: str) -> list[str]:
    """The names that a config group offers, e.g. `choices("model")`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
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
    if "data.partition=own" in overrides and not any(word.startswith("data=") for word in words):
        words.append("data=custom")  # each device's own
    words = _with_clients(words, overrides)
    return with_paths(_to_experiment(_compose(words), list(overrides)))


def _with_clients(words: list[str], overrides: Sequence[str]) -> list[str]:
    """The words, with how many clients there are where that is for the data or for nobody to say."""
    counted = [word for word in words if word.startswith("population.clients=")]
    if counted and counted[-1] == f"population.clients={CONNECTED}":
        kept = [word for word in words if word not in counted]
        return [*kept, f"population.clients={MOST_CONNECTED}", "population.connected=true"]
    if counted:
        return words
    # How many there are is for the data to say, once they are read: fedtune.data.own_data.counted
    return [*words, f"population.clients={MOST_CONNECTED}"] if _brings(overrides) else words


def _brings(words: Sequence[str]) -> bool:
    brought = {f"data.partition={name}" for name in (FILES, USERS)}
    return any(word in brought or word.startswith("data.user_column=") for word in words)


def load(text: str, where: str = "config.yaml") -> Experiment:
    """Read back what `Experiment.text` wrote, whoever's it is.

    Raises:
        ConfigError: if the text isn't such a config; `where` names it in the message.
    """
    try:
        given = read_plain(text)
        if not isinstance(given, dict):
            raise ConfigError(f"{where}: expected settings as 'key: value', got {type(given).__name__}")
        words = given.pop("overrides", [])  # what was typed is kept, and never looked up
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{where}: 'overrides' should be a list of words")
        if asks := next(_asking(given), None):
            raise ConfigError(
                f"{where}: '{asks[:100]}' has '${{' in it, which asks this machine for a value. A file or a message "
                "holds plain values: write the value itself there"
            )
        experiment = _to_experiment(OmegaConf.merge(_schema(), given), None)
        return replace(experiment, overrides=words) if words else experiment
    except (yaml.YAMLError, OmegaConfBaseException, *MALFORMED) as error:
        raise ConfigError(f"{where} can't be read: {first_line(error)[:300]}") from error


def _asking(given: Any, key: str = "") -> Iterator[str]:
    """The keys under which something is to be looked up."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inner = f"{key}.{name}" if key else str(name)
            yield from [inner] if "${" in str(name) else _asking(value, inner)
    elif isinstance(given, list):
        for value in given:
            yield from _asking(value, key)
    elif isinstance(given, str) and "${" in given:
        yield key


def load_file(path: Path) -> Experiment:
    """What `load` makes of a run's config.yaml.

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
    check_words(words, "overrides")
    # Who comes this way was started by Flower, on whatever it runs
    return compose(words if any(word.startswith("runtime=") for word in words) else ["runtime=flower", *words])


def check_words(words: Sequence[str], where: str) -> None:
    """Look at `key=value` words that came from elsewhere, before Hydra does, which finds files by the names of choices,
    and values by resolvers (${oc.env:HOME}).

    Raises:
        ConfigError: for a word that is more than a setting and its value; `where` names them in the message.
    """
    known = {*top_level_keys(), *groups(), *ALIASES, "resume"}
    for word in words:
        key, _, value = word.partition("=")
        section = key.split(".")[0]
        group = "codec" if key in ALIASES else key
        named = f"{where}: {word[:100]!r}"
        # Hydra's parser takes seconds for lists within lists, and ends in a RecursionError
        if len(word) > LONGEST_WORD or word.count("[") + word.count("{") > MOST_BRACKETS:
            raise ConfigError(f"{named}... is too long: at most {LONGEST_WORD} characters and {MOST_BRACKETS} brackets")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", key) or section not in known:
            raise ConfigError(f"{named} is no setting: expected key=value{nearest(section[:40], sorted(known))}")
        if group in groups() and value.strip("'\"") not in choices(group):
            raise ConfigError(f"{named} is not known: expected {', '.join(choices(group))}")
        if "${" in re.sub(r"\$\{[A-Za-z_][\w.]*\}", "", value):
            raise ConfigError(f"{named} asks this machine for a value: write the value itself there")


def build(spec: Mapping[str, Any], what: str, allowed: Collection[str] | None = None) -> Any:
    """Make the object that a `_target_` entry describes: `fedtune.config.targets.make`.

    Raises:
        ConfigError: if the class may not be made, can't be found or refuses its arguments.
    """
    return make(spec, what, allowed)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Where two nested dicts differ, as `train.lr: 0.001 -> 0.01`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


def describe_keys() -> Iterator[tuple[str, Any, str]]:
    """The (key, default, help) of every setting, for `fedtune run --help`."""
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
    if key in TEXTS and _is_bare(key, value):
        override = f"{key}={_quoted(value)}"
    if key in ALIASES:
        return [f"{target}{equals}{value}" for target in ALIASES[key]]
    if key.startswith("codec."):
        return [f"{target}.{key.removeprefix('codec.')}{equals}{value}" for target in ("codec_up", "codec_down")]
    if key == "population.devices":  # Hydra would add them to those of a mix
        return [f"{key}=null", override]
    return [override]


def _texts() -> Iterator[str]:
    """The settings that are text, whose values need no quotes but the shell's."""
    for outer in fields(Experiment):
        factory = outer.default_factory
        if factory is not MISSING and is_dataclass(factory):
            yield from (f"{outer.name}.{item.name}" for item in fields(factory) if item.type in (str, str | None))
        elif outer.type in (str, str | None):
            yield outer.name


TEXTS = frozenset([*_texts(), *PATHS])


def _is_bare(key: str, value: str) -> bool:
    """Whether a text is as the shell left it, and not null, or written for Hydra already."""
    written = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""" + (r"|\[.*\]|\{.*\}" if key in PATHS else "")
    return bool(value) and value != "null" and not re.fullmatch(written, value, re.DOTALL)


def quoted_text(key: str | None, value: str) -> str:
    """A text as the value of a word, so that the setting is that text to the letter.

    Args:
        key: a setting that is a text, whose words need no quotes where none are in them; None within a list, where they
            always do.
    """
    return value if key is not None and _is_bare(key, value) else _quoted(value)


def _quoted(value: str) -> str:
    """A text in the quotes of Hydra's grammar, where a backslash means something before a quote alone."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"


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
    try:
        return _set(words) or _by_hydra(tuple(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, words)) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists
        raise ConfigError(f"these settings can't be read: {first_line(error)[:200]}") from error


def _by_hydra(words: tuple[str, ...]) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=_schema())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed: DictConfig = hydra_compose("config", overrides=list(words))
        return composed


_chosen = cache(_by_hydra)  # a handful of choices; never changed


def _set(words: list[str]) -> DictConfig | None:
    """What Hydra composes, in a quarter of the time: files are chosen and merged once for all words that choose the
    same, and the other words set their values, as they do in Hydra's last step. None for what is more than setting a
    value that is there, so that Hydra does it, or says what is wrong with it."""
    heads = [word.partition("=")[0].partition("@")[0] for word in words]
    known = frozenset(groups())
    try:
        composed = copy.deepcopy(_chosen(tuple(word for word, head in zip(words, heads, strict=True) if head in known)))
        for word in (word for word, head in zip(words, heads, strict=True) if head not in known):
            parsed = OverridesParser.create().parse_override(word)
            if parsed.type != OverrideType.CHANGE or parsed.package or parsed.is_sweep_override():
                return None
            OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True)
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError):
        return None
    return composed


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
        raise cause or ConfigError(first_line(error)) from None
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
        return f"{first_line(error)} Known: {', '.join(sorted({*groups(), *top_level_keys()}))}"
    if match := re.match(r"Error (?:merging override|parsing override) '?(.+?)'?(?:\n|$)", text):
        detail = first_line(error.__cause__) if error.__cause__ else "expected key=value"
        return f"{match.group(1)}: {detail[0].lower()}{detail[1:]}"
    if bad := next((word for word in words if not _parses(word)), None):
        return f"{bad[:200]}: expected key=value; a value with special characters wants quotes, as in 'key=\"a=b\"'"
    return first_line(error)


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
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
