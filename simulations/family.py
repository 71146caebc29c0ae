"""Every method on the same data, seed and base: what each sends, how exact it is, what it learns.

    python -m simulations.family experiment=demo                       all methods, one after the other
    python -m simulations.family methods=fedit,flora,fedex_lora model=tiny rounds=5
    python -m simulations.family out=runs/family experiment=demo       where to; what is finished there isn't run again

Prints a Markdown table, from the run folders alone. One seed: a difference in loss here is no ranking.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.compose import choices


@dataclass(frozen=True)
class Line:
    """What one run came to."""

    method: str
    up: float  # payload bytes of an update, mean over clients and rounds
    down: float  # payload bytes of a broadcast, likewise
    error: float | None  # aggregation error of the last round
    losses: tuple[float | None, float | None]  # held-out, before the first round and after the last

    def text(self) -> str:
        error = "-" if self.error is None else f"{self.error:.1e}"
        first, last = ("-" if loss is None else f"{loss:.4f}" for loss in self.losses)
        return f"| `{self.method}` | {self.up / 1e3:,.1f} | {self.down / 1e3:,.1f} | {error} | {first} | {last} |"


def main(words: Sequence[str]) -> int:
    given = dict(word.split("=", 1) for word in words if word.startswith(("methods=", "out=")))
    others = [word for word in words if not word.startswith(("methods=", "out="))]
    methods = given["methods"].split(",") if "methods" in given else choices("method")
    parent = Path(given.get("out", "runs/family"))
    failed = []
    for place, method in enumerate(methods, 1):
        folder = parent / method
        if finished(folder):
            continue
        print(f"[{place}/{len(methods)}] {method}", file=sys.stderr, flush=True)
        what = (
            [f"resume={folder}"]
            if (folder / "config.yaml").exists()
            else [f"method={method}", f"out={folder}", *others]
        )
        done = subprocess.run([sys.executable, "-m", "fedtune", "run", *what], stdout=subprocess.DEVNULL, check=False)
        if done.returncode == 130:
            return 130
        if done.returncode:
            failed.append(method)
    print("| `method=` | up, kB | down, kB | aggregation error | loss before | loss after |\n|---|---|---|---|---|---|")
    for method in methods:
        if finished(parent / method):
            print(read(parent / method).text())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def read(folder: Path) -> Line:
    """What a finished run came to."""
    metrics, ledger = _rows(folder / "metrics.csv"), _rows(folder / "ledger.csv")
    sizes = {
        way: [int(row["payload_bytes"]) for row in ledger if row["direction"] == way and row["part"] == "train"]
        for way in ("up", "down")
    }
    errors = [_number(row["aggregation_error"]) for row in metrics]
    losses = [loss for row in metrics if (loss := _number(row["eval_loss"])) is not None]
    return Line(
        folder.name,
        sum(sizes["up"]) / max(1, len(sizes["up"])),
        sum(sizes["down"]) / max(1, len(sizes["down"])),
        errors[-1],
        (losses[0], losses[-1]) if losses else (None, None),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
