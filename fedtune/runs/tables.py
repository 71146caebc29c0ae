"""A run's tables: CSV files that grow by lines, and of which a checkpoint says what they were when it was written.

Lines are appended and never changed, so a length and a hash say all of a file: whatever follows that length is of a
round that doesn't count, and whatever is before it has to be there, bit by bit. So a run can't go on over a table that
lost a round, or in which somebody changed a number.

An empty table is an absent one: the disk may be full when a file is made.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.errors import RunFolderError
from fedtune.core.files import sync_folder, write_atomically
from fedtune.runs import ledger
from fedtune.runs.ledger import LedgerRow
from fedtune.runs.metrics_columns import CLIENTS, CLOCK, FAILURES, METRICS, SIMILARITY

LEDGER = "ledger.csv"
COLUMNS = {
    "metrics.csv": METRICS,
    LEDGER: ledger.COLUMNS,
    "failures.csv": FAILURES,
    "clients.csv": CLIENTS,
    "clock.csv": CLOCK,
    "similarity.csv": SIMILARITY,
}
WORDS = ("direction", "part", "error", "device", "excluded_reason")  # the columns that don't hold numbers


@dataclass
class _Written:
    """What of a file is there."""

    length: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    synced: bool = True

    def add(self, content: bytes) -> None:
        self.length += len(content)
        self.digest.update(content)
        self.synced = False


class Tables:
    """The tables of one run folder.

    Every method that writes raises OSError if it can't; the file then still ends with a whole line.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._written = {name: _Written() for name in COLUMNS}

    def append(self, name: str, lines: str) -> None:
        """Add whole lines to a table."""
        if not lines:
            return
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if not os.fstat(descriptor).st_size:
                lines = csv_text([COLUMNS[name]]) + lines
            content = lines.encode()
            _write_all(descriptor, content)
            self._written[name].add(content)
        finally:
            os.close(descriptor)

    def settle(self) -> dict[str, list[Any]]:
        """Have all that was appended on the disk itself; returns each table's length in bytes and its SHA-256."""
        fresh = [name for name, written in self._written.items() if not written.synced]
        for name in fresh:
            descriptor = os.open(self._folder / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._written[name].synced = True
        if fresh:
            sync_folder(self._folder)  # where a new file's name is
        return {
            name: [written.length, written.digest.hexdigest()]
            for name, written in self._written.items()
            if written.length
        }

    def cut_back(self, name: str, round: int, settled: Mapping[str, Sequence[Any]]) -> None:
        """Make a table what it was after `round`.

        A killed run may have written lines of a round whose checkpoint it didn't reach; that round is run again. The
        ledger keeps what was said since then and belongs to no round that is run again: the greetings of a resume.

        Args:
            settled: what `settle` returned then; nothing before the first checkpoint.

        Raises:
            RunFolderError: if the table isn't what it was.
        """
        path = self._folder / name
        content = path.read_bytes() if path.exists() else b""
        length, sha256 = settled.get(name, (0, hashlib.sha256().hexdigest()))
        if len(content) < length or hashlib.sha256(content[:length]).hexdigest() != sha256:
            raise RunFolderError(
                f"{path} is not what this run wrote up to round {round}: {_what_changed(name, content, round)}. "
                "Put back what was there, or start a new run with another out="
            )
        rest = content[length:].splitlines(keepends=True) if name == LEDGER and length else []
        kept = content[:length] + b"".join(line for line in rest if _is_of(line, round))
        if not kept:
            path.unlink(missing_ok=True)
        elif kept != content:
            write_atomically(path, kept)
        self._written[name] = _Written()
        self._written[name].add(kept)
        self._written[name].synced = kept == content or not kept

    def entries(self) -> list[LedgerRow]:
        """The ledger."""
        return [ledger.parse(cells) for cells in read_lines(self._folder / LEDGER)[1:]]


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_lines(path: Path) -> list[list[str]]:
    """A table's lines, its header first; nothing if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        return list(csv.reader(stream))


def _is_of(line: bytes, round: int) -> bool:
    """Whether this is a whole line of the ledger, of that round or an earlier one."""
    with suppress(ValueError):
        return line.endswith(b"\n") and ledger.parse(line.decode().rstrip("\n").split(",")).round <= round
    return False


def _what_changed(name: str, content: bytes, round: int) -> str:
    """What is wrong with a table that is not what it was, as far as that can be told."""
    if not content:
        return "it is gone"
    try:
        header, *lines = csv.reader(io.StringIO(content.decode(), newline=""))
    except (UnicodeError, csv.Error) as error:
        return f"it is no CSV in UTF-8 ({error})"
    if header != list(COLUMNS[name]):
        return f"its first line should name the columns {','.join(COLUMNS[name])[:60]}..."
    rounds: set[int] = set()
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header):
            return f"line {number} has {len(cells)} of {len(header)} cells"
        for column, cell in zip(header, cells, strict=True):
            if column == "direction" and cell not in ledger.TOTALS:
                return f"line {number}, {column}: expected {' or '.join(ledger.TOTALS)}, got {cell[:40]!r}"
            if column in ("round", "client") and not cell.isdecimal():
                return f"line {number}, {column}: expected a number from 0 up, got {cell[:40]!r}"
            if column not in WORDS and cell and not _is_number(cell):
                return f"line {number}, {column}: expected a number, got {cell[:40]!r}"
        rounds.add(int(cells[0]))
    missing = [str(number) for number in range(round + 1) if number not in rounds]
    if missing and name in ("metrics.csv", LEDGER):
        return f"round {', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''} is not in it"
    return "lines were taken out or changed"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _write_all(descriptor: int, content: bytes) -> None:
    """One write where the system takes it whole. If it can't (a full disk), what it took is taken back, so that the
    file still ends with a whole line."""
    start = os.fstat(descriptor).st_size
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, start)
        raise
