"""What seeded noise costs, beside torch's own generator and a model's forward passes.

    python -m simulations.benchmarks.seeded            SmolLM2, 135 M weights; a minute or two on 2 cores
    python -m simulations.benchmarks.seeded --quick    the toy model, in seconds: do the parts still fit?

    FEDTUNE_COMPILE=0 python -m simulations.benchmarks.seeded    the same where there is no compiler

Every ratio is taken within one run, of the best of several repetitions that take turns. Seconds are this machine's and
are printed to give them scale. Compiling is not in them; its time is printed apart.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from fedtune.config.schema import AdapterSpec, ModelSpec
from fedtune.core.protocol import Batch
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.random_directions.hash_noise import Table, accumulate_
from fedtune.random_directions.weights import pool, steps_record
from fedtune.training.zeroth_order import Rules, _loss, slopes_along

SMOLLM2 = ModelSpec(name="smollm2", path="HuggingFaceTB/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Line:
    what: str
    seconds: float
    than: str
    others: float
    aim: str = ""

    @property
    def ratio(self) -> float:
        return self.seconds / self.others


def best(repeats: int, **works: Callable[[], object]) -> dict[str, float]:
    """The least seconds of each, all of them in turn so that they share the machine's moods."""
    for work in works.values():
        work()
    found = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def by_generator(weight: Tensor, c: float) -> None:
    """w += c z as the authors' code has it."""
    weight.add_(torch.normal(0.0, 1.0, weight.shape, dtype=weight.dtype), alpha=c)


def replay(size: int, seeds: int, repeats: int) -> list[Line]:
    """Many directions over fewer weights, per direction."""
    table = Table({"w": size})
    sums, chosen = table.sums(), range(seeds)
    counts = torch.randint(-1000, 1000, (seeds,)).tolist()
    weight = torch.zeros(size)
    few = min(seeds, 16)
    took = best(
        repeats,
        ours=partial(accumulate_, table, sums, chosen, counts),
        generator=lambda: [by_generator(weight, 1e-6) for _ in range(few)],
    )
    return [
        Line(
            f"replaying {seeds:,} seeds", took["ours"] / seeds, "torch.normal", took["generator"] / few, "at most 0.1x"
        )
    ]


def step(spec: ModelSpec, length: int, repeats: int) -> list[Line]:
    """One FedKSeed step on one example."""
    model = LocalModel(load_base(spec, torch.device("cpu")), AdapterSpec(kind="none"), 0)
    rules = Rules(lr=3e-7, local_steps=1, eps=5e-4)
    weights = model.seeded
    weights.move_to(rules.space, {})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, len(model.tokenizer), (1, length), generator=generator)
    loss = partial(_loss, model.module, Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    seeds = pool(0, 1)

    def ours() -> None:
        slopes_along(weights, loss, seeds, rules.eps)
        weights.step(steps_record(seeds, [1]))

    live = [parameter.data for parameter in weights.live.values()]

    def authors() -> None:
        for c in (1e-9, -2e-9, 1e-9, 1e-9):
            for tensor in live:
                by_generator(tensor, c)
        for _ in range(2):
            loss()

    def bare() -> None:
        for _ in range(2):
            loss()
        for _ in range(3):
            for tensor in live:
                tensor.add_(1e-9)

    took = best(repeats, ours=ours, authors=authors, bare=bare, forwards=lambda: [loss() for _ in range(2)])
    what = f"one FedKSeed step, 1 x {length} tokens"
    return [
        Line(what, took["ours"], "two forwards and three w += c", took["bare"], "at most 1.5x"),
        Line(what, took["ours"], "two forwards and four torch.normal", took["authors"], "at most 0.1x"),
        Line(what, took["ours"], "two forwards", took["forwards"]),
    ]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    small = Table({"w": 1 << 16})
    accumulate_(small, small.sums(), [1], [1])
    compiling = time.perf_counter() - begun
    if options.quick:
        spec = ModelSpec(name="tiny", dtype="float32")
        lines = [*replay(1 << 16, 8, 1), *step(spec, 32, 1)]
    else:
        lines = [*replay(10_000_000, 1024, 1), *step(SMOLLM2, 32, 7)]
    table = Printed(title=f"{options.threads} threads; the first kernel took {compiling:.1f} s to compile or load")
    for column in ("what", "ms", "beside", "ms", "ratio", "aim"):
        table.add_column(column)
    for line in lines:
        table.add_row(
            line.what, f"{line.seconds * 1e3:.2f}", line.than, f"{line.others * 1e3:.2f}", f"{line.ratio:.3f}", line.aim
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
