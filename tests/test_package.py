"""What is installed: a wheel that holds what the tree holds, and works from any folder."""

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import SMALL
from flwr.cli.build import build_fab_from_disk

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("fedtune", "strategies", "clients", "conf", "simulations")
BESIDE = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".gitignore")
BUILD = """
import os, tarfile
from setuptools import build_meta
archive = build_meta.build_sdist("../dist")
build_meta.build_wheel("../dist")
with tarfile.open(f"../dist/{archive}") as opened:
    opened.extractall("..", filter="data")
os.chdir(f"../{archive.removesuffix('.tar.gz')}")
build_meta.build_wheel("../again")
"""
# What people call, in one process
COMMANDS = """
import contextlib, importlib, io, pkgutil, re, sys
from importlib.metadata import distribution
from pathlib import Path

target, *words = sys.argv[1:]
(script,) = distribution("fedtune").entry_points
main = script.load()


def said(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main(words)
        except SystemExit as end:  # argparse's, after --help
            code = end.code
    assert not code, (words, code)
    return out.getvalue()


names = re.findall(r"^    ([a-z]+)(?: |$)", said("--help"), re.MULTILINE)
for name in names:
    assert "usage: " in said(name, "--help"), name
assert "fedit " in said("methods")
assert "held-out loss" in said("run", *words, "rounds=2", "out=run")
assert Path("run/adapter/adapter_model.safetensors").is_file()
for package in ("fedtune.comparisons", "fedtune.report", "fedtune.python_api"):
    importlib.import_module(package)
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")
page = sys.modules["fedtune.report.page"].render(sys.modules["fedtune.report.comparison"].load([Path("run")]))
assert "<style" in page  # all of a report but its pictures, which take seconds
ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ROOMS}
assert {name.split(".")[0] for name in ours} >= {"fedtune", "strategies", "clients"}
elsewhere = [module.__file__ for module in ours.values() if not Path(module.__file__).is_relative_to(target)]
print(*names)
print("elsewhere", elsewhere)
"""


def tree():
    """Every file of the five packages, as a wheel names it."""
    found = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built from, with tests beside it; building leaves files there."""
    folder = tmp_path_factory.mktemp("built") / "source"
    for name in (*ROOMS, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def dist(source):
    """The folder with the sdist and the wheel, and beside it again/ with the wheel that the sdist gives."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return source.parent / "dist"


def wheel_in(folder):
    (path,) = folder.glob("*.whl")
    return path


def files_of(wheel):
    """Those of the packages; the others are the distribution's own."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    return {name for name in names if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(dist):
    assert files_of(wheel_in(dist)) == tree()


def test_the_source_distribution_gives_the_same_wheel(dist):
    assert files_of(wheel_in(dist.parent / "again")) == tree()
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in names if name.split("/")[0] in ROOMS} == tree()
    assert {name.split("/")[0] for name in names} - set(ROOMS) == {
        *BESIDE[:-1], "PKG-INFO", "setup.cfg", "fedtune.egg-info"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flowers_bundle_holds_the_same_but_what_only_a_report_needs(source):
    """Flower takes code and settings; a device writes no page."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(source))) as archive:
        names = {name for name in archive.namelist() if name.split("/")[0] in ROOMS}
    assert names == {name for name in tree() if name.endswith((".py", ".yaml"))}
    assert all(name.startswith("fedtune/report/assets/") or name == "fedtune/py.typed" for name in tree() - names)


@pytest.fixture(scope="module")
def installed(dist):
    """A folder with the wheel alone."""
    target = dist.parent / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--target", str(target), str(wheel_in(dist))], check=True, timeout=120)
    return target


def python(installed, cwd, *words):
    """Python as it is where fedtune was installed: -S keeps out what makes an editable installation found."""
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    path = os.pathsep.join([str(installed), *libraries])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-S", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


def test_every_command_works_where_it_is_installed(installed, tmp_path):
    script = f"ROOMS = {ROOMS}\n{COMMANDS}"
    done = python(installed, tmp_path, "-c", script, str(installed), *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    names, elsewhere = done.stdout.splitlines()[-2:]
    assert set(names.split()) >= {
        "run", "compare", "plan", "export", "evaluate", "compress", "decompress", "report", "serve", "methods", "doctor"
    }  # fmt: skip
    assert elsewhere == "elsewhere []"


def test_python_m_fedtune_is_the_command(installed, tmp_path):
    done = python(installed, tmp_path, "-m", "fedtune", "--version")
    assert done.stdout == "fedtune 0.1.0\n"
    assert done.returncode == 0, done.stderr
