"""From text to token ids, the way a model meets it: cut where it takes over, and with no control token typed by a user.

prompt         tokenised as a whole, as it is at inference
what follows   tokenised as the middle of a text: many tokenizers put a blank before a text (Llama 2's, say), which
               in the middle would be a blank that nobody wrote
`<|end|>`      is the real token where the chat template put it, and characters where somebody typed it
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

MARK = "\ufdd0"  # before each character of a typed special token; a code point that Unicode keeps free of any meaning
STEMS = ("\n", ".", "a", "0")  # what a text may go on from without a token across the seam; newlines suit nearly all
TEXTS_AT_ONCE = 8192  # whose encodings are in memory together
Piece = tuple[str, bool]  # a stretch of text, and whether it is learnt
Given = tuple[tuple[int, ...], bool]  # the same of token ids


class Encoder:
    """A tokenizer's way from pieces of text to token ids.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special: dict[str, int] = {
            text: int(tokenizer.convert_tokens_to_ids(text)) for text in {*added, *tokenizer.all_special_tokens} if text
        }
        longest = sorted(self.special, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, longest)) or "(?!)")  # which matches nothing
        # Some special tokens take the white space beside them along
        ways = [
            (r"\s*" if getattr(added.get(text), "lstrip", False) else "")
            + re.escape(text)
            + (r"\s*" if getattr(added.get(text), "rstrip", False) else "")
            for text in longest
        ]
        self._real = re.compile(f"(?<!{MARK})({'|'.join(ways) or '(?!)'})")

    def typed(self, text: str) -> bool:
        """Whether a special token is written out in this text."""
        return self._typed.search(text) is not None

    def as_text(self, text: str) -> str:
        """The same with its special tokens marked, so that they are encoded as characters."""
        return self._typed.sub(lambda found: MARK + MARK.join(found[0]), text)

    def encode(self, rows: Sequence[Sequence[Piece | Given]]) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of all pieces of all rows. A row's pieces are one text; each is tokenised by itself.

        Args:
            rows: a piece may be token ids already, before which no text can stand.

        Returns:
            Ids (total,) int32, end to end; and how many each piece has, (pieces,) int64, row by row.
        """
        texts: dict[tuple[bool, str], int] = {}  # each is encoded once, and many recur: what a template says
        parts: list[int] = []  # a place in `texts`, or below 0 a special token
        owners: list[int] = []  # which piece a part belongs to
        special, cut, middle, after = self.special, self._real.split, not self._prefixes, self._opens_after_special
        piece = 0
        for row in rows:
            opens = True  # a text's beginning may be tokenised in its own way
            for text, _ in row:
                if not isinstance(text, str):
                    parts += [~token for token in text]
                    owners += [piece] * len(text)
                    piece += 1
                    continue
                for number, part in enumerate(cut(text)):
                    if number % 2:
                        found = special.get(part)
                        parts.append(~(special[part.strip()] if found is None else found))
                        opens = after
                    elif part:
                        parts.append(texts.setdefault((opens, part), len(texts)))
                        opens = middle
                    else:
                        continue
                    owners.append(piece)
                piece += 1
        ids = self._ids(list(texts))
        flat = [ids[part] if part >= 0 else (~part,) for part in parts]
        lengths = np.fromiter(map(len, flat), dtype=np.int64, count=len(flat))
        tokens = np.fromiter(chain.from_iterable(flat), dtype=np.int32, count=int(lengths.sum()))
        return tokens, np.bincount(np.asarray(owners, dtype=np.int64), lengths, piece).astype(np.int64)

    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text: the begin-of-text token, mostly, or nothing."""
        plain, whole = self._plain(["a"])[0], list(self.tokenizer("a")["input_ids"])
        starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    @cached_property
    def _prefixes(self) -> bool:
        """Whether a text's beginning is tokenised otherwise than its middle."""
        stem, text, both = self._plain([STEMS[0], "a", STEMS[0] + "a"])
        return both != stem + text

    @cached_property
    def _opens_after_special(self) -> bool:
        """Whether text after a special token is tokenised as a text's beginning is."""
        if not self.special or not self._prefixes:
            return True
        sample = next(iter(self.special))
        return list(self.tokenizer(sample + "a", add_special_tokens=False)["input_ids"])[1:] == self._plain(["a"])[0]

    def _ids(self, wanted: Sequence[tuple[bool, str]]) -> list[list[int]]:
        clean = [text.replace(MARK, "") if MARK in text else text for _, text in wanted]
        found: list[list[int]] = [[] for _ in wanted]
        for opens, encode in ((True, self._plain), (False, self._going_on)):
            places = [place for place, (own, _) in enumerate(wanted) if own is opens]
            for place, ids in zip(places, encode([clean[place] for place in places]), strict=True):
                found[place] = ids
        real = set(self.special.values())
        for place, (opens, text) in enumerate(wanted):
            if MARK in text and not real.isdisjoint(found[place]):
                # Some tokenizers have their special tokens among those of text (Unigram): no two characters together
                first = (self._plain if opens else self._going_on)([clean[place][0]])
                found[place] = [*chain(*first, *self._going_on(list(clean[place][1:])))]
        return found

    def _going_on(self, texts: Sequence[str]) -> list[list[int]]:
        """These as the middle of a text: what comes after a stem that no token joins with them."""
        found: list[list[int]] = [[] for _ in texts]
        open_ = list(range(len(texts)))
        for stem in STEMS if self._prefixes else ():
            start = self._plain([stem])[0]
            if not start:  # nothing of it is left to go on from
                continue
            encoded = self._plain([stem + texts[place] for place in open_])
            whole = {place: ids for place, ids in zip(open_, encoded, strict=True) if ids[: len(start)] == start}
            for place, ids in whole.items():
                found[place] = ids[len(start) :]
            open_ = [place for place in open_ if place not in whole]
        for place, ids in zip(open_, self._plain([texts[place] for place in open_]), strict=True):
            found[place] = ids
        return found

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """These as texts of their own, without begin or end, special tokens as characters."""
        how = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not texts:
            return [list(ids) for ids in self.tokenizer(list(texts), **how)["input_ids"]] if texts else []
        self.tokenizer(texts[0], **how)  # which tells the backend how, and what it finds is the first of these
        found: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            encoded = backend.encode_batch_fast(texts[start : start + TEXTS_AT_ONCE], add_special_tokens=False)
            found += [one.ids for one in encoded]
        return found
