"""The model card of a pushed run: what was done, to what, and what came of it, from what the run itself wrote down."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedtune.config.schema import FULL, Experiment
from fedtune.config.targets import TARGET, declared_traits, told_of
from fedtune.core.text import size
from fedtune.device.owner import HUB_ID

# Of a whole path all but the last name; a hub id has none before its slash
FOLDERS = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^,\[\]'\"]*[/\\])?")
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def model_card(
    name: str, experiment: Experiment, summary: Mapping[str, Any], round: int, loss: float | None, merged: bool
) -> str:
    """The README.md of a model repository: front matter, then a few tables.

    No path of this machine is in it: of files it has the names.

    Args:
        name: the repository's, OWNER/NAME.
        summary: what the run's summary.json holds.
        round: the last that is in the model.
        loss: the held-out loss after it, where it is known.
        merged: what is pushed is a whole model, and no adapter.
    """
    base, data, totals = (dict(summary.get(part) or {}) for part in ("base", "data", "totals"))
    target = str(experiment.method.strategy.get(TARGET))
    title, method = declared_traits(target).title or experiment.method_name, experiment.method_name
    paper = PAPER.search(told_of(target))
    adapter = "all weights" if experiment.adapter.kind == FULL else experiment.adapter.kind
    held_out, before = data.get("server_heldout", 0), summary.get("first_eval_loss")
    population = experiment.population
    clients = population.pooled or population.clients
    rows = {
        "Base": _base(base),
        "Method": f"{title} (`method={method}`)"
        + (f", [arXiv:{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""),
        "Trained": adapter
        + (f", {summary['adapter']['trainable_parameters']:,} numbers" if "adapter" in summary else ""),
        "Data": f"{_source(data)}: {data.get('examples', 0):,} examples, {data.get('train', 0):,} of them trained on",
        "Held out": f"{held_out:,} examples by the server, {data.get('client_heldout', 0):,} by clients; "
        f"{data.get('heldout_in_training', 0)} of the server's are in training data word for word",
        "Rounds": str(round),
        "Clients": f"{clients}" + (", pooled into one" if population.pooled else f", {population.cohort_size} a round"),
        "Bytes": f"{size(totals.get('up_wire_bytes', 0))} up, {size(totals.get('down_wire_bytes', 0))} down, by all "
        "clients over the whole run",
        "Held-out loss": f"{_loss(before)} before, {_loss(loss)} after",
        "Privacy": privacy(experiment),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    versions = ", ".join(f"{package} {version}" for package, version in dict(summary.get("versions") or {}).items())
    return f"""---
{yaml.safe_dump(_front(experiment, base, merged), sort_keys=False, allow_unicode=True)}---

# {name.rpartition("/")[2]}

{"A model" if merged else "A PEFT adapter"} fine-tuned by federated learning with fedtune: clients kept their data and
sent updates{"" if experiment.runtime.name == "flower" else ", simulated on one system"}.

| | |
|---|---|
{table}

The losses are nats a learnt token. They are of the run's own held-out rows, and say nothing of other data.

## Use

```python
{_use(name, base, merged)}
```

## Reproduce

```
{" ".join(shlex.quote(word) for word in ("fedtune", "run", *_words(experiment)))}
```

{versions}
"""


def privacy(experiment: Experiment) -> str:
    """What a run did so that updates don't tell of the rows that they come from."""
    return "none: updates were sent as they are"


def _front(experiment: Experiment, base: Mapping[str, Any], merged: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    if base.get("hub_id"):
        front |= {"base_model": base["hub_id"], "base_model_relation": "finetune" if merged else "adapter"}
    kind = [] if experiment.adapter.kind == FULL else [experiment.adapter.kind]
    front["tags"] = ["fedtune", "federated-learning", experiment.method_name, *kind]
    if sets := [given for given in experiment.data.paths if HUB_ID.fullmatch(given) and not Path(given).exists()]:
        front["datasets"] = sets
    return front


def _words(experiment: Experiment) -> Iterator[str]:
    """What was typed, without where files were."""
    for word in experiment.overrides:
        key, _, value = word.partition("=")
        if key not in ("out", "name"):
            yield f"{key}={FOLDERS.sub('', value)}"


def _base(base: Mapping[str, Any]) -> str:
    hub_id = base.get("hub_id")
    named = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else _named(str(base.get("source", "?")))
    held = "" if base.get("quantization", "none") == "none" else f", held in {base['quantization']}"
    return f"{named}, {base.get('dtype', '?')}{held}, sha256 {str(base.get('sha256', '?'))[:16]}"


def _source(data: Mapping[str, Any]) -> str:
    return ", ".join(map(_named, str(data.get("source", "?")).split(", ")))


def _named(source: str) -> str:
    """Of a file or folder on this machine its name alone."""
    kind, _, path = source.partition(":")
    return f"{kind} {FOLDERS.sub('', path)}" if kind in ("file", "folder", "gguf") else source


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not measured"


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _use(name: str, base: Mapping[str, Any], merged: bool) -> str:
    if merged:
        return (
            f"from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({name!r})"
        )
    if base.get("hub_id"):
        return (
            f"from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained({name!r})"
        )
    return f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, {name!r})  # base: as above"
