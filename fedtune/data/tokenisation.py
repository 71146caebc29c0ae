"""From examples to tokens: by the tokenizer's chat template, with a mark on every token that is learnt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.config.schema import DataSpec
from fedtune.core.errors import DataError
from fedtune.data.chat_template import Chat
from fedtune.data.corpus import Corpus, Question
from fedtune.data.encoder import Encoder, Given, Piece
from fedtune.data.rows import Example


def tokenise(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> tuple[Corpus, list[int]]:
    """Tokenise by the tokenizer's chat template where it has one.

    Returns:
        The corpus, and for each of its examples the place it had in `examples`. Those without an answer, and those
        that the cut at `max_length` leaves with nothing to learn, are left out; the corpus' `counts` has how many.

    Raises:
        DataError: if no example is left, or the chat template can't show one.
    """
    encoder = Encoder(tokenizer)
    chat = Chat(encoder, spec)
    pieces = chat.pieces(examples)
    opening = (encoder.opening(), False)
    begun: list[list[Piece | Given]] = [
        [opening, *row] if not example.messages or chat.template is None else [*row]
        for example, row in zip(examples, pieces, strict=True)
    ]
    tokens, lengths = encoder.encode(begun)
    targets = np.repeat(np.asarray([learn for row in begun for _, learn in row], dtype=bool), lengths)
    row_of_piece = np.repeat(np.arange(len(begun), dtype=np.int32), [len(row) for row in begun])
    owners = np.repeat(row_of_piece, lengths)  # (total,): whose row a token is in
    sizes = np.bincount(owners, minlength=len(begun))
    place = np.arange(len(tokens)) - (np.cumsum(sizes) - sizes)[owners]  # within its row
    within = place < spec.max_length
    learnt = np.bincount(owners[targets & within & (place > 0)], minlength=len(begun)) > 0  # nothing predicts the first
    answered = np.asarray([bool(row) for row in pieces])
    chat.counts.update(
        read=len(examples),
        no_answer=int((~answered).sum()),
        too_long=int((answered & ~learnt).sum()),
        cut=int((learnt & (sizes > spec.max_length)).sum()),
    )
    kept = np.flatnonzero(learnt)
    if not len(kept):
        raise _nothing_left(examples, chat.counts, spec)
    stay = learnt[owners] & within
    told = {name: count for name, count in chat.counts.items() if count}
    asked = {row: examples[place] for row, place in enumerate(kept.tolist()) if examples[place].choices}
    return Corpus(
        tokens[stay],
        targets[stay],
        np.concatenate([[0], np.cumsum(np.minimum(sizes[kept], spec.max_length))]).astype(np.int64),
        _questions(asked, chat, opening) if asked else {},
        told,
    ), kept.tolist()


def _nothing_left(examples: Sequence[Example], counts: Mapping[str, int], spec: DataSpec) -> DataError:
    if counts["too_long"]:
        return DataError(
            f"data.max_length={spec.max_length} cuts every example before anything to learn: raise it, or set "
            "data.loss_on=all"
        )
    roles = dict.fromkeys(turn["role"] for example in examples for turn in example.messages)
    return DataError(
        f"none of {len(examples):,} rows has an assistant turn that answers something: the roles found are "
        f"{', '.join(roles)}; expected user and assistant, or human and gpt"
    )


def _questions(asked: Mapping[int, Example], chat: Chat, opening: Given) -> dict[int, Question]:
    """The choices of these examples, each in the right one's place. What is too long is cut at its beginning, so that
    a whole choice is left."""
    most = chat.spec.max_length
    rows: list[list[Piece | Given]] = []
    for example in asked.values():
        head = chat.head(example)
        before = [opening, *head] if chat.template is None else head
        rows += [[*before, (chat.marked(choice), True)] for choice in example.choices]
    tokens, lengths = chat.encoder.encode(rows)
    pieces = iter(np.split(tokens, np.cumsum(lengths)[:-1]))
    encoded = iter([[next(pieces) for _ in row] for row in rows])
    questions = {}
    for row, example in asked.items():
        options = []
        for _ in example.choices:
            *given, choice = next(encoded)
            choice = choice[: most - 1]  # nothing predicts the first token
            span = np.concatenate([*given, choice])[-most:]
            options.append((span, np.arange(len(span)) >= len(span) - len(choice)))
        questions[row] = Question(tuple(options), example.right)
    return questions
