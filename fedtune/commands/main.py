"""`fedtune`: the words that all commands share, and which module gets the others."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from fedtune import __version__
from fedtune.commands import (
    chat,
    compare,
    compress,
    decompress,
    doctor,
    evaluate,
    export,
    methods,
    plan,
    push,
    report,
    run,
    serve,
)
from fedtune.core.broken_pipe import outlast_readers
from fedtune.core.errors import FedtuneError, Interrupted

COMMANDS = (run, compare, plan, export, evaluate, chat, push, compress, decompress, report, serve, methods, doctor)
SUMMARY = """\
Federated fine-tuning of language models: many clients, one base, and the true cost of each method.

  fedtune run experiment=demo          fine-tune SmolLM2 across 20 clients
  fedtune run model=tiny rounds=2      the same in seconds, on a toy model
  fedtune run resume=runs/demo         go on with a run that was stopped
  fedtune compare 'methods=[fedit,flora]'   several, over seeds, and a page of what came out
  fedtune plan population=mixed        what each device would be asked, and what that takes
  fedtune report runs                  compare runs on one page
  fedtune serve runs                   the same page, while they go on
  fedtune evaluate runs/demo           how good its model is
  fedtune chat runs/demo               talk to it, beside its base
  fedtune export runs/demo tuned       its model as a Hugging Face folder
  fedtune push runs/demo me/demo       its adapter on the Hugging Face hub, with a model card
  fedtune compress adapter small       a PEFT adapter, many times smaller
  fedtune methods                      what method= can be
  fedtune doctor                       what this device can do, as a profile
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 an error that the message explains, 130 interrupted."""
    outlast_readers()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    if not words:
        parser.print_help()
        return 0
    # argparse takes no list of words on both sides of an option, so a codec's settings are what it doesn't know
    options, others = parser.parse_known_args(words)
    if others and (options.func is not compress.main or any(word.startswith("-") for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.settings = others
    try:
        code: int = options.func(options)
        return code
    except FedtuneError as error:
        if os.environ.get("FEDTUNE_DEBUG"):
            raise
        print(f"fedtune: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:
        print("fedtune: interrupted before anything was written", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Leaves descriptions as they are written; what it adds for commands are such parsers too."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `func` of what it parses is the `main` of the command that was named."""
    parser = Parser(prog="fedtune", description=SUMMARY)
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
