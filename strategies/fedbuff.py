"""FedBuff: the server waits for K updates, whoever they come from, and adds up what each of them changed.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639.

Client k was sent start_k, which the server held t_k updates ago, and answers x_k. Of K such,

    x <- x + eta_g (1/K) sum_k s(t_k) (x_k - start_k)        s(t) = 1 / sqrt(1 + t)

with A and B apart. Where start_k is x, as in a synchronous round, that is FedIT with equal weights at eta_g = 1.

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer. start_k is the server's own.
Inexact, as FedIT is: changes of A and of B are averaged apart.
The steps: clients/first_order.py.
Departs from the paper: its secure aggregation, its differential privacy, and a server that does more with the sum than
step along it are no part of this. K is the number of updates that are handed over: a synchronous round has its own,
whatever `buffer` says. Clients count the same whatever their samples, as in the paper: there are no weights
p_k = n_k / sum(n).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.core.checks import above_zero
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from strategies.fedit import State

__all__ = ["FedBuff", "State"]


@dataclass(frozen=True)
class FedBuff:
    """The server's side of FedBuff: a step for every `buffer` updates, each weighed by its staleness.

    Raises:
        ConfigError: for a setting out of range.
    """

    traits: ClassVar[Traits] = Traits(title="FedBuff", asynchronous=True)

    buffer: int = 4  # K, updates that a step of the server takes
    lr: float = 1.0  # eta_g, the server's

    def __post_init__(self) -> None:
        if not isinstance(self.buffer, int) or isinstance(self.buffer, bool) or self.buffer < 1:
            raise ConfigError(f"method.strategy.buffer={self.buffer}: expected a whole number from 1 up")
        above_zero("method.strategy.lr", self.lr)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.adapter.items()}
        # What started from x counts as it is, and x by so much less: with lr=1 the mean then keeps its very bits
        fresh = 0.0
        for peer, update in replies:
            discount = 1 / math.sqrt(1 + peer.staleness)
            if not update.start:
                fresh += discount
            for name, total in sums.items():
                part = update.tensors[name]
                change = part.double() - update.start[name] if update.start else part
                total.add_(change, alpha=self.lr * discount / len(replies))
        kept = 1 - self.lr * fresh / len(replies)
        return State(
            {name: (kept * tensor.double() + sums[name]).to(tensor.dtype) for name, tensor in state.adapter.items()}
        )
