"""What the tests on real nodes share."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import rows

HERE = Path(__file__).parent
# Each node looks for work that often, in seconds, as Flower does unasked; ten times a second, four that wait take a
# third of a core from the tests beside them
CALMLY = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def call(fleet, *arguments):
    """`fedtune run ...` of this checkout, which need not be the one that is installed, as the operator of the fleet."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedtune", "run", *arguments],
        cwd=fleet.operator,
        env={**fleet.environment(fleet.operator, f"{fleet.mark}/operator"), **PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(fleet, *arguments, seconds=240):
    process = call(fleet, *arguments)
    out, _ = process.communicate(timeout=seconds)
    faults = [line for line in fleet.superlink.log().splitlines() if "ERROR" in line] if process.returncode else []
    return process.returncode, "\n".join([out, *faults[-10:]])


def failures(folder):
    return {(int(row["round"]), int(row["client"])): row["error"] for row in rows(folder, "failures.csv")}
