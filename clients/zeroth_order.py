"""Zeroth-order local training along directions that are drawn from a pool (strategies/fedkseed.py).

What the server's settings ask for: fedtune.training.zeroth_order.Rules; `each`, to answer with every step as it was
taken instead of
with one sum a direction. Its tensors: `slopes`, how far along each direction of the pool the weights are; where there
are some, `probabilities`, by which directions are drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtune.core.costs import Work
from fedtune.core.errors import ClientError, ConfigError
from fedtune.core.protocol import Batches, Instruction, Setting, Tensors, Update, describe
from fedtune.core.seeds import bits, derive_seed
from fedtune.models.adapted_model import LocalModel
from fedtune.random_directions.weights import pool
from fedtune.training.schedule import RoundSchedule, by_engine
from fedtune.training.zeroth_order import descend, rules_of

STATE_BYTES = 10.0  # a weight in 16 bits, besides the one in the base: fedtune/random_directions/weights.py


@dataclass(frozen=True)
class ZerothOrder:
    clip: float = 0.0  # a step is skipped if the losses on its two sides differ by more; 0: none is for that
    schedule: RoundSchedule | None = by_engine()

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ConfigError(f"method.client.clip={self.clip}: expected 0, or a difference of losses above it")

    def work(self, settings: Mapping[str, Setting]) -> Work:
        rules = rules_of(settings)
        passes = 2 * rules.perturbations if rules.two_sided else rules.perturbations + 1
        return Work(rules.local_steps, STATE_BYTES, passes, backward=False)

    def receive(self, model: LocalModel, instruction: Instruction, memory: Tensors) -> None:
        rules, slopes = rules_of(instruction.settings), slopes_of(instruction).tolist()
        model.seeded.move_to(rules.space, dict(zip(pool(rules.pool_seed, len(slopes)), slopes, strict=True)))

    def train(self, model: LocalModel, batches: Batches, instruction: Instruction, memory: Tensors, key: int) -> Update:
        rules = rules_of(instruction.settings)
        directions = len(slopes_of(instruction))
        index = drawn(
            derive_seed(key, "directions"), rules.slopes, directions, instruction.tensors.get("probabilities")
        )
        seeds = pool(rules.pool_seed, directions)
        by_step = [[seeds[j] for j in step] for step in index.reshape(-1, rules.perturbations)]
        steps = descend(model, batches, rules, by_step, self.clip, self.schedule)
        slopes = steps.counts.reshape(-1)
        gone = slopes != 0
        index, slopes = index[gone], slopes[gone]
        if not instruction.settings.get("each"):
            index, place = np.unique(index, return_inverse=True)
            slopes = np.bincount(place, slopes, len(index)).astype(np.int64)
            if len(slopes) and np.abs(slopes).max() > rules.space.limit:
                raise ClientError(
                    "the slopes along one direction add up to more than fits: lower method.strategy.rules.lr"
                )
        tensors = {
            "index": torch.from_numpy(index.astype(np.int32)),
            "slopes": torch.from_numpy(slopes.astype(np.int32)),
        }
        return Update(tensors, batches.examples, {"train_loss": steps.loss, "skipped_steps": float(steps.skipped)})


def slopes_of(instruction: Instruction) -> Tensor:
    """How far along each direction of the pool the weights are, (directions,) int32.

    Raises:
        ClientError: if the server sent something else, or odds that are none.
    """
    slopes, odds = instruction.tensors.get("slopes"), instruction.tensors.get("probabilities")
    if slopes is None or slopes.dtype != torch.int32 or slopes.ndim != 1 or not len(slopes):
        got = "none" if slopes is None else describe(slopes)
        raise ClientError(f"expected the tensor 'slopes', int32 (directions,), from the server, got {got}")
    if odds is not None:
        total = float(odds.double().sum())
        if odds.shape != slopes.shape or not (odds >= 0).all() or not 0 < total < math.inf:
            raise ClientError(f"expected {len(slopes)} probabilities from 0 up, got {describe(odds)}, {total:g} in all")
    return slopes


def drawn(key: int, count: int, directions: int, probabilities: Tensor | None = None) -> np.ndarray:
    """Draw `count` places in the pool, int64, with repetition: uniform, or by `probabilities`, (directions,)."""
    words = bits(key, count)
    if probabilities is None:
        return (words % np.uint64(directions)).astype(np.int64)
    edges = np.cumsum(probabilities.double().numpy())
    unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    found: np.ndarray = np.searchsorted(edges, unit * edges[-1], side="right")
    return found.clip(max=directions - 1).astype(np.int64)
