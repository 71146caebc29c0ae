"""What a comparison is made of: entries, groups of them, and what a table or a curve says of each."""

from dataclasses import dataclass

from fedtune.runs.comparison_file import Failure as Failure
from fedtune.runs.read import Floats, Run


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t)."""

    mean: float  # NaN of nothing
    low: float  # NaN below two values
    high: float
    values: tuple[float, ...]  # by seed; NaN where a seed has none


@dataclass(frozen=True)
class Entry:
    """The same settings over several seeds."""

    label: str  # what tells it from the group's other entries: "fedit", "fedit compeft", "fedit train.lr=0.003"
    runs: tuple[Run, ...]  # by seed, ascending; one each

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.experiment.seed for run in self.runs)


@dataclass(frozen=True)
class Group:
    """Entries that learn the same task."""

    title: str  # "SmolLM2-135M on chatterbot, 20 clients"
    common: tuple[tuple[str, str], ...]  # (setting, value) of what all share, for people
    entries: tuple[Entry, ...]  # by label


@dataclass(frozen=True)
class Protocol:
    """At what point runs are compared, between two evaluated rounds as a rule (fedtune/report/standings.py)."""

    kind: str  # "rounds", "bytes" (wire, both directions) or "seconds" (virtual where devices have limits)
    limit: float

    @property
    def title(self) -> str:
        """As "after 10 rounds", "within 40.0 MB", "within 60 s"."""
        if self.kind == "rounds":
            return f"after {self.limit:g} round{'' if self.limit == 1 else 's'}"
        if self.kind == "bytes":
            from fedtune.core.text import size

            return f"within {size(self.limit)}"
        return f"within {self.limit:.6g} s"


@dataclass(frozen=True)
class Standing:
    """One entry under a protocol; a mean over its seeds of each number at the round that counts."""

    entry: Entry  # with those of its runs alone that count here; its label is the whole entry's
    at: tuple[float, ...]  # by seed: the round that counts; 1.5 is half of the way from round 1 to round 2
    used: float  # the share of the limit that is spent there, mean over seeds
    scores: dict[str, Estimate]  # by metrics column: eval_loss, eval_accuracy, and whichever others were measured
    up_bytes: Estimate
    down_bytes: Estimate
    seconds: Estimate
    memory_bytes: Estimate
    behind: Estimate | None  # eval_loss minus the reference's, paired by seed; None for the reference itself
    p: float  # of that difference, adjusted over the table (multiple_comparisons.py); NaN below two common seeds
    # "reference", "worse", "better", "within noise", "unspent" (it would be worse, but had not spent what the others
    # had), or "one seed" where nothing can be told apart
    verdict: str


@dataclass(frozen=True)
class Table:
    protocol: Protocol
    reference: str  # the label that the others are compared with: the lowest mean loss, unless one is named; may be ""
    standings: tuple[Standing, ...]  # the best first
    notes: tuple[str, ...]  # as "fedkseed used 0.3 % of the bytes: rounds ended it"


@dataclass(frozen=True)
class Reached:
    """What it took an entry to reach a target loss."""

    entry: Entry
    rounds: Estimate
    bytes: Estimate
    seconds: Estimate
    missed: int  # seeds that never got there; the estimates are of the others


@dataclass(frozen=True)
class Curve:
    """One entry over its rounds: what at least one seed measured, with the 95 % interval where two or more did."""

    entry: Entry
    x: Floats  # (n,) rounds, mean bytes or mean seconds
    mean: Floats  # (n,)
    low: Floats  # (n,) NaN where fewer than two
    high: Floats  # (n,)


@dataclass(frozen=True)
class Comparison:
    """All that a page shows."""

    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]  # about folders: what was cut off, left out, or split, and why
    command: str | None  # that made it, where comparison.json says
