"""DeComFL: zeroth-order steps along directions that all clients of a round share, so that slopes alone are averaged.

Li et al. 2024, "Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization",
arXiv:2405.15861; https://github.com/ZidongLiu/DeComFL.

In round r every client takes the steps t = 1 ... T along the same directions z_rtp, p = 1 ... P, from the same weights,
and answers with the slopes g_krtp that it met on its own data. The server takes their mean over the m clients,
p_k = 1 / m, and all take the steps with it:

    g_rtp = 1/m sum_k g_krtp        w <- w - lr / P sum_tp g_rtp z_rtp

Up: T P slopes, at most 4 bytes each.
Down: the means of the rounds since the client last took part, at most 4 T P bytes each; at first, of all rounds.
Directions never travel: they follow from pool_seed, r, t and p.
Exact: the mean of the clients' weights is what the mean of their slopes gives, to the rounding of the mean to quanta.
On the client: all means so far. With them it is where the server is, to the bit, however long it was away.
The steps: fedtune/training/zeroth_order.py. Directions and weights: fedtune/random_directions/hash_noise.py,
fedtune/random_directions/weights.py.
Departs from the paper: two-sided slopes unless rules.two_sided=false (the paper's are one-sided, the code has both);
noise that is equal on every device; whole quanta. Quantum and lr: as in strategies/fedkseed.py.
method=mezo is this with one client that holds all data (MeZO, Malladi et al. 2023, arXiv:2305.17333).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.core.errors import WireError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update
from fedtune.core.settings import told
from fedtune.training.catch_up import missing_merges
from fedtune.training.zeroth_order import Rules, check_counts, check_length


@dataclass(frozen=True)
class State:
    slopes: Tensor  # g_rtp / P: (rounds, T, P) int32, in quanta


@dataclass(frozen=True)
class DeComFL:
    traits: ClassVar[Traits] = Traits(
        title="DeComFL", lossy_up=False, lossy_down=False, local_steps="rules.local_steps", learning_rate="rules.lr"
    )

    rules: Rules

    def init(self, layout: Layout) -> State:
        return State(torch.zeros(0, self.rules.local_steps, self.rules.perturbations, dtype=torch.int32))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return missing_merges(vars(state), peer, told(self.rules))

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        if update.tensors.keys() != {"slopes"}:
            raise WireError(f"expected the tensor 'slopes', got {sorted(update.tensors)[:5]}")
        check_counts("slopes", update.tensors["slopes"], tuple(state.slopes.shape[1:]), self.rules.space)
        check_length("slopes", update.tensors["slopes"], self.rules.space)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        mean = torch.stack([update.tensors["slopes"] for _, update in replies]).double().mean(0)
        slopes = torch.cat([state.slopes, mean.round().int()[None]])
        self.rules.space.check(slopes.numpy())
        return State(slopes)
