"""Run the app on a fleet of this machine's own, step by step: what a deployment does, without the other machines."""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fedtune.config.data import DataSpec
from fedtune.core.errors import FedtuneError
from fedtune.data.sources import load_examples
from simulations.fleet import Fleet, Site

EXAMPLES = """\
  python -m simulations.fleet experiment=demo population.clients=3 --nodes 3
  python -m simulations.fleet 'model=tiny rounds=2 population.clients=2' --insecure
"""

# What unequal devices tell of themselves. Nothing slows them down: they are processes of this machine all the same
PROFILES = (
    {"memory-bytes": 32_000_000_000, "flop-per-s": 1e12, "up-bytes-per-s": 12_500_000, "down-bytes-per-s": 62_500_000},
    {"memory-bytes": 8_000_000_000, "flop-per-s": 1e11, "up-bytes-per-s": 2_500_000, "down-bytes-per-s": 12_500_000},
    {"memory-bytes": 4_000_000_000, "flop-per-s": 2e10, "up-bytes-per-s": 625_000, "max-rank": 8},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 the run completed, 1 it failed or could not be started, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.fleet",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="what `fedtune run` takes; out= is FOLDER/run unless given")
    parser.add_argument("--nodes", type=int, default=2, help="how many devices (%(default)s)")
    parser.add_argument("--folder", type=Path, help="a new folder for all its files (runs/fleet, runs/fleet-2, ...)")
    parser.add_argument("--app", type=Path, default=Path(), help="the folder of the Flower app (this one)")
    parser.add_argument(
        "--own",
        action="store_true",
        help="each device has a file of its own: chatterbot's topics in unequal parts, in FOLDER-data",
    )
    parser.add_argument("--insecure", action="store_true", help="neither TLS nor node authentication")
    parser.add_argument("--limit", type=float, default=86_400, help="seconds that the run may take (a day)")
    options = parser.parse_args(arguments)
    folder = options.folder or _unused(Path("runs/fleet"))
    words = [word for given in options.overrides for word in shlex.split(given)]
    if not any(word.startswith("out=") for word in words):
        words.append(f"out={folder.resolve() / 'run'}")
    if options.own:
        words.append("data.partition=own")
    overrides = shlex.join(words)
    files = files_of_their_own(folder.resolve().with_name(f"{folder.name}-data"), options.nodes) if options.own else {}
    sites = [
        Site(f"site-{index}", PROFILES[index % len(PROFILES)], own=files.get(index)) for index in range(options.nodes)
    ]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leave by the door, as for Ctrl-C
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", flush=True)

    try:
        with Fleet(folder, sites, app=options.app, secure=not options.insecure, say=say) as fleet:
            say(f'flwr run {options.app} --stream --run-config overrides="{overrides}"')
            result = fleet.run({"overrides": overrides}, sys.stdout, options.limit)
            say(f"run {result.run_id} {result.status}" + ("" if result.completed else f": {result.details}"))
            say(f"stopping everything; logs, keys and certificates stay in {folder}")
        say("nothing is left running")
    except FedtuneError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fleet: interrupted; everything was stopped", file=sys.stderr)
        return 130
    return 0 if result.completed else 1


def files_of_their_own(folder: Path, count: int) -> dict[int, Path]:
    """Write a file for each device, from whole topics of chatterbot: the first has most of them.

    Raises:
        DataError: if chatterbot's text isn't installed.
    """
    examples = load_examples(DataSpec(name="chatterbot"))
    topics = sorted({str(example.columns["topic"]) for example in examples})
    cuts = [round(len(topics) * (1 - (1 - place / count) ** 2)) for place in range(count + 1)]
    folder.mkdir(parents=True)
    files = {}
    for place, (begin, end) in enumerate(pairwise(cuts)):
        own = topics[begin : max(end, begin + 1)]
        files[place] = folder / f"site-{place}.jsonl"
        with files[place].open("w", encoding="utf-8") as stream:
            for example in examples:
                if example.columns["topic"] in own:
                    row = dict(
                        zip(("prompt", "completion"), (turn["content"] for turn in example.messages), strict=True)
                    )
                    stream.write(json.dumps({**row, "topic": example.columns["topic"]}) + "\n")
    return files


def _unused(folder: Path) -> Path:
    number = 1
    while (candidate := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


if __name__ == "__main__":
    sys.exit(main())
