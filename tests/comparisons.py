"""Comparisons that were never run, for tests of the page: numbers by formula, so that a test knows them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from conftest import small

from fedtune.config.schema import Experiment
from fedtune.report.comparison import Comparison, compare
from fedtune.runs.read import Clients, Run


@cache
def _base() -> Experiment:
    return small(out=Path("nowhere"))


def made_up(entries: int = 3, seeds: int = 2, rounds: int = 4, clients: int = 5, status: str = "finished") -> list[Run]:
    """Entry e with seed s has the loss 3 - 0.1 r + 0.2 e + 0.01 s after round r, and sends 1000 (e + 1) bytes up and
    three times that down in each."""
    found = []
    for e in range(entries):
        for s in range(seeds):
            r = np.arange(rounds + 1.0)
            loss = 3 - 0.1 * r + 0.2 * e + 0.01 * s
            experiment = replace(
                _base(), seed=s, rounds=rounds, train=replace(_base().train, lr=1e-3 * (e + 1)), overrides=[f"seed={s}"]
            )
            metrics = {
                "round": r,
                "eval_loss": loss,
                "eval_accuracy": np.exp(-loss),
                "seconds": np.ones(rounds + 1),
                "eval_seconds": np.ones(rounds + 1),
                "virtual_seconds": np.full(rounds + 1, np.nan),
                "aggregation_error": np.where(r > 0, 0.01 * e, np.nan),
            }
            once, each = np.where(r == 0, 50.0, 0), np.where(r > 0, 1000.0 * (e + 1), 0)
            wire = {("up", "handshake"): once, ("up", "train"): each, ("down", "train"): 3 * each}
            told = {"command": f"fedtune run seed={s}", "versions": {"fedtune": "0.1.0"}}
            each_client = Clients(rounds, np.arange(clients), loss[-1] + np.arange(clients) / 10, np.ones(clients))
            found.append(
                Run(
                    Path(f"runs/{e}-{s}"), experiment, status, None, told, metrics, wire, wire, each_client,
                    1e8 * (entries - e), (),
                )
            )  # fmt: skip
    return found


def comparison(labels: tuple[str, ...] = (), **sizes: int) -> Comparison:
    """Compared, with these labels in place of the entries' own, as somebody could have named them."""
    found = compare(made_up(**sizes))
    (group,) = found.groups
    named = zip(group.entries, labels or [entry.label for entry in group.entries], strict=True)
    entries = tuple(replace(entry, label=label) for entry, label in named)
    return replace(found, groups=(replace(group, entries=entries),))
