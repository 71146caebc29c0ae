"""Full delta, a control: the mean of the clients' whole weight changes, which FLoRA has to equal.

The ideal that FLoRA (Wang et al. 2024, arXiv:2409.05976) stacks, computed the long way: no method of its own. With
p_k = n_k / sum(n) and fresh adapters each round,

    D <- D + sum_k p_k s_k B_k A_k      W = W0 + D          B_k A_k: (out, in), formed by the client; s_k = alpha / r_k

Up: the matrix s_k B_k A_k of every adapted layer, bytes per scalar times in x out.
Down: D, as many bytes, whole each time: whoever missed rounds lacks nothing.
Exact by definition, at any mixture of ranks and s_k. Clients keep nothing.
The steps: clients/fresh.py, which draws the same A as it does for FLoRA.
Departs from averaging full fine-tuning in that what is trained is still s_k B_k A_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.averaging import average, own_width
from fedtune.lowrank.stacking import fresh_layers
from fedtune.models.base_delta import DENSE


@dataclass(frozen=True)
class State:
    change: Tensors  # MODULE.delta (out, in) float32, summed over all rounds so far


@dataclass(frozen=True)
class FullDelta:
    traits: ClassVar[Traits] = Traits(
        title="Full delta", control=True, mixed_ranks=True, needs_low_rank=True, lossy_up=False, lossy_down=False
    )

    def init(self, layout: Layout) -> State:
        layers = fresh_layers(layout)
        return State({m + DENSE: torch.zeros(p.b.shape[0], p.a.shape[1]) for m, p in layers.items()})

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.change, own_width(peer))

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.change)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        mean = average(replies, state.change)
        return State({name: matrix + mean[name] for name, matrix in state.change.items()})
