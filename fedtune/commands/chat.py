"""`fedtune chat`: talk to the base and to a run's model, the same question to both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.commands import Subparsers
from fedtune.core.checks import at_least
from fedtune.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.evaluation.conversation import Conversation, Tell
    from fedtune.export.tuned_model import Tuned

TEXT = """\
Talk to a run's model and to the base that it was tuned from. Both are asked the same, and each goes on from its own
answers. Where stdin is no terminal, each of its lines is a question.

  fedtune chat runs/demo
  fedtune chat runs/demo --prompt "Do you get lonely?"      one question, and done
  fedtune chat runs/demo --round best --temperature 0.7     a round that the run kept; answers are drawn
  fedtune chat runs/demo --client 3                         a client's own model, of methods that leave it one

/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.
"""
WIDE = 100  # columns of a terminal from which answers stand side by side
NAMES = ("base", "tuned")


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("chat", help="talk to a run's model and its base, side by side", description=TEXT)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a .fedtune file")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, and end")
    parser.add_argument("--client", type=int, metavar="N", help="client N's own model, of a personal method")
    parser.add_argument(
        "--round", metavar="N", help="a round that the run kept: its number, or best (default: the last)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--base", help="the base: a folder, a GGUF file or a hub id (default: what the run had)")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if there is no such model.
    """
    from fedtune.evaluation.conversation import Conversation
    from fedtune.export.tuned_model import tuned_model

    at_least("--temperature", options.temperature, 0)
    at_least("--max-new-tokens", options.max_new_tokens, 1)
    if options.client is not None and options.round is not None:
        raise ConfigError("--client is about the last round, of which clients keep their models: leave out --round")
    from rich.console import Console

    tuned = tuned_model(Path(options.run).expanduser(), options.base, options.round, options.client, both=True)
    console = Console(file=sys.stdout, highlight=False)
    talks = [Conversation(tuned.tokenizer, tuned.data) for _ in NAMES]
    for line in _lines(options.prompt):
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            for talk in talks:
                talk.turns.clear()
            console.print("begun anew", style="dim")
        elif text:
            try:
                _answer(console, tuned, talks, text, options.max_new_tokens, options.temperature)
            except DataError as error:
                if options.prompt is not None:
                    raise
                console.print(str(error), style="red", markup=False)
    return 0


def _answer(
    console: Console, tuned: Tuned, talks: list[Conversation], text: str, max_new_tokens: int, temperature: float
) -> None:
    with _shown(console) as tells:
        for number, talk in enumerate(talks):
            # Ctrl-C stops this answer, not the next one
            with suppress(KeyboardInterrupt):
                if number:
                    talk.ask(tuned.module, text, tells[number], max_new_tokens, temperature)
                else:
                    with tuned.untuned() as base:
                        talk.ask(base, text, tells[number], max_new_tokens, temperature)


@contextmanager
def _shown(console: Console) -> Iterator[list[Tell]]:
    """Where the two answers are told: side by side where there is room, else one under the other."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal or console.width < WIDE:
        begun: set[str] = set()

        def teller(name: str) -> Callable[[str], None]:
            def tell(piece: str) -> None:
                if name not in begun:
                    console.print(("\n" if begun else "") + f"{name}:", style="bold")
                    begun.add(name)
                console.print(_printable(piece), end="", markup=False, soft_wrap=True)
                console.file.flush()

            return tell

        yield [teller(name) for name in NAMES]
        console.print()
        return
    answers = [Text() for _ in NAMES]
    table = Table(*NAMES, expand=True, box=None, padding=(0, 2))
    for column in table.columns:
        column.ratio = 1
    table.add_row(*answers)
    with Live(table, console=console, refresh_per_second=12, vertical_overflow="visible"):
        yield [lambda piece, answer=answer: answer.append(_printable(piece)) for answer in answers]  # type: ignore[misc]


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _lines(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"> {line.strip()}")
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then has a history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
