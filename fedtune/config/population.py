"""The settings of a population: who the clients are, how many take part, and what a round does about the slow.

A part of fedtune/config/schema.py; no torch here either.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config.devices import CATALOGUE
from fedtune.core.checks import above_zero, at_least, fraction, nearest, one_of, option
from fedtune.core.errors import ConfigError

CONNECTED = "connected"  # the word for whoever comes, under an index below MOST_CONNECTED
MOST_CONNECTED = 10_000
MEASURED = "measured"  # the word for what each device says of itself


@dataclass(frozen=True)
class PopulationSpec:
    clients: int = option(
        20,
        "how many clients there are; of data.partition=files or users as many as there are; connected: whoever comes",
    )
    connected: bool = option(False, "clients come and go, and population.clients is one more than their highest index")
    min_clients: int = option(2, "population.clients=connected: how many have to be there to begin")
    cohort: int | None = option(None, "how many of them take part in a round; null takes all, but at most 10")
    quorum: float = option(0.5, "a round counts when at least this fraction of its cohort replied")
    ranks: Any = option(
        None,
        "LoRA ranks of the clients: a list, taken in turn, as in [64,32,16]; capability: what each device declares, at "
        "most adapter.rank; null: adapter.rank for all",
    )
    scaling: str = option("equal", "with ranks: equal (one alpha / r for all) or per_rank (one alpha for all)")
    devices: Any = option(
        None,
        "who the clients are, docs/devices.md: {name: share}; a list of names, taken in turn; a .csv of one's own; "
        "measured: what fedtune doctor wrote on each device; null: without limits",
    )
    efficiency: float = option(0.3, "share of a catalogued device's peak that training sustains")
    deadline: float | None = option(None, "virtual seconds that a round may take; null: as long as its slowest client")
    straggler: str = option("wait", "who misses the deadline: wait for it, drop it, or take what is done (partial)")
    dropout: float = option(0.0, "chance that a client that was asked never answers")
    selection: str = option(
        "uniform", "who takes part: uniform, power_of_choice (of those drawn, the worst) or speed_tier"
    )
    candidates: int | None = option(
        None,
        "power_of_choice: how many are drawn, of which those with the highest loss take part; null: twice the cohort",
    )
    tiers: int = option(3, "speed_tier: into how many groups of like speed the clients are divided")
    weights: str = option(
        "samples", "what an update counts: samples (as many examples as its client has) or equal (all alike)"
    )
    max_weight: float = option(1.0, "largest share of a round's weight that one client may have; 1: no limit")
    max_norm_ratio: float | None = option(
        1000.0,
        "an update whose norm is over so many times the round's median is left out; null: none is (docs/security.md)",
    )
    pooled: int = option(0, "how many clients' data the only client holds, as method=centralized has it; 0: its own")

    def __post_init__(self) -> None:
        at_least("population.pooled", self.pooled, 0)
        if self.pooled and self.clients != 1:
            raise ConfigError(
                f"population.pooled={self.pooled} puts all data with one client, and population.clients={self.clients}"
            )
        one_of("population.scaling", self.scaling, ("equal", "per_rank"))
        if isinstance(self.ranks, Sequence) and not isinstance(self.ranks, str):
            if not self.ranks or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in self.ranks):
                raise ConfigError(
                    f"population.ranks={list(self.ranks)}: expected whole numbers from 1 up, as in [16,8,4]"
                )
        elif self.ranks not in (None, "capability"):
            raise ConfigError(f"population.ranks={self.ranks}: expected a list of ranks, capability, or null")
        at_least("population.clients", self.clients, 1)
        at_least("population.cohort", self.cohort_size, 1)
        at_least("population.min_clients", self.min_clients, 1)
        if self.connected and self.pooled:
            raise ConfigError("population.clients=connected: whose data are pooled has to be known before they come")
        if self.cohort_size > self.clients:
            raise ConfigError(
                f"population.cohort={self.cohort} asks for more clients a round than there are "
                f"(population.clients={self.clients})"
            )
        if not 0 < self.quorum <= 1:
            raise ConfigError(f"population.quorum={self.quorum} must be above 0 and at most 1")
        check_devices(self.devices)
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"population.efficiency={self.efficiency} must be above 0 and at most 1")
        self._check_rounds()

    def _check_rounds(self) -> None:
        """What a round does about who is slow or away, and whom it asks."""
        one_of("population.straggler", self.straggler, ("wait", "drop", "partial"))
        one_of("population.selection", self.selection, ("uniform", "power_of_choice", "speed_tier"))
        fraction("population.dropout", self.dropout)
        at_least("population.tiers", self.tiers, 1)
        one_of("population.weights", self.weights, ("samples", "equal"))
        if not 0 < self.max_weight <= 1:
            raise ConfigError(f"population.max_weight={self.max_weight} must be above 0 and at most 1")
        if self.max_norm_ratio is not None:
            at_least("population.max_norm_ratio", self.max_norm_ratio, 10)
        if self.deadline is not None:
            above_zero("population.deadline", self.deadline)
        elif self.straggler != "wait":
            raise ConfigError(
                f"population.straggler={self.straggler} needs to know who is late: set population.deadline, in virtual "
                "seconds, or leave population.straggler=wait"
            )
        if self.selection == "speed_tier" and self.tiers > self.clients:
            raise ConfigError(
                f"population.tiers={self.tiers} asks for more groups than there are clients "
                f"(population.clients={self.clients})"
            )
        if self.candidates is None:
            return
        if self.selection != "power_of_choice":
            raise ConfigError(
                f"population.candidates={self.candidates} means nothing to population.selection={self.selection}: "
                "leave it out, or set population.selection=power_of_choice"
            )
        if not self.cohort_size <= self.candidates <= self.clients:
            raise ConfigError(
                f"population.candidates={self.candidates}: expected at least the cohort ({self.cohort_size}) and at "
                f"most population.clients={self.clients}"
            )

    @property
    def cohort_size(self) -> int:
        return min(self.clients, 10) if self.cohort is None else self.cohort

    @property
    def drawn(self) -> int:
        """How many clients power_of_choice draws, of which a cohort is then taken."""
        return min(2 * self.cohort_size, self.clients) if self.candidates is None else self.candidates

    def rank_of(self, index: int, rank: int, most: float) -> int:
        """The LoRA rank of client `index`, or 0 where all have the same.

        Args:
            rank: adapter.rank.
            most: what its device can take.
        """
        if self.ranks is None:
            return 0
        asked = rank if self.ranks == "capability" else self.ranks[index % len(self.ranks)]
        return max(1, int(min(asked, most)))

    def min_replies(self, cohort: int) -> int:
        """How many of `cohort` clients have to reply; the small number takes back what rounding adds to 0.1 * 30."""
        return math.ceil(self.quorum * cohort - 1e-9)


def check_devices(devices: object) -> None:
    """Check the form of `population.devices`, and that its devices are known.

    Raises:
        ConfigError: if `population.devices` is none of its forms, or names a device that isn't catalogued.
    """
    if devices is None or devices == MEASURED:
        return
    key, known = f"population.devices={devices}", sorted(CATALOGUE)
    forms = f"{{name: share}}, a list of names, the path of a .csv, {MEASURED} or null"
    if isinstance(devices, str):
        if devices.lower().endswith(".csv"):
            return
        meant = f"; for one device alone, population.devices=[{devices}]" if devices in CATALOGUE else ""
        raise ConfigError(f"{key}: expected {forms}{meant or nearest(devices, [*known, MEASURED])}")
    if not isinstance(devices, Mapping | Sequence):
        raise ConfigError(f"{key}: expected {forms}")
    if not devices:
        raise ConfigError(f"{key} names no device: expected {forms}")
    for name in devices:
        if name not in known:
            raise ConfigError(
                f"population.devices: '{name}' is not known: expected {', '.join(known)}{nearest(str(name), known)}; a "
                "device that isn't here goes into a .csv of one's own (docs/devices.md)"
            )
    for name, share in devices.items() if isinstance(devices, Mapping) else ():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 < share < math.inf:
            raise ConfigError(f"population.devices: the share of {name} should be a number above 0, got {share!r}")
