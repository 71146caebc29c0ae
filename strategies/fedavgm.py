"""FedAvgM: a server with momentum, around any method that averages.

Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
arXiv:1909.06335.

Let delta_t be the average of the round less the adapter x_t that it began with, as sum_k p_k theta_k - x_t with
p_k = n_k / sum(n) for FedIT's; the average is the business of the method inside.

    m_t = momentum m_t-1 + delta_t        x_t+1 = x_t + lr m_t        m_-1 = 0

A steady delta is thus taken lr / (1 - momentum) times. momentum = 0 and lr = 1 is the method inside, to the last bit.
Down and up: what the method inside sends, nothing more. m stays at the server.
Inexact by intent: the server goes elsewhere than to the mean of its clients, and aggregation_error says how far.
Mixed ranks, and what lives on the client: as the method inside.
method=fedavgm is around FedIT, server_optimizer=fedavgm around any other; fedtune/server/server_optimizer.py does both.
Departs from the paper: lr is 1 there, with the clients' own rate tuned instead. A tensor that nobody trained in a round
(RoLoRA's frozen factor) neither moves nor loses momentum in it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.core.protocol import Tensors
from fedtune.server.server_optimizer import ServerOptimizer


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    title: ClassVar[str] = "FedAvgM"

    lr: float = 1.0
    momentum: float = 0.9

    def start(self, zeros: Tensor) -> Tensors:
        return {"m": zeros}

    def step(self, delta: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        m = self.momentum * moments["m"] + delta
        return self.lr * m, {"m": m}
