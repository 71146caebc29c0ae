"""Zeroth-order local training along directions that all clients of a round share (strategies/decomfl.py).

The client's memory is the mean slopes of all rounds so far, `slopes` (rounds, T, P) int32 in quanta, and their number.
"""

from dataclasses import dataclass

import torch

from clients.zeroth_order import ZerothOrder
from fedtune.core.protocol import Batches, Instruction, Tensors, Update
from fedtune.core.seeds import bits, derive_seed
from fedtune.lowrank.residual import VERSION
from fedtune.models.adapted_model import LocalModel
from fedtune.training.catch_up import caught_up
from fedtune.training.zeroth_order import Rules, descend, rules_of


@dataclass(frozen=True)
class SharedDirections(ZerothOrder):
    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        rules = rules_of(instruction.settings)
        slopes = caught_up(instruction, memory, ["slopes"], "round", "rounds")["slopes"]
        record: dict[int, int] = {}
        for place, mean in enumerate(slopes.flatten(1).tolist()):
            record.update(zip(seeds_of(rules, place + 1), mean, strict=True))
        model.seeded.move_to(rules.space, record)

    def train(self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int) -> Update:
        rules, version = rules_of(instruction.settings), int(instruction.settings[VERSION])
        seeds, width = seeds_of(rules, version + 1), rules.perturbations
        by_step = [seeds[place : place + width] for place in range(0, len(seeds), width)]
        steps = descend(model, batches, rules, by_step, self.clip, self.schedule)
        metrics = {"train_loss": steps.loss, "skipped_steps": float(steps.skipped)}
        return Update({"slopes": torch.from_numpy(steps.counts).int()}, batches.examples, metrics)


def seeds_of(rules: Rules, number: int) -> list[int]:
    """The seeds of the number-th update, from 1: (T P), step by step."""
    return [int(seed) for seed in bits(derive_seed(rules.pool_seed, "shared", number), rules.slopes)]
