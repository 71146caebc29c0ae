"""FedProx: FedIT whose clients are held near what they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127;
https://github.com/litian96/FedProx.

Client k minimises its loss F_k with a proximal term around theta_t, the adapter that the round began with, and the
server averages with p_k = n_k / sum(n) over the clients that replied, A and B apart:

    theta_k ~ argmin F_k(theta) + (mu / 2) |theta - theta_t|^2        theta_t+1 = sum_k p_k theta_k

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer; nothing more than FedIT.
Inexact, as FedIT is: B A differs from sum_k p_k B_k A_k. The term keeps the clients' factors together, and with them
that difference small.
The steps: clients/first_order.py, whose `mu` is no part of the server: method.client.mu=0.01 gives the term to any
other method that trains in this way, and mu = 0 here is FedIT to the last bit.
Departs from the paper: a client always takes all its steps (there, slow ones stop early, at a gamma_k-inexact
solution), and with AdamW, which rescales gradient and term together, unless train.optimizer=sgd; train.max_grad_norm
clips the sum of both. Clients are drawn uniformly and weighted by samples; the paper's algorithm draws them by p_k and
takes a plain mean.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.protocol import Traits
from strategies.fedit import FedIT, State

__all__ = ["FedProx", "State"]


@dataclass(frozen=True)
class FedProx(FedIT):
    traits: ClassVar[Traits] = Traits(title="FedProx", averages=True)
