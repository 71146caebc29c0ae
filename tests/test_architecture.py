"""The house rules that a scan can check."""

import ast
import re
from pathlib import Path

import pytest
from conftest import strategy_of, traits_of_method

from fedtune.config.compose import choices
from fedtune.config.targets import declared_traits

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "fedtune").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_knows_no_method(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"strategies", "clients", "simulations"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_only_two_files_use_flowers_private_parts(path):
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    private = {name for name in imports(path) if name.split(".")[0] == "flwr"} - public
    assert not private or path.name in {"flower_private.py", "http_overhead.py"}


def test_strategies_know_nothing_of_flower_codecs_or_config():
    for folder in ("strategies", "clients"):
        for path in (ROOT / folder).glob("*.py"):
            roots = set(imports(path))
            assert not any(
                name.startswith(("flwr", "hydra", "fedtune.config", "fedtune.wire", "fedtune.codecs")) for name in roots
            )


def test_every_strategy_opens_with_its_source_and_its_bytes():
    for path in (ROOT / "strategies").glob("[a-z]*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        control = declared_traits(strategy_of(path.stem)["_target_"]).control  # which comes from no paper
        for word in ("Down", "p_k", *(() if control else ("arXiv", "Departs"))):
            assert word in text, f"{path.name} lacks {word}"


@pytest.mark.slow
def test_no_pickle_and_no_tensor_files_that_can_hold_code():
    for path in [*CORE, *(ROOT / "strategies").glob("*.py"), *(ROOT / "clients").glob("*.py")]:
        assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(imports(path))
        assert "torch.load" not in path.read_text()


# From what everything is built on to what a person meets: a package imports those before it, and no other
ORDER = (
    "core", "config", "lowrank", "random_directions", "data", "models", "device", "training", "codecs", "wire",
    "planning", "evaluation", "runs", "workspace", "server", "export", "runtime", "report", "comparisons", "commands",
    "python_api",
)  # fmt: skip


def packages(path):
    """The packages of fedtune that a file names, wherever in it: in functions and for type checkers as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fedtune":
            yield from (alias.name for alias in node.names if alias.name in ORDER)
    yield from (name.split(".")[1] for name in imports(path) if name.startswith("fedtune."))


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_downwards_alone(package):
    below = ORDER[: ORDER.index(package) + 1]
    for path in (ROOT / "fedtune" / package).rglob("*.py"):
        upwards = {name for name in packages(path) if name not in below}
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}, which come after {package} in ORDER"


def test_every_module_is_in_a_package():
    folders = {path.parent.name for path in (ROOT / "fedtune").glob("*/__init__.py")}
    assert folders == set(ORDER)
    assert {path.name for path in (ROOT / "fedtune").glob("*.py")} == {"__init__.py", "__main__.py"}


def test_modules_stay_small():
    """One subject a file: whatever is longer than this is asked why."""
    for path in CORE:
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_docs_tell_of_every_method_what_its_class_says():
    """A line per method in docs/methods.md, whose column on mixed ranks is the trait."""
    table = {}
    for line in (ROOT / "docs" / "methods.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            table |= {name.strip("` "): cells for name in cells[0].split(",") if "=" not in name}
    assert table.keys() == set(choices("method"))
    for name, cells in table.items():
        if "base" not in strategy_of(name):  # else it is as what it is put around
            assert cells[5].startswith("yes" if traits_of_method(name).mixed_ranks else "no"), name


def public(node, name):
    """(name, docstring) of everything in a module that is public and documented, itself and methods included."""
    if text := ast.get_docstring(node):
        yield name, text
    for inner in node.body:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(inner, kinds) and not inner.name.startswith("_") and not isinstance(node, kinds[1:]):
            yield from public(inner, f"{name}.{inner.name}")


@pytest.mark.slow
def test_a_public_docstring_begins_with_a_sentence():
    """It ends with a full stop, and Args and Raises come after it: an API reference shows the sentence alone. Only a
    module's may begin with what it is about, as `fedtune report` or raFLoRA."""
    wrong = set()
    for path in sorted([*CORE, *(ROOT / "strategies").glob("*.py"), *(ROOT / "clients").glob("*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, text in public(ast.parse(path.read_text()), module):
            first = text.partition("\n\n")[0]
            section = re.match(r"(Args|Attributes|Raises|Returns|Yields|Example):", first)
            capital = name == module or re.match(r"[A-Z]", first)
            if section or not capital or not re.search(r"[.:?]$", first):
                wrong.add(name)
    assert not wrong
