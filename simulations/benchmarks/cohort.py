"""What training clients in one pass over the base gains (runtime.cohort), each way on the same batches in one process.

    python -m simulations.benchmarks.cohort                    the demo's model and data, 8 clients: 4 minutes
    python -m simulations.benchmarks.cohort --clients 64 --sizes 1 8 64 runtime.device=cuda
    python -m simulations.benchmarks.cohort model=tiny --steps 1 --repeats 1

A row is a gradient step of all clients, so many in a pass: the least seconds of all repeats, which take turns, the
tokens that are put in, padding apart, and the most memory beyond what was held before. `padded` is PEFT's own forward,
one client after the other, each batch padded to its longest example, and the last column how far the losses are from
that one's. A quiet machine, please.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedtune.config.compose import compose
from fedtune.core.heap import trim
from fedtune.core.protocol import Batch, GradientRequest, Instruction
from fedtune.core.seeds import derive_seed
from fedtune.models.adapted_model import LocalModel
from fedtune.models.packing import pack
from fedtune.training.first_order import loss_of
from fedtune.training.gradients import gradients
from fedtune.workspace.workspace import Workspace
from simulations.benchmarks.costs import resident

PADDED = "padded"


@dataclass(frozen=True)
class Measured:
    """One way to take a step of all clients."""

    way: str  # how many at once, or "padded"
    seconds: float  # the least
    tokens: int  # that are learnt from or told from, in all
    peak_bytes: float  # beyond what was held before
    loss: float  # the mean of all clients' first losses


def measure(workspace: Workspace, clients: int, sizes: Sequence[int], steps: int, repeats: int) -> list[Measured]:
    """A row for `padded` and each size.

    Args:
        steps: batches of each client, one after the other.
    """
    model, size = workspace.model, workspace.experiment.train.batch_size
    seed = workspace.experiment.seed
    batches = []
    for client in range(clients):
        stream = iter(workspace.data.batches(client, size, derive_seed(seed, "cohort", client)))
        batches.append([next(stream) for _ in range(steps)])
    tokens = sum(sum(pack(own).sizes) for own in batches)
    twins = [model.twin() for _ in range(clients)]
    ways: dict[str, Callable[[], float]] = {PADDED: lambda: _padded(model, batches)}
    ways |= {str(most): lambda most=most: _packed(twins, batches, most) for most in sizes}  # type: ignore[misc]
    found: dict[str, Measured] = {}
    for _ in range(repeats):
        for way, run in ways.items():
            seconds, peak, loss = _timed(run, model.device)
            best = found.get(way, Measured(way, seconds, tokens, peak, loss))
            found[way] = replace(best, seconds=min(best.seconds, seconds), peak_bytes=max(best.peak_bytes, peak))
    return list(found.values())


def _padded(model: LocalModel, batches: Sequence[Sequence[Batch]]) -> float:
    losses: list[float] = []
    model.module.train()
    for own in batches:
        for batch in own:
            loss = loss_of(model.module, batch.to(model.device))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        _forget(model)
    model.module.eval()
    return sum(losses) / len(losses)


def _packed(twins: Sequence[LocalModel], batches: Sequence[Sequence[Batch]], most: int) -> float:
    losses: list[float] = []
    for start in range(0, len(twins), most):
        part = slice(start, start + most)
        for step in zip(*batches[part], strict=True):
            asked = [GradientRequest(twin, batch, 0) for twin, batch in zip(twins[part], step, strict=True)]
            losses += [reply.loss for reply in gradients(asked)]
        for twin in twins[part]:
            _forget(twin)
    return sum(losses) / len(losses)


def _forget(model: LocalModel) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _timed(run: Callable[[], float], device: torch.device) -> tuple[float, float, float]:
    """Seconds, bytes at the peak beyond what was held before, and the loss."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        before: float = torch.cuda.memory_allocated(device)
    else:
        trim()  # what an earlier way has freed would pass for held
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = resident()
    begun = time.perf_counter()
    loss = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun, torch.cuda.max_memory_allocated(device) - before, loss
    return time.perf_counter() - begun, resident("VmHWM") - before, loss


def table_of(rows: Sequence[Measured], title: str) -> Table:
    """A line a way, with its speed in terms of the padded one."""
    table = Table(title=title)
    for column in ("clients at once", "s", "tokens/s", "times padded", "peak MB", "loss off"):
        table.add_column(column, justify="right")
    slow = next(row for row in rows if row.way == PADDED)
    for row in rows:
        table.add_row(
            row.way,
            f"{row.seconds:.2f}",
            f"{row.tokens / row.seconds:.0f}",
            f"{slow.seconds / row.seconds:.2f}",
            f"{row.peak_bytes / 1e6:.0f}",
            f"{abs(row.loss / slow.loss - 1):.0e}",
        )
    return table


def main(words: Sequence[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.cohort")
    parser.add_argument("overrides", nargs="*", default=[], help="settings, as of fedtune run; experiment=demo first")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="how many are trained at once")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_intermixed_args(list(words))
    people = f"population.clients={max(asked.clients, 20)}"
    workspace = Workspace(compose(["experiment=demo", people, "population.cohort=8", *asked.overrides]))
    workspace.use_threads()
    if not workspace.stacks(Instruction({})):
        raise SystemExit(f"these clients go one by one: {workspace.model.obstacle}")
    rows = measure(workspace, asked.clients, asked.sizes, asked.steps, asked.repeats)
    model = workspace.model
    title = (
        f"{workspace.experiment.model.name}, {model.dtype}, {model.quantization}, {model.kind} on {model.device}; "
        f"{asked.clients} clients, {workspace.experiment.train.batch_size} examples a batch, {rows[0].tokens} tokens"
    )
    Console().print(table_of(rows, title))


if __name__ == "__main__":
    main(sys.argv[1:])
