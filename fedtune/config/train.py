"""The settings of a client's training: its optimizer, how many steps it takes, and how its learning rate goes.

A part of fedtune/config/schema.py; no torch here either.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from fedtune.core.checks import above_zero, at_least, one_of, option
from fedtune.core.errors import ConfigError

STEPS = 4  # by default


@dataclass(frozen=True)
class TrainSpec:
    lr: float = option(1e-3, "learning rate of a client's optimizer")
    schedule: str = option("constant", "how the rate goes over the run's rounds: constant, cosine or linear")
    lr_end: float = option(0.0, "cosine, linear: the rate that they come down to when the last round is over")
    warmup_rounds: int = option(0, "rounds in which the rate rises to the full one first")
    schedule_interval: str = option(
        "step", "step: each step has a rate of its own (transformers); round: all of a round have that of its end"
    )
    steps: int = option(STEPS, "optimizer steps a client takes in a round")
    epochs: float | None = option(None, "instead of steps: passes over a client's own examples in a round, as in 0.5")
    batch_size: int = option(4, "examples per step")
    micro_batch_size: int = option(
        0, "examples that go through the model at a time, 0: the whole batch; the step is the batch's all the same"
    )
    optimizer: str = option("adamw", "adamw, sgd, or bitsandbytes' adamw8bit and paged_adamw8bit")
    weight_decay: float = option(0.0, "decoupled weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them alone")
    checkpoint_activations: bool = option(
        False, "keep activations at the blocks' borders alone and compute the others anew: less memory, more time"
    )

    def __post_init__(self) -> None:
        above_zero("train.lr", self.lr)
        one_of("train.schedule", self.schedule, ("constant", "cosine", "linear"))
        at_least("train.lr_end", self.lr_end, 0)
        at_least("train.warmup_rounds", self.warmup_rounds, 0)
        one_of("train.schedule_interval", self.schedule_interval, ("step", "round"))
        at_least("train.steps", self.steps, 1)
        at_least("train.batch_size", self.batch_size, 1)
        at_least("train.micro_batch_size", self.micro_batch_size, 0)
        one_of("train.optimizer", self.optimizer, ("adamw", "sgd", "adamw8bit", "paged_adamw8bit"))
        at_least("train.weight_decay", self.weight_decay, 0)
        at_least("train.max_grad_norm", self.max_grad_norm, 0)
        if self.schedule == "constant" and self.lr_end:
            raise ConfigError(
                f"train.lr_end={self.lr_end:g}: a constant rate ends as it begins; take train.schedule=cosine or linear"
            )
        if self.schedule != "constant" and self.schedule_interval == "round" and not self.lr_end:
            raise ConfigError(
                "train.schedule_interval=round gives a round the rate of its end, and with train.lr_end=0 the last one "
                "would learn nothing: set train.lr_end above 0, or take train.schedule_interval=step"
            )
        if self.epochs is not None:
            above_zero("train.epochs", self.epochs)
            if not math.isfinite(self.epochs):
                raise ConfigError(f"train.epochs={self.epochs}: expected a number of passes")
            if self.steps != STEPS:
                raise both_said(f"train.steps={self.steps}", self.epochs)

    @property
    def is_scheduled(self) -> bool:
        """Whether the rate is ever another than `lr`."""
        return self.schedule != "constant" or self.warmup_rounds > 0

    @property
    def at_once(self) -> int:
        """Examples of a full batch that go through the model at a time."""
        return min(self.batch_size, self.micro_batch_size) if self.micro_batch_size else self.batch_size

    def steps_of(self, samples: int, batch_size: int) -> int:
        """The steps that `epochs` come to, at least one: ceil(epochs * samples / examples a step), which are the whole
        of the client's where it has less than a batch of them.

        60 examples in batches of 8 are 8 steps an epoch, the last of which goes on into the next, and 4 half an epoch.
        """
        assert self.epochs is not None
        passes = Fraction(self.epochs).limit_denominator(1_000_000)  # 0.1 is a tenth, not the float a little above
        return max(1, math.ceil(passes * samples / max(1, min(batch_size, samples))))


def both_said(steps: str, epochs: float) -> ConfigError:
    """The error of a run that says twice how long a client trains."""
    return ConfigError(f"{steps} and train.epochs={epochs:g} both say how long a client trains: leave out one of them")
