"""FedKSeed-Pro: FedKSeed whose clients draw the directions that mattered more often.

Qin et al. 2024, arXiv:2312.06353, section 4.2; https://github.com/alibaba/FederatedScope/tree/FedKSeed.

As FedKSeed (strategies/fedkseed.py), p_k and all, and with H_j all slopes that were ever met along direction j,

    a_j = mean |clip(H_j, +-1000)|        p = softmax((a - min a) / (max a - min a))

so that the likeliest direction is drawn e times as often as the unlikeliest. With no slopes yet, or all alike, p = 1/K.

Down: G and p, at most 8 K bytes.
Up: each step's direction and slope, as the history counts every one: steps times log2(K) bits and 4 bytes at most.
Departs from the authors' code: a direction's history begins empty and its a_j at 0 (theirs begins with one 0 in it).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.core.checks import at_least
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Setting, Traits, Update
from fedtune.core.settings import told
from fedtune.training.zeroth_order import Rules
from strategies import fedkseed


@dataclass(frozen=True)
class State:
    slopes: Tensor  # G: (K,) float64, in quanta
    met: Tensor  # (K,) float64: sum of |clip(H_j)|, loss per unit of z
    times: Tensor  # (K,) int64: how many slopes H_j has


@dataclass(frozen=True)
class FedKSeedPro:
    traits: ClassVar[Traits] = Traits(
        title="FedKSeed-Pro",
        lossy_up=False,
        lossy_down=False,
        local_steps="rules.local_steps",
        learning_rate="rules.lr",
    )

    rules: Rules
    directions: int = 4096  # K
    bound: float = 1000.0  # what slopes are clipped to in H_j

    def __post_init__(self) -> None:
        at_least("method.strategy.directions", self.directions, 1)

    @property
    def plain(self) -> fedkseed.FedKSeed:
        return fedkseed.FedKSeed(self.rules, self.directions)

    def init(self, layout: Layout) -> State:
        none = torch.zeros(self.directions, dtype=torch.int64)
        return State(self.plain.init(layout).slopes, none.double(), none)

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        slopes = state.slopes.round().int()
        settings: dict[str, Setting] = {**told(self.rules), "each": True}
        return Instruction({"slopes": slopes, "probabilities": probabilities(state)}, settings)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        self.plain.validate(fedkseed.State(state.slopes), round, peer, update)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        slopes = self.plain.aggregate(fedkseed.State(state.slopes), round, replies).slopes
        met, times = state.met.clone(), state.times.clone()
        quantum = self.rules.space.quantum * self.rules.perturbations
        for _, update in replies:
            index = update.tensors["index"].long()
            met.index_add_(0, index, (update.tensors["slopes"].double().abs() * quantum).clamp(max=self.bound))
            times.index_add_(0, index, torch.ones_like(index))
        return replace(state, slopes=slopes, met=met, times=times)


def probabilities(state: State) -> Tensor:
    """The probabilities p of the directions, (K,) float32."""
    a = state.met / state.times.clamp(min=1)
    spread = a.max() - a.min()
    scaled = (a - a.min()) / spread if spread > 0 else torch.zeros_like(a)
    return torch.softmax(scaled, 0).float()
