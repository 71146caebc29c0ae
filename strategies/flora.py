"""FLoRA: fresh adapters each round, stacked and merged into everybody's base.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv:2409.05976.

    B = [B_1 B_2 ...]      A = [p_1 s_1 A_1; p_2 s_2 A_2; ...]      W <- W + B A
                                                                    A_k: (r_k, in)   B_k: (out, r_k)   s_k = alpha / r_k

Up: A_k and B_k of every adapted layer, bytes per scalar times r_k (in + out) a layer.
Down: the stack, sum_k r_k instead of r_k, and never more than min(in, out); to a client that missed rounds, all stacks
that it lacks. The first round's is empty.
Exact: B A = sum_k p_k s_k B_k A_k, because p_k s_k stands in one factor only, not in both. What is merged is kept as
one residual beside the base, W = W0 + B A, so a quantized base takes it up too; when its rank passes twice
`residual_rank`, it is cut back to that and sent whole: metrics.csv has what this loses as merge_error.
Mixed ranks: yes, and mixed s_k. A client keeps the residual and its version, and draws a new A at each turn.
The steps: clients/fresh.py. The residual: fedtune/lowrank/residual.py.
Departs from the authors' code: they merge into the weights themselves, which a quantized base would round away, and
send every stack to everybody, whoever was there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedtune.core.checks import at_least
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update
from fedtune.lowrank.stacking import State, begin, check_factors, each_layer, instruct, stacked


@dataclass(frozen=True)
class FLoRA:
    traits: ClassVar[Traits] = Traits(
        title="FLoRA", mixed_ranks=True, needs_low_rank=True, lossy_up=False, lossy_down=False
    )

    residual_rank: int = 256  # what is merged is cut back to this rank when it passes twice as much

    def __post_init__(self) -> None:
        at_least("method.strategy.residual_rank", self.residual_rank, 1)

    def init(self, layout: Layout) -> State:
        return begin(layout)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return instruct(state, peer)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        check_factors(state, peer, update)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        change = each_layer(stacked(replies, state.scaling), lambda _, stack: stack.to(torch.float32))
        return replace(state, merged=state.merged.merge(change, self.residual_rank))
