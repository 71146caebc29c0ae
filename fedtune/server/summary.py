"""What a run comes to, for summary.json: enough to repeat it and to tell two runs apart."""

import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

import fedtune
from fedtune.config.schema import to_dict
from fedtune.data.sources import describe_source
from fedtune.models.attention import attention_of
from fedtune.workspace.workspace import Workspace

PACKAGES = ("torch", "transformers", "peft", "flwr", "bitsandbytes", "numpy", "safetensors", "tokenizers")


def summarise(
    workspace: Workspace, status: str, done: int, totals: Mapping[str, int], state: str, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        done: the last finished round; -1 if not even round 0 is.
        totals: of the ledger, over the whole run.
        state: the state's sha256.
        scores: what else there is to say about quality and time.
    """
    experiment, model, data = workspace.experiment, workspace.model, workspace.data
    return {
        "name": experiment.name,
        "method": experiment.method_name,
        "server_optimizer": experiment.server_optimizer_name,
        "population": {
            "clients": experiment.population.clients,
            "cohort": experiment.population.cohort_size,
            "pooled": experiment.population.pooled,
        },
        "status": status,
        "rounds": max(done, 0),
        "seed": experiment.seed,
        "state_sha256": state,
        **scores,
        "totals": {
            name: totals.get(name, 0)
            for name in (
                "up_payload_bytes",
                "down_payload_bytes",
                "up_wire_bytes",
                "down_wire_bytes",
                "overhead_bytes",
                "spent_bytes",
                "messages",
                "failed",
            )
        },
        "base": {
            **to_dict(model.origin),
            "dtype": model.dtype,
            "quantization": model.quantization,
            "attention": attention_of(model.base),
        },
        "adapter": {
            "kind": experiment.adapter.kind,
            "trainable_parameters": model.trainable,
            "layout_sha256": model.layout.sha256,
        },
        "data": {
            "source": describe_source(experiment.data),
            "rows": data.read + data.dropped,
            "dropped": data.dropped,
            "distinct": data.distinct,
            "duplicates_dropped": data.repeated,
            **data.identity,
            "row_counts": dict(data.corpus.counts),
            "train": sum(map(len, data.train)),
            "client_heldout": sum(map(len, data.heldout)),
            "server_heldout": len(data.server),
            "heldout_in_training": data.in_training[0],
            "client_heldout_in_training": data.in_training[1],
            "clients_without_rows": len(data.idle),
        },
        "machine": {
            "device": str(model.device),
            "threads": experiment.runtime.threads,
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": versions(),
        "command": " ".join(["fedtune run", *experiment.overrides]),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of fedtune and of the packages that decide a result's bits."""
    return {"fedtune": fedtune.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
