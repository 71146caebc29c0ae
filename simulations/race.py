"""Who is there first on the virtual clock: FedPipe-style plans against FedIT at the same rank, on unequal devices.

    python -m simulations.race                       3 seeds of experiment=unequal; half an hour on one core
    python -m simulations.race model=tiny adapter.targets=null rounds=4 train.lr=5e-3

FedIT goes its rounds and waits for the slowest; the loss that it ends with is the target. fedpipe gets a deadline, and
more rounds. All that is typed is given to both; runs that are finished are not run again. For every seed: the loss,
when each reached the target on the virtual clock, and the most memory that any client took of what its device has.
"""

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtune.commands.main import main as fedtune

SEEDS = (0, 1, 2)
ROUNDS = 5  # of FedIT
MORE = 2  # times as many for the other, at most
DEADLINE = 5.0  # virtual seconds, for fedpipe
COMMON = ("experiment=unequal", "runtime.threads=1")


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def finished(folder: Path, rounds: int) -> bool:
    return (folder / "metrics.csv").exists() and int(table(folder, "metrics.csv")[-1]["round"]) >= rounds


def reached(folder: Path, target: float) -> tuple[int, float] | None:
    """The first round whose loss is the target or less, and the clock then."""
    for row in table(folder, "metrics.csv"):
        if row["eval_loss"] and float(row["eval_loss"]) <= target:
            return int(row["round"]), float(row["virtual_seconds"] or 0)
    return None


def fullest(folder: Path) -> float:
    """The largest share that any turn took of its device's memory."""
    return max(float(row["memory_bytes"]) / float(row["limit_bytes"]) for row in table(folder, "clock.csv"))


def play(words: Sequence[str], folder: Path, rounds: int) -> None:
    if finished(folder, rounds):
        return
    resume = [f"resume={folder}"] if (folder / "config.yaml").exists() else [*words, f"out={folder}"]
    if fedtune(["run", *resume, f"rounds={rounds}"]) != 0:
        raise SystemExit(f"{folder} didn't finish")


def compare(out: Path, seed: int, given: Sequence[str], rounds: int) -> Mapping[str, Any]:
    """One seed: both runs, and what they come to."""
    words = [*COMMON, *given, f"seed={seed}"]
    fedit, pipe = out / f"fedit-{seed}", out / f"fedpipe-{seed}"
    play([*words, "method=fedit"], fedit, rounds)
    play([*words, "method=fedpipe", f"population.deadline={DEADLINE}"], pipe, rounds * MORE)
    last = table(fedit, "metrics.csv")[-1]
    target, there = float(last["eval_loss"]), float(last["virtual_seconds"])
    first = reached(pipe, target)
    return {
        "seed": seed,
        "start": float(table(fedit, "metrics.csv")[0]["eval_loss"]),
        "target": target,
        "fedit": there,
        "fedpipe": first,
        "best": min(float(row["eval_loss"]) for row in table(pipe, "metrics.csv") if row["eval_loss"]),
        "fedit_memory": fullest(fedit),
        "fedpipe_memory": fullest(pipe),
    }


def report(found: Sequence[Mapping[str, Any]], rounds: int, console: Console) -> None:
    shown = Table(box=None, header_style="dim")
    for heading in (
        "seed", "loss at first", f"FedIT's after {rounds} rounds", "its virtual s", "fedpipe there in", "rounds",
        "times faster", "its lowest loss", "memory, FedIT", "fedpipe",
    ):  # fmt: skip
        shown.add_column(heading, justify="right")
    faster = []
    for one in found:
        number, seconds = one["fedpipe"] or (None, None)
        if seconds:
            faster.append(one["fedit"] / seconds)
        shown.add_row(
            str(one["seed"]), f"{one['start']:.4f}", f"{one['target']:.4f}", f"{one['fedit']:.1f}",
            f"{seconds:.1f} s" if seconds else "not reached", str(number or "-"),
            f"{faster[-1]:.2f}" if seconds else "-", f"{one['best']:.4f}",
            f"{one['fedit_memory']:.0%}", f"{one['fedpipe_memory']:.0%}",
        )  # fmt: skip
    console.print(shown)
    if len(faster) == len(found) > 1:
        spread = statistics.stdev(faster)
        console.print(f"fedpipe is there {statistics.mean(faster):.2f} times as fast (standard deviation {spread:.2f})")


def main() -> None:
    given = sys.argv[1:]
    out = Path(next((word[4:] for word in given if word.startswith("out=")), "runs/race"))
    rounds = int(next((word[7:] for word in given if word.startswith("rounds=")), ROUNDS))
    rest = [word for word in given if not word.startswith(("out=", "rounds=", "seeds="))]
    seeds = next((tuple(map(int, word[6:].split(","))) for word in given if word.startswith("seeds=")), SEEDS)
    report([compare(out, seed, rest, rounds) for seed in seeds], rounds, Console(width=150))


if __name__ == "__main__":
    main()
