"""Read fine-tuning data: a source yields rows, a row becomes a conversation.

A row keeps its place (file and line) so that a complaint can name it, and its other columns so that a partition can go
by them.
"""

import csv
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.choices import CHOICES, is_question, prompt_of, read_choices
from fedtune.errors import DataError
from fedtune.schema import DataSpec, SafeLoader

Message = dict[str, str]  # {"role": "user", "content": "..."}
Row = tuple[str, dict[str, Any]]  # where it stands ("train.jsonl line 7"), and its columns

KNOWN_COLUMNS = (
    "'messages', or 'prompt' and 'completion', or 'instruction' and 'output', or 'question', 'choices' and 'answer', "
    "or 'text'"
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


def load_examples(spec: DataSpec) -> list[Example]:
    """Every example of the source that `spec` names, in the source's order.

    Raises:
        DataError: if the source can't be read, is empty, or a row lacks the needed columns (naming file and line).
    """
    read = reader(spec)
    examples = [example for row in _rows(spec) if (example := read(row)) is not None]
    if not examples:
        raise DataError(f"data {spec.path or spec.name} has no usable rows: expected at least one")
    return examples


def describe_source(spec: DataSpec) -> str:
    """Where the data comes from, for the run's record."""
    if spec.path is None and spec.name == "chatterbot":
        return f"pypi:chatterbot-corpus=={importlib.metadata.version('chatterbot-corpus')}"
    path = Path(str(spec.path)).expanduser()
    return f"file:{path.resolve()}" if path.exists() else f"hub:{spec.path}"


def reader(spec: DataSpec) -> Callable[[Row], Example | None]:
    """The function that turns this source's rows into examples, by the columns that they have."""

    def read(row: Row) -> Example | None:
        where, columns = row
        given = {name: value for name, value in columns.items() if value is not None}
        answered = spec.completion_column or not {"completion", "messages"}.isdisjoint(given)
        if not answered and is_question(given, spec.prompt_column):
            return question(where, given, prompt_of(given, spec.prompt_column))
        if spec.prompt_column or spec.completion_column:
            return pair(where, given, spec.prompt_column or "prompt", spec.completion_column or "completion")
        if "messages" in given:
            return Example(_messages(where, "messages", given["messages"]), "", _rest(given, "messages"))
        if "prompt" in given and "completion" in given:
            return pair(where, given, "prompt", "completion")
        if "instruction" in given and "output" in given:
            asked = _text(where, given, "instruction")
            if more := given.get("input"):
                asked = f"{asked}\n\n{more}"
            turns = (_turn("user", asked), _turn("assistant", _text(where, given, "output")))
            return Example(turns, "", _rest(given, "instruction", "input", "output"))
        if "text" in given:
            return Example((), _text(where, given, "text"), _rest(given, "text"))
        raise DataError(
            f"{where}: expected columns {KNOWN_COLUMNS}; got {', '.join(map(repr, given)) or 'none'}. "
            "Name others by data.prompt_column= and data.completion_column="
        )

    def question(where: str, given: dict[str, Any], prompt: str) -> Example:
        choices, right = read_choices(where, given)
        turns = (_turn("user", _text(where, given, prompt)), _turn("assistant", choices[right]))
        return Example(turns, "", _rest(given, prompt, CHOICES), choices, right)

    def pair(where: str, given: dict[str, Any], prompt: str, completion: str) -> Example:
        for name in (prompt, completion):
            if name not in given:
                raise DataError(f"{where}: column '{name}' is missing; the row has {', '.join(map(repr, given))}")
        asked, answer = given[prompt], given[completion]
        turns = (
            _messages(where, prompt, asked)
            if isinstance(asked, list)
            else (_turn("user", _text(where, given, prompt)),)
        )
        turns += (
            _messages(where, completion, answer)
            if isinstance(answer, list)
            else (_turn("assistant", _text(where, given, completion)),)
        )
        return Example(turns, "", _rest(given, prompt, completion))

    return read


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _rest(columns: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if name not in used}


def _text(where: str, columns: Mapping[str, Any], name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{name}' should be text, got {type(value).__name__}")
    return value


def _messages(where: str, column: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):  # CSV has no lists
        with suppress(ValueError):
            value = json.loads(value)
    whole = isinstance(value, list) and bool(value)
    if not whole or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        raise DataError(
            f"{where}: column '{column}' should be a list of {{'role': ..., 'content': ...}} with text in both"
        )
    return tuple(_turn(turn["role"], turn["content"]) for turn in value)


def _rows(spec: DataSpec) -> Iterator[Row]:
    if spec.path is None:
        if spec.name == "chatterbot":
            return _chatterbot()
        raise DataError(f"data={spec.name} names no source: give data.path= a file or a hub id, or data=chatterbot")
    path = Path(spec.path).expanduser()
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(f"data.path={spec.path}: expected one of {', '.join(FORMATS)}, got '{path.suffix}'")
        return _file(path)
    if path.is_dir():
        raise DataError(f"data.path={spec.path} is a folder: expected a file ({', '.join(FORMATS)}) or a hub id")
    if path.suffix in FORMATS or spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1:
        raise DataError(f"data.path={spec.path} does not exist: expected a file ({', '.join(FORMATS)}) or a hub id")
    return _hub(spec)


def _file(path: Path) -> Iterator[Row]:
    try:
        yield from FORMATS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): expected {path.suffix} in UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            yield where, _object(where, row)


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path.name} is not JSON: {error}. One object a line wants the ending .jsonl") from error
    if isinstance(rows, dict):  # {"data": [...]}, as many sets on the hub have it
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise DataError(f"{path.name} should hold a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path.name} item {number}"
        yield where, _object(where, row)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} should be an object with columns, got {type(row).__name__}")
    return row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            for row in rows:
                where = f"{path.name} line {rows.line_num}"
                if None in row:
                    raise DataError(f"{where} has more cells than the header names")
                yield where, {name: value for name, value in row.items() if value is not None and value != ""}
        except csv.Error as error:
            raise DataError(f"{path.name} line {rows.line_num} is not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} is not Parquet: {str(error).splitlines()[0]}") from error


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub(spec: DataSpec) -> Iterator[Row]:
    import datasets

    assert spec.path is not None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(spec.path, spec.subset, split=spec.split)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path={spec.path} is neither a file here nor to be had from the Hugging Face hub: {reason} "
            "Check the name, data.subset, data.split and the network"
        ) from error
    for number, row in enumerate(loaded):
        yield f"{spec.path} {spec.split} row {number}", dict(row)


def _chatterbot() -> Iterator[Row]:
    """The first exchange of each conversation of the English corpus, with its file's name as the topic.

    Later lines are sometimes a dialogue and sometimes other answers to the first question; nothing in the files tells
    which, so they are left out.
    """
    found = importlib.util.find_spec("chatterbot_corpus")  # located, not imported
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "data=chatterbot wants its text: pip install --no-deps chatterbot-corpus==1.3.3, or give data.path="
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "data" / "english"
    for file in sorted(folder.glob("*.yml")):
        for number, turns in enumerate(yaml.load(file.read_bytes(), SafeLoader)["conversations"], 1):
            if isinstance(turns, list) and len(turns) >= 2:
                question, answer = str(turns[0]).strip(), str(turns[1]).strip()
                if question and answer:
                    yield (
                        f"{file.name} conversation {number}",
                        {"prompt": question, "completion": answer, "topic": file.stem},
                    )
