"""A method whose messages are as large as one likes, both ways, for tests: MEGABYTES in the environment."""

import os
from dataclasses import dataclass
from functools import cache

import torch

from fedtune.core.errors import WireError
from fedtune.core.protocol import Instruction, Update

WORDS = ("method.strategy._target_=bulky.Bulky", "method.client._target_=bulky.BulkyClient")


@cache
def ballast():
    return {"ballast": torch.arange(int(os.environ["MEGABYTES"]) * 250_000, dtype=torch.int32)}


@dataclass(frozen=True)
class State:
    updates: int


@dataclass(frozen=True)
class Bulky:
    def init(self, layout):
        return State(0)

    def configure(self, state, round, peer):
        return Instruction(ballast() if round <= 1 and peer.index >= 0 else {})

    def validate(self, state, round, peer, update):
        if not torch.equal(update.tensors["ballast"], ballast()["ballast"]):
            raise WireError("the ballast shifted")

    def aggregate(self, state, round, replies):
        return State(state.updates + len(replies))


@dataclass(frozen=True)
class BulkyClient:
    lr: float = 0.0
    steps: int = 0
    optimizer: str = ""
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    mu: float = 0.0

    def receive(self, model, instruction, memory):
        pass

    def train(self, model, batches, instruction, memory, key):
        return Update(instruction.tensors, batches.examples)
