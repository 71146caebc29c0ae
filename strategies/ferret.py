"""Ferret: first-order steps, of which K coordinates along seeded directions travel.

Shu et al. 2024, "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", arXiv:2409.06277;
https://github.com/allen4747/Ferret.

Client k trains as usual, from w to w - Delta_k, and projects Delta_k, block l by block, on K_kl directions V_kl of its
own, as many as go with |Delta_kl| and K in all. The server takes the mean of what its m clients' coordinates rebuild:

    gamma_kl = 1/(rho K_kl) V_kl^T Delta_kl        w <- w - server_lr sum_k p_k V_k gamma_k        p_k = 1 / m

Up: K coordinates and L budgets, at most 4 (K + L) bytes.
Down: the coordinates p_k gamma_k and the budgets of all who answered since the client last took part, at most
4 (K + L + 2) bytes each; at first, of all rounds. Directions never travel: they follow from pool_seed, from how many
answers the server had, and from the client's index.
Exact: in the mean over directions with scaling=unbiased. Of one Delta, |V gamma - Delta|^2 is (d - 2 + kappa) / K times
|Delta|^2 (kappa 2.875 for noise=normal, 1 for rademacher), so more of it is noise than not, unless K is near d.
On the client: all coordinates and budgets so far. With them it is where the server is, to the bit, however long it was
away; each p_k gamma_k is rounded to whole quanta once, by the server, after its weight, and all parties use that.
The steps: clients/projected.py. Projection, blocks and budgets: fedtune/training/projection.py. Weights:
fedtune/random_directions/weights.py.
rho is the variance of z, which is 1 here. scaling=official rebuilds Delta / 3, as the authors' code does: its z have a
variance of 1 / (3 d), and it divides by 1 / d. Its recipe goes with it: rules.server_lr=10, plain SGD at 1e-4.
Departs from the authors' code: K is what all blocks have together (theirs is the budget of the block that moved most);
directions are a client's own (theirs come from a pool of K that all share); what one direction adds to a block isn't
cut to a length of 10, which it stays far below; noise that is equal on every device; whole quanta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.core.checks import at_least, one_of
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update
from fedtune.core.settings import told
from fedtune.training.catch_up import missing_merges
from fedtune.training.projection import BUDGET, FEWEST, SLOPES, Projection, blocks_of, check_answer, check_room

SHARE = {"unbiased": 1.0, "official": 1 / 3}  # of Delta, what is rebuilt in the mean


@dataclass(frozen=True)
class State:
    turn: Tensor  # (n, 2) int32, of each answer: how many the server had before its round, and the client's index
    budget: Tensor  # K_kl: (n, L) int32
    slopes: Tensor  # p_k gamma_k: (n, K) int32, in quanta, block by block


@dataclass(frozen=True)
class Ferret:
    traits: ClassVar[Traits] = Traits(title="Ferret", lossy_up=False, lossy_down=False)

    rules: Projection
    scaling: str = "unbiased"

    def __post_init__(self) -> None:
        one_of("method.strategy.scaling", self.scaling, list(SHARE))

    def init(self, layout: Layout) -> State:
        blocks = len(blocks_of(layout))
        at_least("method.strategy.rules.directions", self.rules.directions, FEWEST * blocks)
        return State(*(torch.zeros(0, width, dtype=torch.int32) for width in (2, blocks, self.rules.directions)))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        own = {"share": SHARE[self.scaling], "client": peer.index}
        return missing_merges(vars(state), peer, {**told(self.rules), **own})

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        check_answer(update, state.budget.shape[1], self.rules)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        done, turn, budget, slopes = len(state.turn), [state.turn], [state.budget], [state.slopes]
        for peer, update in replies:
            turn.append(torch.tensor([[done, peer.index]], dtype=torch.int32))
            budget.append(update.tensors[BUDGET][None])
            slopes.append((update.tensors[SLOPES].double() / len(replies)).round().int()[None])
        grown = State(torch.cat(turn), torch.cat(budget), torch.cat(slopes))
        check_room(vars(grown), self.rules)
        return grown
