"""Tokenised examples: the tokens of all lie in one array, and row numbers pick from it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fedtune.core.protocol import Batch

Span = tuple[np.ndarray, np.ndarray]  # tokens (length,) int32, and which count: (length,) bool


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: each choice after the prompt, with the choice's own tokens as those that count."""

    options: tuple[Span, ...]
    right: int  # the place of the right one


@dataclass(frozen=True)
class Corpus:
    """Tokenised examples, end to end."""

    tokens: np.ndarray  # (total,) int32
    targets: np.ndarray  # (total,) bool: the tokens whose loss counts
    starts: np.ndarray  # (examples + 1,) int64: example i is [starts[i], starts[i + 1])
    questions: Mapping[int, Question] = field(default_factory=dict)  # by row, where the example is one
    counts: Mapping[str, int] = field(default_factory=dict)  # of rows, by what reading did (fedtune/data/row_counts.py)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def batch(self, rows: Sequence[int] | np.ndarray, pad: int) -> Batch:
        """The examples of those row numbers as one batch, padded on the right with `pad`."""
        return padded([self.span(row) for row in rows], pad)

    def pick(self, rows: np.ndarray) -> "Corpus":
        """The corpus of these rows alone, which have to ascend: the first is its row 0."""
        lengths = np.diff(self.starts)
        kept = np.zeros(len(self), dtype=bool)
        kept[rows] = True
        tokens = np.repeat(kept, lengths)
        starts = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
        questions = {new: self.questions[old] for new, old in enumerate(rows.tolist()) if old in self.questions}
        return Corpus(self.tokens[tokens], self.targets[tokens], starts, questions, self.counts)

    @cached_property
    def sha256(self) -> str:
        """A hash of all that is learnt and asked: equal corpora, and only those, have equal hashes."""
        digest = hashlib.sha256()
        for array in (self.starts, self.tokens, self.targets):
            digest.update(array.tobytes())
        for row, question in sorted(self.questions.items()):
            digest.update(f"{row} {question.right}".encode())
            for tokens, counts in question.options:
                digest.update(f" {len(tokens)} ".encode() + tokens.tobytes() + counts.tobytes())
        return digest.hexdigest()

    def span(self, row: int) -> Span:
        start, end = self.starts[row], self.starts[row + 1]
        return self.tokens[start:end], self.targets[start:end]


def padded(spans: Sequence[Span], pad: int) -> Batch:
    """These as one batch, padded on the right with `pad`."""
    width = max(len(tokens) for tokens, _ in spans)
    tokens = torch.full((len(spans), width), pad, dtype=torch.int64)
    targets = torch.zeros((len(spans), width), dtype=torch.bool)
    for place, (own, counts) in enumerate(spans):
        tokens[place, : len(own)] = torch.from_numpy(own.astype(np.int64))
        targets[place, : len(own)] = torch.from_numpy(counts)
    return Batch(tokens, targets)
