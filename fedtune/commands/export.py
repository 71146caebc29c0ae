"""`fedtune export`: a run's model as a Hugging Face folder."""

import argparse

from fedtune.commands import Subparsers

TEXT = """\
Write the model of a run as a Hugging Face folder, with its tokenizer: the trained weights, or the base with the
adapter merged into it.

  fedtune export runs/demo tuned
  fedtune export runs/demo tuned --round best             a round that keep.best or keep.every kept
  fedtune export model.fedtune tuned                      the small file of a run along seeded directions
  fedtune export model.fedtune tuned --base models/smol   where the base is on this machine
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("export", help="write a run's model as a Hugging Face folder", description=TEXT)
    parser.add_argument("source", metavar="FROM", help="a run's folder, or a .fedtune file")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--base", help="the base: a folder, a GGUF file or a hub id (default: what the run had)")
    parser.add_argument(
        "--round", metavar="N", help="a round that the run kept: its number, or best (default: the last)"
    )
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.config.schema import FULL
    from fedtune.core.text import size
    from fedtune.export.model_folder import export

    done = export(options.source, options.out, options.base, options.round)
    of = done.experiment
    merged = "" if of.adapter.kind == FULL else f", adapter={of.adapter.kind} merged into the base"
    print(f"wrote    {done.path}  ({size(done.bytes)})")
    print(f"model    {of.name}: method={of.method_name} after round {done.round}{merged}")
    print(f"base     {done.origin.source}, sha256 {done.origin.sha256}")
    print(f'load     AutoModelForCausalLM.from_pretrained("{done.path}"), AutoTokenizer likewise')
    return 0
