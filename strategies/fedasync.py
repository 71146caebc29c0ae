"""FedAsync: the server mixes every client's adapter in as it comes, the less the older it is.

Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", arXiv:1903.03934.

Client k was sent what the server held t_k updates ago (0: still holds). Its A and B, as they stand, are mixed in:

    x <- (1 - a_k) x + a_k x_k        a_k = alpha s(t_k)

    s(t) = 1                                          constant
    s(t) = 1 if t <= b, else 1 / (a (t - b) + 1)      hinge(a, b)
    s(t) = (1 + t)^-a                                 polynomial(a)

Down and up: A and B of every adapted layer, bytes per scalar times r (in + out) a layer.
Inexact, as FedIT is: B A differs from the same mixture of the products.
The steps: clients/first_order.py, whose `mu` is the weight rho of the paper's term around what the client was sent.
Departs from the paper: alpha stays what it is for the whole run, which there falls late in the experiments; rho is 0
unless method.client.mu says otherwise. Updates handed over together, as those of a synchronous round, which all
started from the same x, are one step, x <- (1 - mean a_k) x + mean(a_k x_k): one by one the last client would weigh
the most, and the same update, come twice, would count for more. Clients count the same whatever their samples, as in
the paper: there are no weights p_k = n_k / sum(n).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.checks import at_least, one_of
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Traits, Update, expect_like
from fedtune.lowrank.averaging import average
from strategies.fedit import State

__all__ = ["FedAsync", "State"]


@dataclass(frozen=True)
class FedAsync:
    """The server's side of FedAsync: each update is mixed in as it comes, less the staler it is.

    Raises:
        ConfigError: for a setting that is unknown or out of range.
    """

    traits: ClassVar[Traits] = Traits(title="FedAsync", asynchronous=True)
    buffer: ClassVar[int] = 1  # updates that a step of the server takes

    alpha: float = 0.6  # weight of a fresh update, as in the paper's experiments
    discount: str = "polynomial"  # s: constant, hinge or polynomial
    a: float = 0.5  # how fast s falls; the paper's hinge has 10
    b: int = 4  # hinge: staleness up to which an update counts in full

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"method.strategy.alpha={self.alpha}: expected a weight above 0, and at most 1")
        one_of("method.strategy.discount", self.discount, ("constant", "hinge", "polynomial"))
        at_least("method.strategy.a", self.a, 0)
        at_least("method.strategy.b", self.b, 0)

    def init(self, layout: Layout) -> State:
        return State(dict(layout.initial))

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return Instruction(state.adapter)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        expect_like(update.tensors, state.adapter)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        count, mixed = len(replies), [self.weight(peer.staleness) for peer, _ in replies]
        current = {name: tensor.double() for name, tensor in state.adapter.items()}  # a mean is in its like's dtype
        came = average(replies, current, [weight / count for weight in mixed])
        kept = 1 - sum(mixed) / count  # not of the quotients, which in all need not be 1 where alpha is
        return State(
            {name: (kept * current[name] + came[name]).to(tensor.dtype) for name, tensor in state.adapter.items()}
        )

    def weight(self, staleness: int) -> float:
        """The weight a_k = alpha s(staleness) of an update.

        Args:
            staleness: server updates since the client was sent what it trained on.
        """
        if self.discount == "polynomial":
            return float(self.alpha * (1 + staleness) ** -self.a)
        if self.discount == "hinge" and staleness > self.b:
            return self.alpha / (self.a * (staleness - self.b) + 1)
        return self.alpha
