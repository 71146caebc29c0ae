"""A comparison as tables for other programs: results.csv, results.parquet and summary.csv."""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv

from fedtune.core.csv_cells import guarded
from fedtune.core.files import write_atomically
from fedtune.report.labels import module
from fedtune.report.shapes import Comparison, Estimate, Group, Standing, Table
from fedtune.report.standings import protocols, table
from fedtune.runs.metrics_columns import METRICS
from fedtune.runs.read import Run

COUNTS = ("round", "clients", "failed")  # columns of whole numbers, beside those of bytes
FIRST = ("group", "label", "method", "codec_up", "codec_down", "seed", "folder")  # columns of results, before those of
LAST = ("spent_up_bytes", "spent_down_bytes", "seconds_since_start", "virtual")  # metrics.csv, and after


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
    contents = {
        "results.csv": _csv(results),
        "results.parquet": results.to_parquet(index=False),
        "summary.csv": _csv(_summary(comparison, reference)),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _results(comparison: Comparison, folder: Path) -> pd.DataFrame:
    """A line per run and round. Empty is what isn't a finite number, and what a column of whole numbers can't hold."""
    every = [(group, entry, run) for group in comparison.groups for entry in group.entries for run in entry.runs]
    recorded = dict.fromkeys([*METRICS, *(name for _, _, run in every for name in run.metrics)])
    columns = [*FIRST, *(name for name in recorded if name not in FIRST + LAST), *LAST]
    frames = [_lines(group, entry.label, run, folder) for group, entry, run in every]
    found = (pd.concat(frames) if frames else pd.DataFrame()).reindex(columns=columns)
    numbers = [name for name in columns if name not in FIRST and name != "virtual"]
    found[numbers] = found[numbers].astype(float).where(np.isfinite)
    whole = [name for name in numbers if name in COUNTS or (name in METRICS + LAST and name.endswith("_bytes"))]
    found[whole] = np.trunc(found[whole]).where(found[whole].abs() < 2.0**63)
    return found.astype(dict.fromkeys(FIRST, "str") | dict.fromkeys([*whole, "seed"], "Int64") | {"virtual": bool})


def _lines(group: Group, label: str, run: Run, folder: Path) -> pd.DataFrame:
    """A line per round."""
    experiment = run.experiment
    codecs = module(experiment.codec_up), module(experiment.codec_down)
    alike = (group.title, label, experiment.method_name, *codecs, experiment.seed, _relative(run.path, folder))
    spent = run.spent("up"), run.spent("down"), run.seconds(), run.is_virtual
    own = dict(zip(FIRST + LAST, alike + spent, strict=True))
    return pd.DataFrame({**run.metrics, **own}, index=range(len(run.rounds)))


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return str(path)


def _summary(comparison: Comparison, reference: str | None) -> pd.DataFrame:
    lines = []
    for group in comparison.groups:
        named = reference if reference in [entry.label for entry in group.entries] else None
        for protocol in protocols(group):
            found = table(group, protocol, named)
            lines += [_line(group, found, standing) for standing in found.standings]
    return pd.DataFrame(lines, columns=None if lines else _FIXED)


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


def _csv(of: pd.DataFrame) -> bytes:
    """For spreadsheets too: labels, folders and the names of strangers' columns are no formulas."""
    texts = of.select_dtypes(exclude=["number", "bool"])
    safe = of.assign(
        **{name: texts[name].map({word: guarded(word) for word in texts[name].dropna().unique()}) for name in texts}
    )
    stream = io.BytesIO()
    pa_csv.write_csv(pa.Table.from_pandas(safe.rename(columns=guarded), preserve_index=False), stream)
    return stream.getvalue()
