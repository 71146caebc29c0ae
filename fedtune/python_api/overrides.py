"""Python's values as the words of the command line."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from fedtune.config.compose import TEXTS, quoted_text
from fedtune.core.errors import ConfigError

EXAMPLE = 'as in run("method=fedit", rounds=2, train__lr=1e-3)'


def words_of(overrides: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """All settings as `key=value` words, those that are given by name after the others.

    Args:
        overrides: words as on the command line.
        settings: values by key, where `__` stands for the dot that a keyword can't have: `train__lr` is train.lr.

    Raises:
        ConfigError: for an override that is no string, or a value that no setting can have.
    """
    if wrong := [override for override in overrides if not isinstance(override, str)]:
        raise ConfigError(f"{wrong[0]!r}: expected key=value in a string, or settings by name, {EXAMPLE}")
    return [*overrides, *(word(name.replace("__", "."), value) for name, value in settings.items())]


def word(key: str, value: Any) -> str:
    """One setting as a word: None, booleans, numbers, strings, paths, and lists and dicts of these.

    A string is what one would type after `key=` on the command line; where the setting is a text, it is that text to
    the letter. Within a list or a dict every string is a text.

    Raises:
        ConfigError: for a value of any other type.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return f"{key}={quoted_text(key, value) if key in TEXTS else value}"
    return f"{key}={_written(key, value)}"


def list_word(key: str, value: Any) -> str:
    """The same of a comparison's own settings, which are lists: 'methods=["fedit", "flora"]'.

    A string is what one would type after `key=`, as in methods="all".

    Raises:
        ConfigError: for a value that is no list of names and numbers.
    """
    if isinstance(value, str):
        return f"{key}={value}"
    items = [_plain(item) for item in (value if hasattr(value, "__iter__") else [value])]
    if wrong := [item for item in items if not isinstance(item, str | int | float)]:
        raise ConfigError(f"{key}: expected a list of names or numbers, got {wrong[0]!r} in it")
    return f"{key}={json.dumps(items, ensure_ascii=False)}"


@contextmanager
def printing(quiet: bool) -> Iterator[None]:
    """Within it nothing goes to standard output if `quiet`."""
    if not quiet:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _written(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    value = _plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return quoted_text(None, value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_written(key, item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence | set | frozenset):
        return "[" + ",".join(_written(key, item) for item in value) + "]"
    raise ConfigError(
        f"{key}: expected None, a boolean, a number, a string, a path, or a list or dict of these, got "
        f"{type(value).__name__}"
    )


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, arrays as lists, paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy":
        return value.tolist()
    return value
