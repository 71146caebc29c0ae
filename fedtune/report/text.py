"""Scores and estimates as people read them, and what a comparison says in a sentence or two."""

import math
from collections.abc import Sequence

from fedtune.core.text import duration, listed, magnitude, number, plural, sentence, size
from fedtune.report.comparison import Estimate, Reached, Standing, Table

SCORES = {
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "eval_exact_match": "exact match",
    "eval_rouge_l": "ROUGE-L",
    "eval_choice_accuracy": "multiple-choice accuracy",
    "client_eval_loss": "loss on the clients' own data",
    "client_eval_accuracy": "accuracy on the clients' own data",
    "aggregation_error": "aggregation error",
}


def title_of(column: str) -> str:
    """A metrics column for people, as "held-out loss"."""
    return SCORES.get(column, column.removeprefix("eval_").replace("_", " "))


def lower_is_better(column: str) -> bool:
    return "loss" in column or "error" in column or "perplexity" in column


def rounded(value: float) -> float | None:
    """To six significant digits, as JSON can hold it: None where there is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def signed(value: float) -> str:
    """A difference, as "+0.0157"."""
    return number(value, 3) if not value > 0 else f"+{number(value, 3)}"


def interval(estimate: Estimate) -> str:
    """The 95 % interval as "2.10 to 2.17"; empty where there is none."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return ""
    half = (estimate.high - estimate.low) / 2
    # As many decimals as the interval's width makes sense of
    decimals = min(max(1 - magnitude(half), 0), 6) if half else 4
    return f"{estimate.low:.{decimals}f} to {estimate.high:.{decimals}f}"


def within(estimate: Estimate) -> str:
    """Half the 95 % interval as "± 0.012"; empty where there is none."""
    half = (estimate.high - estimate.low) / 2
    return f"± {number(half, 2)}" if math.isfinite(half) else ""


def answers(tables: Sequence[Table], reached: Sequence[Reached], target: float) -> list[str]:
    """What the comparison says, a short paragraph per protocol and one about the way to the target loss."""
    found = [_of_table(table) for table in tables]
    return [*filter(None, found), *filter(None, [_of_target(reached, target)])]


def _of_table(table: Table) -> str:
    scored = [standing for standing in table.standings if math.isfinite(_loss(standing).mean)]
    point = sentence(table.protocol.title)
    if not scored:
        return f"{point} nothing has been evaluated yet."
    best, rest = min(scored, key=lambda standing: _loss(standing).mean), len(scored) - 1
    seeds = len(_loss(best).values)
    spread = f", 95 % interval {interval(_loss(best))}" if interval(_loss(best)) else ""
    reading = f"{number(_loss(best).mean)} ({plural(seeds, 'seed')}{spread})"
    if not rest:
        return f"{point} {best.entry.label} had a held-out loss of {reading}. There is nothing to compare it with yet."
    said = f"{point} {best.entry.label} had the lowest held-out loss of {len(scored)}: {reading}."
    by_verdict: dict[str, list[str]] = {}
    for standing in scored:
        by_verdict.setdefault(standing.verdict, []).append(standing.entry.label)
    against = "it" if table.reference == best.entry.label else table.reference
    if near := by_verdict.get("within noise", []):
        said += f" Not to be told from {against}: {listed(near)}."
    elif "worse" in by_verdict and len(by_verdict["worse"]) == rest and against == "it":
        said += " Every other is worse by more than the noise between seeds."
    if against != "it" and (better := by_verdict.get("better", [])):
        said += f" Better than {against} by more than noise: {listed(better)}."
    if unspent := by_verdict.get("unspent", []):
        said += f" As unlike amounts were spent, nothing can be said of {listed(unspent)}."
    if by_verdict.get("one seed"):
        alone = by_verdict["one seed"]
        if seeds < 2 or len(alone) == rest:
            said += " With one seed nobody can say which differences are chance: take it as a hint, and run more seeds."
        else:
            said += f" With one seed in common, nothing can be said of {listed(alone)}."
    return said


def _of_target(reached: Sequence[Reached], target: float) -> str:
    there = [entry for entry in reached if math.isfinite(entry.bytes.mean)]
    if not there or not math.isfinite(target):
        return ""
    there = [entry for entry in there if not entry.missed] or there
    cheapest = min(there, key=lambda entry: entry.bytes.mean)
    fastest = min(there, key=lambda entry: entry.seconds.mean if math.isfinite(entry.seconds.mean) else math.inf)
    said = f"To a loss of {number(target)}, {cheapest.entry.label} took the fewest bytes: {size(cheapest.bytes.mean)}"
    said += f" in {cheapest.rounds.mean:.3g} rounds" if cheapest.rounds.mean != 1 else " in one round"
    if cheapest.missed:
        said += f" ({plural(cheapest.missed, 'seed')} of it never got there)"
    if fastest is not cheapest and math.isfinite(fastest.seconds.mean):
        said += f"; {fastest.entry.label} was there first, after {duration(fastest.seconds.mean)}"
    if never := [entry.entry.label for entry in reached if not math.isfinite(entry.bytes.mean)]:
        said += f". Never there: {listed(never)}"
    return said + "."


def _loss(standing: Standing) -> Estimate:
    nothing = Estimate(math.nan, math.nan, math.nan, ())
    return standing.scores.get("eval_loss", nothing)
