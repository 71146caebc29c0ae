"""A run's tables as data frames, read as `fedtune report` reads them: what can be read is, and what can't is said."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedtune.core.csv_cells import unguarded
from fedtune.runs.csv_columns import read_columns
from fedtune.runs.tables import COLUMNS, LEDGER, WORDS

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns that count, beside those of bytes; the others are measured
WHOLE = ("round", "client", "other", "clients", "failed", "bits", "batch_size", "steps", "layers", "trainable_params",
         "staleness", "tokens")  # fmt: skip
NEEDED = {
    LEDGER: ("round", "client", "payload_bytes", "wire_bytes")
}  # a line without is none; of others round and client


def read_frame(path: Path) -> "tuple[DataFrame, tuple[str, ...]]":
    """One of `fedtune.runs.tables.COLUMNS` with the columns of today, and what had to be left out of it.

    A table that isn't there has no lines; an empty cell is NaN.
    """
    from pandas import DataFrame

    columns = COLUMNS[path.name]
    needed = NEEDED.get(path.name, ("round", "client"))
    words = [name for name in columns if name in WORDS]
    others = [name for name in columns if name not in (*needed, *words)]
    found = read_columns(path, needed, others, words)
    if found is None:
        none = {
            name: np.empty(0, object if name in words else np.int64 if _counts(name) else np.float64)
            for name in columns
        }
        return DataFrame(none), ()
    table = {name: whole_where_it_can_be(name, values) for name, values in found.numbers.items()}
    for name, (places, known) in found.words.items():
        texts = np.array([unguarded(word) for word in known], dtype=object)
        table[name] = texts[places] if len(known) else np.empty(0, dtype=object)
    return DataFrame({name: table[name] for name in columns}), found.notes


def whole_where_it_can_be(name: str, values: np.ndarray) -> np.ndarray:
    """A column of counts as int64, if all of its cells have one; any other as it is, float64."""
    return values.astype(np.int64) if _counts(name) and np.isfinite(values).all() else values


def _counts(name: str) -> bool:
    return name in WHOLE or name.endswith("_bytes")
