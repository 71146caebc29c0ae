"""FLoRIST: stacked adapters, cut by SVD to the rank that keeps most of their energy.

Ramesh and Dass 2025, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", arXiv:2506.09199.

    U S V^T = sum_k p_k s_k B_k A_k                 from the stacked factors; s_k = alpha / r_k
    r* = the smallest r with sum_{i<=r} S_i^2 >= energy sum_i S_i^2         of each layer by itself
    B = U_r* S_r*      A = V_r*^T      W <- W + B A

Up: A_k and B_k of every adapted layer, bytes per scalar times r_k (in + out) a layer.
Down: r* (in + out) a layer; to a client that missed rounds, all that it lacks. The first round's is empty.
Inexact below energy = 1: it loses a share sqrt(1 - energy) of the update's norm at most. At 1 it keeps the numerical
rank and is exact, as far as the residual's rank allows (see FLoRA, strategies/flora.py).
Mixed ranks: yes, and mixed s_k. A client keeps the residual and its version, and draws a new A at each turn.
The steps: clients/fresh.py. The SVD: fedtune/lowrank/algebra.py. The residual: fedtune/lowrank/residual.py.
Where the text is silent: what clients do with B and A (here FLoRA's: merge, and begin anew), the place of s_k (here in
the sum, with p_k), the scope of the threshold (here each layer by itself).
Departs from the paper: QR of the stacks instead of their SVDs, which gives the same core up to a rotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedtune.core.checks import at_least
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update
from fedtune.lowrank.algebra import LowRank, by_energy
from fedtune.lowrank.stacking import State, begin, check_factors, each_layer, instruct, stacked


@dataclass(frozen=True)
class FLoRIST:
    traits: ClassVar[Traits] = Traits(
        title="FLoRIST", mixed_ranks=True, needs_low_rank=True, lossy_up=False, lossy_down=False
    )

    energy: float = 0.99  # fraction of the squared singular values that is kept
    residual_rank: int = 256  # what is merged is cut back to this rank when it passes twice as much

    def __post_init__(self) -> None:
        at_least("method.strategy.residual_rank", self.residual_rank, 1)
        if not 0 < self.energy <= 1:
            raise ConfigError(f"method.strategy.energy={self.energy} must be above 0 and at most 1")

    def init(self, layout: Layout) -> State:
        return begin(layout)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return instruct(state, peer)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        check_factors(state, peer, update)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        def cut(module: str, stack: LowRank) -> LowRank:
            return by_energy(stack, self.energy).to(torch.float32)

        change = each_layer(stacked(replies, state.scaling), cut)
        return replace(state, merged=state.merged.merge(change, self.residual_rank))
