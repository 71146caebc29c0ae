"""Krum: the one client's LoRA adapter that has the nearest neighbours, through Flower's own Krum.

Blanchard, El Mhamdi, Guerraoui and Stainer 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", arXiv:1703.02757.

Of the n clients that replied, f of them perhaps malicious, with all numbers of A and B laid end to end as w_k,

    s_k = sum of |w_k - w_i|^2 over the n - f - 2 clients i that are nearest to k        w = w_k of the smallest s_k

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Exact: one client's B A as it trained it. All others' work of the round is lost.
The steps: clients/first_order.py. The maths: fedtune/server/robust.py.
Departs from the paper, as Flower does: whole adapters are compared after several local steps, not gradients. Flower
does not check the paper's bound n >= 2f + 3; here it is checked. A tie, which the paper gives to the smallest index,
falls as rounding has it: with three replies and f = 0 the two nearest to each other always tie. There are no weights
p_k = n_k / sum(n) in either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.server.robust import State, check_count, krum, tolerated


@dataclass(frozen=True)
class Krum:
    traits: ClassVar[Traits] = Traits(title="Krum", averages=True)

    num_malicious: int | None = (
        None  # f, of a round's replies; null takes floor((n - 3) / 2), the most the proof allows
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
        malicious = tolerated(self.num_malicious, len(replies), each=2)
        return State(krum(state.adapter, replies, malicious, selected=1))
