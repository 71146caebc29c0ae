"""A group as a page shows it: what it says, who is in colour, its figures, its tables, and how to repeat it."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.config.targets import TARGET, declared_traits
from fedtune.core.text import NOTHING, duration, number, plural, sentence, size
from fedtune.report import comparison as compared
from fedtune.report.comparison import Entry, Estimate, Group, Protocol, Reached, Standing, Table
from fedtune.report.figures import Figure, columns, figures
from fedtune.report.specs import SLOTS
from fedtune.report.text import answers, rounded, signed, title_of, within
from fedtune.runs.read import Run

LONGEST = 100_000  # characters of a config that are shown


@dataclass(frozen=True)
class Question:
    """What a page is asked beyond what fits any comparison."""

    protocols: tuple[Protocol, ...] = ()  # none: those that fit
    target: float | None = None  # a held-out loss; None: half of the best entry's way
    reference: str | None = None  # the entry that others are compared with; None: the best


@dataclass(frozen=True)
class Choice:
    label: str
    chosen: bool  # in colour


@dataclass(frozen=True)
class Cell:
    text: str
    range: str = ""  # as "± 0.012"
    kind: str = ""  # for its colour
    value: float | None = None  # what the text rounds


@dataclass(frozen=True)
class Line:
    entry: int
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Results:
    """A table as text."""

    kind: str  # rounds, bytes, seconds or target
    title: str
    legend: str
    head: tuple[str, ...]
    rows: tuple[Line, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    label: str
    command: str
    versions: str
    text: str


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    answers: tuple[str, ...]
    common: tuple[tuple[str, str], ...]
    entries: tuple[Choice, ...]
    slots: tuple[int, ...]  # the entries in colour, the best first
    figures: tuple[Figure, ...]
    tables: tuple[Results, ...]
    runs: tuple[tuple[str, ...], ...]
    configs: tuple[Settings, ...]


def section(group: Group, place: int, question: Question) -> Section:
    """A group of entries as text, tables and figures.

    Raises:
        ConfigError: if no entry is called what `reference` says.
    """
    known = question.reference if question.reference in {entry.label for entry in group.entries} else None
    wanted = question.protocols or compared.protocols(group)
    tables = [compared.table(group, protocol, known) for protocol in wanted]
    target = compared.target(group) if question.target is None else question.target
    reached = compared.reached(group, target) if math.isfinite(target) else []
    slots = _slots(group, tables[0]) if tables else tuple(range(min(SLOTS, len(group.entries))))
    return Section(
        id=f"group-{place + 1}",
        title=group.title,
        answers=tuple(answers(tables, reached, target)) or ("Nothing has been evaluated yet.",),
        common=group.common,
        entries=tuple(Choice(entry.label, index in slots) for index, entry in enumerate(group.entries)),
        slots=slots,
        figures=tuple(figures(group, tables[0])) if tables else (),
        tables=(*(_results(group, table) for table in tables), *([_way(group, reached, target)] if reached else [])),
        runs=tuple(line for entry in group.entries for line in _runs(entry)),
        configs=tuple(_settings(entry) for entry in group.entries),
    )


def _slots(group: Group, table: Table) -> tuple[int, ...]:
    """The entries in colour at first: the reference and those that set the scale (one client with all data, none that
    talk), then the best."""
    number_of = {entry.label: index for index, entry in enumerate(group.entries)}
    order = [standing.entry for standing in table.standings]
    order += [entry for entry in group.entries if entry.label not in {known.label for known in order}]
    first = [entry for entry in order if entry.label == table.reference or _sets_the_scale(entry)]
    kept = {entry.label for entry in [*first, *order][:SLOTS]}
    for entry in order:
        if len(kept) < SLOTS:
            kept.add(entry.label)
    return tuple(number_of[entry.label] for entry in order if entry.label in kept)


def _sets_the_scale(entry: Entry) -> bool:
    """Whether its method says that it is a control: all data in one place, say, or nobody talking to anybody."""
    return declared_traits(str(entry.runs[0].experiment.method.strategy.get(TARGET))).control


def _results(group: Group, table: Table) -> Results:
    number_of = {entry.label: index for index, entry in enumerate(group.entries)}
    scores = [name for name in columns(group) if any(name in standing.scores for standing in table.standings)]
    timed = any(math.isfinite(standing.seconds.mean) for standing in table.standings)
    sized = any(math.isfinite(standing.memory_bytes.mean) for standing in table.standings)
    head = ["entry", "seeds", "round", "held-out loss", "difference", "p", "verdict"]
    head += [title_of(name) for name in scores[1:]] + ["up", "down"] + ["time"] * timed + ["memory"] * sized
    rows = []
    for standing in table.standings:
        cells = [
            Cell(str(len(standing.at))),
            Cell(_rounds(standing.at)),
            _cell(standing.scores.get("eval_loss")),
            _cell(standing.behind, signs=True),
            Cell(
                "" if not math.isfinite(standing.p) else "< 0.001" if standing.p < 1e-3 else f"{standing.p:.3f}",
                value=rounded(standing.p),
            ),
            Cell(standing.verdict, kind=_kind(standing)),
            *(_cell(standing.scores.get(name)) for name in scores[1:]),
            Cell(size(standing.up_bytes.mean), value=rounded(standing.up_bytes.mean)),
            Cell(size(standing.down_bytes.mean), value=rounded(standing.down_bytes.mean)),
        ]
        cells += [Cell(duration(standing.seconds.mean), value=rounded(standing.seconds.mean))] * timed
        cells += [Cell(size(standing.memory_bytes.mean), value=rounded(standing.memory_bytes.mean))] * sized
        rows.append(Line(number_of[standing.entry.label], standing.entry.label, tuple(cells)))
    legend = (
        f"Mean and 95 % interval over seeds; differences are from {table.reference}, paired by seed. p is adjusted for "
        "all entries of the table and for a reference that may be the luckiest of them (Tukey's range, stepping down): "
        "where all are equal and scatter alike, at most 5 % of tables call any worse. Between two evaluated rounds, "
        "numbers are on the straight line."
    )
    return Results(table.protocol.kind, sentence(table.protocol.title), legend, tuple(head), tuple(rows), table.notes)


def _way(group: Group, reached: Sequence[Reached], target: float) -> Results:
    number_of = {entry.label: index for index, entry in enumerate(group.entries)}
    rows = []
    for entry in reached:
        got = math.isfinite(entry.bytes.mean)
        missed = plural(entry.missed, "seed") if entry.missed else ""
        cells = (
            Cell(size(entry.bytes.mean), value=rounded(entry.bytes.mean)) if got else Cell("never", kind="doubt"),
            Cell(
                f"{entry.rounds.mean:.3g}" if got else NOTHING, within(entry.rounds), value=rounded(entry.rounds.mean)
            ),
            Cell(duration(entry.seconds.mean), value=rounded(entry.seconds.mean)),
            Cell(missed, kind="doubt"),
        )
        rows.append(Line(number_of[entry.entry.label], entry.entry.label, cells))
    title, legend = (
        f"To a held-out loss of {number(target)}",
        "Means of the seeds that got there, at the first evaluated round that did.",
    )
    return Results("target", title, legend, ("entry", "bytes", "rounds", "time", "never there"), tuple(rows), ())


def _cell(estimate: Estimate | None, signs: bool = False) -> Cell:
    if estimate is None:
        return Cell(NOTHING, kind="doubt")
    text = signed(estimate.mean) if signs else number(estimate.mean)
    return Cell(text, within(estimate), value=rounded(estimate.mean))


def _kind(standing: Standing) -> str:
    return standing.verdict if standing.verdict in {"better", "worse", "reference"} else "doubt"


def _rounds(at: Sequence[float]) -> str:
    shown = [f"{number:.6g}" if number == round(number) else f"{number:.2f}" for number in sorted(at)]
    return NOTHING if not at else shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _runs(entry: Entry) -> list[tuple[str, ...]]:
    return [
        (
            entry.label,
            str(run.experiment.seed),
            run.status,
            f"{int(run.rounds.max(initial=0))} of {run.experiment.rounds}",
            str(run.path),
            _command(run.summary.get("command"), run.experiment.overrides),
        )
        for run in entry.runs
    ]


def _settings(entry: Entry) -> Settings:
    run = entry.runs[0]
    versions = run.summary.get("versions")
    told = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    return Settings(entry.label, _command(run.summary.get("command"), run.experiment.overrides), told, _config(run))


def _config(run: Run) -> str:
    """As the run wrote it: to write it again takes far longer than to read it."""
    try:
        return (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")[:LONGEST]
    except OSError:
        return run.experiment.text()


def _command(told: object, overrides: Sequence[str]) -> str:
    return told if isinstance(told, str) else shlex.join(["fedtune", "run", *overrides])
