"""`fedtune compress`: a PEFT adapter many times smaller."""

import argparse
import shlex

from fedtune.commands import Subparsers

TEXT = """\
Write a PEFT adapter (adapter_config.json and adapter_model.safetensors) into a new folder, many times smaller, and say
what that cost: the error is measured on what the new folder decodes to.

  fedtune compress runs/demo/adapter small                 ComPEFT (arXiv:2311.13171)
  fedtune compress trained small --start initial           of what training changed
  fedtune compress trained small --codec topk codec.density=0.1
  fedtune decompress small again --start initial

ComPEFT, topk and stc are meant for updates: of all values they keep the largest few, and make the others zero. An
adapter's A matrices begin as random numbers, most of which would be lost, so give --start wherever you have the adapter
that training began with. Decompressing needs it again.
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "compress",
        help="write a PEFT adapter many times smaller",
        usage="fedtune compress [-h] [--codec NAME] [--start FOLDER] ADAPTER OUT [codec.SETTING=VALUE ...]",
        description=TEXT,
    )
    parser.add_argument("source", metavar="ADAPTER", help="a PEFT folder, as a run's adapter/")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--codec",
        default="compeft",
        metavar="NAME",
        help="as for fedtune run (default: compeft); its settings likewise",
    )
    parser.add_argument("--start", metavar="FOLDER", help="the PEFT folder that training began with")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code. `settings` are the codec's, as `codec.density=0.1`.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.core.text import size
    from fedtune.export.compressed_adapter import compress

    done = compress(options.source, options.out, options.codec, options.settings, options.start)
    settings = "".join(f" {name}={value}" for name, value in vars(done.codec).items() if value is not None)
    back = shlex.join(
        ["fedtune", "decompress", options.out, "NEW", *(["--start", options.start] if options.start else [])]
    )
    print(f"wrote    {done.path}")
    print(f"codec    {options.codec}{settings}")
    print(f"weights  {size(done.before)} -> {size(done.after)}, {done.before / done.after:.1f} times smaller")
    print(f"error    {done.error:.3g} of the adapter's norm")
    if done.of_difference is not None:
        print(f"         {done.of_difference:.3g} of that of its difference from {options.start}")
    print(f"back     {back}")
    return 0
