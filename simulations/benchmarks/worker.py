"""What a device spends on a round besides training, with a worker that stays and without.

    python -m simulations.benchmarks.worker [model=tiny ...]

Two real SuperNodes on loopback, one after the other, train SmolLM2 in the same experiment; the figures are their own,
from their logs. "around" is all that our ClientApp does besides training, from its call to its answer; "start" is the
age of its process when it is called, which is Flower's: a new Python, Flower's imports, the app's bundle.
"""

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from simulations.fleet import Fleet, Site

ROUNDS = 4
LINE = re.compile(r"round (\d+), train: training ([\d.]+) s, around it ([\d.]+) s; before, Flower took ([\d.]+) s")
ROOT = Path(__file__).parents[2]


def measure(stays: bool, words: Sequence[str], rounds: int = ROUNDS) -> list[tuple[int, float, float, float]]:
    """(round, training, around, start) in seconds, by round."""
    experiment = [
        "population.clients=1",
        "population.cohort=1",
        "train.steps=2",
        "evaluate.every=0",
        f"rounds={rounds}",
        *words,
    ]
    with tempfile.TemporaryDirectory() as folder:
        site = Site("device", {"worker": stays})
        with Fleet(Path(folder) / "fleet", [site], app=ROOT, secure=False) as fleet:
            result = fleet.run({"overrides": " ".join([*experiment, f"out={folder}/run"])}, seconds=1200)
            log = fleet.nodes[0].log()
    if not result.completed:
        raise SystemExit(f"the run {result.status}: {result.details}")
    return figures(log)


def figures(log: str) -> list[tuple[int, float, float, float]]:
    """Those of `measure` that a node's log has."""
    return [(int(number), *map(float, rest)) for number, *rest in LINE.findall(log)]


def main(words: Sequence[str]) -> None:
    words = words or ["model=smollm2", "data=chatterbot"]
    print(f"{' '.join(words)}, seconds on the device\n")
    print(f"{'':<10}{'round':>6}{'training':>10}{'around':>9}{'start':>8}")
    later = {}
    for name, stays in (("worker", True), ("none", False)):
        found = measure(stays, words)
        for number, training, around, start in found:
            print(f"{name:<10}{number:>6}{training:>10.2f}{around:>9.2f}{start:>8.1f}")
        later[name] = statistics.median(around for number, _, around, _ in found if number > 1)
    print(f"\nfrom round 2, around training: {later['worker']:.2f} s with a worker, {later['none']:.2f} s without")


if __name__ == "__main__":
    main(sys.argv[1:])
