"""Bulyan: Krum's choice of LoRA adapters, then a trimmed mean around their median, through Flower's own Bulyan.

El Mhamdi, Guerraoui and Rouault 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium",
arXiv:1802.07927.

Of the n clients that replied, f of them perhaps malicious, the theta = n - 2f with the smallest scores s_k of Krum are
kept (strategies/krum.py). Then, for each number j of A and of B,

    w[j] = mean of the beta = theta - 2f of their w_k[j] that are nearest to the median of them

because in many dimensions an attacker can be near in distance and far off in one number.

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact: as FedIT, and what is left out is lost.
The steps: clients/first_order.py. The maths: fedtune/server/robust.py.
Departs from the paper, as Flower does: whole adapters are compared after several local steps, not gradients; the theta
are taken by one ranking, where the paper runs Krum theta times, each time on what is left; and the median of an even
count is the mean of the middle two. Of fewer than 4f + 3 replies Flower keeps the old model with a warning; here that
is an error. f = 0, which null means for fewer than seven replies, is the plain mean of all and guards against nobody.
There are no weights p_k = n_k / sum(n) in either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.server.robust import State, bulyan, check_count, tolerated


@dataclass(frozen=True)
class Bulyan:
    traits: ClassVar[Traits] = Traits(title="Bulyan", averages=True)

    num_malicious: int | None = (
        None  # f, of a round's replies; null takes floor((n - 3) / 4), the most the proof allows
    )

    def __post_init__(self) -> None:
        check_count("num_malicious", self.num_malicious, 0)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        malicious = tolerated(self.num_malicious, len(replies), each=4)
        return State(bulyan(state.adapter, replies, malicious))
