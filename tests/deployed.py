"""What the tests on real nodes share."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from conftest import rows

HERE = Path(__file__).parent
# Each node looks for work that often, in seconds, as Flower does unasked; ten times a second, four that wait take a
# third of a core from the tests beside them
CALMLY = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
# Flower's own commands, without what their packages import for other commands beside them: 1 of the 3 CPU seconds that
# the process of each message takes. Those as installed are in test_fleet.py
LEAN = """#!{python}
import importlib, importlib.util, sys, types

spec = importlib.util.find_spec("{package}")
bare = sys.modules["{package}"] = types.ModuleType("{package}")
bare.__path__, bare.__spec__ = spec.submodule_search_locations, spec
if __name__ == "__main__":
    sys.exit(importlib.import_module("{package}.{module}").{module}())
"""
COMMANDS = {"flwr-clientapp": "flwr.supernode.cli", "flower-superexec": "flwr.supercore.cli"}


def lean_commands(folder):
    """The environment of a fleet that finds these before the installed ones; they are written into the folder."""
    for name, package in COMMANDS.items():
        path = folder / name
        path.write_text(LEAN.format(python=sys.executable, package=package, module=name.replace("-", "_")))
        path.chmod(0o700)
    return {"PATH": os.pathsep.join([str(folder), sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}


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
