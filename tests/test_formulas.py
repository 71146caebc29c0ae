"""Cells that a spreadsheet would take for a formula stay text; numbers stay numbers."""

import csv
import io
import json
import shutil
from dataclasses import replace

import pyarrow.parquet as parquet
import pytest
from conftest import small
from fedtune.workspace.workspace import Party
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.csv_cells import guarded, unguarded
from fedtune.core.protocol import ClientInfo
from fedtune.plan_view import Planned, table_of
from fedtune.report.comparison import load, write_results

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''@x")
BEGINNINGS = tuple("=+-@\t\r\n")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_becomes_text(text):
    assert guarded(text) == f"'{text}"
    assert unguarded(guarded(text)) == text


@pytest.mark.parametrize("text", ["-1.5", "+3", "-1e-05", "-inf", "0", "fedit", "fedit train.lr=0.1", "", "'quoted'"])
def test_a_number_and_a_word_stay(text):
    assert guarded(text) == unguarded(text) == text


@given(st.text(alphabet="=+-@\t\r\n'1e.ax ", max_size=6))
def test_no_text_begins_a_formula_and_none_is_lost(text):
    cell = guarded(text)
    assert unguarded(cell) == text
    if cell.startswith(BEGINNINGS):
        float(cell)


def test_results_of_strangers_hold_no_formula(shared_run, tmp_path):
    """A label from comparison.json, a run's folder and a column of metrics.csv; Parquet, which nobody opens as a sheet,
    has them as they are."""
    shutil.copytree(shared_run(rounds=1), tmp_path / "=run", ignore=shutil.ignore_patterns("checkpoint"))
    label, column = '=HYPERLINK("http://x")', "@SUM(1)"
    cell = {"label": label, "folder": "=run", "seed": 0, "status": "done"}
    (tmp_path / "comparison.json").write_text(json.dumps({"cells": [cell]}))
    path = tmp_path / "=run" / "metrics.csv"
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{first},{column}", *(f"{line},-1.5" for line in lines), ""]))
    found = load([tmp_path])
    assert found.groups[0].entries[0].label == label
    results, typed, summary = write_results(found, tmp_path)
    for file in (results, summary):
        with file.open(newline="") as stream:
            for row in csv.reader(stream):
                for text in row:
                    assert not text.startswith(BEGINNINGS) or float(text) <= 0
    with results.open(newline="") as stream:
        for row in csv.DictReader(stream):
            assert (unguarded(row["label"]), unguarded(row["folder"])) == (label, "=run")
            assert float(row[f"'{column}"]) == -1.5
    assert parquet.read_table(typed)["label"].to_pylist() == [label] * 2
    assert column in parquet.read_schema(typed).names


def test_a_plan_holds_no_formula(tmp_path):
    workspace = Party(small(out=tmp_path))
    peer = ClientInfo(0, 5, capability=replace(ClientInfo(0, 5).capability, device="=1+1"))
    (row,) = csv.DictReader(io.StringIO(table_of(workspace, [Planned(peer, {}, None, "-too small")])))
    assert row["device"] == "'=1+1"
    assert "'-too small" in row.values()
