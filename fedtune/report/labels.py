"""What tells entries from one another, in as few words as will do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from fedtune.config.compose import CONF
from fedtune.config.schema import Experiment, flat, to_dict
from fedtune.config.targets import TARGET, name_of

# What differs between runs of one entry, or says where it ran and what was measured beside it
BESIDE = ("seed", "out", "overrides", "name", "tracker", "rounds", "budget", "runtime")
DISPLAY = (
    "every", "batch_size", "clients", "exactness", "similarity", "peers", "generate", "max_new_tokens", "extract",
)  # fmt: skip
LONGEST = 40  # characters of a value
# What a table should show wherever entries differ in it, whatever their methods
_HEADS = ("server_optimizer", "codec_up._target_", "codec_down._target_", "adapter.kind", "adapter.rank",
          "model.quantization")  # fmt: skip
_POOLED = ("population.", "train.steps", "train.epochs", "method.client.steps")  # what pooling changes by itself


def settings(experiment: Experiment) -> dict[str, Any]:
    """What makes an entry: all that decides a method's result and cost, but for the seed."""
    found: dict[str, Any] = {key: value for key, value in to_dict(experiment).items() if key not in BESIDE}
    if isinstance(measured := found.get("evaluate"), dict):
        found["evaluate"] = {key: value for key, value in measured.items() if key not in DISPLAY}
    return found


def alike(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The `settings` of each, by dotted key, such that an entry's seeds are equal: what repeats the run's seed, as
    method.strategy.basis_seed does, is "seed", unless a run with another seed has the same value there."""
    tables = [flat(settings(experiment)) for experiment in experiments]
    met: dict[str, set[int]] = {}  # the seeds of the runs that have this value under this key, and all else alike
    keys = []
    for table, experiment in zip(tables, experiments, strict=True):
        rest = repr(sorted((key, repr(value)) for key, value in table.items() if not key.endswith("seed")))
        keys.append({key: f"{key}={value!r} {rest}" for key, value in table.items() if key.endswith("seed")})
        for word in keys[-1].values():
            met.setdefault(word, set()).add(experiment.seed)
    for table, experiment, words in zip(tables, experiments, keys, strict=True):
        for key, word in words.items():
            if table[key] == experiment.seed and len(met[word]) == 1:
                table[key] = "seed"
    return tables


def labels(experiments: Sequence[Experiment]) -> list[str]:
    """One for each of these, which differ in some setting; unique.

    The method always; then server optimizer, codecs, adapter and quantization where any two differ; then whatever else
    tells apart those that are equal so far. What is as by default isn't said.
    """
    tables = [flat(settings(experiment)) for experiment in experiments]
    defaults = flat(settings(Experiment()))
    differing = {key for key in _HEADS if len({_hashable(table.get(key)) for table in tables}) > 1}
    if len({experiment.server_optimizer_name for experiment in experiments}) > 1:
        differing.add("server_optimizer")
    heads = [_head(experiment, differing) for experiment in experiments]
    found = []
    for head, table in zip(heads, tables, strict=True):
        like = [other for other, beside in zip(tables, heads, strict=True) if beside == head]
        found.append(" ".join([head, *_rest(table, like, defaults)]))
    return unique(found)


def unique(names: Sequence[str]) -> list[str]:
    """The names, where one is there twice the later ones with a number."""
    taken: set[str] = set()
    found = []
    for name in names:
        number, tried = 1, name
        while tried in taken:
            number += 1
            tried = f"{name} ({number})"
        taken.add(tried)
        found.append(tried)
    return found


def shown(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        text = "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    else:
        text = "[" + ",".join(map(shown, value)) + "]" if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def module(spec: Mapping[str, Any]) -> str:
    """The name under which a `_target_` is chosen."""
    return name_of(str(spec.get(TARGET) or "raw"))


def _head(experiment: Experiment, differing: set[str]) -> str:
    words, own = [experiment.method_name], _own(experiment.method_name)
    if "server_optimizer" in differing and experiment.server_optimizer_name:
        words.append(experiment.server_optimizer_name)
    up, down = module(experiment.codec_up), module(experiment.codec_down)
    if {"codec_up._target_", "codec_down._target_"} & differing:
        if up == down:
            words += [up] if up != own.get("codec@codec_up", "raw") else []
        else:
            words += [
                f"{way} {name}"
                for way, name in (("up", up), ("down", down))
                if name != own.get(f"codec@codec_{way}", "raw")
            ]
    adapter = experiment.adapter
    if "adapter.kind" in differing and adapter.kind != own.get("adapter", "lora"):
        words.append("full" if adapter.kind == "none" else adapter.kind)
    if "adapter.rank" in differing and adapter.kind != "none":
        words.append(f"r{adapter.rank}")
    if "model.quantization" in differing and experiment.model.quantization != "none":
        words.append(experiment.model.quantization)
    return " ".join(words)


@cache
def _own(method: str) -> dict[str, str]:
    """The adapter and the codecs that a method brings along, by config group: they are part of its name."""
    try:
        found = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    lines = found.get("defaults", []) if isinstance(found, dict) else []
    return {
        str(key).removeprefix("override /"): str(value)
        for line in lines
        if isinstance(line, dict)
        for key, value in line.items()
    }


def _rest(table: Mapping[str, Any], like: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[str]:
    """What tells this one from those with the same head."""
    keys = dict.fromkeys(key for other in like for key in other)
    differing = [key for key in keys if len({_hashable(other.get(key)) for other in like}) > 1]
    differing = [key for key in differing if not _mirrors(key, differing, like)]
    if table.get("population.pooled"):
        differing = [key for key in differing if not key.startswith(_POOLED)]
    both = {key for key in differing if key.startswith("codec_up.") and _as_down(key, like)}
    words = []
    for key in differing:
        value = table.get(key)
        if (key not in table and value is None) or (key in defaults and defaults[key] == value):
            continue
        if key.startswith("codec_down.") and f"codec_up.{key.removeprefix('codec_down.')}" in both:
            continue
        name = f"codec.{key.removeprefix('codec_up.')}" if key in both else key
        words.append(f"{name}={shown(value)}")
    return words


def _mirrors(key: str, differing: Sequence[str], like: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a method's own setting only repeats a common one, as method.client.lr does train.lr."""
    if not key.startswith("method."):
        return False
    name = key.rsplit(".", 1)[-1]
    same = [f"{group}.{name}" for group in ("train", "population", "adapter")]
    return any(
        other in differing and all(table.get(key) in (None, table.get(other)) for table in like) for other in same
    )


def _as_down(key: str, like: Sequence[Mapping[str, Any]]) -> bool:
    down = f"codec_down.{key.removeprefix('codec_up.')}"
    return all(table.get(key) == table.get(down) for table in like)


def _hashable(value: Any) -> str:
    return repr(value)


def told_apart(names: Sequence[str], made: Sequence[str]) -> list[str]:
    """Names that were given; where one is there twice, with what the label made of settings says beside it."""
    often = Counter(names)
    return unique(
        [
            name if often[name] == 1 else " ".join([name, *(w for w in label.split(" ") if w not in name.split(" "))])
            for name, label in zip(names, made, strict=True)
        ]
    )
