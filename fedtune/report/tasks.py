"""What a run learns, as against how: base, data, division, population, evaluation. Scores are comparable within one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import flat, to_dict
from fedtune.report.labels import module, settings, shown
from fedtune.runs.read import Run

# Which settings a partition looks at; the others would tell equal divisions apart
_LOOKS_AT = {
    "alpha": ("dirichlet",),
    "classes": ("pathological",),
    "partition_by": ("dirichlet", "natural", "pathological", "shard"),
}
_WHERE = {"base": ("name", "path", "revision"), "data": ("name", "path", "subset", "split")}
# What a person wants to know of a whole group, in this order, where all share it
_COMMON = ("train.steps", "train.epochs", "train.batch_size", "train.lr", "train.optimizer", "adapter.kind",
           "adapter.rank", "adapter.alpha", "model.quantization", "population.cohort", "population.deadline",
           "population.straggler", "population.dropout", "population.selection")  # fmt: skip


def tasks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Nested settings for each run, equal for those that learn the same task.

    Where the base or the data came from stands in summary.json. A run that lost it is taken to have had the same as
    those with equal settings, where these agree.
    """
    known = {(what, _named(run, what)): set[str]() for run in runs for what in _WHERE}
    for run in runs:
        for what in _WHERE:
            if (told := _told(run, what)) is not None:
                known[what, _named(run, what)].add(told)
    return [_task(run, known) for run in runs]


def title(run: Run) -> str:
    """As "SmolLM2-135M on chatterbot, 20 clients"."""
    model, data = run.experiment.model, run.experiment.data
    base = _last(_text(run.summary, "base", "hub_id") or model.path) or model.name
    source = data.name if data.name != "custom" else _last(", ".join(data.paths)) or data.name
    count = _clients(run)
    return f"{base} on {source}, {count} client{'' if count == 1 else 's'}"


def common(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    """Settings that all of these share, for people."""
    found = [_facts(run) for run in runs]
    first = found[0]
    return tuple((key, value) for key, value in first.items() if all(other.get(key) == value for other in found))


def _task(run: Run, known: Mapping[tuple[str, str], set[str]]) -> dict[str, Any]:
    experiment = run.experiment
    data = {
        key: value
        for key, value in to_dict(experiment.data).items()
        if key not in _WHERE["data"] and experiment.data.partition in _LOOKS_AT.get(key, (experiment.data.partition,))
    }
    population = experiment.population
    found: dict[str, Any] = {"data": data}
    for what in _WHERE:
        told = known[what, _named(run, what)]
        own = _told(run, what)
        found.setdefault(what, {})["source"] = own or (next(iter(told)) if len(told) == 1 else _named(run, what))
    found["population"] = {"clients": _clients(run), "devices": to_dict(population.devices)}
    if population.devices is not None:
        found["population"]["efficiency"] = population.efficiency
    found["evaluate"] = {"examples": experiment.evaluate.examples}
    return found


def _named(run: Run, what: str) -> str:
    spec = run.experiment.model if what == "base" else run.experiment.data
    return ", ".join(str(value) for key in _WHERE[what] if (value := getattr(spec, key)) is not None)


def _told(run: Run, what: str) -> str | None:
    """What summary.json says of the base or the data: enough to tell two apart."""
    if what == "base":
        return _text(run.summary, "base", "sha256")
    found = [_text(run.summary, "data", key) for key in ("source", "examples", "server_heldout")]
    if any(value is None for value in found):
        return None
    return f"{found[0]} ({found[1]} examples, {found[2]} held out)"


def _clients(run: Run) -> int:
    """How many clients the data is divided among, or would be if it weren't pooled."""
    return run.experiment.population.pooled or run.experiment.population.clients


def _facts(run: Run) -> dict[str, str]:
    experiment, summary = run.experiment, run.summary
    data, population = experiment.data, experiment.population
    table = flat(settings(experiment))
    division = data.partition
    if division in _LOOKS_AT["alpha"]:
        division += f" (alpha {data.alpha:g}" + (f", by {data.partition_by})" if data.partition_by else ")")
    found = {
        "base": _text(summary, "base", "source") or _named(run, "base"),
        "base sha256": (_text(summary, "base", "sha256") or "")[:12],
        "data": _told(run, "data") or _named(run, "data"),
        "partition": division,
        "data.loss_on": data.loss_on,
        "data.max_length": str(data.max_length),
        "clients": str(_clients(run)),
        "devices": "" if population.devices is None else shown(to_dict(population.devices)),
        "evaluate.examples": str(experiment.evaluate.examples or "all"),
        "method": experiment.method_name,
        "codec_up": module(experiment.codec_up),
        "codec_down": module(experiment.codec_down),
        "rounds": str(experiment.rounds),
    }
    found |= {key: shown(table[key]) for key in _COMMON if table.get(key) is not None}
    if experiment.train.epochs is not None:  # which is instead
        del found["train.steps"]
    if experiment.train.is_scheduled:
        found["train.schedule"] = experiment.train.schedule
    found["fedtune"] = _text(summary, "versions", "fedtune") or ""
    found["torch"] = _text(summary, "versions", "torch") or ""
    return {key: value for key, value in found.items() if value}


def _text(summary: Mapping[str, Any], *path: str) -> str | None:
    """What stands there in a summary, if it is a word or a number; a file may say anything."""
    found: Any = summary
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return str(found)[:300] if isinstance(found, str | int | float) and not isinstance(found, bool) else None


def _last(path: str | None) -> str:
    return Path(path).name if path else ""
