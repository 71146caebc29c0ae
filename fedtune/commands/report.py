"""`fedtune report`: runs side by side on one page."""

import argparse
import math

from fedtune.commands import Subparsers

TEXT = """\
Put runs side by side on one page: report.html, which opens in any browser without a network, with its figures as SVG
and PNG and all numbers as CSV and Parquet.

  fedtune report runs/fedit runs/flora          two runs
  fedtune report runs                           all runs below a folder
  fedtune report runs --out page --bytes 40e6 --target 2.2 --reference fedit

Runs that differ only in their seed are one entry, with a 95 % interval. Runs that learn different tasks stand apart.
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("report", help="compare runs on one page", description=TEXT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one that has runs below it")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the folder that all runs are in)")
    parser.add_argument("--rounds", type=_above_zero, metavar="N", help="compare after this many rounds")
    parser.add_argument("--bytes", type=_above_zero, metavar="B", help="compare within this many bytes, both ways")
    parser.add_argument("--seconds", type=_above_zero, metavar="S", help="compare within this time")
    parser.add_argument(
        "--target", type=_finite, metavar="LOSS", help="a held-out loss: what does it take to get there?"
    )
    parser.add_argument("--reference", metavar="LABEL", help="the entry to compare with (default: the best)")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.report.page import report

    limits = {kind: getattr(options, kind) for kind in ("rounds", "bytes", "seconds")}
    print(f"wrote    {report(options.runs, options.out, limits, options.target, options.reference)}")
    return 0


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
