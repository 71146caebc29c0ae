"""The words of `fedtune evaluate`."""

import argparse
from typing import Any

TEXT = """\
Score the model of a run on what the run held out: loss, accuracy, exact match and ROUGE-L of its answers, and
multiple-choice questions (docs/evaluation.md).

  fedtune evaluate runs/demo --generate 50                answer 50 of the held-out examples
  fedtune evaluate runs/demo --clients --out scores.json  on each client's own held-out data, too
  fedtune evaluate runs/demo --data other.jsonl           on a file of the same columns
  fedtune evaluate runs/demo --tasks arc_easy,hellaswag   by lm-evaluation-harness, where that is installed
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "evaluate",
        help="score a run's model",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a .fedtune file")
    parser.add_argument("--data", metavar="FILE", help="score on this file, instead of what the run held out")
    parser.add_argument("--clients", action="store_true", help="score on each client's own held-out data, too")
    parser.add_argument("--generate", type=int, metavar="N", help="answer N examples (default: as many as the run)")
    parser.add_argument("--limit", type=int, metavar="N", help="examples to score on, 0 for all (default: as the run)")
    parser.add_argument("--tasks", metavar="A,B", default="", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--base", help="the base: a folder, a GGUF file or a hub id (default: what the run had)")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")


def evaluate(options: argparse.Namespace) -> None:
    """Do what the words ask for.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.judging import Request, evaluate

    named = {name: getattr(options, name) for name in Request.__dataclass_fields__}
    evaluate(Request(**{**named, "tasks": tuple(name.strip() for name in options.tasks.split(",") if name.strip())}))
