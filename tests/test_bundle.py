"""The bundle that Flower sends to every device: all it needs to run, and nothing else."""

import io
import json
import os
import secrets
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

import fedtune
from fedtune.runtime.deploy import bundled
from simulations.fleet.parts import free_port
from simulations.fleet.processes import MARK, cut
from simulations.fleet.runs import script

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_that_flower_reads_is_the_packages():
    # Flower needs it as a literal in pyproject.toml; the package may run from a bundle, where no metadata is installed
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fedtune.__version__


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_holds_the_code_the_settings_and_the_licence():
    with bundled(ROOT) as app:
        bundle = build_fab_from_disk(app)  # what `flwr run` calls; `flwr build` also minds the name of the folder
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = set(archive.namelist())
    rooms = ("fedtune", "strategies", "clients", "conf", "simulations")
    wanted = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted <= names
    assert names - wanted == {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}
    assert len(bundle) < 1_900_000  # a device downloads it before its first message, and Flower doesn't compress it


@pytest.mark.slow
def test_flwr_run_plays_a_toy_on_the_nodes_that_flower_simulates(tmp_path, folder_for_ray):
    """`flwr run .`, as somebody types it who has read nothing, but for the rounds, which would all be alike; the daemon
    that it starts stays until it is ended."""
    mark = secrets.token_hex(8)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(script("flwr")).parent), os.environ["PATH"]]),
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray listens on every interface
        MARK: mark,
    }
    out = f"out={tmp_path / 'run'}"
    toy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]["overrides"]
    try:
        with bundled(ROOT) as app:
            command = [script("flwr"), "run", app, "--stream", "--run-config", f'overrides="{toy} rounds=1 {out}"']
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
            )
    finally:
        cut(mark)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["name"], summary["status"], summary["totals"]["failed"]) == ("flwr-run", "finished", 0)
