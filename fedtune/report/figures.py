"""A group's figures: what is drawn, the sentence that says it without eyes, and its numbers as a table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.core.text import duration, listed, number, sentence, size
from fedtune.report import axes, specs
from fedtune.report.axes import Spec
from fedtune.report.comparison import Curve, Entry, Estimate, Group, Standing, Table, curve, estimate
from fedtune.report.specs import PARTS, Rows
from fedtune.report.text import interval, lower_is_better, rounded, title_of
from fedtune.runs.ledger import Part

POINTS = 20_000  # of one figure: more can't be told apart, and make the page slow
CLIENTS = 60  # of one entry in the figure of the spread
ALL_ROWS = 16  # entries; figures with a row an entry show only the chosen of more
NOT_SCORES = ("eval_seconds",)


@dataclass(frozen=True)
class View:
    """Another x axis for the same figure."""

    label: str  # "by bytes"
    x: Spec


@dataclass(frozen=True)
class Figure:
    name: str  # of its files: letters, digits and dashes
    title: str
    caption: str  # the main numbers in a sentence
    spec: Spec | None  # None where there is nothing to draw: the caption says why
    views: tuple[View, ...] = ()  # none, or several, the first being the spec's
    head: tuple[str, ...] = ()  # of its numbers as a table
    rows: tuple[tuple[str, ...], ...] = ()


def figures(group: Group, table: Table) -> list[Figure]:
    """All figures of a group of entries that there are data for.

    Args:
        table: who stands where at the point in which the runs are compared.
    """
    costs = [
        _front(group, table, "bytes", "bytes sent and received", _bytes, size, "bytes"),
        _front(group, table, "time", _clock_of(group), lambda standing: standing.seconds, duration, "seconds"),
        _front(
            group, table, "memory", "peak memory of a client", lambda standing: standing.memory_bytes, size, "bytes"
        ),
    ]
    spent = [_at_rounds(entry, "bytes") for entry in group.entries]
    took = [_at_rounds(entry, "seconds") for entry in group.entries]
    lines = [_curves(group, column, spent, took) for column in columns(group)]
    return [*costs, *lines, _parts(group), _spread(group), _exactness(group)]


def columns(group: Group) -> list[str]:
    """The measured scores, the held-out loss first."""
    measured = {
        name
        for entry in group.entries
        for run in entry.runs
        for name, values in run.metrics.items()
        if name.startswith(("eval_", "client_eval_")) and name not in NOT_SCORES and np.isfinite(values).any()
    }
    first = ["eval_loss", "eval_accuracy"]
    return first[:1] + [name for name in first[1:] if name in measured] + sorted(measured.difference(first))


def _front(
    group: Group,
    table: Table,
    name: str,
    what: str,
    cost: Callable[[Standing], Estimate],
    said: Callable[[float], str],
    unit: str,
) -> Figure:
    title = f"Held-out loss against {name}"
    number_of = {entry.label: index for index, entry in enumerate(group.entries)}
    all_points = [(standing, cost(standing), _loss(standing)) for standing in table.standings]
    points = [(s, x, y) for s, x, y in all_points if math.isfinite(x.mean) and math.isfinite(y.mean)]
    missing = [standing.entry.label for standing, x, y in all_points if not math.isfinite(x.mean + y.mean)]
    free = [standing.entry.label for standing, x, _ in points if x.mean <= 0]
    points = [point for point in points if point[1].mean > 0]
    if not points:
        return Figure(f"loss-{name}", title, f"Not drawn: no run says its {what} together with a loss.", None)
    best = _unbeaten([(x.mean, y.mean) for _, x, y in points])
    rows: Rows = [
        {
            "e": number_of[standing.entry.label],
            "x": rounded(x.mean),
            "y": rounded(y.mean),
            "low": rounded(y.low),
            "high": rounded(y.high),
            "front": index in best,
            "cost": said(x.mean),
            "range": interval(y) or "one seed",
        }
        for index, (standing, x, y) in enumerate(points)
    ]
    on_front = sorted((points[index] for index in best), key=lambda point: point[1].mean)
    told = [f"{standing.entry.label} ({said(x.mean)}, {number(y.mean)})" for standing, x, y in on_front]
    caption = f"{sentence(table.protocol.title)}. Nothing is at once cheaper and better than {listed(told)}."
    if free:
        caption += f" {listed(free)} spent nothing, which a log axis can't show."
    if missing:
        caption += f" Without numbers here: {listed(missing)}."
    shown = axes.around([row["y"] for row in rows], [row[end] for row in rows for end in ("low", "high") if row[end]])
    if off := [standing.entry.label for standing, _, y in points if y.mean > shown[1]]:
        caption += f" Above the figure: {listed(off)}."
    y_axis = axes.axis("y", "held-out loss", domain=shown)
    spec = specs.front(
        rows,
        axes.log_axis("x", what, [x.mean for _, x, _ in points], unit),
        y_axis,
        _tips(("cost", what), ("y", "loss"), ("range", "95 % interval")),
    )
    listing = tuple(
        (standing.entry.label, said(x.mean), number(y.mean), interval(y), "yes" if index in best else "")
        for index, (standing, x, y) in enumerate(points)
    )
    head = ("entry", what, "held-out loss", "95 % interval", "unbeaten")
    return Figure(f"loss-{name}", title, caption, spec, (), head, listing)


def _unbeaten(points: Sequence[tuple[float, float]]) -> set[int]:
    """The points (cost, loss) such that none is as cheap and as good, and better in one of the two."""
    kept, lowest = set[int](), math.inf
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < lowest:
            lowest = points[index][1]
            kept.add(index)
    return kept


def _curves(group: Group, column: str, spent: Sequence[dict[int, float]], took: Sequence[dict[int, float]]) -> Figure:
    """Args:
    spent, took: by entry, mean bytes and seconds by round.
    """
    what = title_of(column)
    name, title = column.removeprefix("eval_").replace("_", "-"), f"{sentence(what)} by round"
    lines = [(index, entry, _round(curve(entry, column))) for index, entry in enumerate(group.entries)]
    lines = [(index, entry, line) for index, entry, line in lines if len(line.x)]
    if not lines:
        return Figure(name, title, f"Not drawn: the runs measured no {what}.", None)
    longest = max(len(line.x) for _, _, line in lines)
    most = max(2, min(200, POINTS // len(lines)))
    rows: Rows = []
    for index, _, line in lines:
        for at in _thinned(len(line.x), most):
            r = int(line.x[at])
            rows.append(
                {
                    "e": index,
                    "r": r,
                    "b": rounded(spent[index].get(r, math.nan)),
                    "s": rounded(took[index].get(r, math.nan)),
                }
                | {"y": rounded(line.mean[at]), "low": rounded(line.low[at]), "high": rounded(line.high[at])}
            )
    views = [View("by round", axes.axis("r", "round", whole=True))]
    for field, label, axis_title, unit in (
        ("b", "by bytes", "bytes sent and received", "bytes"),
        ("s", "by time", _clock_of(group), "seconds"),
    ):
        if values := [row[field] for row in rows if row[field]]:
            views.append(View(label, axes.log_axis(field, axis_title, values, unit)))
    ends = sorted(lines, key=lambda line: line[2].mean[-1], reverse=not lower_is_better(column))
    last = [f"{entry.label} {number(line.mean[-1])}" for _, entry, line in ends]
    caption = f"Best at its last round: {last[0]}" if len(last) > 1 else f"At its last round: {last[0]}"
    caption += f"; worst: {last[-1]}." if len(last) > 1 else "."
    caption += (
        " Bands are 95 % intervals over seeds."
        if any(row["low"] is not None for row in rows)
        else " One seed each: no bands."
    )
    if longest > most:
        caption += f" Drawn with {most} of up to {longest} rounds."
    shown = axes.around(
        [row["y"] for row in rows], [row[end] for row in rows for end in ("low", "high") if row[end] is not None]
    )
    spec = specs.curves(
        rows, views[0].x, axes.axis("y", what, domain=shown), _tips(("r", "round"), ("y", what)), longest <= 25
    )
    head = ("entry", "seeds", "first round", what, "last round", what, "95 % interval", "best")
    better = np.min if lower_is_better(column) else np.max
    listing = tuple(
        (
            entry.label,
            str(len(entry.runs)),
            *(str(int(line.x[0])), number(line.mean[0]), str(int(line.x[-1])), number(line.mean[-1])),
            interval(Estimate(line.mean[-1], line.low[-1], line.high[-1], ())),
            number(float(better(line.mean))),
        )
        for _, entry, line in lines
    )
    return Figure(name, title, caption, spec, tuple(views) if len(views) > 1 else (), head, listing)


def _exactness(group: Group) -> Figure:
    name, title, column = (
        "exactness",
        "How far the server's step is from the mean of the clients' steps",
        "aggregation_error",
    )
    lines = [(index, entry, _round(curve(entry, column))) for index, entry in enumerate(group.entries)]
    lines = [line for line in lines if len(line[2].x)]
    if not lines:
        return Figure(name, title, "Not drawn: the runs measured no aggregation error (evaluate.exactness).", None)
    most = max(2, min(200, POINTS // len(lines)))
    rows: Rows = [
        {"e": index, "r": int(line.x[at]), "y": rounded(line.mean[at])}
        | {
            end: rounded(values[at]) if values[at] > 0 else None
            for end, values in (("low", line.low), ("high", line.high))
        }
        for index, _, line in lines
        for at in _thinned(len(line.x), most)
        if line.mean[at] > 0
    ]
    for row in rows:
        if row["low"] is None or row["high"] is None:
            row["low"] = row["high"] = None
    means = [(entry.label, float(np.mean(line.mean)), line) for _, entry, line in lines]
    exact = [label for label, mean, _ in means if mean == 0]
    caption = "Relative to the mean step, by Frobenius norm; 0 is exact, 1 is as wrong as no step at all."
    drawn = sorted((mean, label) for label, mean, _ in means if mean > 0)
    if drawn:
        (least, nearest), (worst, farthest) = drawn[0], drawn[-1]
        caption += f" Mean over the rounds from {number(least, 2)} ({nearest}) to {number(worst, 2)} ({farthest})."
    if exact:
        caption += f" Exactly 0 throughout, and not on a log axis: {listed(exact)}."
    spec = None
    if rows:
        y = axes.log_axis("y", "relative error", [row["y"] for row in rows])
        few = max(len(line.x) for _, _, line in lines) <= 25
        spec = specs.curves(
            rows, axes.axis("r", "round", whole=True), y, _tips(("r", "round"), ("y", "relative error")), few
        )
    head = ("entry", "mean over rounds", "largest", "last round")
    listing = tuple(
        (label, number(mean, 3), number(float(line.mean.max()), 3), number(line.mean[-1], 3))
        for label, mean, line in means
    )
    return Figure(name, title, caption, spec, (), head, listing)


def _parts(group: Group) -> Figure:
    name, title = "bytes-by-part", "Bytes a round, by direction and part"
    found = {index: _mean_parts(entry) for index, entry in enumerate(group.entries)}
    found = {index: parts for index, parts in found.items() if sum(parts.values())}
    if not found:
        return Figure(name, title, "Not drawn: no run has a ledger yet.", None)
    counted = {
        index: sum(value for part, value in parts.items() if "measuring" not in part) for index, parts in found.items()
    }
    order = sorted(found, key=lambda index: counted[index])
    labels = [group.entries[index].label for index in order]
    rows: Rows = []
    for index, parts in found.items():
        total = sum(parts.values())
        present = [part for part in PARTS if parts[part]]
        rows += [
            {
                "e": index,
                "part": part,
                "bytes": rounded(parts[part]),
                "place": PARTS.index(part),
                "said": size(parts[part]),
            }
            | ({"total": rounded(total), "shown": size(counted[index])} if part == present[0] else {})
            for part in present
        ]
    least, most = order[0], order[-1]
    caption = (
        "All clients of a round together, as serialised messages; the mean over rounds and seeds, with what the start "
        f"took. From {size(counted[least])} ({group.entries[least].label}) a round to {size(counted[most])} "
        f"({group.entries[most].label})."
    )
    if any("measuring" in row["part"] for row in rows):
        caption += " Messages that only measure are drawn pale and aren't in the sums."
    caption += _few(group)
    spec = specs.stacks(rows, labels, _tips(("part", "part"), ("said", "a round")))
    used = [part for part in PARTS if any(parts[part] for parts in found.values())]
    listing = tuple(
        (group.entries[index].label, *(size(found[index][part]) for part in used), size(counted[index]))
        for index in order
    )
    return Figure(name, title, caption, spec, (), ("entry", *used, "sum without measuring"), listing)


def _mean_parts(entry: Entry) -> dict[str, float]:
    """Wire bytes a round by PARTS, over the entry's runs."""
    mean = dict.fromkeys(PARTS, 0.0)
    for run in entry.runs:
        done = max(int(run.rounds.max(initial=0)), 1)
        for (direction, part), values in run.wire.items():
            said = {str(Part.TRAIN): "train", str(Part.EVALUATE): "measuring"}.get(part)
            name = f"{direction}: {said}" if said else part
            mean[name if name in PARTS else Part.IDLE] += float(np.nansum(values)) / done / len(entry.runs)
    return mean


def _spread(group: Group) -> Figure:
    name, title = "clients", "How the clients differ"
    found: dict[int, np.ndarray] = {}
    for index, entry in enumerate(group.entries):
        losses = [run.clients.loss[np.isfinite(run.clients.loss)] for run in entry.runs if run.clients is not None]
        if losses and sum(map(len, losses)):
            found[index] = np.sort(np.concatenate(losses))
    if not found:
        return Figure(
            name, title, "Not drawn: no run scored its clients one by one (evaluate.clients=true does).", None
        )
    cuts = {index: np.quantile(losses, [0, 0.25, 0.5, 0.75, 1]) for index, losses in found.items()}
    order = sorted(found, key=lambda index: cuts[index][2])
    points: Rows = [
        {"e": index, "x": rounded(losses[at])}
        for index, losses in found.items()
        for at in _thinned(len(losses), CLIENTS)
    ]
    boxes: Rows = [
        {"e": index, **dict(zip(("low", "q1", "median", "q3", "high"), map(rounded, map(float, cut)), strict=True))}
        for index, cut in cuts.items()
    ]
    labels = [group.entries[index].label for index in order]
    least = min(order, key=lambda index: cuts[index][4] - cuts[index][0])
    caption = (
        "Loss on each client's own held-out data after its run's last scored round: a stroke a client, the middle half "
        f"as a bar, the median as a thick stroke. Lowest median: {labels[0]} ({number(cuts[order[0]][2])}); smallest "
        f"range: {group.entries[least].label} ({number(cuts[least][0])} to {number(cuts[least][4])})."
    )
    if (most := max(map(len, found.values()))) > CLIENTS:
        caption += f" {CLIENTS} of up to {most} clients are drawn, evenly through the ranks."
    caption += _few(group)
    tips = _tips(("low", "best"), ("q1", "25 %"), ("median", "median"), ("q3", "75 %"), ("high", "worst"))
    spec = specs.spread(points, boxes, labels, "loss of a client", tips)
    head = ("entry", "clients scored", "best", "25 %", "median", "75 %", "worst")
    listing = tuple(
        (group.entries[index].label, str(len(found[index])), *(number(float(cut)) for cut in cuts[index]))
        for index in order
    )
    return Figure(name, title, caption, spec, (), head, listing)


def _clock_of(group: Group) -> str:
    virtual = {run.is_virtual for entry in group.entries for run in entry.runs}
    return {frozenset({True}): "virtual time", frozenset({False}): "measured time"}.get(frozenset(virtual), "time")


def _bytes(standing: Standing) -> Estimate:
    up, down = standing.up_bytes, standing.down_bytes
    if len(up.values) == len(down.values) and up.values:
        return estimate([sent + got for sent, got in zip(up.values, down.values, strict=True)])
    return Estimate(up.mean + down.mean, math.nan, math.nan, ())


def _loss(standing: Standing) -> Estimate:
    return standing.scores.get("eval_loss", Estimate(math.nan, math.nan, math.nan, ()))


def _round(line: Curve) -> Curve:
    """Without the rounds that have no number."""
    kept = np.isfinite(line.mean)
    return Curve(line.entry, line.x[kept], line.mean[kept], line.low[kept], line.high[kept])


def _at_rounds(entry: Entry, over: str) -> dict[int, float]:
    """Mean bytes or seconds by round."""
    x = curve(entry, "round", over)
    return {round(float(r)): float(value) for r, value in zip(x.mean, x.x, strict=True) if math.isfinite(r)}


def _thinned(count: int, most: int) -> list[int]:
    """At most so many of range(count), evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index) for index in np.linspace(0, count - 1, most)})


def _few(group: Group) -> str:
    """What figures with a row an entry say where they show only some."""
    return "" if len(group.entries) <= ALL_ROWS else " Drawn for the entries in colour; the numbers are of all."


def _tips(*fields: tuple[str, str]) -> list[Spec]:
    return [{"field": "name", "title": "entry"}, *({"field": field, "title": title} for field, title in fields)]
