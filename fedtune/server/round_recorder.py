"""What a round leaves behind: lines first and the checkpoint last, so that a round counts as done only when all of it
is on disk."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fedtune.core.optional import residual_of
from fedtune.core.protocol import ClientInfo, Instruction, Score
from fedtune.runs.adapter_files import ADAPTER_CONFIG, adapter_files
from fedtune.runs.ledger import Ledger, sums
from fedtune.runs.model_file import NAME, TunedModel, dump
from fedtune.runs.run_folder import KEPT, ROUNDS, RunFolder, best_of
from fedtune.server.round import Round
from fedtune.server.state import ServerState
from fedtune.server.summary import summarise
from fedtune.server.update_similarity import every_two
from fedtune.workspace.workspace import Workspace


class RoundRecorder:
    """One run's, into its folder."""

    def __init__(self, workspace: Workspace, known: ServerState, folder: RunFolder):
        self._workspace = workspace
        self._known = known
        self._folder = folder
        self._adapter_config = b""  # as last written

    def record(
        self,
        played: Round,
        score: Score | None,
        eval_seconds: float,
        broadcast: Instruction,
        ledger: Ledger,
        peers: Mapping[int, ClientInfo],
    ) -> dict[str, Any]:
        """Write a round down, and return its row of metrics.csv.

        Args:
            score: on held-out data, where it was due.
            broadcast: what the server's own model holds.
            peers: the clients, by index.

        Raises:
            RunFolderError: if the disk can't take it.
        """
        number, folder, model = played.number, self._folder, self._workspace.model
        entries = ledger.take_pending()
        residual = residual_of(self._known.strategy_state)
        row = {
            "round": number,
            "eval_loss": None,
            "eval_accuracy": None,
            "train_loss": played.mean("train_loss"),
            "seconds": round(played.seconds, 3),
            "eval_seconds": round(eval_seconds, 3),
            "clients": played.clients,
            "failed": len(played.failures),
            **sums(entry for entry in entries if entry.round == number),
            "client_eval_loss": played.mean("client_eval_loss"),
            "client_eval_accuracy": played.mean("client_eval_accuracy"),
            "aggregation_error": played.error,
            "requantization_error": played.rounding,
            "virtual_seconds": played.virtual_seconds,
            "merge_error": residual.error if residual else None,
            **(score.row() if score else {}),
        }
        folder.append_ledger(entries)
        folder.append_failures(played.failures)
        folder.append_clock(number, played.turns)
        folder.append_similarity(number, every_two(played.signs))
        folder.append_metrics(row)
        self._write_adapter(number)
        tuned = TunedModel(self._workspace.experiment, broadcast, model.origin, model.dtype, number)
        if model.is_seeded:
            folder.write_model(dump(tuned))
        self._keep(tuned, score)
        sha256, identity = self._workspace.experiment.sha256, self._workspace.data.identity
        folder.save_checkpoint(self._known.checkpoint(number, sha256, identity, peers))
        if self._workspace.experiment.keep.best:
            folder.settle_kept(number)
        return row

    def _keep(self, tuned: TunedModel, score: Score | None) -> None:
        """Keep this round's model, where that is asked for: as an adapter, and as what makes it whatever it is."""
        keep, folder = self._workspace.experiment.keep, self._folder
        best = keep.best and score is not None and score.loss < folder.best().get("eval_loss", math.inf)
        every = keep.every > 0 and tuned.round > 0 and tuned.round % keep.every == 0
        if not (best or every):
            return
        which = {"round": tuned.round, "eval_loss": score.loss if score else None}
        files = adapter_files(self._workspace.model) | {NAME: dump(tuned), KEPT: json.dumps(which).encode()}
        if every:
            folder.write_kept(f"{ROUNDS}/{tuned.round}", files)
        if best:
            folder.write_kept(best_of(tuned.round), files)

    def _write_adapter(self, number: int) -> None:
        files = adapter_files(self._workspace.model)
        for name, content in files.items() if number == 0 else ():
            self._folder.write_adapter(name, content, "start")
        if (config := files.get(ADAPTER_CONFIG, b"")) == self._adapter_config:  # it changes with the ranks alone
            files.pop(ADAPTER_CONFIG, None)
        for name, content in files.items():
            self._folder.write_adapter(name, content)
        self._adapter_config = config

    def summarise(self, status: str, totals: Mapping[str, int], more: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, and return it.

        Args:
            totals: of the ledger, over the whole run.
            more: what else there is to say.
        """
        best = self._folder.best()
        found = {**self._folder.scores(), **({"best": best} if best else {}), **more}
        known = self._known
        summary = summarise(self._workspace, status, known.done, totals, known.sha256, found)
        self._folder.write_summary(summary)
        return summary
