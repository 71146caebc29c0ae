"""A client with a memory, for tests: it starts each turn a little off what it was sent, by what it learnt last time.

Whatever loses, mixes up or repeats memories changes the result.
"""

from dataclasses import dataclass

import torch

from clients.first_order import FirstOrder
from fedtune.core.protocol import Update

WORDS = ("method.client._target_=remembering.Remembering",)


@dataclass(frozen=True)
class Remembering(FirstOrder):
    def receive(self, model, instruction, memory):
        drift = {name: 0.5 * memory.get(name, torch.zeros_like(t)) for name, t in instruction.tensors.items()}
        model.install({name: tensor + drift[name] for name, tensor in instruction.tensors.items()})

    def train(self, model, batches, instruction, memory, key):
        update = yield from super().train(model, batches, instruction, memory, key)
        turns = memory.get("turns", torch.zeros(())) + 1
        memory.update(
            {name: tensor - instruction.tensors[name] for name, tensor in update.tensors.items()}, turns=turns
        )
        return Update(update.tensors, update.examples, {**update.metrics, "turns": float(turns)})
