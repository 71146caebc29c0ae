"""A run's model to talk to, made as `fedtune export` makes it, with the base that it was tuned from."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import FULL, DataSpec
from fedtune.export.model_folder import check_one_model, client_model, source_of, tuned, workspace_for
from fedtune.models.base import load_base
from fedtune.runs.adapter_files import adapter_files


@dataclass(frozen=True)
class Tuned:
    """A run's model, ready to generate.

    Attributes:
        module: a PEFT model on a base of its own; of adapter=none the model itself.
        round: the last that is in it.
        data: how the run's text became tokens.
    """

    module: Any
    tokenizer: Any
    round: int
    data: DataSpec
    _base: Any = None  # of adapter=none: the base beside it

    @contextmanager
    def untuned(self) -> Iterator[Any]:
        """The base: the same weights with the adapter switched off; of adapter=none another model, if it was loaded."""
        if not hasattr(self.module, "disable_adapter"):
            yield self._base
            return
        with self.module.disable_adapter():
            yield self.module


def tuned_model(
    path: Path, base: str | None = None, round: str | None = None, client: int | None = None, both: bool = False
) -> Tuned:
    """The model of a run, or of a .fedtune file.

    Args:
        base: where the base is on this machine, if not where the run found it.
        round: one that the run kept, or "best"; None: the last.
        client: whose model it is to be, of a method that leaves clients with models of their own; None: everybody's.
        both: the base is to be there as well, in memory a second time where there is no adapter to switch off.

    Raises:
        FedtuneError: if there is no such model, there are as many as clients, or the base isn't here or is another.
    """
    from peft import PeftModel

    found = source_of(path, round)
    workspace = workspace_for(found, base)
    if client is None:
        check_one_model(found, workspace)
        local, number = tuned(found, workspace)
    else:
        local, number = client_model(found, workspace, client)
    tokenizer, spec, device = local.tokenizer, workspace.experiment.model, local.device
    data = workspace.data_spec
    if workspace.experiment.adapter.kind == FULL:
        beside = load_base(spec, device).model.eval() if both else None
        return Tuned(local.module.eval(), tokenizer, number, data, beside)
    files = adapter_files(local)
    del local, workspace  # their base has hooks of ours in it. It goes before a fresh one is read
    fresh = load_base(spec, device)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="fedtune-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        warnings.simplefilter("ignore")  # about tied weights, which matter to who merges
        return Tuned(PeftModel.from_pretrained(fresh.model, folder).eval(), tokenizer, number, data)
