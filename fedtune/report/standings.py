"""Tables and curves: where each entry stands after as many rounds, bytes or seconds as the others.

Rounds are steps, and a limit falls between two of them: a run whose last round ends just beyond it would count with the
round before, and look worse than one that is equal but for a few bytes. So a run counts with what lies on the straight
line between the last evaluated round within the limit and the first beyond it; where none lies beyond, with its last
one. Where such runs end just below the limit (another round was not in their budget), all are compared where the first
of them ended. One that ended far below is shown as it is, and not called worse than who spent more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.core.errors import ConfigError
from fedtune.report.intervals import SIGNIFICANT, estimate, means
from fedtune.report.multiple_comparisons import step_down
from fedtune.report.shapes import Curve, Entry, Estimate, Group, Protocol, Reached, Standing, Table
from fedtune.runs.read import Floats, Run

KINDS = ("rounds", "bytes", "seconds")
# Columns of metrics.csv that are no scores
_COUNTS = frozenset(("round", "seconds", "eval_seconds", "virtual_seconds", "clients", "failed"))
SLACK = 1.01  # a limit lies a little above the total that it is made from, so that all seeds of that entry are within
CLEARLY = 0.9  # of a limit; who ended with less didn't come near it


@dataclass(frozen=True)
class _Point:
    """Where a run counts: at an evaluated round, or on the way from there to the next evaluated one."""

    run: Run
    place: int  # of the round in the run's metrics
    after: int  # of the next evaluated round; `place` where the run counts with that
    way: float  # the share of the way to `after`, by what the limit is of
    used: float  # the share of the limit that is spent here

    def value(self, column: Floats) -> float:
        """What a column (R,) has here; with only one of both rounds measured, what that one has."""
        here, there = float(column[self.place]), float(column[self.after])
        return here + self.way * (there - here) if self.way and math.isfinite(there) else here


def table(group: Group, protocol: Protocol, reference: str | None = None) -> Table:
    """Where each entry stands.

    A finished run counts where it reached the limit, between two evaluated rounds as a rule, or with its last one. One
    that ended early (it failed, was stopped, or is going on) counts if it got to the limit all the same. Others are
    left out, and the notes say so.

    Args:
        reference: a label.

    Raises:
        ConfigError: if no entry has the label `reference`.
    """
    known = [entry.label for entry in group.entries]
    if reference is not None and reference not in known:
        raise ConfigError(f"reference={reference} is none of the entries: expected one of {', '.join(known)}")
    notes: list[str] = []
    counting = [(entry, _counting(entry, protocol, notes)) for entry in group.entries]
    limit = _common_limit([run for _, runs in counting for run in runs], protocol)
    if limit * SLACK**2 < protocol.limit:  # a limit that was made from a run's total is up to so much above it
        shown = replace(protocol, limit=limit).title
        notes.append(f"compared {shown}: there the first ended of those that came near the limit")
    found = [_standing(entry, [_point(run, protocol, limit) for run in runs]) for entry, runs in counting if runs]
    found.sort(key=lambda standing: (standing.scores["eval_loss"].mean, standing.entry.label))
    if reference is not None and reference not in [standing.entry.label for standing in found]:
        notes.append(f"{reference} has no result here: the others are compared with the best one instead")
        reference = None
    if not found:
        return Table(protocol, reference or "", (), tuple(notes))
    # What a client's own data says is another number, and a control with all data in one place is nobody's choice
    tested = [standing for standing in found if not _has_own_test(standing)] or found
    best = next((standing for standing in tested if not _is_pooled(standing)), tested[0])
    first = next((standing for standing in found if standing.entry.label == reference), best)
    if (note := _unlike_tests(found)) is not None:
        notes.append(note)
    notes += [note for standing in found for note in _rough(standing, protocol)]
    return Table(protocol, first.entry.label, tuple(_judged(found, first)), tuple(notes))


def protocols(group: Group) -> list[Protocol]:
    """Those that fit: the rounds that all entries have; and the bytes and seconds that the experiments' `budget` names
    or, without one, that the entry that spent least came to.

    Where others weren't evaluated within these after a round at least, the next dearer entry decides: a method that
    sends next to nothing would else leave nothing to compare. Seconds only where all are of one kind, virtual or
    measured.
    """
    begun = [entry for entry in group.entries if any(map(_evaluated, entry.runs))]
    done = [max(map(_evaluated, _ended(entry)), default=0) for entry in begun]
    found = [Protocol("rounds", float(min((count for count in done if count), default=0)))]
    for kind in ("bytes", "seconds"):
        if kind == "seconds" and len({_is_virtual(entry) for entry in begun}) > 1:
            continue
        named = _budget(group, kind)
        limits = _limits(begun, kind) if named is None else [named]
        fitting = (Protocol(kind, limit) for limit in limits)
        found += [p for p in fitting if named is not None or all(_begun(entry, p) for entry in begun)][:1]
    return found


def target(group: Group) -> float:
    """Half of the best entry's way: the mean of its first and its lowest mean loss. NaN where nothing is evaluated."""
    curves = [curve(entry, "eval_loss").mean for entry in group.entries]
    ways = [(float(mean.min()), float(mean[0])) for mean in curves if len(mean)]
    if not ways:
        return math.nan
    lowest, first = min(ways)
    return (first + lowest) / 2


def reached(group: Group, loss: float) -> list[Reached]:
    """What each entry took to reach `loss`, the cheapest in bytes first."""
    found = []
    for entry in group.entries:
        there = [(run, int(places[0])) for run in entry.runs if len(places := _at_most(run, loss))]
        rounds, sent, seconds = (estimate([float(_over(run, kind)[place]) for run, place in there]) for kind in KINDS)
        found.append(Reached(entry, rounds, sent, seconds, len(entry.runs) - len(there)))
    return sorted(found, key=lambda one: (math.isnan(one.bytes.mean), one.bytes.mean, one.entry.label))


def curve(entry: Entry, column: str, over: str = "rounds") -> Curve:
    """A metrics column by round, with x as rounds, mean bytes or mean seconds after them."""
    _check_kind(over)
    rounds = np.unique(np.concatenate([np.empty(0, np.int64), *(run.rounds for run in entry.runs)]))
    values, along = np.full((2, len(entry.runs), len(rounds)), np.nan)
    for row, run in enumerate(entry.runs):
        at = np.searchsorted(rounds, run.rounds)
        values[row, at] = run.metrics.get(column, np.nan)
        along[row, at] = _over(run, over)
    along[~np.isfinite(values)] = np.nan  # x is that of the seeds whose mean it is
    mean, low, high = means(values)
    x = means(along)[0]
    kept = np.isfinite(mean) & np.isfinite(x)
    return Curve(entry, x[kept], mean[kept], low[kept], high[kept])


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"over={kind}: expected {', '.join(KINDS)}")


def _over(run: Run, kind: str) -> Floats:
    """(R,) rounds, bytes or seconds after each round."""
    _check_kind(kind)
    return {"rounds": lambda: run.metrics["round"], "bytes": run.spent, "seconds": run.seconds}[kind]()


def _at_most(run: Run, loss: float) -> Floats:
    return np.flatnonzero(run.metrics["eval_loss"] <= loss)


def _ended(entry: Entry) -> list[Run]:
    """Without those that failed, which shouldn't end a table for all others."""
    return [run for run in entry.runs if run.status != "failed"]


def _evaluated(run: Run) -> int:
    """The last evaluated round; 0 if there is none."""
    places = np.flatnonzero(np.isfinite(run.metrics["eval_loss"]))
    return int(run.rounds[places[-1]]) if len(places) else 0


def _counting(entry: Entry, protocol: Protocol, notes: list[str]) -> list[Run]:
    """The entry's runs that count."""
    kept = []
    for run in entry.runs:
        over = _over(run, protocol.kind)
        within = np.isfinite(run.metrics["eval_loss"]) & (over <= protocol.limit)
        last = float(over[-1]) if len(over) else 0.0
        who = f"{entry.label} seed {run.experiment.seed}"
        if run.status != "finished" and not last >= protocol.limit:
            at = f"after round {run.rounds[-1]}" if len(run.rounds) else "before round 0 was done"
            why = f": {run.error}" if run.error else ""
            notes.append(f"{who} is left out: {run.status} {at}{why}")
        elif not within.any():
            unknown = len(over) and not np.isfinite(over).any()
            notes.append(
                f"{who} is left out: "
                + (f"its {protocol.kind} are unknown" if unknown else f"nothing was evaluated {protocol.title}")
            )
        else:
            if protocol.kind == "rounds" and last < protocol.limit:
                notes.append(f"{who} ended after {last:g} rounds")
            kept.append(run)
    return kept


def _common_limit(runs: Sequence[Run], protocol: Protocol) -> float:
    """What all runs that came near the limit have spent; no less than where the last of them was first evaluated."""
    ends = [_spent(run, protocol.kind, protocol.limit) for run in runs]
    common = min([protocol.limit, *(end for end in ends if end >= CLEARLY * protocol.limit)])
    first = [float(np.nanmin(_over(run, protocol.kind)[np.isfinite(run.metrics["eval_loss"])])) for run in runs]
    return max([common, *first])


def _spent(run: Run, kind: str, limit: float) -> float:
    """Up to the limit, as far as the run was evaluated."""
    over = _over(run, kind)[np.isfinite(run.metrics["eval_loss"])]
    return min(limit, float(np.nanmax(over))) if np.isfinite(over).any() else math.nan


def _point(run: Run, protocol: Protocol, limit: float) -> _Point:
    """Where the run counts; it was evaluated within `limit`, which is the protocol's or a little below."""
    over = _over(run, protocol.kind)
    evaluated = np.isfinite(run.metrics["eval_loss"])
    place = int(np.flatnonzero(evaluated & (over <= limit))[-1])
    beyond = np.flatnonzero(evaluated & (over > limit))
    used = min(limit, _spent(run, protocol.kind, limit)) / protocol.limit if protocol.limit else 1.0
    if not len(beyond) or over[place] == limit:
        return _Point(run, place, place, 0.0, used)
    after = int(beyond[0])
    return _Point(run, place, after, float((limit - over[place]) / (over[after] - over[place])), used)


def _standing(entry: Entry, points: Sequence[_Point]) -> Standing:
    columns = dict.fromkeys(name for point in points for name in point.run.metrics if _is_score(name))
    scores = {
        name: estimate(
            [point.value(point.run.metrics[name]) if name in point.run.metrics else math.nan for point in points]
        )
        for name in columns
    }
    up, down = (estimate([point.value(point.run.spent(way)) for point in points]) for way in ("up", "down"))
    return Standing(
        entry=replace(entry, runs=tuple(point.run for point in points)),
        at=tuple(point.value(point.run.metrics["round"]) for point in points),
        used=float(np.mean([point.used for point in points])),
        scores={name: score for name, score in scores.items() if math.isfinite(score.mean)},
        up_bytes=up,
        down_bytes=down,
        seconds=estimate([point.value(point.run.seconds()) for point in points]),
        memory_bytes=estimate([point.run.memory_bytes for point in points]),
        behind=None,
        p=math.nan,
        verdict="reference",
    )


def _is_score(column: str) -> bool:
    return column not in _COUNTS and not column.endswith("_bytes")


def _judged(standings: Sequence[Standing], first: Standing) -> list[Standing]:
    """Each against the first, paired by seed."""
    seeds = sorted({seed for standing in standings for seed in standing.entry.seeds})
    losses = np.full((len(seeds), len(standings)), np.nan)
    for column, standing in enumerate(standings):
        rows = [seeds.index(seed) for seed in standing.entry.seeds]
        losses[rows, column] = standing.scores["eval_loss"].values
    place = [standing is first for standing in standings].index(True)
    judged = []
    for standing, own, p in zip(standings, losses.T, step_down(losses, place).tolist(), strict=True):
        if standing is first:
            judged.append(standing)
            continue
        apart = own - losses[:, place]
        behind = estimate(apart[np.isfinite(apart)])
        judged.append(replace(standing, behind=behind, p=p, verdict=_verdict(standing, first, behind, p)))
    return judged


def _verdict(standing: Standing, first: Standing, behind: Estimate, p: float) -> str:
    if math.isnan(p):
        return "one seed"
    if p > SIGNIFICANT:
        return "within noise"
    more, less = (standing, first) if behind.mean > 0 else (first, standing)  # by loss
    if more.used < CLEARLY and more.used * SLACK < less.used:
        return "unspent"
    return "worse" if behind.mean > 0 else "better"


def _is_pooled(standing: Standing) -> bool:
    return any(run.experiment.population.pooled for run in standing.entry.runs)


def _has_own_test(standing: Standing) -> bool:
    return any(run.clients is not None for run in standing.entry.runs)


def _unlike_tests(standings: Sequence[Standing]) -> str | None:
    """A method that leaves each client with a model of its own is scored by each client's data."""
    own = [one.entry.label for one in standings if _has_own_test(one)]
    if not own or len(own) == len(standings):
        return None
    return f"{', '.join(own)}: scored on each client's own held-out data, the others on the server's"


def _rough(standing: Standing, protocol: Protocol) -> list[str]:
    """Why an entry's numbers aren't quite what the limit says."""
    label, runs, notes = standing.entry.label, standing.entry.runs, []
    if not standing.used >= CLEARLY:
        ended = all(run.rounds[-1] >= run.experiment.rounds for run in runs)
        why = "rounds ended it" if ended else "it was not evaluated later"
        notes.append(f"{label} used {100 * standing.used:.2g} % of the {protocol.kind}: {why}")
    if protocol.kind != "rounds" and any(0 < at < 1 for at in standing.at):
        notes.append(f"{label}: its first round doesn't fit; what is shown lies on the line to what that came to")
    return notes


def _budget(group: Group, kind: str) -> float | None:
    """The limit that all experiments name alike, if they name one."""
    named = {
        getattr(getattr(run.experiment, "budget", None), kind, None) for entry in group.entries for run in entry.runs
    }
    value = next(iter(named)) if len(named) == 1 else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _limits(entries: Sequence[Entry], kind: str) -> list[float]:
    """What entries came to, each up to the next of three digits, ascending; nothing if that isn't known of all."""
    totals = []
    for entry in entries:
        ends = [float(over[-1]) for run in _ended(entry) if _evaluated(run) and len(over := _over(run, kind))]
        totals += [max(ends)] if ends else []
    if not all(math.isfinite(total) and total > 0 for total in totals):
        return []
    found = []
    for total in sorted(total * SLACK for total in totals):
        unit = 10.0 ** (math.floor(math.log10(total)) - 2)
        found.append(math.ceil(total / unit) * unit)
    return found


def _begun(entry: Entry, protocol: Protocol) -> bool:
    """Whether any run was evaluated within the limit after a round."""
    return any(
        (np.isfinite(run.metrics["eval_loss"]) & (run.rounds > 0) & (_over(run, protocol.kind) <= protocol.limit)).any()
        for run in entry.runs
    )


def _is_virtual(entry: Entry) -> bool:
    return any(run.is_virtual for run in entry.runs)
