"""FedTrimmedAvg: the mean of the clients' LoRA adapters without the extremes, through Flower's own FedTrimmedAvg.

Yin, Chen, Ramchandran and Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
arXiv:1803.01498.

Over the n clients that replied, for each number j of A and of B in order, w_(1)[j] <= ... <= w_(n)[j], and with
c = floor(beta n),

    w[j] = (w_(c+1)[j] + ... + w_(n-c)[j]) / (n - 2c)

which up to c attackers can't push beyond what the others sent: beta is to be at least their fraction.

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact: as FedIT, and what is cut off is lost.
The steps: clients/first_order.py. The maths: fedtune/server/robust.py.
Departs from the paper, as Flower does: the paper trims gradients at every step; here, adapters after several local
steps. c is rounded down, so fewer than 1 / beta replies are a plain mean that guards against nobody (with the default,
fewer than five). There are no weights p_k = n_k / sum(n) in either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.server.robust import State, trimmed_mean


@dataclass(frozen=True)
class FedTrimmedAvg:
    traits: ClassVar[Traits] = Traits(title="FedTrimmedAvg", averages=True)

    beta: float = 0.2  # fraction of the replies to cut off at each end; Flower's default

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.5:
            raise ConfigError(f"method.strategy.beta={self.beta}: expected a fraction from 0 up to, but not, 0.5")

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(trimmed_mean(state.adapter, replies, self.beta))
