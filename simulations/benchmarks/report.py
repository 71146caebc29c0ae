"""What a report costs: 100 runs of 100 rounds with 300 clients each, 6 million messages in all, from files to a page.

    python -m simulations.benchmarks.report                       all of it, about 0.7 GB in a temporary folder
    python -m simulations.benchmarks.report runs=10 rounds=20     less of it
    python -m simulations.benchmarks.report clock=no              without clock.csv, as where devices have no limits

Prints seconds of each step, as they went by and as this process worked, and the most memory that it took. The folders
are written by the run folder's own writers; the files of one run are copied into all others, whose settings differ.
"""

import itertools
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.compose import compose
from fedtune.runs.ledger import LedgerRow, Part, sums
from fedtune.runs.run_folder import RunFolder
from fedtune.server.virtual_clock import Timed, Turn

METHODS = ("fedit", "flora", "ffa_lora", "fedex_lora", "flexlora", "fedsa_lora", "rolora")
CODECS = ("raw", "int8", "compeft")
MB = 1e6


def write(parent: Path, runs: int, rounds: int, clients: int, clock: bool) -> int:
    """Make the runs, each method with each codec and as many seeds as it takes; returns the bytes of all."""
    first: Path | None = None
    cells = itertools.product(range(runs), METHODS, CODECS)
    for seed, method, codec in itertools.islice(cells, runs):
        path = parent / f"{method} {codec}" / f"seed-{seed}"
        path.mkdir(parents=True)
        folder = RunFolder(path)
        experiment = compose(
            [f"method={method}", f"codec={codec}", f"population.clients={clients}", f"rounds={rounds}"]
        )
        folder.write_config(replace(experiment, seed=seed, out=str(path)))
        if first is None:
            first = path
            rows = list(_fill(folder, rounds, clients, clock))
        else:
            for name in ("ledger.csv", "clock.csv"):
                if (first / name).exists():
                    shutil.copyfile(first / name, path / name)
        generator = np.random.default_rng(len(method) + 10 * seed)
        for row in rows:
            loss = 3 - row["round"] / rounds * (1 + METHODS.index(method) / 20) + generator.normal(0, 0.02)
            folder.append_metrics({**row, "eval_loss": loss, "eval_accuracy": 1 / loss})
        base, data = {"sha256": "0" * 64}, {"source": "made up", "examples": 1000, "server_heldout": 100}
        folder.write_summary({"status": "finished", "base": base, "data": data})
        folder.close()
    return sum(path.stat().st_size for path in parent.rglob("*") if path.is_file())


def _fill(folder: RunFolder, rounds: int, clients: int, clock: bool) -> Iterator[dict[str, Any]]:
    """Ledger and clock of one run; the rest of its lines of metrics.csv."""
    generator = np.random.default_rng(0)
    for number in range(rounds + 1):
        part = Part.TRAIN if number else Part.HANDSHAKE
        took = generator.exponential(2.0, clients)
        entries = [
            LedgerRow(number, peer, way, part, 1_843_200, 1_843_456, 0, float(took[peer]))
            for way in ("down", "up")
            for peer in range(clients)
        ]
        folder.append_ledger(entries)
        if clock and number:
            folder.append_clock(
                number,
                [
                    Timed(peer, Turn("raspberry_pi_5", 1843456.0, float(took[peer]), 12.25, 1843456.0, 3.5, 1.5e9, 8e9,
                                     16, 4, 10, 30, 460800), 100.0 * number)
                    for peer in range(clients)
                ],
            )  # fmt: skip
        row = {"round": number, "train_loss": 2.5, "seconds": 1.5, "eval_seconds": 0.5, "clients": clients, "failed": 0}
        yield row | sums(entries) | {"virtual_seconds": 100.0 * number if clock and number else None}


def main(words: Sequence[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    runs, rounds, clients = (int(given.get(*pair)) for pair in (("runs", 100), ("rounds", 100), ("clients", 300)))
    with tempfile.TemporaryDirectory() as made:
        parent = Path(made)
        size = write(parent / "runs", runs, rounds, clients, given.get("clock") != "no")
        print(f"{runs} runs of {rounds} rounds with {clients} clients: {size / MB:.0f} MB")
        _time(parent)


def _time(parent: Path) -> None:
    # As late as this, so that it is part of what is measured
    begun = _now()
    from fedtune.report.comparison import compare, curve, protocols, reached, table, target, write_results
    from fedtune.runs.read import find, read

    begun = _say("importing", begun)
    runs = [read(path) for path in find([parent / "runs"])]
    begun = _say("reading", begun)
    comparison = compare(runs)
    for group in comparison.groups:
        for protocol in protocols(group):
            table(group, protocol)
        reached(group, target(group))
        for entry, over in itertools.product(group.entries, ("rounds", "bytes", "seconds")):
            curve(entry, "eval_loss", over)
    begun = _say("comparing", begun)
    write_results(comparison, parent / "results")
    begun = _say("results.csv, results.parquet, summary.csv", begun)
    try:
        from fedtune.report import page
    except ImportError:
        return
    page.write(comparison, parent / "report")
    _say("the page", begun)


def _now() -> tuple[float, float]:
    """By the clock, and of this process's own work: a busy machine changes the first alone."""
    return time.perf_counter(), time.process_time()


def _say(what: str, begun: tuple[float, float]) -> tuple[float, float]:
    took, worked = (now - then for now, then in zip(_now(), begun, strict=True))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{took:7.2f} s, {worked:6.2f} s of work   {what} (at most {most / MB:.0f} MB so far)", flush=True)
    return _now()


if __name__ == "__main__":
    main(sys.argv[1:])
