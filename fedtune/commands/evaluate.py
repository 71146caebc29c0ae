"""`fedtune evaluate`: how good a finished run's model is, for people and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.commands import Subparsers
from fedtune.core.errors import ConfigError, DataError, ExportError
from fedtune.core.files import write_atomically

if TYPE_CHECKING:
    from fedtune.core.protocol import Score
    from fedtune.data.federated_data import FederatedData
    from fedtune.models.adapted_model import LocalModel
    from fedtune.workspace.workspace import Workspace

COLUMNS = ("loss", "accuracy", "exact match", "ROUGE-L", "choices")  # of fedtune.evaluation.scoring.FIGURES
TEXT = """\
Score the model of a run on what the run held out: loss, accuracy, exact match and ROUGE-L of its answers, and
multiple-choice questions (docs/evaluation.md).

  fedtune evaluate runs/demo --generate 50                answer 50 of the held-out examples
  fedtune evaluate runs/demo --clients --out scores.json  on each client's own held-out data, too
  fedtune evaluate runs/demo --data other.jsonl           on a file of the same columns
  fedtune evaluate runs/demo --tasks arc_easy,hellaswag   by lm-evaluation-harness, where that is installed
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("evaluate", help="score a run's model", description=TEXT)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a .fedtune file")
    parser.add_argument("--data", metavar="FILE", help="score on this file, instead of what the run held out")
    parser.add_argument("--clients", action="store_true", help="score on each client's own held-out data, too")
    parser.add_argument("--generate", type=int, metavar="N", help="answer N examples (default: as many as the run)")
    parser.add_argument("--limit", type=int, metavar="N", help="examples to score on, 0 for all (default: as the run)")
    parser.add_argument("--tasks", metavar="A,B", default="", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--base", help="the base: a folder, a GGUF file or a hub id (default: what the run had)")
    parser.add_argument(
        "--round", metavar="N", help="a round that the run kept: its number, or best (default: the last)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    named = {name: getattr(options, name) for name in Request.__dataclass_fields__}
    evaluate(Request(**{**named, "tasks": tuple(name.strip() for name in options.tasks.split(",") if name.strip())}))
    return 0


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    run: str  # a run's folder, or a .fedtune file
    data: str | None = None  # a file to score on, instead of what the run held out
    base: str | None = None  # where the base is on this machine
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness
    include_path: str | None = None  # a folder with tasks of one's own
    clients: bool = False  # score on each client's own held-out data too
    generate: int | None = None  # examples to answer; None: as many as the run did
    limit: int | None = None  # examples at most, 0 for all; None: as many as the run took, and whole tasks
    out: str | None = None  # a JSON file
    round: str | None = None  # one that the run kept, or "best"; None: the last


@dataclass(frozen=True)
class EvaluationReport:
    """What was found."""

    round: int  # the last that is in the model
    heldout: Score | None  # None where nothing was held out
    clients: Mapping[int, Score]
    mean: Score | None  # of the clients, weighted by their samples
    tasks: Mapping[str, Mapping[str, float]]


def evaluate(request: Request) -> EvaluationReport:
    """Score the model, print the figures, and write them where asked.

    Raises:
        FedtuneError: if there is no such model, or nothing to score it on.
    """
    from fedtune.evaluation.lm_eval_harness import check_installed
    from fedtune.evaluation.scoring import mean_score
    from fedtune.export.model_folder import check_one_model, source_of, tuned, workspace_for

    if request.clients and request.data is not None:
        raise ConfigError("--clients is about the run's own division of its data, which --data has none of: leave one")
    if request.include_path is not None and not Path(request.include_path).is_dir():
        raise ConfigError(f"--include-path {request.include_path} is no folder: expected one with task files")
    if request.tasks:
        check_installed()
    found = source_of(Path(request.run).expanduser(), request.round)
    spec = found.experiment.evaluate
    if request.generate is not None:
        spec = replace(spec, generate=request.generate)
    if request.limit is not None:
        spec = replace(spec, examples=request.limit)
    workspace = workspace_for(found, request.base, evaluate=spec)
    check_one_model(found, workspace)
    local, number = tuned(found, workspace)
    if request.data is not None:
        workspace.data = _whole(workspace, request.data)
    else:
        workspace.data.check_same(found.data, f"{request.run} can't be scored on what it held out")
    heldout = workspace.evaluate()
    clients = _by_client(workspace) if request.clients else {}
    if heldout is None and not clients and not request.tasks:
        raise DataError("the run held nothing out for the server (data.heldout=0): give --data, --clients or --tasks")
    samples = {index: workspace.samples(index) for index in clients}
    tasks = _tasks(request, local, spec.batch_size) if request.tasks else {}
    verdict = EvaluationReport(number, heldout, clients, mean_score(samples, clients), tasks)
    _show(verdict, f"{found.experiment.name}: method={found.experiment.method_name} after round {number}")
    if request.out is not None:
        _write(Path(request.out).expanduser(), verdict, request)
        print(f"wrote    {request.out}")
    return verdict


def _whole(workspace: Workspace, path: str) -> FederatedData:
    """A file's examples, all held out, with the columns named as for the run's own."""
    import numpy as np

    from fedtune.data.federated_data import FederatedData
    from fedtune.data.row_counts import describe
    from fedtune.data.sources import load_examples
    from fedtune.data.tokenisation import tokenise
    from fedtune.models.model_checks import check_tokens

    spec = replace(workspace.data_spec, path=path, subset=None)
    corpus, kept = tokenise(examples := load_examples(spec), workspace.model.tokenizer, spec)
    for line in describe(corpus.counts, spec):
        print(line)
    data = FederatedData(corpus, (), (), np.arange(len(corpus)), workspace.model.pad, len(examples) - len(kept))
    check_tokens(data.corpus, workspace.model.base)
    return data


def _by_client(workspace: Workspace) -> dict[int, Score]:
    scores = {index: workspace.evaluate_on(index) for index in range(len(workspace.data.heldout))}
    found = {index: score for index, score in scores.items() if score is not None}
    if not found:
        raise DataError("no client of the run holds anything out (data.client_heldout=0): leave --clients out")
    return found


def _tasks(request: Request, local: LocalModel, batch_size: int) -> dict[str, dict[str, float]]:
    from fedtune.evaluation.lm_eval_harness import run_tasks

    return run_tasks(local, request.tasks, request.include_path, request.limit or None, batch_size)


def _show(verdict: EvaluationReport, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedtune.core.protocol import FIGURES

    console = Console(file=sys.stdout, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    if verdict.heldout is not None:
        table.add_row("held-out", *_cells(verdict.heldout))
    for index, score in sorted(verdict.clients.items()):
        table.add_row(f"client {index}", *_cells(score))
    if verdict.mean is not None:
        table.add_row("mean", *_cells(verdict.mean))
        for label, pick in (("worst", _worst), ("best", _best)):
            table.add_row(label, *(_number(pick(name, verdict.clients)) for name in FIGURES))
    if table.rows:
        console.print(table)
    if verdict.tasks:
        tasks = Table("task", "figure", box=None, pad_edge=False, header_style="dim")
        tasks.add_column("value", justify="right")
        for task, figures in verdict.tasks.items():
            for name, value in figures.items():
                if name != "sample_len":  # no figure of the model's
                    tasks.add_row(task, name, _number(value))
        console.print(tasks)


def _cells(score: Score) -> list[str]:
    from fedtune.core.protocol import FIGURES

    return [_number(getattr(score, name)) for name in FIGURES]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _given(name: str, scores: Mapping[int, Score]) -> list[float]:
    return [value for score in scores.values() if (value := getattr(score, name)) is not None]


def _best(name: str, scores: Mapping[int, Score]) -> float | None:
    return (min if name == "loss" else max)(_given(name, scores), default=None)


def _worst(name: str, scores: Mapping[int, Score]) -> float | None:
    return (max if name == "loss" else min)(_given(name, scores), default=None)


def _write(path: Path, verdict: EvaluationReport, request: Request) -> None:
    def plain(score: Score | None) -> dict[str, Any] | None:
        return None if score is None else {item.name: getattr(score, item.name) for item in fields(score)}

    content = {
        "run": request.run,
        "data": request.data,
        "round": verdict.round,
        "heldout": plain(verdict.heldout),
        "clients": {str(index): plain(score) for index, score in sorted(verdict.clients.items())},
        "mean": plain(verdict.mean),
        "tasks": verdict.tasks,
    }
    try:
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise ExportError(f"--out {path} can't be written: {error.strerror or error}. Name another file") from error
