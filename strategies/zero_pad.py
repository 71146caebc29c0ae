"""Zero-padding: federated averaging of LoRA adapters of different ranks, the narrow ones filled up with zeros.

The baseline that papers on mixed ranks start from: "HetLoRA", Cho et al. 2024, arXiv:2401.06432, without its weights
and its pruning; "FLoRA", Wang et al. 2024, arXiv:2409.05976.

With p_k = n_k / sum(n) over the clients that replied, r the widest rank, and s_k = alpha / r_k of client k,

    A = sum_k p_k pad_r(A_k)        B = sum_k p_k (s_k / s) pad_r(B_k)        A_k: (r_k, in)   B_k: (out, r_k)

and client k starts from the first r_k components of B A. A zero counts like any other value: component j is drawn
towards zero by everybody whose rank is below j.

Down and up: A and B of rank r_k of every adapted layer, bytes per scalar times r_k (in + out) a layer.
Inexact: as FedIT, by s sum_k p_k (B_k - B)(A_k - A) with the padded factors.
Mixed ranks: yes. With equal ranks it is FedIT.
The steps: clients/first_order.py.
Departs from the papers: where clients multiply B A by different s_k, B is carried over in proportion, so that what
each trained keeps its size; the papers give all clients one alpha / r or don't say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.averaging import average, for_peer, truncate_rank


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer, of the widest rank
    scaling: float  # s, what the adapter's B A is multiplied by


@dataclass(frozen=True)
class ZeroPad:
    traits: ClassVar[Traits] = Traits(title="Zero-padding", mixed_ranks=True, needs_low_rank=True, averages=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return for_peer(state.adapter, peer, state.scaling)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, truncate_rank(state.adapter, peer.rank))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(average(replies, state.adapter, scaling=state.scaling), state.scaling)
