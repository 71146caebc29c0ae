"""`fedtune plan`: what a round would ask of each client, and what that would take, before anything runs.

The same code as in a run: the strategy's own instruction for each client, timed by the same clock, on a base of which
only the shapes are known: no weights are downloaded or read. Bytes are those of the tensors that travel; a run counts
them from its messages.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.commands import Subparsers
from fedtune.core.errors import QuorumError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.config.schema import Experiment
    from fedtune.core.protocol import ClientInfo
    from fedtune.models.sketch import Sketch
    from fedtune.planning.turn_times import Turn
    from fedtune.workspace.workspace import Workspace

BAR = 12  # characters
WIDE = 140
COLUMNS = (
    "client", "device", "samples", "layers", "lowest_block", "ranks", "batch_size", "bits", "steps", "trainable_params",
    "memory_bytes", "limit_bytes", "down_bytes", "up_bytes", "download_seconds", "compute_seconds", "upload_seconds",
    "excluded",
)  # fmt: skip
TEXT = """\
Print what a round would ask of each client and what that takes on its device: layers and ranks, batch, bits of the
base, memory, seconds, bytes; who can't take part, and why. Nothing is trained, and no weights are downloaded or read.
The settings are those of fedtune run.

  fedtune plan population=mixed model=smollm2 method=fedpipe population.deadline=60
  fedtune plan population.devices=mine.csv model=smollm2 method=fedit --csv plan.csv
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "plan",
        help="what each device would be asked to do, before anything runs",
        usage="fedtune plan [-h] [--csv FILE] [key=value ...]",
        description=TEXT,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--csv", metavar="FILE", help="write it, with a line for each client")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it the experiment can't be set up.
        QuorumError: if nobody can take part; the plan is printed all the same.
    """
    from rich.console import Console

    from fedtune.config.compose import compose
    from fedtune.core.files import write_atomically
    from fedtune.data.own_data import counted

    workspace, sketch, (planned, trouble) = made(counted(compose(options.overrides)))
    console = Console()
    if not console.is_terminal:  # a file has no edge
        console = Console(width=WIDE)
    report(workspace, planned, console, sketch)
    if options.csv is not None:
        write_atomically(Path(options.csv).expanduser(), table_of(workspace, planned).encode())
        console.print(f"wrote    {options.csv}", soft_wrap=True)
    if trouble is not None:
        raise trouble
    return 0


def made(experiment: Experiment) -> tuple[Workspace, Sketch | None, tuple[list[Planned], QuorumError | None]]:
    """The plans, from a base without its weights where that is enough to know it, which is then returned as well."""
    from fedtune.models.base import pick_device
    from fedtune.models.sketch import sketch_base
    from fedtune.workspace.workspace import Workspace

    workspace, runtime = Workspace(experiment), experiment.runtime
    if workspace.experiment.model.path is not None:
        sketch = sketch_base(workspace.experiment.model, pick_device(runtime.device, runtime.deterministic))
        if sketch is not None:
            workspace.take(sketch.base)
            # A model's or a method's code may ask for numbers, of which there are none
            with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
                return workspace, sketch, plans(workspace)
            workspace = Workspace(experiment)
    return workspace, None, plans(workspace)


@dataclass(frozen=True)
class Planned:
    """What one client is asked to do in the first round, or why it can't take part."""

    peer: ClientInfo
    ranks: Mapping[str, int]  # by layer; empty where it is left out, or what is trained isn't layers
    turn: Turn | None
    reason: str = ""


def plans(workspace: Workspace) -> tuple[list[Planned], QuorumError | None]:
    """A plan for each client, by index, and what would stop the first round."""
    from fedtune.config.compatibility import traits_of
    from fedtune.core.protocol import ClientInfo
    from fedtune.device.home import home
    from fedtune.lowrank.algebra import lora_factors
    from fedtune.planning.population import assign_rank, profile_of
    from fedtune.server.virtual_clock import Clock

    experiment, layout = workspace.experiment, workspace.model.layout
    state = workspace.strategy.init(workspace.layout)
    peers = {}
    for index in range(experiment.population.clients):
        peer = ClientInfo(index, workspace.samples(index), profile_of(index, experiment, home()))
        peers[index] = assign_rank(peer, experiment, layout)
    clock, trouble = Clock(workspace), None
    expected: dict[int, Turn] = {}
    try:
        expected = clock.eligible_clients(state, 1, {index: peer for index, peer in peers.items() if peer.samples})
    except QuorumError as error:
        trouble = error
    found = []
    for index, peer in peers.items():
        if not peer.samples:
            found.append(Planned(peer, {}, None, "has no rows to train on"))
            continue
        if index in clock.excluded:
            found.append(Planned(peer, {}, None, clock.excluded[index]))
            continue
        told = workspace.strategy.configure(state, 1, peer)
        turn = expected.get(index) or clock.expected(peer, told)
        whole = layout.initial if not traits_of(workspace.strategy).partial else told.tensors
        ranks = {module: peer.rank or product.rank for module, product in lora_factors(whole).items()}
        found.append(Planned(peer, ranks if layout.is_low_rank else {}, turn))
    return found, trouble


def report(workspace: Workspace, planned: Sequence[Planned], console: Console, sketch: Sketch | None = None) -> None:
    """The table for people: clients with the same device and the same work share a line."""
    from rich.table import Table

    from fedtune.config.compatibility import traits_of
    from fedtune.core.text import size
    from fedtune.server.progress import method_of

    experiment = workspace.experiment
    population, costs = experiment.population, workspace.costs
    deadline = population.deadline
    until = "no deadline" if deadline is None else f"{deadline:g} s a round, straggler={population.straggler}"
    console.print(
        f"[bold]{method_of(experiment)} on {experiment.model.name}[/bold]: {population.clients} clients, "
        f"{population.cohort_size} a round, {until}"
    )
    held = ", ".join(f"{size(count)} in {bits} bits" for bits, count in costs.base_bytes.items())
    console.print(f"base     {held}", style="dim")
    console.print(
        f"data     examples of {costs.typical_tokens:.0f} tokens on average in a batch, {costs.tokens:.0f} at most",
        style="dim",
    )
    if population.devices is None:
        console.print("devices  none: nobody has a limit, and time stands still; see population=mixed", style="dim")
    working = [(one, one.turn) for one in planned if one.turn is not None]
    if sketch is not None and working:
        console.print(_memory(workspace, sketch, [turn for _, turn in working]), style="dim")
    console.print()
    longest = max((turn.seconds for _, turn in working), default=0.0)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (
        "device",
        "clients",
        "layers",
        "ranks",
        "batch",
        "bits",
        "memory",
        "down + compute + up",
        "seconds",
    ):
        table.add_column(heading, justify="left" if heading in ("device", "seconds") else "right", no_wrap=True)
    for line in _lines(working, len(workspace.weights), deadline, longest):
        table.add_row(*line)
    console.print(table)
    for reason, clients in _by_reason(planned).items():
        console.print(f"\n[red]left out[/red] client {', '.join(map(str, clients))}: {reason}", highlight=False)
    if working and longest:
        slowest, _ = max(working, key=lambda each: each[1].seconds)
        total = sum(turn.up_bytes for _, turn in working) / len(working)
        console.print(
            f"\nslowest  client {slowest.peer.index} ({slowest.peer.capability.device or 'no name'}), {longest:.4g} s; "
            f"each sends {size(total)} a round on average, and is sent as much",
            highlight=False,
        )
        if deadline is None and traits_of(workspace.strategy).plans:
            middle = sorted(turn.seconds for _, turn in working)[len(working) // 2]
            console.print(
                f"hint     without a deadline memory alone limits a plan; half of the clients would be done in "
                f"{middle:.3g} s: try population.deadline={middle:.2g}",
                highlight=False,
            )


def _memory(workspace: Workspace, sketch: Sketch, turns: Sequence[Turn]) -> str:
    """What loading the base takes and what training then does, at most."""
    from fedtune.core.text import size

    parts = []
    for bits in sorted({turn.bits for turn in turns}):
        loading = sketch.loading_bytes(workspace.costs.base_bytes[str(bits)], bits)
        training = [turn for turn in turns if turn.bits == bits]
        small = sum(turn.limit_bytes < loading for turn in training)
        more = f", more than {small} of its clients have" if small else ""
        most = size(max(turn.memory_bytes for turn in training))
        parts.append(f"loading the base in {bits} bits takes at most {size(loading)}{more}, then a turn {most}")
    return f"memory   {'; '.join(parts)}"


def table_of(workspace: Workspace, planned: Sequence[Planned]) -> str:
    """The plan as CSV, a line for each client."""
    from fedtune.core.csv_cells import guarded

    block_of = {weight.module: weight.block for weight in workspace.weights}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in planned:
        head = [one.peer.index, guarded(one.peer.capability.device), one.peer.samples]
        if (turn := one.turn) is None:
            writer.writerow([*head, *[""] * (len(COLUMNS) - 4), guarded(one.reason)])
            continue
        lowest = min((block_of[module] for module in one.ranks), default="")
        ranks = " ".join(f"{module.removeprefix('base_model.model.')}:{rank}" for module, rank in one.ranks.items())
        writer.writerow([
            *head, turn.layers, lowest, ranks, turn.batch_size, turn.bits, turn.steps, turn.trainable_params,
            turn.memory_bytes, turn.limit_bytes, turn.down_bytes, turn.up_bytes,
            turn.download, turn.compute, turn.upload, "",
        ])  # fmt: skip
    return stream.getvalue()


def _lines(
    working: Sequence[tuple[Planned, Turn]], layers: int, deadline: float | None, longest: float
) -> list[list[str]]:
    from fedtune.core.text import size

    alike: dict[tuple[object, ...], list[tuple[Planned, Turn]]] = {}
    for one, turn in working:
        ranks = tuple(one.ranks.items())
        key = (turn.device, turn.batch_size, turn.bits, ranks, turn.limit_bytes, round(turn.seconds, 9))
        alike.setdefault(key, []).append((one, turn))
    lines = []
    for group in sorted(alike.values(), key=lambda group: -group[0][1].seconds):
        one, turn = group[0]
        whole = deadline or longest
        share = min(1.0, turn.seconds / whole) if whole else 0.0
        bar = "█" * round(share * BAR)
        limit = f" of {size(turn.limit_bytes)}" if turn.limit_bytes < math.inf else ""
        late = deadline is not None and turn.seconds > deadline
        lines.append([
            turn.device or "-",
            str(len(group)),
            f"{turn.layers}/{layers}" if one.ranks else str(turn.layers),
            _range(sorted(set(one.ranks.values()))),
            str(turn.batch_size),
            str(turn.bits),
            size(turn.memory_bytes) + limit,
            f"{turn.download:.2f} + {turn.compute:.2f} + {turn.upload:.2f}",
            f"[{'red' if late else 'green'}]{bar:<{BAR}}[/] {turn.seconds:.2f}{' late' if late else ''}",
        ])  # fmt: skip
    return lines


def _range(ranks: Sequence[int]) -> str:
    return "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _by_reason(planned: Sequence[Planned]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in planned:
        if one.turn is None:
            found.setdefault(one.reason, []).append(one.peer.index)
    return found
