"""`fedtune decompress`: the PEFT folder of a compressed adapter."""

import argparse

from fedtune.commands import Subparsers

TEXT = """\
Make the PEFT folder again that fedtune compress made smaller.

  fedtune decompress small adapter
  fedtune decompress small adapter --start initial         if it was compressed with --start
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("decompress", help="make the PEFT folder of a compressed adapter", description=TEXT)
    parser.add_argument("source", metavar="PACKED", help="a folder that fedtune compress made")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--start", metavar="FOLDER", help="the PEFT folder that --start was then")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.export.compressed_adapter import decompress

    path = decompress(options.source, options.out, options.start)
    print(f"wrote    {path}")
    print(f'load     PeftModel.from_pretrained(base, "{path}")')
    return 0
