"""What a strategy, a client, a codec or a grid may offer besides what it must (fedtune/core/protocol.py).

Whoever asks does so by isinstance, which looks whether the member is there.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedtune.core.method_traits import Traits

if TYPE_CHECKING:
    from fedtune.core.costs import Work
    from fedtune.core.protocol import Codec, DeviceProfile, Setting


@runtime_checkable
class DeclaresTraits(Protocol):
    """A strategy that says what it can do; without, it has none of the traits."""

    @property
    def traits(self) -> Traits: ...


@runtime_checkable
class PlansAhead(Protocol):
    """A strategy whose `configure` is dear for each device alone, and cheaper once it has seen all of a round."""

    def plan_for_all(self, state: Any, capabilities: "Sequence[DeviceProfile]") -> None:
        """Told before the round's first `configure` of all that may be asked; changes no answer."""
        ...


@runtime_checkable
class HasBuffer(Protocol):
    """An asynchronous strategy: after so many updates the server takes a step, whoever they come from."""

    @property
    def buffer(self) -> int: ...


class Residual(Protocol):
    """What a server has merged into the base (fedtune/lowrank/residual.py)."""

    @property
    def error(self) -> float:
        """How far off the last merge is: ||recompressed - total||_F / ||total||_F, 0 where nothing was cut."""
        ...


@runtime_checkable
class HasResidual(Protocol):
    """A strategy's state with what it has merged into the base so far; None if it does no such thing."""

    @property
    def merged(self) -> Residual | None: ...


@runtime_checkable
class CostedClient(Protocol):
    """A client that can say what a turn takes, so that devices with limits can be told apart."""

    def work(self, settings: "Mapping[str, Setting]") -> "Work":
        """What a turn takes under an instruction's settings."""
        ...


@runtime_checkable
class GridCodec(Protocol):
    """A codec of which a setting may have several values."""

    @property
    def grid(self) -> "Sequence[Codec]":
        """The codecs among which a client chooses by held-out loss; none if every setting has one value."""
        ...


@runtime_checkable
class ContractingCodec(Protocol):
    """A codec that says whether it leaves out less than it is given, as error feedback needs."""

    @property
    def contracts(self) -> bool:
        """Whether |x - decode(encode(x))|^2 <= (1 - delta) |x|^2, with a delta above 0 for every shape of x, in the
        mean where it draws."""
        ...


@runtime_checkable
class SequentialGrid(Protocol):
    """A Flower Grid that may have its clients' turns one after another."""

    @property
    def takes_turns(self) -> bool:
        """Whether it does: a reply's time is then its own turn's."""
        ...

    @property
    def turn_seconds(self) -> float:
        """What the turn of the reply that was pulled last took; its share, where several were worked on at once."""
        ...


def residual_of(state: Any) -> Residual | None:
    """What a strategy has merged into the base, by its state; None if it does no such thing."""
    return state.merged if isinstance(state, HasResidual) else None
