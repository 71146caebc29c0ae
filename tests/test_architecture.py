"""The house rules that a scan can check."""

import ast
from pathlib import Path

import pytest
from conftest import strategy_of, traits_of_method

from fedtune.config.compose import choices

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
    assert not private or path.name in {"flower.py", "framing.py"}


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
        control = "control" in text.partition("\n")[0]  # which compares with a paper and comes from none
        for word in ("Down", "p_k", *(() if control else ("arXiv", "Departs"))):
            assert word in text, f"{path.name} lacks {word}"


def test_no_pickle_and_no_tensor_files_that_can_hold_code():
    for path in [*CORE, *(ROOT / "strategies").glob("*.py"), *(ROOT / "clients").glob("*.py")]:
        assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(imports(path))
        assert "torch.load" not in path.read_text()


def test_rooms_stay_small():
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
