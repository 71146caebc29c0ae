"""The bundle that Flower sends to every device: all it needs to run, and nothing else."""

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

import fedtune

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_that_flower_reads_is_the_packages():
    # Flower needs it as a literal in pyproject.toml; the package may run from a bundle, where no metadata is installed
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fedtune.__version__


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_holds_the_code_the_settings_and_the_licence():
    bundle = build_fab_from_disk(ROOT)  # what `flwr run` calls; `flwr build` also minds the name of the folder
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = set(archive.namelist())
    rooms = ("fedtune", "strategies", "clients", "conf", "simulations")
    wanted = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted <= names
    assert names - wanted == {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}
    assert len(bundle) < 1_000_000  # a device downloads it before its first message
