"""Conversations as text, by the tokenizer's chat template, cut where learning begins and ends.

What is learnt is what generation goes on with: before an answer stands the template's own generation prompt, to the
letter, and from there on the answer as the template finishes it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

from fedtune.config.schema import DataSpec
from fedtune.core.errors import DataError
from fedtune.data.encoder import Encoder, Piece
from fedtune.data.rows import Example, Message

PLACEHOLDER = "\x1aanswer\x1a"  # stands where an answer will; no text has it
ROWS_AT_ONCE = 1000  # whose renderings are in memory together
_TODAY = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Chat:
    """One tokenizer's way from examples to pieces of text.

    Args:
        spec: what is learnt (loss_on), the day that a template is told (date), and whether special tokens in the data
            are the real ones (parse_special).
        counts: what was done to how many rows, by a name of `row_counts.REMARKS`; filled as rows are read.
    """

    encoder: Encoder
    spec: DataSpec
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def template(self) -> str | None:
        """The template's source, with the day of `data.date` wherever it asks for today's; None: there is none."""
        if self.encoder.tokenizer.chat_template is None:
            return None
        day = date.fromisoformat(self.spec.date)
        source = str(self.encoder.tokenizer.get_chat_template())
        pinned = _TODAY.sub(lambda found: found[1] + day.strftime(found[2]) + found[1], source)
        if re.search(r"strftime_now\s*\(", pinned):
            raise DataError(
                "the tokenizer's chat template asks for the day in a format that isn't written out, so runs of two "
                "days would differ: write the day into the template"
            )
        return pinned

    def pieces(self, examples: Sequence[Example]) -> list[list[Piece]]:
        """Each example's text, cut where learning begins and ends; nothing where there is no answer to learn.

        Raises:
            DataError: for a row that the template refuses or can't show, naming it.
        """
        prepared = [self._prepared(example) for example in examples]
        if self.template is None:
            return [self._lines(example) for example in prepared]
        places = [answers(example.messages, self.spec.loss_on) for example in prepared]
        turns = [(example, place) for example, own in zip(prepared, places, strict=True) for place in own]
        before = iter(self._render([(example, example.messages[:place]) for example, place in turns], True))
        after = iter(self._render([(example, example.messages[: place + 1]) for example, place in turns], False))
        return [
            self._cut(example, [(place, next(before), next(after)) for place in own])
            if example.messages
            else self._lines(example)
            for example, own in zip(prepared, places, strict=True)
        ]

    def head(self, example: Example) -> list[Piece]:
        """What precedes the answer of an example that ends with it."""
        *asked, answer = example.messages
        anything = replace(example, messages=(*asked, {**answer, "content": PLACEHOLDER}))
        pieces = self.pieces([anything])[0]
        found = [place for place, (text, _) in enumerate(pieces) if PLACEHOLDER in text]
        if not found:
            raise DataError(
                f"{example.where}: the tokenizer's chat template changes an answer's text, so no choice can be put in "
                "its place"
            )
        before = pieces[found[-1]][0].partition(PLACEHOLDER)[0]
        return [*pieces[: found[-1]], *([(before, False)] if before else [])]

    def _prepared(self, example: Example) -> Example:
        """With typed special tokens marked, and system turns told by the user where the template takes none."""
        messages, text = example.messages, example.text
        if self.template is not None and any(turn["role"] == "system" for turn in messages) and not self._takes_system:
            messages = _told_by_the_user(messages)
            self.counts["system_folded"] += 1
        if not self.spec.parse_special and self.encoder.typed(_spoken(example)):
            messages, text, tools = map(self.marked, (messages, text, example.tools))
            self.counts["special_as_text"] += 1
            return replace(example, messages=messages, text=text, tools=tools)
        return example if messages is example.messages else replace(example, messages=messages)

    def marked(self, value: Any) -> Any:
        """The same with every special token that is spelled out in it marked as text."""
        if isinstance(value, str):
            return value if self.spec.parse_special else self.encoder.as_text(value)
        if isinstance(value, dict):
            return {key: self.marked(item) for key, item in value.items()}
        return type(value)(map(self.marked, value)) if isinstance(value, list | tuple) else value

    def _lines(self, example: Example) -> list[Piece]:
        """Without a template: questions are lines, answers end with the end of text."""
        end = self.encoder.tokenizer.eos_token
        if not example.messages:
            return [(example.text, True), *([(end, True)] if end else [])]
        places = answers(example.messages, self.spec.loss_on)
        self._count_empty(example, places)
        pieces: list[Piece] = []
        for place, turn in enumerate(example.messages[: places[-1] + 1] if places else ()):
            if turn.get("tool_calls"):
                raise DataError(f"{example.where}: 'tool_calls' need a chat template, and the tokenizer has none")
            learn = place in places or self.spec.loss_on == "all"
            if turn["role"] != "assistant":
                pieces.append((turn["content"] + "\n", learn))
            elif end or place < places[-1]:
                pieces += [(turn["content"], learn), (end or "\n", learn)]
            else:
                pieces.append((turn["content"], learn))
        return [piece for piece in pieces if piece[0]]

    def _cut(self, example: Example, turns: Sequence[tuple[int, str, str]]) -> list[Piece]:
        """A rendering for each answer's prompt, and one that has the answer too, made one text."""
        pieces: list[Piece] = []
        done = ""
        for place, before, after in turns:
            if not before.startswith(done):
                raise DataError(
                    f"{example.where}: the tokenizer's chat template renders earlier turns differently once later ones "
                    "follow, so they can't be learnt in one pass: data.loss_on=last learns each row's last answer. Or "
                    "give each answer a row of its own, or use another tokenizer"
                )
            same = _same(before, after)
            if same < len(before):
                # The generation prompt has what the finished turn lacks (an opened "thinking" part, say). How far they
                # agree is seen with another answer: this one may begin with the same letters
                answer = {**example.messages[place], "content": PLACEHOLDER}
                other = self._render([(example, (*example.messages[:place], answer))], False)[0]
                same = min(same, _same(before, other))
            pieces += [(before[len(done) :], self.spec.loss_on == "all"), (after[same:], True)]
            done = before + after[same:]
            self._check_calls(example, example.messages[place], after)
        if turns:
            told = example.messages[: turns[-1][0] + 1]
            self.counts["rewritten"] += not all(turn["content"].strip() in turns[-1][2] for turn in told)
            self._count_empty(example, [place for place, _, _ in turns])
        return [piece for piece in pieces if piece[0]]

    def _count_empty(self, example: Example, places: Sequence[int]) -> None:
        said = [example.messages[place] for place in places]
        self.counts["empty_answer"] += any(not turn["content"].strip() and not turn.get("tool_calls") for turn in said)

    def _check_calls(self, example: Example, turn: Message, shown: str) -> None:
        names = [call.get("function", call).get("name") for call in turn.get("tool_calls", ())]
        if missing := [name for name in names if str(name) not in shown]:
            raise DataError(
                f"{example.where}: the tokenizer's chat template leaves out 'tool_calls' (of {missing[0]}): use a "
                "tokenizer whose template has them, or leave such rows out"
            )

    @cached_property
    def _takes_system(self) -> bool:
        """Whether a system turn comes through the template."""
        asked: Turns = ({"role": "user", "content": "?"},)
        try:
            self._apply([asked], True)
        except Exception:
            return True  # a question alone is refused too, so it isn't the system turn
        try:
            return PLACEHOLDER in self._apply([({"role": "system", "content": PLACEHOLDER}, *asked)], True)[0]
        except Exception:
            return False

    def _render(self, asked: Sequence[tuple[Example, Turns]], generate: bool) -> list[str]:
        """Conversations as text, those without tools many at a time."""
        found: list[str] = []
        for start in range(0, len(asked), ROWS_AT_ONCE):
            some = asked[start : start + ROWS_AT_ONCE]
            if not any(example.tools for example, _ in some):
                try:
                    found += self._apply([messages for _, messages in some], generate)
                    continue
                except Exception:  # templates raise what their authors chose; which row it was is found out below
                    pass
            found += [self._render_one(example, messages, generate) for example, messages in some]
        return found

    def _render_one(self, example: Example, messages: Turns, generate: bool) -> str:
        try:
            return self._apply([messages], generate, list(example.tools) or None)[0]
        except Exception as error:
            roles = [turn["role"] for turn in messages]
            raise DataError(
                f"{example.where}: the tokenizer's chat template refuses {roles}: {error}. Change or leave out this row"
            ) from error

    def _apply(self, conversations: Sequence[Turns], generate: bool, tools: list[Any] | None = None) -> list[str]:
        rendered = self.encoder.tokenizer.apply_chat_template(
            [list(messages) for messages in conversations],
            tools=tools,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generate,
        )
        return [str(text) for text in rendered]


def answers(messages: Turns, loss_on: str) -> list[int]:
    """Which turns are learnt: the assistant's that come after something, or only the last of them."""
    places = [place for place, turn in enumerate(messages) if place and turn["role"] == "assistant"]
    return places[-1:] if loss_on == "last" else places


def _told_by_the_user(messages: Turns) -> Turns:
    """With each system turn put before the next question, an empty line between them."""
    turns: list[Message] = []
    waiting: list[str] = []
    for turn in messages:
        if turn["role"] == "system":
            waiting.append(turn["content"])
        elif turn["role"] == "user" and waiting:
            turns.append({**turn, "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            turns.append(turn)
    return tuple(turns) if not waiting else messages


def _spoken(example: Example) -> str:
    """All that the row says, in one string."""
    parts = [example.text, *(turn["content"] for turn in example.messages)]
    if example.tools or any(len(turn) > 2 for turn in example.messages):
        parts += _texts((example.tools, *example.messages))
    return "\0".join(parts)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _same(one: str, other: str) -> int:
    """How many characters at their beginnings are the same."""
    return (
        len(one)
        if other.startswith(one)
        else next(i for i, (a, b) in enumerate(zip(one, other + "\0", strict=False)) if a != b)
    )
