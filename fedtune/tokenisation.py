"""From examples to tokens: by the tokenizer's chat template, with a mark on every token that is learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.corpus import Corpus, Question
from fedtune.data import Example
from fedtune.errors import DataError
from fedtune.schema import DataSpec

PLACEHOLDER = "\x1aanswer\x1a"  # stands where a choice will; no text has it


def tokenise(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> tuple[Corpus, list[int]]:
    """Tokenise by the tokenizer's chat template where it has one.

    Each stretch of text that is learnt or not is tokenised by itself, because that is how it will be at inference: the
    prompt ends where the model takes over.

    Returns:
        The corpus, and for each of its examples the place it had in `examples`: those that the cut at `max_length`
        leaves with nothing to learn are dropped.
    """
    stretches = [_stretches(example, tokenizer, spec.loss_on) for example in examples]
    encoded = tokenizer(
        [text for pieces in stretches for text, _ in pieces], add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    prefix = _prefix(tokenizer)
    suffix = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    kept: list[int] = []
    piece = 0
    for place, (example, pieces) in enumerate(zip(examples, stretches, strict=True)):
        templated = bool(example.messages) and tokenizer.chat_template is not None
        row = [] if templated else list(prefix)
        learn = [False] * len(row)
        for _, target in pieces:
            row += encoded[piece]
            learn += [target] * len(encoded[piece])
            piece += 1
        if not templated:
            row += suffix
            learn += [True] * len(suffix)
        row, learn = row[: spec.max_length], learn[: spec.max_length]
        if any(learn[1:]):  # nothing predicts the first token
            tokens.append(np.asarray(row, dtype=np.int32))
            targets.append(np.asarray(learn, dtype=bool))
            kept.append(place)
    if not kept:
        raise DataError(
            f"data.max_length={spec.max_length} cuts every example before anything to learn: raise it, or set "
            "data.loss_on=all"
        )
    starts = np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64)
    asked = {row: examples[place] for row, place in enumerate(kept) if examples[place].choices}
    questions = _questions(asked, tokenizer, spec) if asked else {}
    return Corpus(np.concatenate(tokens), np.concatenate(targets), starts, questions), kept


def _questions(asked: Mapping[int, Example], tokenizer: Any, spec: DataSpec) -> dict[int, Question]:
    """The choices of these examples, each in the right one's place. What is too long is cut at its beginning, so that
    a whole choice is left."""
    heads = [_head(example, tokenizer, spec.loss_on) for example in asked.values()]
    texts = [text for head, example in zip(heads, asked.values(), strict=True) for text in (*head, *example.choices)]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    prefix = [] if tokenizer.chat_template is not None else _prefix(tokenizer)
    questions = {}
    for (row, example), head in zip(asked.items(), heads, strict=True):
        before = [*prefix, *(token for _ in head for token in next(encoded))]
        options = []
        for _ in example.choices:
            choice = next(encoded)[: spec.max_length - 1]  # nothing predicts the first token
            tokens = np.asarray([*before, *choice][-spec.max_length :], dtype=np.int32)
            options.append((tokens, np.arange(len(tokens)) >= len(tokens) - len(choice)))
        questions[row] = Question(tuple(options), example.right)
    return questions


def _head(example: Example, tokenizer: Any, loss_on: str) -> list[str]:
    """The stretches of text before the answer."""
    *asked, answer = example.messages
    anything = replace(example, messages=(*asked, {**answer, "content": PLACEHOLDER}))
    *stretches, last = [text for text, _ in _stretches(anything, tokenizer, loss_on)]
    before, found, _ = last.partition(PLACEHOLDER)
    if not found:
        raise DataError("the tokenizer's chat template changes an answer's text, so no choice can be put in its place")
    return [*stretches, before] if before else stretches


def _stretches(example: Example, tokenizer: Any, loss_on: str) -> list[tuple[str, bool]]:
    """The example's text, cut where learning begins and ends."""
    if not example.messages:
        return [(example.text, True)]
    everything = loss_on == "all"
    if tokenizer.chat_template is None:
        pieces = []
        for turn in example.messages:
            answer = turn["role"] == "assistant"
            pieces.append((turn["content"] if answer else turn["content"] + "\n", answer or everything))
        return pieces
    pieces = []
    done = ""
    for place, turn in enumerate(example.messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, example.messages[:place], True)
        after = _render(tokenizer, example.messages[: place + 1], False)
        if not after.startswith(done):
            raise DataError(
                "the tokenizer's chat template renders earlier turns differently once later ones follow, so they "
                "can't be learnt in one pass: give each row one answer, or use another tokenizer"
            )
        # Some templates' generation prompt is no prefix of the finished turn (an empty "thinking" part, say): learning
        # then starts where the two part.
        cut = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        cut = max(cut, len(done))
        pieces.append((after[len(done) : cut], everything))
        pieces.append((after[cut:], True))
        done = after
    return [(text, learn) for text, learn in pieces if text]


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], generate: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # templates raise what their authors chose
        raise DataError(
            f"the tokenizer's chat template refuses {[turn['role'] for turn in messages]}: {error}"
        ) from error


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before plain text: the begin-of-text token or nothing."""
    start = tokenizer("")["input_ids"]
    return list(start) if start and start == [tokenizer.bos_token_id] else []
