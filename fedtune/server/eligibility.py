"""Who can be asked in a round: who has data, whose device can do it, and who is there."""

from collections.abc import Sequence, Set
from typing import Any

from fedtune.core.errors import QuorumError
from fedtune.planning.turn_times import Turn
from fedtune.server.client_registry import ClientRegistry
from fedtune.server.progress import View
from fedtune.server.virtual_clock import Clock
from fedtune.workspace.workspace import Workspace


class Eligibility:
    """One run's, over its registry and its clock."""

    def __init__(self, workspace: Workspace, registry: ClientRegistry, clock: Clock, view: View):
        self._workspace = workspace
        self._population = workspace.experiment.population
        self._registry = registry
        self._clock = clock
        self._view = view
        self._named: dict[int, str] = {}  # who was said to be left out, and why
        self._said_untimed = False

    @property
    def idle(self) -> set[int]:
        """The clients without training data: by their own word, and before they came by the division."""
        known, peers = set(self._workspace.data.idle), self._registry.peers
        return {index for index in known | peers.keys() if not (peers[index].samples if index in peers else 0)}

    @property
    def cohort_size(self) -> int:
        """How many clients a round asks: no more than have data."""
        if self._population.connected:
            return min(self._population.cohort_size, max(1, len(self._registry.nodes.keys() - self.idle)))
        return min(self._population.cohort_size, self.most_clients)

    @property
    def most_clients(self) -> int:
        """How many clients with data there are."""
        if self._population.connected:
            return len(self._registry.peers.keys() - self.idle)
        return self._population.clients - len(self.idle)

    @property
    def is_timed(self) -> bool:
        """Whether the virtual clock runs: devices with limits, or clients still at work from when there were such."""
        return self._clock.runs(self._registry.peers) or bool(self._clock.progress.pending)

    def clients(self, state: Any, number: int, present: Set[int]) -> tuple[list[int], dict[int, Turn]]:
        """Who can take part in round `number`, and what the devices with limits are expected to take.

        Args:
            present: those whose nodes are connected. Where clients come and go, nobody else is asked; else who should
                be there and isn't is a failure of the round.

        Raises:
            QuorumError: if no device can, or none by the deadline.
        """
        peers, idle = self._registry.peers, self.idle
        expected: dict[int, Turn] = {}
        if self.is_timed:
            expected = self._clock.eligible_clients(
                state, number, {i: peer for i, peer in peers.items() if i not in idle}
            )
        else:
            self._clock.forget()
            self._say_untimed()
        self._say_left_out(number)
        out = self._clock.excluded
        able = [
            index
            for index in (sorted(present) if self._population.connected else range(self._population.clients))
            if index not in out and index not in idle and self._clock.is_there(number, index, peers)
        ]
        return able, expected

    def _say_left_out(self, number: int) -> None:
        out = self._clock.excluded
        for reason in dict.fromkeys(out.values()):
            new = [index for index in out if out[index] == reason and self._named.get(index) != reason]
            if new:
                self._view.note(f"left out from round {number}: client {', '.join(map(str, new))}, which {reason}")
        self._named = dict(out)

    def _say_untimed(self) -> None:
        """What was asked for and means nothing without a clock."""
        if not self._said_untimed and (note := self._clock.untimed(self._registry.peers)):
            self._view.note(note)
        self._said_untimed = True

    def check(self, number: int, able: Sequence[int]) -> None:
        """Check that a round with these clients can count.

        Raises:
            QuorumError: if it can't.
        """
        needed = self._population.min_replies(self.cohort_size)
        if len(able) < needed:
            out, idle = self._clock.excluded, self.idle
            known = len(self._registry.peers) if self._population.connected else self._population.clients
            away = known - len(able) - len(out) - len(idle)
            why = [f"client {index} {reason}" for index, reason in out.items()][:1]
            why += [f"{len(idle)} have no rows"] if idle else []
            why += [f"{away} are away in this round, by their devices' availability"] if away else []
            able_of = f"round {number}: {len(able)} of {self._population.clients} clients can take part"
            if self._population.connected:
                able_of = f"round {number}: {len(able)} of {known} clients that came are there and can take part"
            raise QuorumError(f"{able_of}, population.quorum asks for {'; '.join([str(needed), *why])}")
