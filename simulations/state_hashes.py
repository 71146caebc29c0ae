"""The bits that small runs end in: a table to hold a change against that should change no numbers.

    python -m simulations.state_hashes before.csv              write the table: every method, codec and adapter
    python -m simulations.state_hashes --against before.csv    run all again; what differs is listed, and exits with 1
    python -m simulations.state_hashes --only scaffold,codec/  those whose name begins so

Each line is two rounds of the toy model over rows made here, in this process, in a minute or two for all. Floating
point differs between machines and versions of torch, so a table is held against one of the same machine.
"""

import argparse
import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.config.compose import choices, compose
from fedtune.core.errors import FedtuneError
from fedtune.runtime.local import run_local

SMALL = (
    "model=tiny", "data.partition=iid", "population.clients=4", "population.cohort=3", "rounds=2", "train.steps=2",
    "evaluate.examples=16", "runtime.threads=1",
)  # fmt: skip
COLUMNS = ("case", "state_sha256", "eval_loss", "train_loss", "payload_bytes", "wire_bytes", "result_sha256")
# Where the engine goes ways of its own: unequal devices, a server that doesn't wait, personal models, meters, feedback
MORE = {
    "mixed": ["population=mixed", "method=fedpipe"],
    "mixed_ranks": ["population=mixed", "method=flora", "evaluate.exactness=true"],
    "late": ["population=mixed", "population.deadline=20", "method=fedit"],
    "dropout": ["population.dropout=0.3", "population.quorum=0.3", "method=scaffold"],
    "fedbuff": ["population=mixed", "method=fedbuff", "codec=int8"],
    "fedasync": ["population=mixed", "method=fedasync"],
    "peers": ["evaluate.peers=every", "evaluate.clients=true", "method=fedit"],
    "similarity": ["evaluate.similarity=true", "evaluate.exactness=true", "codec_up=compeft"],
    "feedback": ["codec_up=topk", "codec_up.feedback=true", "codec_down=topk", "codec_down.feedback=true"],
    "chained": ["codec_down=stc", "codec_down.feedback=true", "method=hetlora", "population.ranks=[8,4]"],
    "norms": ["population.max_norm_ratio=20", "population.max_weight=0.4"],
    "refused": ["codec_down=stc", "method=fedex_lora"],
    "server_optimizer": ["server_optimizer=fedadam", "method=fedprox"],
}


# Few directions and steps, for methods whose default takes minutes on a core
_STEPS = ["method.strategy.rules.local_steps=4", "method.strategy.rules.lr=3e-4", "method.strategy.rules.eps=1e-3"]
FEW = {
    "fedkseed": [*_STEPS, "method.strategy.directions=64"],
    "fedkseed_pro": [*_STEPS, "method.strategy.directions=64"],
    "decomfl": [*_STEPS, "method.strategy.rules.perturbations=2"],
    "mezo": _STEPS,
    "ferret": ["method.strategy.rules.directions=256"],
}


def cases() -> Iterator[tuple[str, list[str]]]:
    """Every case's name and its words."""
    for method in choices("method"):
        yield f"method/{method}", [f"method={method}", *FEW.get(method, [])]
    for codec in choices("codec"):
        yield f"codec/{codec}", [f"codec={codec}"]
    for adapter in choices("adapter"):
        yield f"adapter/{adapter}", [f"adapter={adapter}"]
    for name, words in MORE.items():
        yield f"more/{name}", words


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or hold one against it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.state_hashes", description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", help="the CSV file to write")
    parser.add_argument("--against", metavar="CSV", help="the table that this one should equal")
    parser.add_argument("--only", default="", metavar="NAME,...", help="those whose name begins so")
    options = parser.parse_args(arguments)
    before = _read(Path(options.against)) if options.against else {}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(_row(a, b)) + "\n" for a in range(12) for b in range(12)), encoding="utf-8")
        for name, words in cases():
            if name.startswith(tuple(options.only.split(","))):
                table.append(row := _play(name, [*SMALL, f"data.path={rows}", *words], Path(folder) / "runs" / name))
                print("  ".join(value[:12] if key != "case" else f"{value:<24}" for key, value in row.items()))
    if options.out:
        with Path(options.out).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(table)
    changed = [
        f"{row['case']}: {key} was {before[row['case']][key]}, is {row[key]}"
        for row in table
        if row["case"] in before
        for key in COLUMNS
        if row[key] != before[row["case"]][key]
    ]
    if options.against:
        print(f"{len(table)} cases, {len(changed)} differences", *changed, sep="\n")
        print(*(f"{row['case']}: new" for row in table if row["case"] not in before), sep="\n")
    return int(bool(changed))


def _row(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a} plus {b}?", "completion": f"{a} and {b} make {a + b}."}


def _play(name: str, words: list[str], out: Path) -> dict[str, str]:
    try:
        run_local(compose([*words, f"out={out}"]))
    except FedtuneError as error:
        # What is refused is a result as well, as long as it is refused in the same words
        said = hashlib.sha256(type(error).__name__.encode()).hexdigest()
        return dict.fromkeys(COLUMNS, "") | {"case": name, "state_sha256": said, "eval_loss": type(error).__name__}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        last = list(csv.DictReader(stream))[-1]
    totals = summary["totals"]
    weights = out / "adapter" / "adapter_model.safetensors"
    return {
        "case": name,
        "state_sha256": summary["state_sha256"],
        "eval_loss": last["eval_loss"],
        "train_loss": last["train_loss"],
        "payload_bytes": str(totals["up_payload_bytes"] + totals["down_payload_bytes"]),
        "wire_bytes": str(totals["up_wire_bytes"] + totals["down_wire_bytes"]),
        "result_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "",
    }


def _read(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


if __name__ == "__main__":
    sys.exit(main())
