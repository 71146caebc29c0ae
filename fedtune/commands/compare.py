"""`fedtune compare`: several methods, codecs and seeds, and a page of what came out."""

import argparse

from fedtune.commands import Subparsers

TEXT = """\
Run methods x codecs x seeds in one folder, all by the same rules, and make a page of what came out. What is finished
there is not run again; what was stopped or failed goes on where it stood. All other settings are those of fedtune run.

  fedtune compare 'methods=[fedit,flora,ffa_lora]' experiment=demo out=runs/three
  fedtune compare 'methods=[fedit]' 'codecs=[raw,int8,compeft]' 'seeds=[0,1,2,3,4]' rounds=10
  fedtune compare 'methods=[fedit,fedkseed]' rounds=1000 budget.bytes=40e6           equal bytes
  fedtune compare 'methods=[fedit,fedpipe]' population=mixed budget.seconds=600      equal time, of the virtual clock
  fedtune compare 'methods=[fedit,fedadam]' 'tune.lr=[0.3x,1x,3x]'                   each at its own learning rate
  fedtune compare methods=all jobs=4                                                 four runs at a time

  methods=     names, or all. An item may bring settings and a label: 'methods=[fedit,"slow: fedit train.lr=1e-4"]'
  codecs=      what updates and broadcasts look like on the wire; default leaves it to the method
  seeds=       one run for each (default: 0, 1, 2)
  tune.KEY=    values to try for each method on a seed of its own (tune.seed=): the one with the lowest held-out loss is
               taken. tune.lr is the clients' learning rate, and 3x three times what the method has by itself.
               tune.rounds= makes these trials shorter
  budget.      bytes=, seconds= or loss=: a run ends where another round would go beyond it
  jobs=        runs at a time (default: one a core, and one beside a GPU)
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "compare",
        help="run methods x codecs x seeds, and make a page of them",
        usage="fedtune compare [-h] 'methods=[...]' ['codecs=[...]'] ['seeds=[...]'] [key=value ...]",
        description=TEXT,
    )
    parser.add_argument("words", nargs="+", metavar="key=value")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.comparisons.run import compare
    from fedtune.core.signals import as_ctrl_c

    with as_ctrl_c():
        return compare(options.words)
