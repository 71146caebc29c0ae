"""FFA-LoRA: LoRA with A frozen where it starts, the same for all; only B is trained and travels.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", arXiv:2403.12313.

With p_k = n_k / sum(n) over the clients that replied, and s_k what client k multiplies B A by,

    B = sum_k p_k (s_k / s) pad_r(B_k)        A = A_0        B_k: (out, r_k)   A_0: (r, in)

A_0 is the layout's own start, which every party draws from the seed. A client of rank r_k < r has its first r_k rows.

Down and up: B of every adapted layer, bytes per scalar times r_k out a layer.
Exact: s B A_0 = sum_k p_k s_k B_k A_0[:r_k], for B A_0 is linear in B.
Mixed ranks: yes, exact as well.
The steps: clients/first_order.py.
Departs from the paper: A_0 is LoRA's usual uniform start and drawn by key, so it is never sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.algebra import factors
from fedtune.lowrank.averaging import average, for_peer, truncate_rank
from fedtune.training.apply_instruction import TRAIN


@dataclass(frozen=True)
class State:
    adapter: Tensors  # B of every layer, of the widest rank
    scaling: float  # s, what the adapter's B A is multiplied by


@dataclass(frozen=True)
class FFALoRA:
    traits: ClassVar[Traits] = Traits(title="FFA-LoRA", mixed_ranks=True, needs_low_rank=True, averages=True)

    def init(self, layout: Layout) -> State:
        return State(factors(layout.initial, "lora_B"), layout.scaling)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        told = for_peer(state.adapter, peer, state.scaling)
        return Instruction(told.tensors, {**told.settings, TRAIN: "lora_B"})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, truncate_rank(state.adapter, peer.rank))

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(average(replies, state.adapter, scaling=state.scaling), state.scaling)
