"""What a person sees while a run goes on: a live view in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedtune.config.schema import FULL, Experiment
from fedtune.core.text import clock, size
from fedtune.data.row_counts import describe

if TYPE_CHECKING:  # torch comes with it, and a report needs none
    from fedtune.data.federated_data import FederatedData
    from fedtune.workspace.workspace import Workspace


class View(Protocol):
    """What the round loop tells whoever is watching."""

    def loading(self, experiment: Experiment) -> None: ...

    def started(self, experiment: Experiment, workspace: "Workspace", folder: Path, done: int) -> None: ...

    def round_begins(self, number: int, cohort: int) -> None: ...

    def reply(self, train_loss: float | None, failed: int, totals: Mapping[str, int]) -> None: ...

    def failure(self, number: int, client: int, reason: str) -> None: ...

    def note(self, text: str) -> None: ...

    def evaluating(self) -> None: ...

    def round_ends(self, row: Mapping[str, Any]) -> None: ...

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None: ...

    def close(self) -> None: ...


def make_view(console: Console | None = None) -> View:
    """A live view where standard output is a terminal, else plain lines."""
    console = console or Console(file=sys.stdout, highlight=False)
    return LiveView(console) if console.is_terminal else LineView()


class LineView:
    """A line an event, for logs and pipes."""

    def loading(self, experiment: Experiment) -> None:
        self._say(f"loading {experiment.model.name} and {experiment.data.name} ...")

    def started(self, experiment: Experiment, workspace: "Workspace", folder: Path, done: int) -> None:
        for line in headline(experiment, workspace, folder):
            self._say(line)
        if done >= 0:
            self._say(f"resumed after round {done}")

    def round_begins(self, number: int, cohort: int) -> None:
        pass

    def reply(self, train_loss: float | None, failed: int, totals: Mapping[str, int]) -> None:
        pass

    def failure(self, number: int, client: int, reason: str) -> None:
        self._say(f"round {number}: client {client} failed: {reason}")

    def note(self, text: str) -> None:
        self._say(text)

    def evaluating(self) -> None:
        pass

    def round_ends(self, row: Mapping[str, Any]) -> None:
        self._say("  ".join(f"{name} {cell}" for name, cell in zip((*HEADINGS, VIRTUAL), cells(row), strict=False)))

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None:
        for line in closing(summary, folder):
            self._say(line)

    def close(self) -> None:
        pass

    def _say(self, line: str) -> None:
        print(line, flush=True)


class LiveView:
    """A table that grows by a line a round, and below it how far the round is."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._bar.add_task("loading", total=None, note="", visible=False)
        self._table = rounds_table()
        self._status = Text("")
        self._live = Live(Group(self._status), console=console, refresh_per_second=8, transient=False)
        self._number = 0
        self._rounds = 0
        self._done_before = 0
        self._begun = time.monotonic()
        self._live.start()

    def loading(self, experiment: Experiment) -> None:
        self._status.plain = f"loading {experiment.model.name} and {experiment.data.name} ..."

    def started(self, experiment: Experiment, workspace: "Workspace", folder: Path, done: int) -> None:
        self._status.plain = ""
        first, *rest = headline(experiment, workspace, folder)
        self._console.print(f"[bold]{escape(first)}[/bold]")
        for line in rest:
            self._console.print(escape(line), style="dim", soft_wrap=True)
        if done >= 0:
            self._console.print(f"resumed after round {done}")
        self._console.print()
        self._table = rounds_table(experiment.population.devices is not None)
        self._rounds, self._done_before = experiment.rounds, max(done, 0)
        self._begun = time.monotonic()
        self._live.update(Group(self._table, self._bar))

    def round_begins(self, number: int, cohort: int) -> None:
        self._number = number
        self._bar.reset(
            self._task,
            total=cohort,
            visible=True,
            description=f"round {number}/{self._rounds}",
            note=self._left(number - 1),
        )

    def reply(self, train_loss: float | None, failed: int, totals: Mapping[str, int]) -> None:
        task = self._bar.tasks[self._task]
        loss = f"loss {train_loss:.3f}  " if train_loss is not None else ""
        lost = f"[red]{failed} failed[/red]  " if failed else ""
        moved = f"up {size(totals['up_wire_bytes'])}  down {size(totals['down_wire_bytes'])}  "
        done = self._number - 1 + (task.completed + 1) / (task.total or 1)
        self._bar.update(self._task, advance=1, note=loss + lost + moved + self._left(done))

    def failure(self, number: int, client: int, reason: str) -> None:
        self._console.print(f"[red]round {number}: client {client} failed:[/red] {escape(reason)}")

    def note(self, text: str) -> None:
        self._console.print(escape(text), style="dim")

    def evaluating(self) -> None:
        self._bar.update(self._task, note="evaluating ...")

    def round_ends(self, row: Mapping[str, Any]) -> None:
        self._table.add_row(*cells(row)[: len(self._table.columns)])  # limits may be declared by devices alone

    def finished(self, summary: Mapping[str, Any], folder: Path) -> None:
        self._bar.update(self._task, visible=False)
        self.close()
        first, *rest = closing(summary, folder)
        self._console.print(f"\n[bold green]{escape(first)}[/bold green]")
        for line in rest:
            self._console.print(escape(line), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _left(self, rounds: float) -> str:
        """Time left, from the rounds done since this process began."""
        done = rounds - self._done_before
        if done <= 0:
            return ""
        return f"{clock((time.monotonic() - self._begun) / done * (self._rounds - rounds))} left"


HEADINGS = ("round", "held-out loss", "accuracy", "train loss", "clients", "up", "down", "seconds")
VIRTUAL = "virtual clock"  # where devices have limits


def rounds_table(timed: bool = False) -> Table:
    """An empty table for rows of `cells`, without the virtual clock unless it runs."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (*HEADINGS, VIRTUAL) if timed else HEADINGS:
        table.add_column(heading, justify="right")
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """A metrics row for people."""

    def number(name: str, digits: int) -> str:
        return f"{row[name]:.{digits}f}" if row[name] is not None else "-"

    clients = str(row["clients"]) + (f" (-{row['failed']})" if row["failed"] else "")
    return [
        str(row["round"]),
        number("eval_loss", 4),
        number("eval_accuracy", 3),
        number("train_loss", 4),
        clients,
        size(row["up_wire_bytes"]),
        size(row["down_wire_bytes"]),
        f"{row['seconds'] + row['eval_seconds']:.1f}",
        *([] if row.get("virtual_seconds") is None else [f"{row['virtual_seconds']:.4g} s"]),
    ]


def headline(experiment: Experiment, workspace: "Workspace", folder: Path) -> list[str]:
    """What is about to run, on what."""
    model, data = workspace.model, workspace.data
    held = model.quantization if model.quantization != "none" else str(model.module.dtype)
    at_once = min(workspace.cohort, experiment.population.cohort_size) if experiment.runtime.name == "local" else 1
    beside = f" ({at_once} trained at once)" if at_once > 1 else ""
    return [
        f"{experiment.name}: {method_of(experiment)}, {clients_of(experiment)}{beside}, {experiment.rounds} rounds",
        f"base     {experiment.model.name} from {model.origin.source}, {held.removeprefix('torch.')} "
        f"on {model.device}, {model.trainable:,} trainable parameters",
        *_data_lines(experiment, data),
        f"writing  {folder}",
    ]


def _data_lines(experiment: Experiment, data: "FederatedData") -> list[str]:
    if not data.shared:
        test = (
            f"{len(data.server):,} rows of the server's own" if len(data.server) else "the clients' own held-out rows"
        )
        return [f"data     each device's own, which stay there; scored on {test}"]
    how = (
        f"each of the {experiment.data.partition} a client" if data.names else f"{experiment.data.partition} partition"
    )
    return [
        f"data     {experiment.data.name}, {len(data.corpus):,} examples, {how}",
        *describe(data.corpus.counts, experiment.data),
        *data.describe(experiment.data),
    ]


def method_of(experiment: Experiment) -> str:
    """The method, and what the server adds to it."""
    added = experiment.server_optimizer_name
    return experiment.method_name + (f" with {added}" if added else "")


def clients_of(experiment: Experiment) -> str:
    """Who trains."""
    population = experiment.population
    if population.pooled:
        epochs, steps = experiment.train.epochs, experiment.local_steps
        turn = f"{steps} steps" if epochs is None else f"{epochs:g} epochs"
        return f"1 client that holds the data of all {population.pooled}, {turn} a round"
    if population.connected:
        return f"whoever comes, from {population.min_clients} clients on, at most {population.cohort_size} a round"
    return f"{population.clients} clients, {population.cohort_size} a round"


def closing(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """What came of it, and what to do next."""
    totals = summary["totals"]
    if "first_eval_loss" in summary:
        result = f"held-out loss {summary['first_eval_loss']:.4f} -> {summary['last_eval_loss']:.4f}"
    else:
        result = f"{summary['rounds']} rounds done"
    failed = f", {totals['failed']} failed replies" if totals["failed"] else ""
    if summary["adapter"].get("kind") == FULL:
        learnt = f"weights  {folder / 'checkpoint'}  (fedtune export {folder} NAME makes a Hugging Face folder of them)"
    else:
        learnt = f"adapter  {folder / 'adapter'}  (PeftModel.from_pretrained loads it)"
    return [
        f"{result} in {clock(summary['seconds'])}; "
        f"{size(totals['up_wire_bytes'])} up, {size(totals['down_wire_bytes'])} down{failed}",
        f"state    {summary['state_sha256']}",
        learnt,
        f"figures  {folder / 'metrics.csv'}, {folder / 'ledger.csv'}, {folder / 'summary.json'}",
    ]
