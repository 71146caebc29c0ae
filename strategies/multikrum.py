"""Multi-Krum: the mean of the clients' LoRA adapters that have the nearest neighbours, through Flower's own MultiKrum.

Blanchard, El Mhamdi, Guerraoui and Stainer 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", arXiv:1703.02757.

Of the n clients that replied, f of them perhaps malicious, with all numbers of A and B laid end to end as w_k,

    s_k = sum of |w_k - w_i|^2 over the n - f - 2 clients i that are nearest to k
    w = sum_k p_k w_k over the m clients of the smallest s_k        p_k = n_k / sum(n) over those m

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact: as FedIT among the m, and the others' work of the round is lost. m = 1 is Krum.
The steps: clients/first_order.py. The maths: fedtune/server/robust.py.
Departs from the paper, as Flower does: whole adapters are compared after several local steps, not gradients, and the m
are weighted by the examples that they claim, where the paper takes their plain mean: an attacker among them weighs more
by claiming more (the engine caps a claim at what the client said at the handshake). Flower does not check the bounds
n >= 2f + 3 and m <= n - f; here they are checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.errors import QuorumError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.server.robust import State, check_count, krum, tolerated


@dataclass(frozen=True)
class MultiKrum:
    traits: ClassVar[Traits] = Traits(title="Multi-Krum", averages=True)

    num_malicious: int | None = (
        None  # f, of a round's replies; null takes floor((n - 3) / 2), the most the proof allows
    )
    selected: int | None = None  # m; null takes n - f - 2, or one where there are too few

    def __post_init__(self) -> None:
        check_count("num_malicious", self.num_malicious, 0)
        check_count("selected", self.selected, 1)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        malicious = tolerated(self.num_malicious, len(replies), each=2)
        most = len(replies) - malicious
        if self.selected is not None and self.selected > most:
            raise QuorumError(
                f"of {len(replies)} replies, {malicious} perhaps malicious, at most {most} can be selected. Lower "
                f"method.strategy.selected (now {self.selected}), or raise population.cohort or population.quorum"
            )
        return State(krum(state.adapter, replies, malicious, self.selected or max(1, most - 2)))
