"""`fedtune serve`: the page of a folder's runs, while they go on."""

import argparse
from pathlib import Path

from fedtune.commands import Subparsers

TEXT = """\
Show the page of a folder's runs while they go on. It follows what is written there, from this machine alone, and
waits if nothing is there yet.

  fedtune serve runs/compare
  fedtune serve runs --port 0                   on any free port
"""
PORT = 8008


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("serve", help="show runs as they go on", description=TEXT)
    parser.add_argument("folder", metavar="OUT", help="a run's folder, or one that has runs below it")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"of 127.0.0.1 (default: {PORT})")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.report.comparison import load
    from fedtune.report.serve import serve

    serve(Path(options.folder).expanduser(), options.port, lambda folder: load([folder]))
    return 0
