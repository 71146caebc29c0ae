"""A party: what one process of the server or of a client holds to take its part."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from fedtune.adapters import LocalModel
from fedtune.config import build, from_run_config
from fedtune.corpus import FederatedData, load_data
from fedtune.errors import DataError
from fedtune.evaluate import Score, score
from fedtune.keys import fold, permutation
from fedtune.models import load_base, pick_device
from fedtune.protocol import Client, Codec, Instruction, Strategy, Update
from fedtune.schema import Experiment


class Party:
    """The method, the codecs, the model and the data of an experiment. Model and data are loaded on first use."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.strategy: Strategy[Any] = build(experiment.method.strategy, "method.strategy")
        self.client: Client = build(experiment.method.client, "method.client")
        self.codec_up: Codec = build(experiment.codec_up, "codec_up")
        self.codec_down: Codec = build(experiment.codec_down, "codec_down")
        torch.set_num_threads(experiment.runtime.threads)

    @cached_property
    def model(self) -> LocalModel:
        experiment = self.experiment
        base = load_base(experiment.model, pick_device(experiment.runtime.device))
        return LocalModel(base, experiment.adapter, experiment.seed)

    @cached_property
    def data(self) -> FederatedData:
        experiment = self.experiment
        return load_data(experiment.data, experiment.population.clients, self.model.tokenizer, experiment.seed)

    def samples(self, index: int) -> int:
        """Training examples of client `index`.

        Raises:
            DataError: if there is no such client.
        """
        if not 0 <= index < len(self.data.train):
            raise DataError(f"there is no client {index}: the data is divided among {len(self.data.train)}")
        return len(self.data.train[index])

    def turn(self, index: int, round: int, instruction: Instruction) -> Update:
        """Client `index` does its part of a round, on a model that holds nothing of the turn before."""
        experiment = self.experiment
        key = fold(experiment.seed, "train", round, index)
        self.install(instruction)
        batches = self.data.batches(index, experiment.train.batch_size, key)
        own = self.data.heldout[index]
        if not (experiment.evaluate.clients and len(own)):
            return self.client.train(self.model, batches, instruction, key)
        found = self._score(own)
        update = self.client.train(self.model, batches, instruction, key)
        scores = {"client_eval_loss": found.loss, "client_eval_accuracy": found.accuracy}
        return replace(update, metrics={**update.metrics, **scores})

    def install(self, instruction: Instruction) -> None:
        """Make the model what a client would hold after receiving `instruction`."""
        self.model.reset()
        self.client.receive(self.model, instruction)

    def evaluate(self) -> Score | None:
        """Score the model as it stands on data that no client holds; None if there is none (data.heldout=0)."""
        rows = self.data.server
        if not len(rows):
            return None
        if (limit := self.experiment.evaluate.examples) and limit < len(rows):
            rows = rows[permutation(fold(self.experiment.seed, "evaluate"), len(rows))[:limit]]
        return self._score(rows)

    def _score(self, rows: Any) -> Score:
        return score(self.model, self.data.corpus, rows, self.experiment.evaluate.batch_size, self.data.pad)


def party_of(run_config: Mapping[str, Any]) -> Party:
    """The party of the run that this config describes; one a process, however many clients ask."""
    text = run_config.get("config") or from_run_config(run_config).text()
    return _party(str(text))


@lru_cache(maxsize=1)
def _party(text: str) -> Party:
    return Party(from_run_config({"config": text}))
