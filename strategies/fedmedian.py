"""FedMedian: the median of the clients' LoRA adapters, number by number, through Flower's own FedMedian.

Yin, Chen, Ramchandran and Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
arXiv:1803.01498.

Over the clients k that replied, for each number j of A and of B,

    w[j] = median_k w_k[j]        of an even count, the mean of the middle two

which fewer than half of them can't push beyond what the others sent.

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact: the product of two medians is not the median of the products, and a median is not a mean.
The steps: clients/first_order.py. The maths: fedtune/server/robust.py.
Departs from the paper, as Flower does: the paper takes the median of gradients at every step; here, of adapters after
several local steps (the median of w_k is w plus the median of w_k - w). There are no weights p_k = n_k / sum(n) in
either: a client with more examples counts no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.server.robust import State, median


@dataclass(frozen=True)
class FedMedian:
    traits: ClassVar[Traits] = Traits(title="FedMedian", averages=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(median(state.adapter, replies))
