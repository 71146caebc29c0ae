"""What the server's algebra costs.

    python -m simulations.benchmarks.aggregation            20 clients, 64 layers of 4096 x 4096; two minutes on 2 cores
    python -m simulations.benchmarks.aggregation --quick    the same on toy layers, in seconds: do the parts still fit?

FlexLoRA, FLoRIST and FLoRA get ranks 4 to 64, FedEx-LoRA and FedIT rank 16 from everybody. Each method has a process to
itself, which holds the updates when the clock starts; what it needs beyond them, its new state included, is the rise of
its resident memory. It is compared with the singular value decomposition of dW* as a matrix, of one layer, times the
number of layers. The factors are random: their spectrum is flat, and FLoRIST keeps nearly all of it.

Ratios are taken within one run. Seconds are this machine's and are printed to give them scale.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Event, Thread
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from fedtune.core.protocol import ClientInfo, Layout, Slot, Tensors, Update, share
from fedtune.lowrank.algebra import name_of, truncated
from fedtune.lowrank.averaging import average
from fedtune.lowrank.stacking import stacked
from strategies.fedex_lora import FedExLoRA
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.florist import FLoRIST

SCALING = 2.0
MIXED: dict[str, Any] = {"flexlora": FlexLoRA(), "florist": FLoRIST(), "flora": FLoRA()}
EQUAL: dict[str, Any] = {"fedex_lora": FedExLoRA()}

Replies = list[tuple[ClientInfo, Update]]


@dataclass(frozen=True)
class Size:
    clients: int = 20
    layers: int = 64
    width: int = 4096
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)  # taken in turn
    rank: int = 16  # where all have the same
    repeats: int = 7  # of what takes a moment


QUICK = Size(clients=5, layers=2, width=256, ranks=(2, 4, 8), rank=4, repeats=1)


def adapter(size: Size, rank: int, seed: int) -> Tensors:
    """Normal factors for all layers."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(size.layers):
        made[name_of(f"layer{layer}", "lora_A")] = torch.randn(rank, size.width, generator=draw)
        made[name_of(f"layer{layer}", "lora_B")] = torch.randn(size.width, rank, generator=draw)
    return made


def layout_of(size: Size, rank: int) -> Layout:
    start = adapter(size, rank, 0)
    start = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in start.items()}
    slots = tuple(
        Slot(name, tuple(t.shape), "float32", *reversed(name.removesuffix(".weight").split(".")), SCALING)
        for name, t in start.items()
    )
    return Layout(slots, start)


def replies_of(size: Size, mixed: bool) -> Replies:
    made = []
    for index in range(size.clients):
        rank = size.ranks[index % len(size.ranks)] if mixed else size.rank
        peer = ClientInfo(index, 100 + index, rank=rank if mixed else 0, scaling=SCALING if mixed else 0)
        made.append((peer, Update(adapter(size, rank, index + 1), 100 + index)))
    return made


class Peak:
    """The most resident memory beyond what there was on entering."""

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self._most, self._process.memory_info().rss) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._process.memory_info().rss)


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(name: str, size: Size) -> dict[str, float]:
    """One aggregation by one method, in this process."""
    strategy, mixed = (MIXED | EQUAL)[name], name in MIXED

    def begin(size: Size) -> tuple[Any, Replies]:
        layout = layout_of(size, max(size.ranks) if mixed else size.rank)
        return strategy.init(layout), replies_of(size, mixed)

    strategy.aggregate(begin(QUICK)[0], 1, begin(QUICK)[1])  # a maths library's first call is slow
    state, replies = begin(size)
    with Peak() as peak:
        begun = time.perf_counter()
        state = strategy.aggregate(state, 1, replies)
        seconds = time.perf_counter() - begun
    inputs = sum(tensor.nbytes for _, update in replies for tensor in update.tensors.values())
    return {"seconds": seconds, "bytes": float(peak.bytes), "inputs": float(inputs)}


def dense(size: Size) -> dict[str, float]:
    """The SVD of one layer's dW*, formed as a matrix, in both precisions; and how far ours is from it."""
    torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))  # a maths library's first call is slow
    (ideal,) = (layer() for layer in stacked(replies_of(replace(size, layers=1), mixed=True), SCALING).values())
    found = {"forming": timed(lambda: ideal.b @ ideal.a)}
    for dtype in (torch.float32, torch.float64):
        matrix = (ideal.b @ ideal.a).to(dtype)
        begun = time.perf_counter()
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        found[str(dtype).removeprefix("torch.")] = time.perf_counter() - begun
    rank = max(size.ranks)
    best = truncated(ideal, rank)
    difference = best.b @ best.a - (u[:, :rank] * s[:rank]) @ v[:rank]
    return {**found, "apart": float(difference.norm() / s[:rank].norm())}


def averaging(size: Size) -> dict[str, float]:
    """FedIT's average and plain weighted sums over the same tensors, in turns; the best of each."""
    replies = replies_of(size, mixed=False)
    updates, weights = [update.tensors for _, update in replies], share(replies)
    like = updates[0]

    def as_written() -> Tensors:
        return {name: sum_of([w * u[name] for w, u in zip(weights, updates, strict=True)]) for name in like}

    def sum_of(terms: Sequence[torch.Tensor]) -> torch.Tensor:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def in_place() -> Tensors:
        made = {}
        for name, tensor in like.items():
            total = torch.zeros_like(tensor)
            for w, u in zip(weights, updates, strict=True):
                total.add_(u[name], alpha=w)
            made[name] = total
        return made

    def pad_rank() -> Tensors:
        made = {}
        for name, tensor in like.items():
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for w, u in zip(weights, updates, strict=True):
                total += w * u[name].double()
            made[name] = total.float()
        return made

    calls: dict[str, Callable[[], object]] = {
        "fedit": lambda: average(replies, like),
        "as written": as_written,
        "in place": in_place,
        "float64": pad_rank,
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(size.repeats + 1):
        for name, call in calls.items():
            best[name] = min(best[name], timed(call))
    return best


def alone(what: str, size: Size) -> dict[str, float]:
    """`measure`, `dense` or `averaging` in a process of its own."""
    words = ["--only", what, "--size", json.dumps(asdict(size))]
    made = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.aggregation", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {name: float(value) for name, value in json.loads(made.stdout).items()}


def factored(size: Size) -> Table:
    """Methods on factors, over the dense SVD of what they aggregate."""
    whole = alone("dense", size)
    shown = Table(
        title=f"{size.clients} clients, {size.layers} layers of {size.width} x {size.width}, "
        f"{torch.get_num_threads()} threads; aims: 100x, under 2 GB",
        caption=f"dense SVD of a layer: {whole['float64']:.1f} s in float64, {whole['float32']:.1f} s in float32; "
        f"forming it {whole['forming']:.2f} s; ours, in float64, is off by {whole['apart']:.0e}",
    )
    for heading in ("over dense float64", "float32", "memory beyond updates", "method", "seconds", "ranks", "updates"):
        shown.add_column(heading)
    for name in (*MIXED, *EQUAL):
        mine = alone(name, size)
        shown.add_row(
            *(f"{whole[dtype] * size.layers / mine['seconds']:.0f}x" for dtype in ("float64", "float32")),
            f"{mine['bytes'] / 1e9:.2f} GB",
            name,
            f"{mine['seconds']:.1f}",
            f"{min(size.ranks)} to {max(size.ranks)}" if name in MIXED else str(size.rank),
            f"{mine['inputs'] / 1e9:.2f} GB",
        )
    return shown


def averaged(size: Size) -> Table:
    """FedIT's average over plain sums."""
    best = alone("fedit", size)
    shown = Table(title=f"FedIT at rank {size.rank}, {best['fedit'] * 1000:.0f} ms; aim: 1.2x of the first")
    for heading in ("fedit over it", "plain sum of the same tensors", "its ms"):
        shown.add_column(heading)
    for name, told in (
        ("as written", "p_1 * theta_1 + p_2 * theta_2 + ..., float32"),
        ("float64", "total += p * theta.double()"),
        ("in place", "total.add_(theta, alpha=p), float32"),
    ):
        shown.add_row(f"{best['fedit'] / best[name]:.2f}x", told, f"{best[name] * 1000:.0f}")
    return shown


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.aggregation")
    parser.add_argument("--quick", action="store_true", help="toy layers")
    parser.add_argument("--only", choices=["dense", "fedit", *MIXED, *EQUAL], help="one measurement, as JSON")
    parser.add_argument("--size", type=json.loads, help="fields of Size, as JSON")
    given = parser.parse_args(words)
    size = Size(**given.size) if given.size else QUICK if given.quick else Size()
    if given.only:
        calls = {"dense": dense, "fedit": averaging}
        json.dump(calls[given.only](size) if given.only in calls else measure(given.only, size), sys.stdout)
        return
    for part in (factored, averaged):
        Console().print(part(size))


if __name__ == "__main__":
    main()
