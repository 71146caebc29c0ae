"""A server that takes a step of its own towards what its clients agree on, instead of going all the way.

Around any strategy whose state has an `adapter` that is an average of the clients' (Reddi et al. 2021, Algorithm 1,
FedOpt):

    delta_t = average_t - x_t        x_t+1 = x_t + step(delta_t, what is remembered of earlier ones)

The strategy inside does everything else: what is sent, what is refused, what is averaged and how. All numbers here are
float64, and only what is sent is rounded to the adapter's dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtune.config.compatibility import traits_of
from fedtune.config.targets import called
from fedtune.core.checks import above_zero, fraction, one_of
from fedtune.core.errors import ConfigError
from fedtune.core.optional import Residual, residual_of
from fedtune.core.protocol import ClientInfo, Instruction, Layout, Strategy, Tensors, Traits, Update

FORMS = ("paper", "flower")  # of the optimizers that Flower has in another than the paper's


@dataclass(frozen=True)
class State:
    base: Any  # the state of the strategy inside, whose `adapter` is what the clients are sent
    moments: dict[str, Tensors]  # by the adapter's names: what is remembered of a tensor, as {"m": ...}, float64

    @property
    def merged(self) -> Residual | None:
        """What the strategy inside has merged into the base, if it does such things."""
        return residual_of(self.base)


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """A strategy but for its step.

    Raises:
        ConfigError: if the strategy inside makes no average to step towards, or a rate is out of range.
    """

    title: ClassVar[str] = ""  # as `Traits.title`

    base: Strategy[Any]

    def __post_init__(self) -> None:
        mine, inner = called(self), called(self.base)
        for item in fields(self):
            if item.name in ("lr", "tau"):
                above_zero(f"{mine}'s {item.name}", getattr(self, item.name))
            elif item.name in ("momentum", "beta1", "beta2"):
                fraction(f"{mine}'s {item.name}", getattr(self, item.name))
            elif item.name == "form":
                one_of(f"{mine}'s form", getattr(self, item.name), FORMS)
        if not traits_of(self.base).averages:
            raise ConfigError(
                f"server_optimizer={mine} steps towards the average of the clients' adapters, and method={inner} "
                "doesn't end its rounds with one: leave server_optimizer out, or take another method (docs/methods.md)"
            )

    @abstractmethod
    def start(self, zeros: Tensor) -> Tensors:
        """What is remembered of a tensor before the first round. `zeros` has its shape, in float64."""

    @abstractmethod
    def step(self, delta: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        """How far to go, and what to remember. Changes neither of its arguments."""

    @property
    def traits(self) -> Traits:
        """Those of the strategy inside, but that the adapter is no plain average any more."""
        return replace(traits_of(self.base), title=self.title, averages=False)

    def init(self, layout: Layout) -> State:
        base = self.base.init(layout)
        zeros = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in base.adapter.items()}
        return State(base, {name: self.start(zero) for name, zero in zeros.items()})

    def configure(self, state: State, round: int, peer: ClientInfo) -> Instruction:
        return self.base.configure(state.base, round, peer)

    def validate(self, state: State, round: int, peer: ClientInfo, update: Update) -> None:
        self.base.validate(state.base, round, peer, update)

    def aggregate(self, state: State, round: int, replies: Sequence[tuple[ClientInfo, Update]]) -> State:
        agreed = self.base.aggregate(state.base, round, replies)
        adapter, moments = dict(agreed.adapter), dict(state.moments)
        for name, current in state.base.adapter.items():
            average = agreed.adapter[name].double()
            delta = average - current.double()
            # What nobody trained in this round stays as it is: momentum would move a frozen factor
            if delta.any():
                step, moments[name] = self.step(delta, state.moments[name])
                # x + step, written so that a step of all the way ends at the average's very bits
                adapter[name] = torch.where(step == delta, average, average + (step - delta)).to(current.dtype)
        return State(replace(agreed, adapter=adapter), moments)
