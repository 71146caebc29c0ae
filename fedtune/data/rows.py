"""A row of a data file becomes a conversation, by the columns that it has.

A row keeps its place (file and line) so that a complaint can name it, and its other columns so that a partition can go
by them.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedtune.config.schema import DataSpec
from fedtune.core.errors import DataError
from fedtune.data.multiple_choice import CHOICES, is_question, prompt_of, read_choices

Message = dict[str, Any]  # {"role": "user", "content": "..."}, and perhaps tool_calls and what belongs to them
Row = tuple[str, dict[str, Any]]  # where it stands ("train.jsonl line 7"), and its columns

DIALOGUES = ("messages", "conversations", "conversation")
# Question and answer, and what is put after the question where the row has it
PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("prompt", "completion", ()),
    ("instruction", "output", ("input", "context")),
    ("instruction", "response", ("input", "context")),
    ("prompt", "response", ()),
    ("question", "answer", ("context",)),
    ("question", "response", ("context",)),
    ("input", "output", ()),
)
SYSTEM = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"ai": "assistant", "observation": "tool"}
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # of a turn, for templates that know them
KNOWN_COLUMNS = (
    "'messages' (or 'conversations'), or "
    + ", or ".join(f"'{prompt}' and '{completion}'" for prompt, completion, _ in PAIRS)
    + ", or 'question', 'choices' and 'answer', or 'text'"
)


@dataclass(frozen=True)
class Example:
    """One training example.

    Either a conversation, whose assistant turns are to be learnt, or plain text, which is learnt whole.
    """

    messages: tuple[Message, ...]  # empty for plain text
    text: str
    columns: Mapping[str, Any]  # the row's other columns
    choices: tuple[str, ...] = ()  # what the answer may be, of a multiple-choice question
    right: int = 0  # the place of the right one, which is the conversation's answer
    tools: tuple[Any, ...] = ()  # descriptions of functions, for the chat template
    where: str = "a row"  # file and line


def reader(spec: DataSpec) -> Callable[[Row], Example]:
    """The function that turns this source's rows into examples, by the columns that they have.

    Raises:
        DataError: from that function, if a row lacks the needed columns, or has something else than text in them.
    """
    dotted = [name for name in (spec.prompt_column, spec.completion_column, spec.partition_by) if name and "." in name]

    def read(row: Row) -> Example:
        where, columns = row
        for name in dotted:
            if name not in columns:
                columns = _dug_out(columns, name)
        given = {name: value for name, value in columns.items() if value is not None}
        turns, text, used, choices, right = _read(where, columns, given, spec)
        system = next((name for name in SYSTEM if name in given and name != spec.partition_by), None)
        if system and turns and turns[0]["role"] != "system" and isinstance(given[system], str):
            used = (*used, system)
            if given[system].strip():
                turns = (_turn("system", given[system]), *turns)
        tools: Any = ()
        if turns and (tools := given.get("tools", ())):
            tools, used = tuple(_list(where, "tools", tools)), (*used, "tools")
        rest = {name: value for name, value in given.items() if name not in used}
        if spec.partition_by in columns:  # a label may be null
            rest.setdefault(spec.partition_by, columns[spec.partition_by])
        said = "".join([text, *(turn["content"] for turn in turns), *choices])
        if tools or not said.isascii() or any(len(turn) > 2 for turn in turns):  # else there is nothing to find
            _check_characters(where, (text, turns, choices, tools))
        return Example(turns, text, rest, choices, right, tools, where)

    return read


Found = tuple[tuple[Message, ...], str, tuple[str, ...], tuple[str, ...], int]


def _read(where: str, columns: Mapping[str, Any], given: Mapping[str, Any], spec: DataSpec) -> Found:
    """Turns, plain text, the columns that were used, and the choices with the place of the right one."""
    answered = spec.completion_column or not {"completion", *DIALOGUES}.isdisjoint(given)
    if not answered and is_question(given, spec.prompt_column):
        prompt = prompt_of(given, spec.prompt_column)
        choices, right = read_choices(where, given)
        turns = (_turn("user", _text(where, given, prompt)), _turn("assistant", choices[right]))
        return turns, "", (prompt, CHOICES), choices, right
    if spec.prompt_column or spec.completion_column:
        prompt, completion = spec.prompt_column or "prompt", spec.completion_column or "completion"
        for name in (prompt, completion):
            if name not in given:
                state = "null or empty" if name in columns else "missing"
                raise DataError(f"{where}: column '{name}' is {state}; the row has {', '.join(map(repr, given))}")
        return _pair(where, given, prompt, completion, ())
    # A column that is null stands for one that isn't there, unless no other way of reading the row is left
    for known in (given, columns):
        for name in DIALOGUES:
            if name in known:
                return _messages(where, name, known[name]), "", (name,), (), 0
        for prompt, completion, more in PAIRS:
            if prompt in known and completion in known:
                return _pair(where, known, prompt, completion, more)
        if "text" in known:
            return (), _text(where, known, "text"), ("text",), (), 0
    raise DataError(
        f"{where}: expected columns {KNOWN_COLUMNS}; got {', '.join(map(repr, given)) or 'none'}. "
        "Name others by data.prompt_column= and data.completion_column="
    )


def _pair(where: str, given: Mapping[str, Any], prompt: str, completion: str, more: tuple[str, ...]) -> Found:
    asked, answer = given[prompt], given[completion]
    if isinstance(asked, list):
        turns = _messages(where, prompt, asked)
    else:
        added = [str(given[name]) for name in more if name not in (prompt, completion) and given.get(name)]
        turns = (_turn("user", "\n\n".join([_text(where, given, prompt), *added])),)
    if isinstance(answer, list):
        turns += _messages(where, completion, answer)
    elif isinstance(answer, bool | int | float):  # a label
        turns += (_turn("assistant", json.dumps(answer)),)
    else:
        turns += (_turn("assistant", _text(where, given, completion)),)
    return turns, "", (prompt, completion, *more), (), 0


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(where: str, columns: Mapping[str, Any], name: str) -> str:
    value = columns[name]
    if value is None:
        raise DataError(f"{where}: column '{name}' is null or empty: expected text. Leave the row out, or fill it in")
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{name}' should be text, got {type(value).__name__}")
    return value


def _list(where: str, column: str, value: Any) -> list[Any]:
    if isinstance(value, str):  # CSV has no lists
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise DataError(f"{where}: column '{column}' should be a list, got {type(value).__name__}")
    return [_without_nulls(item) for item in value]


def _messages(where: str, column: str, value: Any) -> tuple[Message, ...]:
    """The turns of a dialogue, in OpenAI's words (role, content) or ShareGPT's (from, value)."""
    if isinstance(value, str):  # CSV has no lists
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        turns = [_message(f"{where}: column '{column}'", number, turn) for number, turn in enumerate(value, 1)]
        if all(turn is not None for turn in turns):
            return tuple(turn for turn in turns if turn is not None)
    if value is None:
        raise DataError(f"{where}: column '{column}' is null or empty: expected a list of turns")
    raise DataError(
        f"{where}: column '{column}' should be a list of {{'role': ..., 'content': ...}} with text in both "
        "(or 'from' and 'value')"
    )


def _message(column: str, number: int, turn: dict[str, Any]) -> Message | None:
    """None if it has no role."""
    named = turn.get("role", turn.get("from"))
    if not isinstance(named, str):
        return None
    kept = {name: turn[name] for name in KEPT if turn.get(name)}
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = _joined(f"{column}, turn {number}", content)
    if "tool_calls" in kept:
        content, kept["tool_calls"] = content or "", _calls(f"{column}, turn {number}", kept["tool_calls"])
    if content is None and ("content" in turn or "value" in turn):
        raise DataError(
            f"{column}, turn {number} ({named}): the content is null: expected text, or tool_calls beside it"
        )
    role = named.strip().lower()
    return {"role": ROLES.get(role, role), "content": content, **kept} if isinstance(content, str) else None


def _joined(where: str, parts: list[Any]) -> str:
    """The text of content that is a list of parts, as those of models that also see pictures."""
    for part in parts:
        if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: a part of its content is of type {kind}, and only text can be learnt from")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def _calls(where: str, calls: Any) -> list[Any]:
    """Calls of functions, with the arguments as an object: OpenAI has them as JSON, templates write JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: 'tool_calls' should be a list of objects")
    found = []
    for call in map(_without_nulls, calls):
        function = dict(call["function"]) if isinstance(call.get("function"), dict) else call
        if not isinstance(function.get("name"), str):
            raise DataError(f"{where}: one of 'tool_calls' has no function name")
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                function = {**function, "arguments": json.loads(function["arguments"])}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _without_nulls(value: Any) -> Any:
    """Without the keys that Parquet fills in because another row has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _dug_out(columns: dict[str, Any], name: str) -> dict[str, Any]:
    """With what stands under `meta.src`, say, as a column of that name; unchanged where nothing does."""
    value: Any = columns
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return columns
        value = value[part]
    return {**columns, name: value}


def _check_characters(where: str, value: Any) -> None:
    """A lone surrogate is half a character, which JSON can spell and no text can have."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: character {error.start + 1} of a text is U+{ord(value[error.start]):04X}, half of a "
                    "surrogate pair: the file was cut or written wrongly there"
                ) from error
    elif isinstance(value, dict):
        for item in value.values():
            _check_characters(where, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_characters(where, item)
