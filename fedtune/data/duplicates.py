"""Rows that say the same: found, and kept on one side of every split.

    the same text    token for token, as it is trained (data.max_length's cut included)
    the same prompt  what stands before a conversation's first answer, or a plain text as a whole, but for white space
                     and upper case; so the rows of one dialogue that was cut into its turns belong together as well

A test on what was trained on measures memory. So rows with one text or one prompt are a group, and a group is held out
as a whole or not at all, by the server and by all clients alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import takewhile

import numpy as np

from fedtune.data.corpus import Corpus
from fedtune.data.rows import Example


def texts(corpus: Corpus) -> np.ndarray:
    """By row, the first one that has the same tokens, itself if there is none before it; int64."""
    first: dict[bytes, int] = {}
    spans = (corpus.tokens[start:end] for start, end in zip(corpus.starts[:-1], corpus.starts[1:], strict=True))
    found = [first.setdefault(blake2b(tokens.tobytes(), digest_size=16).digest(), i) for i, tokens in enumerate(spans)]
    return np.array(found, dtype=np.int64)


def distinct(same: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """One row of each text, ascending: of equal ones that with the rarest label, so that no label vanishes for
    another's sake; of equally rare ones the first.

    Args:
        same: of `texts`.
        labels: of each row, by which it will be divided.
    """
    often = Counter(labels)
    order = np.array(sorted(range(len(same)), key=lambda row: often[labels[row]]), dtype=np.int64)  # stable
    _, places = np.unique(same[order], return_index=True)
    found: np.ndarray = np.sort(order[places])
    return found


def groups(examples: Sequence[Example], same: np.ndarray) -> np.ndarray:
    """By row, a number that rows with one text or one prompt share, int64.

    A prompt that more than half of the rows have, as an instruction that is the same everywhere, tells nothing of what
    is learnt from them: these rows are told apart by their texts.

    Args:
        same: of `texts`.
    """
    prompts = [_prompt(example) for example in examples]
    prompt, times = Counter(prompts).most_common(1)[0]
    common = prompt if 2 * times > len(prompts) else None
    keys = [row if prompts[row] == common else prompts[row] for row in same.tolist()]
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _prompt(example: Example) -> object:
    turns = [(turn["role"], _plain(turn["content"])) for turn in example.messages]
    asked = tuple(takewhile(lambda turn: turn[0] != "assistant", turns))
    return asked or tuple(turns) or _plain(example.text)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def hold_out(
    order: np.ndarray, group: np.ndarray, owner: Sequence[int], quota: Mapping[int, int], kind: Sequence[object]
) -> np.ndarray:
    """Rows to be held out, ascending: whole groups, in the order in which their first rows come.

    A group is taken if all whose rows are in it have room for them; then, where somebody lacks rows still, also if it
    brings nobody farther from its quota by going beyond. Of every kind at least one row is left.

    Args:
        order: the rows to choose from.
        group: [row] its group.
        owner: [row] whose quota it counts for.
        quota: by owner, how many rows of its own are to be held out.
        kind: [row] what must not vanish.
    """
    members: dict[int, list[int]] = {}
    for row, number in zip(order.tolist(), group[order].tolist(), strict=True):
        members.setdefault(number, []).append(row)
    room, left = dict(quota), Counter(kind[row] for row in order.tolist())
    aside: list[int] = []
    for beyond in (1, 2):
        for number, rows in list(members.items()):
            owned, kinds = Counter(owner[row] for row in rows), Counter(kind[row] for row in rows)
            fits = all(count <= beyond * room[who] for who, count in owned.items())
            if fits and all(count < left[what] for what, count in kinds.items()):
                aside += members.pop(number)
                left -= kinds
                for who, count in owned.items():
                    room[who] -= count
    return np.sort(np.array(aside, dtype=np.int64))


def repeated(same: np.ndarray, rows: np.ndarray, others: np.ndarray) -> int:
    """How many of `rows` stand among the `others` word for word.

    Args:
        same: of `texts`.
    """
    return int(np.isin(same[rows], same[others]).sum())
