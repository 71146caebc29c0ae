"""A run's model for Python, made as `fedtune export` makes it."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from fedtune.config.schema import FULL
from fedtune.export.model_folder import check_one_model, source_of, tuned, workspace_for
from fedtune.models.base import load_base
from fedtune.runs.adapter_files import adapter_files


def tuned_model(path: Path, base: str | None = None) -> tuple[Any, Any]:
    """The model of a run, or of a .fedtune file, and its tokenizer.

    Args:
        base: where the base is on this machine, if not where the run found it.

    Raises:
        FedtuneError: if there is no such model, there are as many as clients, or the base isn't here or is another.
    """
    from peft import PeftModel

    found = source_of(path)
    workspace = workspace_for(found, base)
    check_one_model(found, workspace)
    local, _ = tuned(found, workspace)
    tokenizer = local.tokenizer
    if workspace.experiment.adapter.kind == FULL:
        return local.module.eval(), tokenizer
    files, spec, device = adapter_files(local), workspace.experiment.model, local.device
    del local, workspace  # their base has hooks of ours in it. It goes before a fresh one is read
    fresh = load_base(spec, device)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="fedtune-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        warnings.simplefilter("ignore")  # about tied weights, which matter to who merges
        return PeftModel.from_pretrained(fresh.model, folder).eval(), tokenizer
