"""Rows of multiple-choice questions: what the choices are, and which is right."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fedtune.core.errors import DataError

CHOICES = "choices"
PROMPTS = ("question", "prompt")
ANSWERS = ("answer", "answerKey", "label")  # the first that a row has


def is_question(given: Mapping[str, Any], prompt: str | None) -> bool:
    """Whether a row with these columns is one.

    Args:
        prompt: the column with the question, where it isn't one of the usual.
    """
    return CHOICES in given and (prompt or _prompt(given)) in given


def prompt_of(given: Mapping[str, Any], prompt: str | None) -> str:
    """The name of the column with the question, of a row that `is_question`."""
    return prompt or _prompt(given)


def read_choices(where: str, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """A row's choices, and the place of the right one among them, from 0.

    `choices` is a list of texts, or {"text": [...], "label": [...]}; CSV has either as JSON. The right one is named by
    its label, else by its place from 0, its text, or a letter from A.

    Raises:
        DataError: naming the row and what is wrong with it.
    """
    texts, labels = _choices(where, given[CHOICES])
    column = next((name for name in ANSWERS if name in given), None)
    if column is None:
        raise DataError(f"{where} has '{CHOICES}' but none of {', '.join(ANSWERS)}, to say which is right")
    answer = given[column]
    place = None if isinstance(answer, bool | float) else _place(str(answer).strip(), texts, labels, answer)
    if place is None:
        known = labels or [chr(ord("A") + place) for place in range(min(len(texts), 26))]
        raise DataError(
            f"{where}: '{column}' is {str(answer)[:80]!r}, which is none of its {len(texts)} choices: expected one of "
            f"{', '.join(known)}, a place from 0 to {len(texts) - 1}, or a choice's text"
        )
    return texts, place


def _prompt(given: Mapping[str, Any]) -> str:
    return next((name for name in PROMPTS if name in given), "")


def _choices(where: str, value: Any) -> tuple[tuple[str, ...], list[str]]:
    if isinstance(value, str):  # CSV has no lists
        with suppress(ValueError):
            value = json.loads(value)
    labels: Any = []
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label", [])
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise DataError(
            f"{where}: column '{CHOICES}' should be a list of two texts or more, or {{'text': [...], 'label': [...]}}"
        )
    texts = tuple(text.strip() for text in value)
    if "" in texts:
        raise DataError(f"{where}: choice {texts.index('')} is empty, and so has no likelihood")
    if not isinstance(labels, list) or (labels and len(labels) != len(texts)):
        raise DataError(f"{where}: column '{CHOICES}' should have a label for each of its {len(texts)} texts")
    return texts, [str(label).strip() for label in labels]


def _place(answer: str, texts: tuple[str, ...], labels: list[str], given: Any) -> int | None:
    if answer in labels:
        return labels.index(answer)
    if not isinstance(given, int) and answer in texts:
        return texts.index(answer)
    if answer.isascii() and answer.isdecimal():
        place = int(answer[:9])
    elif len(answer) == 1 and "A" <= answer.upper() <= "Z":
        place = ord(answer.upper()) - ord("A")
    else:
        return None
    return place if place < len(texts) else None
