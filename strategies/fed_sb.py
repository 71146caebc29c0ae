"""Fed-SB: only the r x r core R of W = W0 + s B0 R A0 is trained and travels; B0 and A0 are frozen, the same for all.

Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv:2502.15436.

With p_k = n_k / sum(n) over the clients that replied,

    R = sum_k p_k R_k        R_k: (r, r)   B0: (out, r)   A0: (r, in)

R starts at zero. A0 is the layout's own start; B0 is drawn from `basis_seed`, uniformly with variance 1 / out.

Down and up: R of every adapted layer, bytes per scalar times r^2 a layer, however wide the layer is.
Exact: B0 R A0 is linear in R.
Mixed ranks: no.
The steps: clients/fed_sb.py. The bases: fedtune/training/frozen_basis.py. What the run folder exports is a plain LoRA
adapter, lora_B = B0 and lora_A = R A0.
Departs from the paper, which takes B0, A0 and R's start from the SVD of a first gradient of the full weights: these are
random, so that nobody needs that gradient or has to be sent them. The paper takes larger ranks than are usual for LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Tensors, Traits, Update, expect_like
from fedtune.lowrank.averaging import average
from fedtune.training.frozen_basis import SEED, zero_core


@dataclass(frozen=True)
class State:
    adapter: Tensors  # R of every layer


@dataclass(frozen=True)
class FedSB:
    traits: ClassVar[Traits] = Traits(title="Fed-SB", needs_low_rank=True, averages=True)

    basis_seed: int = 0  # what B0 is drawn from

    def init(self, layout: Layout) -> State:
        if not layout.starts_at_zero:
            raise ConfigError(
                "method=fed_sb puts its own B0 and A0 beside W0, so B has to start at zero: "
                "take adapter=lora, without adapter.path"
            )
        return State(zero_core(layout))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter, {SEED: self.basis_seed})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        return State(average(replies, state.adapter))
