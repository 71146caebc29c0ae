"""What a person sees while a comparison goes on: a line an entry that fills with its seeds' marks, or plain lines."""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fedtune.comparisons.plan import PlannedRun
from fedtune.comparisons.play import Outcome
from fedtune.comparisons.state import now
from fedtune.core.text import clock, size

MARKS = {
    "waiting": "[dim]·[/dim]",
    "running": "[cyan]▶[/cyan]",
    "done": "[green]✓[/green]",
    "failed": "[red]✗[/red]",
    "interrupted": "[yellow]‖[/yellow]",
}


class CompareView:
    """A context. In a terminal a table that is drawn anew, elsewhere a line for each run that ends."""

    def __init__(self, title: str, cells: Sequence[PlannedRun], console: Console | None = None):
        self.title = title
        self.cells = list(cells)
        self.status = dict.fromkeys(self.cells, "waiting")
        self.there = 0  # that were done before
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._begun = time.monotonic()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> "CompareView":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(self._table())

    def was_done(self, cell: PlannedRun) -> None:
        self.status[cell] = "done"
        self.there += 1

    def begins(self, cell: PlannedRun) -> None:
        self.status[cell] = "running"
        self.refresh(True)

    def ends(self, cell: PlannedRun, outcome: Outcome) -> None:
        self.status[cell] = outcome.status
        done = sum(status in ("done", "failed") for status in self.status.values())
        where = f"[{done}/{len(self.cells)}] {cell.label}, seed {cell.seed}"
        if outcome.status == "failed":
            self._console.print(f"[red]{escape(where)} failed:[/red] {escape(outcome.error)}", soft_wrap=True)
        elif not self._console.is_terminal and (found := now(cell.folder)):
            self._console.print(
                f"{where}: held-out loss {found.first_loss:.4f} -> {found.loss:.4f}, {size(found.up_bytes)} up, "
                f"{size(found.down_bytes)} down, {clock(outcome.seconds)}",
                markup=False,
                soft_wrap=True,
            )
        self.refresh(True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def refresh(self, force: bool = False) -> None:
        if self._console.is_terminal and (force or time.monotonic() - self._drawn > 1):
            self._drawn = time.monotonic()
            self._live.update(Group(self._table(), self._foot()), refresh=True)

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        table.add_column("", justify="left", no_wrap=True)
        for heading in ("seeds", "round", "held-out loss", "±", "up", "down"):
            table.add_column(heading, justify="right", no_wrap=True)
        for label in dict.fromkeys(cell.label for cell in self.cells):
            mine = [cell for cell in self.cells if cell.label == label]
            found = [here for cell in mine if self.status[cell] in ("done", "running") and (here := now(cell.folder))]
            losses = [here.loss for here in found if math.isfinite(here.loss)]
            table.add_row(
                escape(label),
                "".join(MARKS[self.status[cell]] for cell in mine),
                str(min(here.round for here in found)) if found else "",
                f"{statistics.mean(losses):.4f}" if losses else "",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
                size(round(statistics.mean(here.up_bytes for here in found))) if found else "",
                size(round(statistics.mean(here.down_bytes for here in found))) if found else "",
            )
        return table

    def _foot(self) -> str:
        count = {status: list(self.status.values()).count(status) for status in MARKS}
        done = count["done"] + count["failed"]
        words = [f"{done} of {len(self.cells)} runs", f"{count['running']} going on"]
        words += [f"[red]{count['failed']} failed[/red]"] if count["failed"] else []
        if fresh := done - self.there:
            left = (time.monotonic() - self._begun) / fresh * (len(self.cells) - done)
            words.append(f"about {clock(left)} left")
        return ", ".join(words)
