"""Files as rows: JSON lines, JSON, CSV, Parquet and folders that `datasets` saved."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedtune.core.errors import DataError
from fedtune.core.text import first_line
from fedtune.data.rows import Row

COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
SPARE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # beside data, not data


def ending(path: Path) -> str:
    """The file's format, `.jsonl` for `Mine.JSONL.gz`; empty if it isn't one of FORMATS."""
    stem = Path(path.name.lower())
    suffix = Path(stem.stem).suffix if stem.suffix in COMPRESSED else stem.suffix
    return suffix if suffix in FORMATS and (suffix != ".parquet" or stem.suffix == suffix) else ""


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def file_rows(path: Path, name: str, split: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        name: what messages call it.
        split: which part of a JSON file that has several.

    Raises:
        DataError: if it can't be read, naming the line where there is one.
    """
    try:
        yield from FORMATS[ending(path)](path, name, split)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): expected {path.suffix} in UTF-8") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged, or not {path.suffix}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def saved_rows(path: Path, name: str, split: str, label: str | None) -> Iterator[Row]:
    """The rows of a folder that `datasets` saved.

    Args:
        label: column whose numbers are to be told by their names, if it has names.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises whatever reading Arrow files does
        raise DataError(f"{name} can't be read as a folder that datasets saved: {first_line(error)}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{name} has no split '{split}': set data.split= to one of {', '.join(loaded)}")
        loaded = loaded[split]
    yield from dataset_rows(loaded, name, label)


def dataset_rows(loaded: Any, name: str, label: str | None) -> Iterator[Row]:
    """The rows of a `datasets` data set."""
    names = getattr((loaded.features or {}).get(label), "names", None)
    for number, row in enumerate(loaded):
        if names and row[label] is not None:
            row = {**row, label: names[row[label]] if row[label] >= 0 else None}
        yield f"{name} row {number}", dict(row)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    opener = COMPRESSED.get(path.suffix.lower())
    with (
        opener(path) if opener else path.open("rb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream,
    ):
        yield stream


def _jsonl(path: Path, name: str, split: str) -> Iterator[Row]:
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{name} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            yield where, _object(where, row)


def _json(path: Path, name: str, split: str) -> Iterator[Row]:
    with _opened(path) as stream:
        text = stream.read()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # an object a line, which the ending .jsonl would tell
            yield from _jsonl(path, name, split)
            return
        raise DataError(f"{name} is not JSON: {error}") from error
    rows = _json_rows(name, found, split) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise DataError(f"{name} should hold a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{name} item {number}"
        yield where, _object(where, row)


def _json_rows(name: str, found: dict[str, Any], split: str) -> Any:
    """The rows of a JSON object: a list under some name, lists by split or by user, or a list for each column."""
    lists = {key: value for key, value in found.items() if isinstance(value, list)}
    if splits := [key for key in found if key in SPLITS and isinstance(found[key], list | dict)]:
        if split not in splits:
            raise DataError(f"{name} has no split '{split}': set data.split= to one of {', '.join(splits)}")
        part = found[split]
        return _json_rows(name, part, split) if isinstance(part, dict) else part
    of_rows = {key: rows for key, rows in lists.items() if all(isinstance(row, dict) for row in rows)}
    if len(of_rows) == len(found) > 1:
        return [{"user": user, **row} for user, rows in of_rows.items() for row in rows]
    if len(lists) == len(found) and lists and not of_rows:
        return _transposed(name, lists)
    frames = {key: value for key, value in found.items() if isinstance(value, dict)}
    places = {tuple(value) for value in frames.values()}
    if len(frames) == len(found) and len(places) == 1 and all(map(str.isdecimal, *places)):  # as pandas' to_json has it
        return _transposed(name, {key: list(value.values()) for key, value in frames.items()})
    return next(iter(lists.values())) if len(lists) == 1 else found


def _transposed(name: str, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
        raise DataError(f"{name} has columns of unequal length: {told}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} should be an object with columns, got {type(row).__name__}")
    return row


def _csv(path: Path, name: str, split: str) -> Iterator[Row]:
    with _opened(path) as stream:
        header = stream.readline()
        stream.seek(0)
        rows = csv.DictReader(stream, strict=True, delimiter=_delimiter(header))
        try:
            for row in rows:
                where = f"{name} line {rows.line_num}"
                if None in row:
                    raise DataError(f"{where} has more cells than the header names")
                yield where, {name: value or None for name, value in row.items()}  # CSV has no null
        except csv.Error as error:
            raise DataError(f"{name} line {rows.line_num} is not CSV: {error}") from error


def _delimiter(header: str) -> str:
    """What parts a header into most names: a comma, a semicolon or a tabulator."""

    def names(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(",;\t", key=names)  # the first of equals


def _parquet(path: Path, name: str, split: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is not Parquet: {first_line(error)}") from error


FORMATS: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
KNOWN_ENDINGS = f"{', '.join(FORMATS)} (and {', '.join(COMPRESSED)} after them)"
