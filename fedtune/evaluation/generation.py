"""Held-out examples answered by greedy decoding, and how near the answers come to the references.

    prompt     what precedes the first learnt token
    answer     the likeliest token after it, again and again, until an end-of-text token or `max_new_tokens`
    reference  the text that is learnt from there on, up to what isn't learnt (of several turns, the first)

Both are compared as text, without special tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from fedtune.core.protocol import Batch
from fedtune.data.corpus import Corpus
from fedtune.models.adapted_model import LocalModel
from fedtune.training.first_order import supervised_logits


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it should have said."""

    text: str
    reference: str


def answerable(corpus: Corpus, tokenizer: Any, rows: Sequence[int] | np.ndarray) -> list[int]:
    """Those of the rows that have a prompt, in ascending order: plain text has none, nor has what is learnt whole."""
    special = set(tokenizer.all_special_ids)
    return [row for row in sorted(map(int, rows)) if not special.issuperset(_parts(corpus, row)[0])]


def answers(
    model: LocalModel, corpus: Corpus, rows: Sequence[int], batch_size: int, pad: int, max_new_tokens: int
) -> list[Answer]:
    """The model's answers to these rows' prompts, in the order of the rows.

    Rows are taken by length, so what is said doesn't depend on their order.

    Args:
        rows: of `answerable`.
    """
    prompts = {row: _parts(corpus, row)[0] for row in rows}
    ordered = sorted(prompts, key=lambda row: (len(prompts[row]), row))
    said: dict[int, list[int]] = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        continued = greedy(model, [prompts[row] for row in batch], pad, max_new_tokens)
        said |= dict(zip(batch, continued, strict=True))
    return [Answer(_text(model, said[row]), _text(model, _parts(corpus, row)[1])) for row in rows]


def greedy(model: LocalModel, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int) -> list[list[int]]:
    """What the model goes on with after each prompt, in token ids, without the end-of-text token.

    Keys and values of what was read are kept, and prompts padded on the left. Where an adapter adds virtual tokens
    every step reads the whole text anew, as training does: PEFT takes no positions beside these, and so would place
    what is padded on the left somewhere else.
    """
    base, virtual, adds_tokens = inside(model.module)
    width = max(map(len, prompts))
    # None in architectures without a limit
    if (positions := getattr(base.config, "max_position_embeddings", None)) is not None:
        max_new_tokens = min(max_new_tokens, positions - virtual - width)
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    stop = stop_tokens(base, model.tokenizer)
    with torch.inference_mode():
        if adds_tokens:
            return _reread(model, prompts, pad, max_new_tokens, stop)
        tokens = torch.full((len(prompts), width), pad, dtype=torch.int64)
        seen = torch.zeros_like(tokens)
        for place, prompt in enumerate(prompts):
            tokens[place, width - len(prompt) :] = torch.tensor(prompt)
            seen[place, width - len(prompt) :] = 1
        with _plainly(base, stop, pad, max_new_tokens):
            made = base.generate(input_ids=tokens.to(model.device), attention_mask=seen.to(model.device))
    return [_until(row[width:].tolist(), stop) for row in made]


def exact(answer: Answer, extract: str | None = None) -> bool:
    """Whether the answer is the reference, white space at the ends and its amount within aside.

    Args:
        extract: a regular expression: compare what its last match in each of the two has, in its first group if it has
            groups. Where one of the two has no match, they aren't the same.
    """
    if extract is None:
        return _collapsed(answer.text) == _collapsed(answer.reference)
    mine, theirs = (_extracted(text, extract) for text in (answer.text, answer.reference))
    return mine is not None and mine == theirs


def rouge_l(answer: Answer) -> float:
    """ROUGE-L F1 by rouge-score, 0 ... 1: words are runs of a-z and 0-9 in lower case, unstemmed."""
    return float(_scorer().score(answer.reference, answer.text)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def _extracted(text: str, pattern: str) -> str | None:
    found = None
    for match in re.finditer(pattern, text):
        found = match[1] if match.re.groups else match[0]
    return None if found is None else _collapsed(found)


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _text(model: LocalModel, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _parts(corpus: Corpus, row: int) -> tuple[list[int], list[int]]:
    """The row's prompt and reference, in token ids."""
    start, end = corpus.starts[row], corpus.starts[row + 1]
    tokens, targets = corpus.tokens[start:end], corpus.targets[start:end]
    first = int(targets.argmax())
    last = first + int((~targets[first:]).argmax()) if not targets[first:].all() else len(tokens)
    return tokens[:first].tolist(), tokens[first:last].tolist()


def inside(module: Any) -> tuple[Any, int, bool]:
    """The base, with whatever adapters are in its layers; how many virtual tokens stand before the text; and whether
    there are any, there or in the layers."""
    config = getattr(module, "peft_config", {}).get("default")
    if config is None:
        return module, 0, False
    before = config.num_virtual_tokens if config.is_prompt_learning else 0
    return module.get_base_model(), before, config.is_prompt_learning or config.is_adaption_prompt


def stop_tokens(base: Any, tokenizer: Any) -> set[int]:
    """What ends an answer: the tokenizer's end of text, and those of the model's own generation settings: a turn
    may end by another."""
    named = getattr(base.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return {int(token) for token in (tokenizer.eos_token_id, *named) if token is not None}


@contextmanager
def _plainly(base: Any, stop: set[int], pad: int, max_new_tokens: int) -> Iterator[None]:
    """Greedy decoding and nothing else. The model's own settings go out of the way, for what a call leaves unsaid is
    taken from them: Qwen2.5's would have repetitions punished."""
    from transformers import GenerationConfig

    kept = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop) or None, pad_token_id=pad
    )
    try:
        yield
    finally:
        base.generation_config = kept


def _reread(
    model: LocalModel, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int, stop: set[int]
) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        texts = [[*prompts[place], *made[place]] for place in going]
        width = max(map(len, texts)) + 1
        batch = Batch(torch.full((len(going), width), pad), torch.zeros(len(going), width, dtype=torch.bool))
        for row, text in enumerate(texts):
            batch.tokens[row, : len(text)] = torch.tensor(text)
            batch.targets[row, len(text)] = True  # the token that is asked for
        likeliest = supervised_logits(model.module, batch.to(model.device))[0].argmax(-1).tolist()
        for place, token in zip(going, likeliest, strict=True):
            made[place].append(token)
        going = [place for place in going if made[place][-1] not in stop]
        if not going:
            break
    return [_until(tokens, stop) for tokens in made]


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens
