"""How good a model is on held-out data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedtune.config.schema import EvaluateSpec
from fedtune.core.protocol import FIGURES, Score
from fedtune.core.seeds import permutation
from fedtune.data.corpus import Corpus, Span, padded
from fedtune.evaluation.generation import answerable, answers, exact, rouge_l
from fedtune.models.adapted_model import LocalModel
from fedtune.training.first_order import supervised_logits


def score(model: LocalModel, corpus: Corpus, rows: Sequence[int] | np.ndarray, batch_size: int, pad: int) -> Score:
    """The model's loss and accuracy, as it stands, on those rows of the corpus.

    Rows are taken by length, which saves padding and makes the result independent of their order.
    """
    ordered = sorted((int(row) for row in rows), key=lambda row: (corpus.length(row), row))
    loss, right, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = corpus.batch(ordered[start : start + batch_size], pad).to(model.device)
            logits, labels = supervised_logits(model.module, batch)
            loss += functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            tokens += len(labels)
    return Score(loss / tokens, right / tokens, tokens) if tokens else Score(float("nan"), float("nan"), 0)


def evaluate_all(
    model: LocalModel, corpus: Corpus, rows: Sequence[int] | np.ndarray, spec: EvaluateSpec, pad: int, key: int
) -> Score:
    """All that is measured of the model as it stands: `score`, the choices of the rows that are questions, and answers
    to as many of the rows as `spec.generate` says.

    Args:
        key: draws the rows that are answered, from those that have a prompt.
    """
    found = score(model, corpus, rows, spec.batch_size, pad)
    asked = [int(row) for row in rows if int(row) in corpus.questions]
    if asked:
        chosen = choose(model, corpus, asked, spec.batch_size, pad)
        right = sum(chosen[row] == corpus.questions[row].right for row in asked)
        found = replace(found, choice_accuracy=right / len(asked), questions=len(asked))
    prompted = answerable(corpus, model.tokenizer, rows) if spec.generate else []
    drawn = [prompted[place] for place in permutation(key, len(prompted))[: spec.generate]]
    if drawn:
        given = answers(model, corpus, sorted(drawn), spec.batch_size, pad, spec.max_new_tokens)
        matches = sum(exact(answer, spec.extract) for answer in given) / len(given)
        rouge = sum(map(rouge_l, given)) / len(given)
        found = replace(found, exact_match=matches, rouge_l=rouge, answers=len(given))
    return found


def choose(model: LocalModel, corpus: Corpus, rows: Sequence[int], batch_size: int, pad: int) -> dict[int, int]:
    """The likeliest choice of each question: that with the highest total log-likelihood of its tokens, given the
    prompt; of equals the first."""
    options: list[tuple[int, int, Span]] = [
        (row, place, option) for row in sorted(rows) for place, option in enumerate(corpus.questions[row].options)
    ]
    options.sort(key=lambda option: len(option[2][0]))
    totals = {row: [0.0] * len(corpus.questions[row].options) for row in rows}
    with torch.inference_mode():
        for start in range(0, len(options), batch_size):
            part = options[start : start + batch_size]
            batch = padded([span for _, _, span in part], pad).to(model.device)
            logits, labels = supervised_logits(model.module, batch)
            each = -functional.cross_entropy(logits.float(), labels, reduction="none").double()
            owner = torch.arange(len(part), device=each.device).repeat_interleave(batch.targets[:, 1:].sum(1))
            sums = torch.zeros(len(part), dtype=each.dtype, device=each.device).index_add_(0, owner, each)
            for (row, place, _), total in zip(part, sums.tolist(), strict=True):
                totals[row][place] = total
    return {row: int(np.argmax(found)) for row, found in totals.items()}


def mean_score(samples: Mapping[int, int], scores: Mapping[int, Score]) -> Score | None:
    """The clients' scores as one, weighted by their samples; None of nobody.

    A figure that only some have is the mean over those.
    """
    if not sum(samples[index] for index in scores):
        return None
    means: dict[str, Any] = {}
    for name in FIGURES:
        given = {index: value for index, each in sorted(scores.items()) if (value := getattr(each, name)) is not None}
        total = sum(samples[index] for index in given)
        means[name] = sum(samples[index] * value for index, value in given.items()) / total if total else None
    counted = ("tokens", "answers", "questions")
    return Score(**means, **{name: sum(getattr(each, name) for each in scores.values()) for name in counted})
