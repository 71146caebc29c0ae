"""How a client's learning rate goes over a run: from the round's number and the run's settings alone, so that all
runtimes, and a run that was resumed, take the same steps.

With R rounds, W of them to warm up, and t rounds behind a step,

    s = t / W                                  while t < W
        e + (1 - e) (1 + cos(pi p)) / 2        cosine          p = (t - W) / (R - W)
        e + (1 - e) (1 - p)                    linear          e = lr_end / lr
        1                                      constant        rate = s lr

    train.schedule_interval=step    t = round - 1 + step / steps, rounds counted from 1 and steps from 0: transformers'
                                    get_..._schedule_with_warmup over all rounds' steps. The first step of a warm-up has
                                    rate 0, as there
    train.schedule_interval=round   t = round, the same for all steps of a round: the cosine_annealing of FlowerTune

A client that takes fewer steps than others, or more, has the same rates at the same shares of its turn.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from fedtune.config.schema import Experiment


@dataclass(frozen=True)
class RoundSchedule:
    """What share of the learning rate the steps of one round have."""

    shape: str  # constant, cosine or linear
    end: float  # the share that is left at the end
    warmup_rounds: int  # W
    interval: str  # step or round
    rounds: int  # R
    round: int  # from 1

    def share(self, step: int, steps: int) -> float:
        """That of a step, counted from 0, of a turn that has so many."""
        behind = float(self.round) if self.interval == "round" else self.round - 1 + step / steps
        if behind < self.warmup_rounds:
            return behind / self.warmup_rounds
        if self.shape == "constant":
            return 1.0
        progress = min((behind - self.warmup_rounds) / (self.rounds - self.warmup_rounds), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.end + (1 - self.end) * left

    def total(self, steps: int) -> float:
        """The sum of the shares of a turn's steps."""
        return math.fsum(self.share(step, steps) for step in range(steps))


def schedule_of(experiment: Experiment, round: int) -> RoundSchedule | None:
    """The schedule of a round; None where the rate is the same throughout."""
    train, rate = experiment.train, experiment.learning_rate
    if not train.is_scheduled or rate is None:
        return None
    end = train.lr_end / rate
    return RoundSchedule(train.schedule, end, train.warmup_rounds, train.schedule_interval, experiment.rounds, round)


def by_engine() -> Any:
    """A client's field `schedule`: no setting, but what the engine puts there for each round, or None. A client that
    has it takes its steps by it."""
    return field(default=None, kw_only=True, metadata={"by_engine": True})
