"""FlexLoRA: one global adapter from the SVD of the ideal update, of which each client takes what its rank holds.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
arXiv:2402.11505.

    U S V^T = dW* = sum_k p_k s_k B_k A_k           s_k = alpha / r_k
    A = V_r^T      B = U_r S_r / s                  at client k's rank and scaling: its first r_k, B times s / s_k

Down and up: A and B of every adapted layer, bytes per scalar times r_k (in + out) a layer.
Inexact: |dW* - s B A|_F^2 = sum_{i>r} S_i^2, the least possible at rank r (Eckart and Young); 0 where r >= sum_k r_k.
r is the widest client's. Components come in order of S, so the first r_k of r are the best of rank r_k too.
Mixed ranks: yes, and mixed s_k. Clients keep nothing.
The steps: clients/first_order.py. The SVD: fedtune/lowrank/algebra.py.
Departs from the authors' code: the SVD is that of the small core between the stacked factors' QR decompositions, in
float64, instead of dW* itself, which is never formed. Where dW* has less than rank r, A goes on in orthonormal rows
made of those it had, and B in zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.algebra import LowRank, lora_factors, pad_rank, to_adapter, truncated
from fedtune.lowrank.averaging import for_peer, truncate_rank
from fedtune.lowrank.stacking import each_layer, stacked


@dataclass(frozen=True)
class State:
    adapter: Tensors  # A and B of every layer at the widest client's rank, components in order of S
    scaling: float  # s of this adapter


@dataclass(frozen=True)
class FlexLoRA:
    traits: ClassVar[Traits] = Traits(title="FlexLoRA", mixed_ranks=True, needs_low_rank=True)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return for_peer(state.adapter, peer, state.scaling)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, truncate_rank(state.adapter, peer.rank))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        held = lora_factors(state.adapter)

        def best(module: str, ideal: LowRank) -> LowRank:
            old = held[module]
            found = pad_rank(truncated(ideal, old.rank), old.rank, old.a)
            return LowRank(found.b / state.scaling, found.a).to(old.a.dtype)

        return replace(state, adapter=to_adapter(each_layer(stacked(replies, state.scaling), best)))
