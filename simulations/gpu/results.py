"""What was measured, as JSON and as a table in Markdown."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.files import write_atomically

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        value: a number, or words for what is none; None: it can't be measured here.
        unit: of the number.
        beside: what it is to be held against, in words.
    """

    what: str
    value: float | str | None
    unit: str = ""
    beside: str = ""

    @property
    def said(self) -> str:
        """The value as a person reads it."""
        if self.value is None:
            return NOT_MEASURED
        if isinstance(self.value, str):
            return self.value
        shown = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        return f"{shown} {self.unit}".strip()


@dataclass
class Outcome:
    """How a step went.

    Attributes:
        status: done, failed, skipped or not measured.
        note: the reason, where it isn't done.
    """

    name: str
    title: str
    status: str
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write gpu.json and gpu.md anew."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [asdict(outcome) for outcome in outcomes]
    write_atomically(folder / "gpu.json", json.dumps({"steps": found}, indent=1).encode())
    write_atomically(folder / "gpu.md", ("\n".join(table(outcomes)) + "\n").encode())


def read(text: str) -> list[Row]:
    """The rows that a step's own process has written, a line of JSON each; a line cut off counts for nothing."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def line(row: Row) -> str:
    """The inverse of `read`, for one row."""
    return json.dumps(asdict(row))


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| step | what | measured | beside |"
    yield "|---|---|---|---|"
    for outcome in outcomes:
        yield from (
            f"| {outcome.name} | {_cell(row.what)} | {_cell(row.said)} | {_cell(row.beside)} |" for row in outcome.rows
        )
        if outcome.status != "done":
            yield f"| {outcome.name} | {outcome.title} | {outcome.status} | {_cell(outcome.note)} |"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
