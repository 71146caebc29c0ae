"""A comparison as tables for other programs: results.csv, results.parquet and summary.csv."""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from fedtune.core.atomic import write_atomically
from fedtune.core.csv_cells import FORMULA, guarded
from fedtune.report.labels import module
from fedtune.report.shapes import Comparison, Estimate, Group, Standing, Table
from fedtune.report.standings import protocols, table
from fedtune.runs.metrics_columns import METRICS
from fedtune.runs.read import Run

WHOLE = ("clients", "failed")  # columns of counts, beside those of bytes
WORDS = ("group", "label", "method", "codec_up", "codec_down")


def write_results(comparison: Comparison, folder: Path, reference: str | None = None) -> list[Path]:
    """Write all numbers: a line per run and round in results.csv and results.parquet, a line per standing of every
    table in summary.csv.

    Args:
        reference: the label that tables compare with, in the groups that have it.

    Raises:
        OSError: if they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = _results(comparison, folder)
    parquet = io.BytesIO()
    pa_parquet.write_table(results, parquet)
    contents = {
        "results.csv": _csv(results),
        "results.parquet": parquet.getvalue(),
        "summary.csv": _csv(_summary(comparison, reference)),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _results(comparison: Comparison, folder: Path) -> pa.Table:
    every = [(group, entry, run) for group in comparison.groups for entry in group.entries for run in entry.runs]
    columns = list(dict.fromkeys([*METRICS, *(name for _, _, run in every for name in run.metrics)]))
    own = ("seed", "folder", "spent_up_bytes", "spent_down_bytes", "seconds_since_start", "virtual", *WORDS)
    columns = [name for name in columns if name not in own]
    types = [(name, pa.string()) for name in WORDS]
    types += [("seed", pa.int64()), ("folder", pa.string())]
    types += [(name, pa.int64() if _is_whole(name) else pa.float64()) for name in columns]
    types += [("spent_up_bytes", pa.int64()), ("spent_down_bytes", pa.int64())]
    types += [("seconds_since_start", pa.float64()), ("virtual", pa.bool_())]
    schema = pa.schema(types)
    tables = [_lines(group, entry.label, run, folder, columns, schema) for group, entry, run in every]
    return pa.concat_tables([schema.empty_table(), *tables])


def _lines(group: Group, label: str, run: Run, folder: Path, columns: list[str], schema: pa.Schema) -> pa.Table:
    count = len(run.rounds)
    experiment = run.experiment
    words = (group.title, label, experiment.method_name, module(experiment.codec_up), module(experiment.codec_down))
    alike: dict[str, Any] = dict(zip(WORDS, words, strict=True))
    alike |= {"seed": experiment.seed, "folder": _relative(run.path, folder), "virtual": run.is_virtual}
    numbers = {name: run.metrics.get(name, np.full(count, np.nan)) for name in columns}
    numbers |= {f"spent_{way}_bytes": run.spent(way) for way in ("up", "down")}
    numbers["seconds_since_start"] = run.seconds()
    made = []
    for item in schema:
        if item.name in alike:
            made.append(pa.repeat(pa.scalar(alike[item.name], item.type), count))
            continue
        values = numbers[item.name]
        none = ~np.isfinite(values)
        if pa.types.is_integer(item.type):
            none |= np.abs(values) >= 2**63
        if pa.types.is_integer(item.type):
            values = np.where(none, 0, values).astype(np.int64)
        made.append(pa.array(values, item.type, mask=none))
    return pa.Table.from_arrays(made, schema=schema)


def _is_whole(column: str) -> bool:
    return column == "round" or (column in METRICS and (column in WHOLE or column.endswith("_bytes")))


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return str(path)


def _summary(comparison: Comparison, reference: str | None) -> pa.Table:
    lines = []
    for group in comparison.groups:
        named = reference if reference in [entry.label for entry in group.entries] else None
        for protocol in protocols(group):
            found = table(group, protocol, named)
            lines += [_line(group, found, standing) for standing in found.standings]
    scores = dict.fromkeys(name for line in lines for name in line)
    names = [*_FIXED, *(name for name in scores if name not in _FIXED)]
    types = {name: pa.int64() if name == "seeds" else pa.string() if name in _TEXTS else pa.float64() for name in names}
    return pa.table({name: pa.array([line.get(name) for line in lines], types[name]) for name in names})


_TEXTS = ("group", "protocol", "reference", "label", "method", "verdict")
_FIXED = ("group", "protocol", "limit", "reference", "label", "method", "seeds", "round", "verdict", "p")


def _line(group: Group, found: Table, standing: Standing) -> dict[str, Any]:
    line: dict[str, Any] = {
        "group": group.title,
        "protocol": found.protocol.kind,
        "limit": found.protocol.limit,
        "reference": found.reference,
        "label": standing.entry.label,
        "method": standing.entry.runs[0].experiment.method_name,
        "seeds": len(standing.entry.runs),
        "round": float(np.mean(standing.at)),
        "verdict": standing.verdict,
        "p": _number(standing.p),
    }
    estimates: dict[str, Estimate | None] = {"behind": standing.behind, **standing.scores}
    estimates |= {name: getattr(standing, name) for name in ("up_bytes", "down_bytes", "seconds", "memory_bytes")}
    for name, one in estimates.items():
        for part in ("mean", "low", "high"):
            line[f"{name}_{part}"] = None if one is None else _number(getattr(one, part))
    return line


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _csv(of: pa.Table) -> bytes:
    """For spreadsheets too: labels, folders and the names of strangers' columns are no formulas."""
    for place, item in enumerate(of.schema):
        if (
            pa.types.is_string(item.type)
            and pa_compute.any(pa_compute.match_substring_regex(of.column(place), FORMULA)).as_py()
        ):
            words = [None if word is None else guarded(word) for word in of.column(place).to_pylist()]
            of = of.set_column(place, item, pa.array(words, item.type))
    stream = io.BytesIO()
    pa_csv.write_csv(of.rename_columns([guarded(name) for name in of.column_names]), stream)
    return stream.getvalue()
