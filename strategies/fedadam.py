"""FedAdam: a server with Adam, around any method that averages.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar and McMahan 2021, "Adaptive Federated Optimization",
arXiv:2003.00295, Algorithm 2.

Let delta_t be the average of the round less the adapter x_t that it began with, as sum_k p_k theta_k - x_t with
p_k = n_k / sum(n) for FedIT's; the average is the business of the method inside. Number by number,

    m_t = beta1 m_t-1 + (1 - beta1) delta_t        m_-1 = 0
    v_t = beta2 v_t-1 + (1 - beta2) delta_t^2        v_-1 = tau^2
    x_t+1 = x_t + lr m_t / (sqrt(v_t) + tau)

Without Adam's bias correction: the paper has none, so early steps are short.
form="flower" is that of flwr.serverapp.strategy.FedAdam (Flower 1.41), for runs that are to be compared with it:
v_-1 = 0, and lr times sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) in round t = 1, 2, ... (Adam's own correction has t
there, so that its first step is lr; this is 0.74 lr). Flower's own lr is 0.1. t is counted for each tensor, in rounds
that trained it.
Down and up: what the method inside sends, nothing more. m and v stay at the server.
Inexact by intent: the server goes elsewhere than to the mean of its clients, and aggregation_error says how far.
Mixed ranks, and what lives on the client: as the method inside.
method=fedadam is around FedIT, server_optimizer=fedadam around any other; fedtune/server/server_optimizer.py does both.
Departs from the paper: both sides' rates are tuned for each task there; lr here suits adapters that clients train by
AdamW at about 1e-3. A tensor that nobody trained in a round (RoLoRA's frozen factor) neither moves nor changes its m
and v in it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.core.protocol import Tensors
from fedtune.server.server_optimizer import ServerOptimizer


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    title: ClassVar[str] = "FedAdam"

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3  # in units of the adapter: what changes by much less counts little
    form: str = "paper"  # or flower

    def start(self, zeros: Tensor) -> Tensors:
        if self.form == "flower":
            return {"m": zeros, "v": zeros, "t": zeros.new_zeros(())}
        return {"m": zeros, "v": zeros + self.tau**2}

    def step(self, delta: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        m = self.beta1 * moments["m"] + (1 - self.beta1) * delta
        v = self.beta2 * moments["v"] + (1 - self.beta2) * delta.square()
        step = self.lr * m / (v.sqrt() + self.tau)
        if self.form == "paper":
            return step, {"m": m, "v": v}
        t = moments["t"] + 1
        corrected = (1 - self.beta2 ** (t + 1)).sqrt() / (1 - self.beta1 ** (t + 1))
        return corrected * step, {"m": m, "v": v, "t": t}
