"""What a run prints, and where: outputs that close or fill up, and systems without UTF-8."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import SMALL, summary_of

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "fedtune"]
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def piped(words, folder, read, **environment):
    """A command whose reader takes `read` lines and closes its end of the pipe; returns them, what was said on standard
    error, and the exit code."""
    start = subprocess.Popen if environment else forked.Popen  # a locale is what Python starts with
    process = start(
        [*COMMAND, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    lines = [process.stdout.readline() for _ in range(read)]
    process.stdout.close()
    return lines, process.stderr.read().decode(), process.wait(timeout=120)


def test_a_reader_that_closes_ends_the_printing_and_not_the_run(tmp_path):
    """As in `fedtune run ... | head -1`, on a system without UTF-8."""
    lines, said, code = piped(["run", *SMALL, "rounds=2", "out=run"], tmp_path, 1, **PLAIN)
    assert (said, code, len(lines)) == ("", 0, 1)
    assert summary_of(tmp_path / "run")["rounds"] == 2


@pytest.mark.parametrize(
    "words",
    [["methods"], ["run", "--help"], ["report", "--help"], ["plan", *SMALL, "population=mixed"], ["run", "x=1"]],
)
def test_a_reader_that_closes_at_once_costs_no_traceback(tmp_path, words):
    _, said, code = piped(words, tmp_path, 0)
    assert "Traceback" not in said
    assert "Broken" not in said
    assert code == (words[-1] == "x=1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_output_that_is_full_ends_the_printing(tmp_path):
    with Path("/dev/full").open("wb") as full:
        done = forked.run([*COMMAND, "methods"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """Python names every file of ours that is opened in the locale's encoding."""
    words = [sys.executable, "-X", "warn_default_encoding", "-m", "fedtune", "methods"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env={**os.environ, **PLAIN}, check=False)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert done.stdout
    assert not [line for line in said.splitlines() if "EncodingWarning" in line and str(ROOT / "fedtune") in line]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["fedtune", "strategies", "clients", "simulations"])
def test_every_text_file_is_opened_as_utf8(folder):
    """A scan: read_text, write_text and open of text name their encoding."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and not any(word.arg == "encoding" for word in node.keywords):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
                modes = [arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
                of_text = name == "open" and (not given or any(mode.strip("rwax+t") == "" for mode in modes))
                assert name not in ("read_text", "write_text"), f"{path}:{node.lineno}"
                assert not of_text, f"{path}:{node.lineno}"
