"""YAML from anybody: plain values, no deeper and no longer than settings are."""

import re
from typing import Any

import yaml

from fedtune.config.schema import SafeLoader

LONGEST = 4_000_000  # characters; a list of the ranks of 100,000 clients has half a million
DEEPEST = 50
OPENING = re.compile(r"[\[{]|[-?]\s")
MANY = 200  # openings, of brackets and of items, below which nothing can be too deep for the parser


def read_plain(text: str) -> Any:
    """What YAML says.

    PyYAML's C parser calls itself for each level, and ends the process where there are tens of thousands.

    Raises:
        yaml.YAMLError: if it is no YAML, refers to parts of itself (as what grows without end does), or is too long or
            too deep.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {LONGEST} are read")
    if "&" in text or len(OPENING.findall(text)) > MANY:
        _check_tokens(text)
    return yaml.load(text, SafeLoader)


def _check_tokens(text: str) -> None:
    depth = 0
    for token in yaml.scan(text, SafeLoader):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            raise yaml.YAMLError("it refers to parts of itself")
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is deeper than {DEEPEST} levels")
