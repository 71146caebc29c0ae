"""`fedtune report` and `fedtune serve`: what their words mean."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from fedtune.core.errors import ConfigError

REPORT = """\
Put runs side by side on one page: report.html, which opens in any browser without a network, with its figures as SVG
and PNG and all numbers as CSV and Parquet.

  fedtune report runs/fedit runs/flora          two runs
  fedtune report runs                           all runs below a folder
  fedtune report runs --out page --bytes 40e6 --target 2.2 --reference fedit

Runs that differ only in their seed are one entry, with a 95 % interval. Runs that learn different tasks stand apart.
"""

SERVE = """\
Show the page of a folder's runs while they go on. It follows what is written there, from this machine alone, and
waits if nothing is there yet.

  fedtune serve runs/compare
  fedtune serve runs --port 0                   on any free port
"""
PORT = 8008
COMMANDS = ("report", "serve")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    reporting = commands.add_parser("report", help="compare runs on one page", description=REPORT, formatter_class=raw)
    reporting.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one that has runs below it")
    reporting.add_argument("--out", metavar="DIR", help="where to write (default: the folder that all runs are in)")
    reporting.add_argument("--rounds", type=_above_zero, metavar="N", help="compare after this many rounds")
    reporting.add_argument("--bytes", type=_above_zero, metavar="B", help="compare within this many bytes, both ways")
    reporting.add_argument("--seconds", type=_above_zero, metavar="S", help="compare within this time")
    reporting.add_argument(
        "--target", type=_finite, metavar="LOSS", help="a held-out loss: what does it take to get there?"
    )
    reporting.add_argument("--reference", metavar="LABEL", help="the entry to compare with (default: the best)")
    serving = commands.add_parser("serve", help="show runs as they go on", description=SERVE, formatter_class=raw)
    serving.add_argument("folder", metavar="OUT", help="a run's folder, or one that has runs below it")
    serving.add_argument("--port", type=int, default=PORT, metavar="N", help=f"of 127.0.0.1 (default: {PORT})")


def handle(options: argparse.Namespace) -> None:
    """Do what was asked.

    Raises:
        FedtuneError: if it can't be done.
    """
    if options.command == "serve":
        from fedtune.report.comparison import load
        from fedtune.report.serve import serve

        serve(Path(options.folder).expanduser(), options.port, lambda folder: load([folder]))
        return
    limits = {kind: getattr(options, kind) for kind in ("rounds", "bytes", "seconds")}
    page = report(options.runs, options.out, limits, options.target, options.reference)
    print(f"wrote    {page}")


def report(
    paths: Sequence[str],
    out: str | None = None,
    at: dict[str, float | None] | None = None,
    target: float | None = None,
    reference: str | None = None,
) -> Path:
    """Compare runs and write the page; returns its path.

    Args:
        paths: run folders, or folders that have runs below them.
        out: where to write; None is the folder that all runs are in.
        at: by rounds, bytes or seconds, the limits to compare within; none: those that fit the runs.

    Raises:
        RunFolderError: if a path holds no run, or the page can't be written.
        ConfigError: if no entry is called what `reference` says.
    """
    from fedtune.report.comparison import Protocol, load
    from fedtune.report.page import write
    from fedtune.report.sections import Question

    comparison = load([Path(path).expanduser() for path in paths])
    asked = tuple(Protocol(kind, limit) for kind, limit in (at or {}).items() if limit is not None)
    found = [run.path for group in comparison.groups for entry in group.entries for run in entry.runs]
    folder = Path(out).expanduser() if out is not None else _around(found or [Path(path) for path in paths])
    return write(comparison, folder, Question(asked, target, reference))


def _around(runs: Sequence[Path]) -> Path:
    try:
        return Path(os.path.relpath(os.path.commonpath([path.resolve() for path in runs])))
    except ValueError as error:  # on different drives
        raise ConfigError("these runs have no folder in common: name one with --out") from error


def _above_zero(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text}")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, not {text}")
    return value
