"""The virtual clock: what a round would take on the devices that the clients stand for.

    a client's turn = what it is sent / its download rate + its steps at its speed + what it answers / its upload rate

Bytes are those of the real messages' content; the addresses around it are left out, whose length is that of ids which
Flower draws anew in each run. Seconds of the steps come from the model of fedtune/core/costs.py and the device's
profile
(population.devices, or what its owner declares). So nothing here depends on where a run is played, or how fast.

    straggler=wait      a round lasts as long as its slowest client
    straggler=drop      who needs longer than the deadline doesn't count, and the round lasts until the deadline
    straggler=partial   who would need longer takes as many steps as fit, at least one; who then still does is dropped

A client that was asked and whose update doesn't come keeps a round with a deadline waiting until then. A round without
one goes on with the others when the last of these has answered. Nobody waits for a node that isn't connected.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from fedtune.config.compatibility import tells_its_work, traits_of
from fedtune.core.costs import Costs, Work
from fedtune.core.errors import CapacityError, QuorumError
from fedtune.core.optional import PlansAhead
from fedtune.core.protocol import ClientInfo, DeviceProfile, Instruction, size_of
from fedtune.core.seeds import bits, derive_seed
from fedtune.core.text import size
from fedtune.planning.client_sampling import PATIENCE, believed, select
from fedtune.planning.population import server_peer
from fedtune.planning.turn_times import Timed, Turn, memory_of, trained_of
from fedtune.runs.checkpoint import Progress
from fedtune.server.instructions import Instructions
from fedtune.server.state import ServerState
from fedtune.training.apply_instruction import BATCH, BITS, STEPS, with_steps
from fedtune.workspace.workspace import Workspace

BESIDE_BYTES = 500  # of a message that holds no tensor, about
ANY_BATCH = 1 << 30  # samples of a client that never runs short of a batch
LONGEST = 1e9  # virtual seconds of a turn, 30 years: one that takes more would drown all others in their sum


class Clock:
    """One run's time, by its clients' devices.

    Attributes:
        instructions: what clients are told, made once for each.
        left_out: why which clients can't take part, by index.
        timed: the clients whose turns are timed.
    """

    def __init__(self, workspace: Workspace, known: ServerState | None = None):
        self._workspace = workspace
        self._known = known or ServerState()
        self.instructions = Instructions(workspace.strategy)
        self._population = workspace.experiment.population
        self._partial = traits_of(workspace.strategy).partial
        self._measured = [0.0, 0.0]  # this round's largest messages, down and up, as shares of what was expected
        self.excluded: dict[int, str] = {}
        self.timed: set[int] = set()

    @property
    def progress(self) -> Progress:
        """What lasts from round to round."""
        return self._known.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._known.progress = progress

    @cached_property
    def _costs(self) -> Costs:
        self._workspace.model.reset()  # what a method has put into the base would be measured with it
        return self._workspace.costs

    def runs(self, peers: Mapping[int, ClientInfo]) -> bool:
        """Whether there is anything to time: a device with a limit."""
        return tells_its_work(self._workspace.client) and any(limited(peer.capability) for peer in peers.values())

    def untimed(self, peers: Mapping[int, ClientInfo]) -> str | None:
        """What was asked for and means nothing where this clock doesn't run."""
        client = self._workspace.client
        if not tells_its_work(client) and any(limited(peer.capability) for peer in peers.values()):
            return (
                f"{type(client).__name__} doesn't say what a turn takes (it has no `work`): no virtual clock, and "
                "nobody is left out for what a device can't do"
            )
        if self._population.deadline is not None or self._population.selection == "speed_tier":
            return (
                "no device has a limit, so nobody is slow: population.deadline and population.selection=speed_tier "
                "mean nothing here (population.devices, docs/devices.md)"
            )
        return None

    def turn(self, peer: ClientInfo, told: Instruction, down_bytes: float, up_bytes: float) -> Turn:
        """What it takes `peer` to do as it is told.

        Args:
            down_bytes: of the message's content; likewise `up_bytes`.
        """
        can, costs = peer.capability, self._costs
        work, train = self._work(peer, told), self._workspace.experiment.train
        batch = min(int(told.settings.get(BATCH, train.batch_size)), max(peer.samples, 1))
        micro = train.micro_batch_size
        held = int(told.settings.get(BITS, self._workspace.bits))
        model, weight_of = self._workspace.model, self._workspace.weight_of
        trained = trained_of(model, weight_of, costs, told, peer.rank or 0, self._partial)
        with np.errstate(over="ignore"):  # a stranger may say that it takes one operation in 1e300 seconds
            memory = memory_of(costs, work, trained, batch, micro, held)
            if work.backward:
                compute = costs.compute(
                    batch, held, work.steps, trained.block, trained.numbers, can.flop_per_s, can.read_bytes_per_s, micro
                )
            else:
                passes = work.steps * work.forward
                compute = costs.forward(batch, held, passes, can.flop_per_s, can.read_bytes_per_s, micro)
        return Turn(
            device=can.device,
            down_bytes=down_bytes,
            download=down_bytes / can.down_bytes_per_s,
            compute=float(compute),
            up_bytes=up_bytes,
            upload=up_bytes / can.up_bytes_per_s,
            memory_bytes=memory,
            limit_bytes=can.memory_bytes,
            bits=held,
            batch_size=batch,
            steps=work.steps,
            layers=len(trained.ranks),
            trainable_params=trained.numbers,
        )

    def memory(self, state: Any, number: int) -> float | None:
        """Bytes that a turn of round `number` takes of a device without limits, by the cost model; None where that
        can't be known."""
        if not tells_its_work(self._workspace.client):
            return None
        peer = replace(server_peer(self._workspace.experiment, self._workspace.model.layout), samples=ANY_BATCH)
        try:
            return self.turn(peer, self._workspace.strategy.configure(state, number, peer), 0, 0).memory_bytes
        except Exception:  # whatever it is: all rounds are done, and a figure for the report is no reason to fail
            return None

    def expected(self, peer: ClientInfo, told: Instruction) -> Turn:
        """What a turn is expected to take before there are messages.

        Both are taken to be as large as the tensors that are sent, times what the largest of the last round came to
        beside that.
        """
        size = _expected_bytes(told)
        down, up = self.progress.measured
        return self.turn(peer, told, down * size, up * size)

    def measure(self, told: Instruction, down_bytes: int, up_bytes: int) -> None:
        """Learn what messages take from two that crossed; it counts from the next round on."""
        size = _expected_bytes(told)
        self._measured = [max(self._measured[0], down_bytes / size), max(self._measured[1], up_bytes / size)]

    def _work(self, peer: ClientInfo, told: Instruction) -> Work:
        workspace = self._workspace
        client = with_steps(workspace.client, workspace.experiment.train, told.settings, peer.samples)
        work: Work = client.work(told.settings)
        return work

    def eligible_clients(self, state: Any, number: int, peers: Mapping[int, ClientInfo]) -> dict[int, Turn]:
        """What round `number` is expected to take each client that can take part; the others, with the reason, are
        `left_out` from then on.

        Raises:
            QuorumError: if nobody can, or nobody by the deadline.
        """
        self.forget()
        self.timed = set(peers)
        if isinstance(strategy := self._workspace.strategy, PlansAhead):
            strategy.plan_for_all(state, [peer.capability for peer in peers.values()])
        expected: dict[int, Turn] = {}
        known: dict[tuple[DeviceProfile, int, int, int], Turn | str] = {}
        train = self._workspace.experiment.train
        least = train.batch_size if train.epochs is None else ANY_BATCH  # epochs: as many steps as samples ask for
        for index, peer in sorted(peers.items()):
            key = (peer.capability, peer.rank, peer.base_version, min(peer.samples, least))
            if key not in known:
                known[key] = self._fits(state, number, peer)
            found = known[key]
            if isinstance(found, str):
                self.excluded[index] = f"{found} ({peer.capability.device})" if peer.capability.device else found
            else:
                expected[index] = found
        if not expected and self.excluded:
            index = min(self.excluded)
            raise QuorumError(
                f"round {number}: none of the {len(peers)} clients can take part; client {index} {self.excluded[index]}"
            )
        self._check_deadline(number, expected)
        return expected

    def forget(self) -> None:
        """Leave nobody out and time nobody."""
        self.excluded, self.timed = {}, set()

    def _fits(self, state: Any, number: int, peer: ClientInfo) -> Turn | str:
        try:
            told = self.instructions.prepare(state, number, peer)
        except CapacityError as error:
            return str(error)
        if not peer.capability.backprop and self._work(peer, told).backward:
            return "can compute forward only, and this method's clients need gradients"
        turn = self.expected(peer, told)
        if turn.memory_bytes > peer.capability.memory_bytes:
            return (
                f"needs {size(int(turn.memory_bytes))} of memory and has {size(int(peer.capability.memory_bytes))}: "
                f"{turn.trainable_params:,} trainable numbers, a batch of {turn.batch_size}, a base in {turn.bits} bits"
            )
        if not turn.seconds <= LONGEST:
            return f"would need more than {LONGEST:.0e} virtual seconds for a turn"
        return turn

    def _check_deadline(self, number: int, expected: Mapping[int, Turn]) -> None:
        deadline = self._population.deadline
        if deadline is None or self._population.straggler == "wait" or not expected:
            return
        share = 1.0 if self._population.straggler == "drop" else 0.0
        needs = {
            index: turn.download + turn.upload + max(share, 1 / turn.steps) * turn.compute
            for index, turn in expected.items()
        }
        first = min(needs, key=lambda index: needs[index])
        if needs[first] > deadline:
            device = f" ({expected[first].device})" if expected[first].device else ""
            raise QuorumError(
                f"round {number}: nobody can answer within population.deadline={deadline:g} virtual seconds; "
                f"the fastest, client {first}{device}, needs {needs[first]:.4g}. Raise it, or take "
                "population.straggler=wait"
            )

    def is_there(self, number: int, index: int, peers: Mapping[int, ClientInfo]) -> bool:
        """Whether this client is available in round `number`, by seed and its device's availability."""
        often = peers[index].capability.availability if index in peers else 1.0
        return often >= 1 or self._drawn("available", number, index) < often

    def drops_out(self, number: int, index: int) -> bool:
        """Whether this client never answers in round `number`."""
        return self._population.dropout > 0 and self._drawn("dropout", number, index) < self._population.dropout

    def _drawn(self, purpose: str, number: int, index: int) -> float:
        word = bits(derive_seed(self._workspace.experiment.seed, purpose, number, index), 1)[0]
        return float(word >> np.uint64(11)) * 2.0**-53

    def cohort(
        self,
        number: int,
        able: Sequence[int],
        count: int,
        peers: Mapping[int, ClientInfo],
        expected: Mapping[int, Turn],
    ) -> list[int]:
        """Who of those that are able takes part in round `number`, by population.selection."""
        population, progress = self._population, self.progress
        reported = {int(index): loss for index, loss in progress.losses.items()}
        chosen = select(
            population.selection,
            seed=self._workspace.experiment.seed,
            round=number,
            able=able,
            cohort=count,
            clients=population.clients,
            samples={index: peers[index].samples if index in peers else 0 for index in able},
            losses=believed(reported, progress.state_unknown),
            waiting={int(index) for index, rounds in progress.in_a_row.items() if rounds >= PATIENCE},
            candidates=max(population.drawn, count),
            seconds={index: turn.seconds for index, turn in expected.items()},
            tiers=population.tiers,
        )
        if population.selection == "power_of_choice":
            stayed = {str(index): progress.in_a_row.get(str(index), 0) + 1 for index in chosen}
            kept = {index: rounds for index, rounds in progress.in_a_row.items() if int(index) not in able}
            self.progress = replace(progress, in_a_row=kept | stayed)
        return chosen

    def shortened(self, peer: ClientInfo, told: Instruction) -> Instruction:
        """The instruction with as many steps as fit before the deadline, where fewer do than were meant."""
        deadline = self._population.deadline
        if self._population.straggler != "partial" or deadline is None:
            return told
        turn = self.expected(peer, told)
        if turn.seconds <= deadline:
            return told
        step = turn.compute / turn.steps
        steps = max(1, math.floor((deadline - turn.download - turn.upload) / step)) if step else turn.steps
        return replace(told, settings={**told.settings, STEPS: steps}) if steps < turn.steps else told

    def late(self, turn: Turn) -> str:
        """Why an answer that came after so long doesn't count; empty if it does."""
        deadline = self._population.deadline
        if self._population.straggler == "wait" or deadline is None or turn.seconds <= deadline:
            return ""
        return (
            f"it would have answered after {turn.seconds:.4g} virtual seconds, and population.deadline is {deadline:g}"
        )

    def advance(self, turns: Sequence[Timed], lost: bool) -> float:
        """Move the clock by a round in which everybody began at once, and return what it shows.

        Args:
            turns: all that were timed.
            lost: whether the update of some client that was asked didn't come, or came too late.
        """
        lasted = max((timed.turn.seconds for timed in turns if not timed.excluded_reason), default=0.0)
        if lost and self._population.deadline is not None:
            lasted = max(lasted, self._population.deadline)
        return self.set_time(self.progress.seconds + lasted)

    def set_time(self, seconds: float) -> float:
        """End a round when the clock shows this."""
        known = self.progress.measured
        measured = [now or before for now, before in zip(self._measured, known, strict=True)]
        self._measured = [0.0, 0.0]
        self.progress = replace(self.progress, seconds=seconds, measured=measured)
        return seconds

    def record_losses(self, losses: Mapping[int, float]) -> None:
        """Remember the losses that clients reported, by index."""
        heard = self.progress.losses | {str(index): float(loss) for index, loss in losses.items()}
        self.progress = replace(self.progress, losses=heard)


def _expected_bytes(told: Instruction) -> int:
    return size_of(told.tensors) + BESIDE_BYTES


def limited(can: DeviceProfile) -> bool:
    """Whether a device has a limit that time or taking part depends on."""
    free = DeviceProfile()
    limits = ("memory_bytes", "flop_per_s", "read_bytes_per_s", "up_bytes_per_s", "down_bytes_per_s", "backprop")
    return any(getattr(can, name) != getattr(free, name) for name in limits)
