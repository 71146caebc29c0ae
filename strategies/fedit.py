"""FedIT: federated averaging of LoRA adapters, A and B apart.

Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv:2305.05644;
https://github.com/JayZhang42/FederatedGPT-Shepherd.

With p_k = n_k / sum(n) over the clients that replied,

    A = sum_k p_k A_k        B = sum_k p_k B_k        A_k: (r, in)   B_k: (out, r)

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact: B A differs from sum_k p_k B_k A_k by sum_k p_k (B_k - B)(A_k - A), up to the scaling alpha / r.
The steps: clients/first_order.py.
Departs from the authors' code: sums run in float64 rather than in the adapter's own precision, so that identical
updates average to exactly themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.averaging import average


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, as trained


@dataclass(frozen=True)
class FedIT:
    traits: ClassVar[Traits] = Traits(title="FedIT", averages=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(average(replies, state.adapter))
