"""Tables that may be damaged: a run may be killed while it writes a line, and a disk may lose any part of a file.

What can be read is read, and what can't is said. A file that is whole takes the fast way, through pyarrow.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

BLOCK = 1 << 26  # bytes that pyarrow takes at once
SMALL = 1 << 14  # bytes of a file that csv reads sooner than pyarrow begins
# No count, size or time is as large, nor any score; what is, is damage, and would drown all it is added to
MOST, LARGEST = 2.0**53, 1e100
# What columns were called in folders of earlier versions
FORMER = {
    "peer": "client",
    "overhead_bytes": "overhead_bytes",
    "numbers": "trainable_params",
    "excluded_reason": "excluded_reason",
}


@dataclass(frozen=True)
class Columns:
    """Some columns of a table, all of the same length."""

    numbers: dict[str, np.ndarray]  # (n,) float64; NaN where there is none
    words: dict[str, tuple[np.ndarray, list[str]]]  # (n,) int64 places in a list of different words
    notes: tuple[str, ...]


def read_columns(
    path: Path, needed: Sequence[str], others: Sequence[str] = (), words: Sequence[str] = ()
) -> Columns | None:
    """Read some columns of a table; None where there is no such file.

    Args:
        needed: columns of numbers; a line that lacks one, or has none from 0 to MOST, is left out.
        others: columns of numbers that may be empty, or absent.
        words: columns of words.
    """
    if (found := _whole_lines(path)) is None:
        return None
    content, header, notes = found
    none = Columns({name: np.empty(0) for name in (*needed, *others)}, {name: _indexed([]) for name in words}, notes)
    if not header:
        return none
    if lacking := [name for name in (*needed, *words) if name not in header]:
        return Columns(none.numbers, none.words, (*notes, f"{path.name} has no column {', '.join(lacking)}"))
    numbers = [*needed, *(name for name in others if name in header)]
    read, bad = _fast(content, header, numbers, words) if len(content) > SMALL else None, 0
    if read is None:
        read, bad = _careful(content, header, numbers, words)
    table, texts = read
    good = np.ones(len(table[needed[0]]), bool)
    for name in numbers:
        table[name][~(np.abs(table[name]) <= LARGEST)] = np.nan
    for name in needed:
        good &= (table[name] >= 0) & (table[name] < MOST)
    bad += int((~good).sum())
    if bad:
        notes = (*notes, f"{path.name}: {_lines(bad)} can't be read")
        table = {name: column[good] for name, column in table.items()}
        texts = {name: (places[good], known) for name, (places, known) in texts.items()}
    for name in others:
        table.setdefault(name, np.full(int(good.sum()), np.nan))
    return Columns(table, texts, notes)


def read_lines(path: Path) -> tuple[list[str], list[list[str]], tuple[str, ...]]:
    """The header, the lines that have as many cells, and what was left out. Nothing where there is no such file."""
    if (found := _whole_lines(path)) is None:
        return [], [], ()
    content, header, notes = found
    rows = list(_rows(content))
    good = [cells for cells in rows if len(cells) == len(header)]
    if len(good) < len(rows):
        notes = (*notes, f"{path.name}: {_lines(len(rows) - len(good))} can't be read")
    return header, good, notes


def number(cell: str) -> float:
    """NaN if it isn't a finite one."""
    try:
        value = float(cell)
    except ValueError:
        return np.nan
    return value if abs(value) <= LARGEST else np.nan


def is_none(cell: str) -> bool:
    """Whether a cell of which no number comes is so on purpose."""
    return not cell or cell.strip().lower().lstrip("+-") in ("", "nan", "inf")


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def _whole_lines(path: Path) -> tuple[bytes, list[str], tuple[str, ...]] | None:
    """A file without what comes after its last line's end, the names in its first line, and what was cut; None where
    there is no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return b"", [], (f"{path.name} can't be read: {error.strerror or error}",)
    end = content.rfind(b"\n") + 1
    notes = (f"{path.name}: the last line is cut off",) if end < len(content) else ()
    content = content[:end]
    first = content[: content.find(b"\n") + 1]
    return content, [FORMER.get(name, name) for name in next(_cells(first), [])], notes


def _cells(content: bytes) -> Iterator[list[str]]:
    """Lines as cells, each line for itself, so that one with a stray quote spoils no other."""
    for line in content.decode(errors="replace").split("\n"):
        try:
            yield from csv.reader([line.rstrip("\r")])
        except csv.Error:
            yield []


def _rows(content: bytes) -> Iterator[list[str]]:
    """All but the first, without empty lines."""
    for line in content.split(b"\n")[1:]:
        if line.strip():
            yield next(_cells(line), [])


_Found = tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, list[str]]]]


def _fast(content: bytes, header: Sequence[str], numbers: Sequence[str], words: Sequence[str]) -> _Found | None:
    """None if anything in it isn't as it should be."""
    places = {name: f"{header.index(name)}" for name in (*numbers, *words)}
    text = pa.dictionary(pa.int32(), pa.string())
    types = {places[name]: pa.float64() for name in numbers} | {places[name]: text for name in words}
    try:
        table = pa_csv.read_csv(
            pa.py_buffer(content),
            pa_csv.ReadOptions(
                use_threads=False,
                block_size=BLOCK,
                skip_rows=1,
                column_names=[str(place) for place in range(len(header))],
            ),
            convert_options=pa_csv.ConvertOptions(include_columns=list(types), column_types=types),
        )
    except pa.ArrowInvalid:
        return None
    found = {name: table.column(places[name]).to_numpy().astype(np.float64) for name in numbers}
    texts = {}
    for name in words:
        column = table.column(places[name]).unify_dictionaries()
        known = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
        chunks = [chunk.indices.fill_null(0).to_numpy(zero_copy_only=False) for chunk in column.chunks]
        texts[name] = (np.concatenate([np.empty(0, np.int64), *chunks]).astype(np.int64), known)
    return found, texts


def _careful(content: bytes, header: Sequence[str], numbers: Sequence[str], words: Sequence[str]) -> tuple[_Found, int]:
    """Line by line, with the count of those that don't fit the header."""
    rows = list(_rows(content))
    good = [cells for cells in rows if len(cells) == len(header)]
    where = {name: header.index(name) for name in (*numbers, *words)}
    table = {name: np.array([number(cells[where[name]]) for cells in good], np.float64) for name in numbers}
    texts = {name: _indexed([cells[where[name]] for cells in good]) for name in words}
    return (table, texts), len(rows) - len(good)


def _indexed(words: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    known = dict.fromkeys(words)
    place = {word: index for index, word in enumerate(known)}
    return np.array([place[word] for word in words], np.int64), list(known)
