"""Zeroth-order local training along directions that all clients of a round share (strategies/decomfl.py).

The client's memory is the mean slopes of all rounds so far, `slopes` (rounds, T, P) int32 in quanta, and their number.
"""

from dataclasses import dataclass

import torch

from fedtune.adapters import LocalModel
from fedtune.errors import ClientError, ConfigError
from fedtune.keys import bits, fold
from fedtune.merging import FROM, KEPT, VERSION, installed_version
from fedtune.protocol import Batches, Instruction, Tensors, Update
from fedtune.zeroth import Rules, descend, rules_of


@dataclass(frozen=True)
class SharedDirections:
    clip: float = 0.0  # a step is skipped if the losses on its two sides differ by more; 0: none is for that

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ConfigError(f"method.client.clip={self.clip}: expected 0, or a difference of losses above it")

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        rules = rules_of(instruction.settings)
        base, version = int(instruction.settings[FROM]), int(instruction.settings[VERSION])
        if base not in (0, mine := installed_version(memory)):
            raise ClientError(f"the server's slopes go on from round {base}; this client knows {mine} rounds")
        new = instruction.tensors["slopes"]
        slopes = torch.cat([memory["slopes"], new]) if base else new
        if len(slopes) != version:
            raise ClientError(f"the server's slopes are of {len(slopes)} rounds, expected {version}")
        memory["slopes"], memory[KEPT] = slopes, torch.tensor(version)
        record: dict[int, int] = {}
        for place, mean in enumerate(slopes.flatten(1).tolist()):
            record.update(zip(seeds_of(rules, place + 1), mean, strict=True))
        model.seeded.move_to(rules.space, record)

    def train(self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int) -> Update:
        rules, version = rules_of(instruction.settings), int(instruction.settings[VERSION])
        seeds, width = seeds_of(rules, version + 1), rules.perturbations
        by_step = [seeds[place : place + width] for place in range(0, len(seeds), width)]
        steps = descend(model, batches, rules, by_step, self.clip)
        metrics = {"train_loss": steps.loss, "skipped_steps": float(steps.skipped)}
        return Update({"slopes": torch.from_numpy(steps.counts).int()}, batches.examples, metrics)


def seeds_of(rules: Rules, number: int) -> list[int]:
    """The seeds of the number-th update, from 1: (T P), step by step."""
    return [int(seed) for seed in bits(fold(rules.pool_seed, "shared", number), rules.slopes)]
