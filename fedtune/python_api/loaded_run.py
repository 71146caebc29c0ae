"""`fedtune.load_run`: a run folder as data frames, settings and a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import to_dict
from fedtune.runs import read as run_arrays
from fedtune.runs.data_frames import read_frame, whole_where_it_can_be

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TABLES = ("ledger.csv", "clients.csv", "failures.csv", "clock.csv", "similarity.csv")


@dataclass(frozen=True, repr=False)
class Run:
    """A run as its folder has it, finished or not, damaged or not.

    What couldn't be read is left out, and said in `notes`, as in `fedtune report`. The frames are read when they are
    first asked for, and then kept: load a run that is going on again to see more of it.

    Attributes:
        path: the run's folder.
    """

    path: Path
    _arrays: run_arrays.Run = field(compare=False)

    @property
    def name(self) -> str:
        """The label that `name=` gave it."""
        return self._arrays.experiment.name

    @property
    def config(self) -> dict[str, Any]:
        """Every setting, resolved, as nested dicts: `run.config["train"]["lr"]`."""
        settings: dict[str, Any] = to_dict(self._arrays.experiment)
        return settings

    @property
    def status(self) -> str:
        """How it stands: finished, running, interrupted, failed, or cut off, where its summary.json is missing."""
        return self._arrays.status

    @property
    def error(self) -> str | None:
        """Why it failed or was interrupted, where that is known."""
        return self._arrays.error

    @property
    def summary(self) -> Mapping[str, Any]:
        """What summary.json holds: totals, versions, hashes, where base and data came from. Empty if it can't be
        read."""
        return self._arrays.summary

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What of the folder had to be left out, as "ledger.csv: the last line is cut off"; nothing as a rule."""
        more = [note for name in TABLES for note in self._table(name)[1]]
        return tuple(dict.fromkeys((*self._arrays.notes, *more)))

    @cached_property
    def metrics(self) -> "DataFrame":
        """A line for each round, 0 being the untouched model: losses, accuracy, seconds, bytes."""
        from pandas import DataFrame

        return DataFrame({name: whole_where_it_can_be(name, each) for name, each in self._arrays.metrics.items()})

    @property
    def ledger(self) -> "DataFrame":
        """A line for each message: round, client, direction, part, payload and wire bytes, seconds."""
        return self._table("ledger.csv")[0]

    @property
    def clients(self) -> "DataFrame":
        """How good the model, or each client's own, is on each client's held-out data. Empty where that isn't measured
        (evaluate.peers, personal methods)."""
        return self._table("clients.csv")[0]

    @property
    def failures(self) -> "DataFrame":
        """What went wrong with which client in which round. Empty if nothing did."""
        return self._table("failures.csv")[0]

    @property
    def clock(self) -> "DataFrame":
        """What each client's turn took on its device. Empty where devices have no limits (population.devices)."""
        return self._table("clock.csv")[0]

    @property
    def similarity(self) -> "DataFrame":
        """How much the signs of two clients' updates agree. Empty without evaluate.similarity=true."""
        return self._table("similarity.csv")[0]

    @property
    def adapter_path(self) -> Path | None:
        """The adapter as a PEFT folder, for `PeftModel.from_pretrained`; None where there is none, as with
        adapter=none."""
        path = self.path / "adapter"
        return path if (path / "adapter_config.json").is_file() else None

    def load_model(
        self, base: str | os.PathLike[str] | None = None, round: int | str | None = None
    ) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
        """The tuned model after the last finished round, ready to generate, on the device that is here.

        With an adapter it is a PEFT model on a base of its own (changes of the base are in the adapter);
        `merge_and_unload()` makes a plain one of it, and `fedtune export` writes one and checks it. With adapter=none
        it is of the base's own class, with the trained weights.

        Args:
            base: where the base is on this machine (a folder, a GGUF file or a hub id), if not where the run found it.
            round: one that keep.every or keep.best kept: its number, or "best"; None: the last.

        Returns:
            The transformers model, in evaluation mode, and its tokenizer.

        Raises:
            ExportError: if there is no such model: no round is done; the method leaves a part of the model with each
                client, so that there are as many models as clients; the base isn't here, or has other weights.

        Example:
            >>> model, tokenizer = run.load_model()
            >>> chat = [{"role": "user", "content": "Do you get lonely?"}]
            >>> prompt = tokenizer.apply_chat_template(
            ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ... ).to(model.device)
            >>> tokenizer.decode(model.generate(**prompt, max_new_tokens=30)[0])
        """
        from fedtune.export.tuned_model import tuned_model

        made = tuned_model(self.path, None if base is None else os.fspath(base), None if round is None else str(round))
        return made.module, made.tokenizer

    def __repr__(self) -> str:
        rounds = self._arrays.rounds
        losses = self._arrays.metrics["eval_loss"]
        known = losses[losses == losses]
        said = [self._arrays.experiment.method_name, self.status]
        said += [f"round {rounds[-1]} of {self._arrays.experiment.rounds}"] if len(rounds) else []
        said += [f"held-out loss {known[0]:.4f} -> {known[-1]:.4f}"] if len(known) else []
        return f"Run({str(self.path)!r}: {', '.join(said)})"

    @cached_property
    def _read(self) -> dict[str, "tuple[DataFrame, tuple[str, ...]]"]:
        return {}

    def _table(self, name: str) -> "tuple[DataFrame, tuple[str, ...]]":
        if name not in self._read:
            self._read[name] = read_frame(self.path / name)
        return self._read[name]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Load a run's folder, whether it has ended, is going on, or was cut off.

    Args:
        path: the folder, as out= named it.

    Raises:
        RunFolderError: if there is no run there, or its config.yaml can't be read. What else is damaged is left out,
            and said in the run's `notes`.

    Example:
        >>> run = fedtune.load_run("runs/demo")
        >>> run.ledger.groupby(["direction", "part"]).wire_bytes.sum()
    """
    folder = Path(path).expanduser()
    return Run(folder, run_arrays.read(folder))
