"""What a setting may be, and how it is refused: by its key, with what was expected."""

import difflib
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from fedtune.core.errors import ConfigError


def option(default: Any, help: str) -> Any:
    """A field with its default and the line that `fedtune run --help` prints for it."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} is not known: expected {', '.join(allowed)}{nearest(str(value), allowed)}")


def at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{key}={value} is too small: expected at least {low}")


def above_zero(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value} must be above 0")


def fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key}={value} must be a fraction from 0 up to, but not, 1")


def nearest(word: str, known: Sequence[str]) -> str:
    """The words `; did you mean ...?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
