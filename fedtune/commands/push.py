"""`fedtune push`: a run's adapter on the Hugging Face hub."""

import argparse
from pathlib import Path

from fedtune.commands import Subparsers
from fedtune.core.errors import ConfigError

TEXT = """\
Upload a run's adapter to the Hugging Face hub, with a model card of what was done: data, method, rounds, clients,
bytes, held-out loss before and after, and the command that makes it again. HF_TOKEN (or hf auth login) says who you
are, HF_ENDPOINT where the hub is.

  fedtune push runs/demo me/demo --dry-run              write what would be pushed to runs/demo/hub; needs no network
  fedtune push runs/demo me/demo --create --private     make the repository, for yourself
  fedtune push runs/demo me/demo --merged               the base with the adapter merged into it
  fedtune push runs/demo me/demo --round best           a round that keep.best or keep.every kept
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("push", help="upload a run's adapter to the Hugging Face hub", description=TEXT)
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and say what is in it; push nothing")
    parser.add_argument("--out", metavar="DIR", help="where --dry-run writes it (default: hub/ in the run's folder)")
    parser.add_argument("--merged", action="store_true", help="the whole model, as fedtune export writes it")
    parser.add_argument("--create", action="store_true", help="make the repository if it isn't there")
    parser.add_argument("--private", action="store_true", help="with --create: for nobody else")
    parser.add_argument(
        "--round", metavar="N", help="a round that the run kept: its number, or best (default: the last)"
    )
    parser.add_argument("--base", help="--merged: where the base is (default: what the run had)")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.core.text import size
    from fedtune.export.hub import Push, prepare, push

    if options.out is not None and not options.dry_run:
        raise ConfigError("--out says where --dry-run writes: leave it out, or add --dry-run")
    if options.private and not options.create:
        raise ConfigError("--private is about a repository that is made: add --create, or leave it out")
    run = Path(options.run).expanduser()
    asked = Push(run, options.name, options.round, options.merged, options.base)
    done = prepare(asked, options.out) if options.dry_run else push(asked, options.create, options.private)
    print(f"{'would push' if options.dry_run else 'pushed'} {options.name}")
    for name, length in done.files.items():
        print(f"  {name}  {size(length)}")
    print(f"{'folder' if options.dry_run else 'commit'}   {done.where}")
    return 0
