"""How good a model is on held-out data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fedtune.adapters import LocalModel
from fedtune.corpus import Corpus
from fedtune.training import learnt_logits


@dataclass(frozen=True)
class Score:
    loss: float  # mean negative log-likelihood per learnt token, nats
    accuracy: float  # fraction of learnt tokens that were the most likely one
    tokens: int  # how many there were


def score(model: LocalModel, corpus: Corpus, rows: Sequence[int] | np.ndarray, batch_size: int, pad: int) -> Score:
    """Score the model as it stands on those rows of the corpus.

    Rows are taken by length, which saves padding and makes the result independent of their order.
    """
    ordered = sorted((int(row) for row in rows), key=lambda row: (corpus.length(row), row))
    loss, right, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = corpus.batch(ordered[start : start + batch_size], pad).to(model.device)
            logits, labels = learnt_logits(model.module, batch)
            loss += functional.cross_entropy(logits.float(), labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            tokens += len(labels)
    return Score(loss / tokens, right / tokens, tokens) if tokens else Score(float("nan"), float("nan"), 0)


def mean_score(samples: Mapping[int, int], scores: Mapping[int, Score]) -> Score | None:
    """The clients' scores as one, weighted by their samples; None of nobody."""
    total = sum(samples[index] for index in scores)
    if not total:
        return None
    loss = sum(samples[index] * score.loss for index, score in sorted(scores.items())) / total
    accuracy = sum(samples[index] * score.accuracy for index, score in sorted(scores.items())) / total
    return Score(loss, accuracy, sum(score.tokens for score in scores.values()))
