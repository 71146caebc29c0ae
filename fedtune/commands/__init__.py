"""The command line, a module for each command: `add_parser` says its words, and `main` does what they ask for.

The modules themselves are quick to import, for `fedtune --help` takes them all; what a command needs beside argparse is
imported when it is called.
"""

from argparse import ArgumentParser, _SubParsersAction
from typing import TypeAlias

Subparsers: TypeAlias = "_SubParsersAction[ArgumentParser]"
