"""What settings may have made: `_target_`, a class, and its arguments.

Whoever types a class on their own command line may have any of their own made. For whatever came from elsewhere, as a
run's config over the wire, a .fedtune file or another's run folder, there is a table: the dataclasses that stand in the
files of strategies/, clients/ and fedtune/codecs/, and those that conf/*.yaml names. It is read from the files, so a
method of one's own that is put there is in it, and no class is imported to find out whether it may be.

A name is MODULE.CLASS and is followed no further: `fedtune.models.base.os.system` begins with fedtune, too. Nothing
else of Hydra's is understood here: no `_args_`, no `_partial_`, no resolvers.
"""

import ast
import importlib
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError, FedtuneError
from fedtune.core.method_traits import Traits
from fedtune.core.text import first_line

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("strategies", "clients", "fedtune/codecs")
TARGET = "_target_"
NESTED = ("base", "rules")  # arguments that are made as well: what a server optimizer is around, and a method's rules
DEEPEST = 3  # a method around a method around its rules
MAX_LIST = 100_000  # values

# What a strategy, a client or a codec is known by, by the last part of the setting that names it
METHODS = {
    "strategy": ("init", "configure", "validate", "aggregate"),
    "base": ("init", "configure", "validate", "aggregate"),
    "client": ("receive", "train"),
    "codec_up": ("encode", "decode"),
    "codec_down": ("encode", "decode"),
    "codec": ("encode", "decode"),
}

_DATACLASS = re.compile(r"^@dataclass\b.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)
_NAMED = re.compile(r"\b_target_:\s*['\"]?([\w.]+)")


@cache
def table() -> frozenset[str]:
    """The classes that anybody's settings may have made."""
    found: set[str] = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).glob("*.py"):
            module = f"{folder.replace('/', '.')}.{file.stem}"
            found.update(f"{module}.{name}" for name in _DATACLASS.findall(file.read_text(encoding="utf-8")))
    for file in (ROOT / "conf").rglob("*.yaml"):
        found.update(_NAMED.findall(file.read_text(encoding="utf-8")))
    return frozenset(found)


def name_of(target: str) -> str:
    """What a class is called by those who choose it: of fedtune's own the file, which is the name under `method=`,
    `codec=` and `server_optimizer=`; of another the class."""
    module, _, name = target.rpartition(".")
    folder, _, file = module.rpartition(".")
    return file if folder.replace(".", "/") in FOLDERS else name


def called(made: object) -> str:
    """How what was made is called: `name_of` of its class."""
    return name_of(f"{type(made).__module__}.{type(made).__qualname__}")


@cache
def declared_traits(target: str) -> Traits:
    """What a strategy's class declares as its `traits` (or, of a server optimizer, as its `title`), read from its file:
    no module is imported, and torch isn't. Of a class that isn't found, or declares anything else, all is as by
    default, but for the title, which is then the class's name.
    """
    given = _declared(target, set()) if _is_name(target) else {}
    return Traits(**{"title": target.rpartition(".")[2], **given})


def _declared(target: str, seen: set[str]) -> dict[str, Any]:
    """The arguments of the class's `Traits(...)`, or of that of the first base that has some."""
    module, _, name = target.rpartition(".")
    if target in seen or (tree := _parsed(module)) is None:
        return {}
    seen.add(target)
    made = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if made is None:
        return {}
    for node in made.body:
        match node:
            case (
                ast.AnnAssign(target=ast.Name(id=field), value=value)
                | ast.Assign(targets=[ast.Name(id=field)], value=value)
            ):
                match field, value:
                    case "title", ast.Constant(value=str(title)):
                        return {"title": title}
                    case "traits", ast.Call(func=ast.Name(id="Traits"), keywords=said):
                        return _plain(said)
    places = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    bases = [base.id for base in made.bases if isinstance(base, ast.Name)]
    return next(filter(None, (_declared(places.get(base, f"{module}.{base}"), seen) for base in bases)), {})


def told_of(target: str) -> str:
    """What the file of a class says at its top; "" if it isn't found."""
    tree = _parsed(target.rpartition(".")[0])
    return (ast.get_docstring(tree) if tree else None) or ""


def _plain(arguments: Sequence[ast.keyword]) -> dict[str, Any]:
    """Those of the arguments that are `Traits`' and plain values."""
    known = {item.name for item in fields(Traits)}
    return {
        item.arg: item.value.value
        for item in arguments
        if item.arg in known and isinstance(item.value, ast.Constant) and isinstance(item.value.value, bool | str)
    }


@cache
def _parsed(module: str) -> ast.Module | None:
    """A module's file, if there is a readable one below fedtune's own folder or on Python's path."""
    for root in (ROOT, *map(Path, sys.path)):
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        if file.is_file():
            try:
                return ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                return None
    return None


def make(spec: Mapping[str, Any], what: str, allowed: Collection[str] | None = None) -> Any:
    """Make the object that a `_target_` entry describes.

    Args:
        what: the setting's key, for messages.
        allowed: the settings came from elsewhere, and may have these made besides those of the table; None: they are
            this user's own.

    Raises:
        ConfigError: if it may not be made, can't be found, or refuses its arguments.
    """
    if allowed is not None:
        check(spec, what, allowed)
    return _made(spec, what, allowed is not None)


def check(spec: Any, what: str, allowed: Collection[str] = (), depth: int = 0) -> None:
    """Look at settings that came from elsewhere, before anything of them is made.

    Raises:
        ConfigError: if they name a class that is neither in the table nor allowed, or are more than a class and plain
            values.
    """
    if not isinstance(spec, Mapping) or depth >= DEEPEST:
        raise ConfigError(f"{what} should be a class and its settings, as {{_target_: MODULE.CLASS}}: {_cut(spec)}")
    target = spec.get(TARGET)
    if not isinstance(target, str) or (target not in table() and target not in allowed):
        raise ConfigError(
            f"{what} wants {_cut(target)} made. What came from elsewhere (a run's config, a .fedtune file, a run "
            "folder) may name the dataclasses of strategies/, clients/ and fedtune/codecs/ that are installed here, "
            "and nothing else. If it is yours, say so to the process that refuses: "
            f"FEDTUNE_TARGETS={target if _is_name(target) else 'MODULE.CLASS'}"
        )
    for name, value in spec.items():
        if name == TARGET:
            continue
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w{0,63}", name):
            raise ConfigError(f"{what}: {target} has no setting {_cut(name)}")
        if isinstance(value, Mapping) and name in NESTED:
            check(value, f"{what}.{name}", allowed, depth + 1)
        elif not _is_plain(value):
            raise ConfigError(f"{what}.{name} should be a plain value or a list of such, got {_cut(value)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LIST and all(item is None or isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _made(spec: Mapping[str, Any], what: str, strict: bool) -> Any:
    target = str(spec.get(TARGET))
    try:
        kind = _found(target, strict)
        given = {str(name): value for name, value in spec.items() if name != TARGET}
        for name, value in given.items():
            if isinstance(value, Mapping) and TARGET in value:
                given[name] = _made(value, f"{what}.{name}", strict)
        _check_arguments(kind, given, what)
        made = kind(**given)
    except FedtuneError:
        raise
    except Exception as error:  # a class of one's own raises whatever it does
        raise ConfigError(f"{what}: {_cut(target, False)} can't be made: {first_line(error)}") from error
    for name in METHODS.get(what.rpartition(".")[2], ()):
        if not hasattr(made, name):
            raise ConfigError(f"{what}: {target} is none: it has no '{name}'")
    return made


def _found(target: str, strict: bool) -> Any:
    module, _, name = target.rpartition(".")
    if not _is_name(target):
        raise ValueError("expected MODULE.CLASS")
    found = getattr(importlib.import_module(module), name)
    if strict and not (isinstance(found, type) and is_dataclass(found)):
        raise TypeError("it is no dataclass")
    return found


def _check_arguments(kind: Any, given: Mapping[str, Any], what: str) -> None:
    """Raises:
    ValueError: for an argument that a dataclass hasn't got.
    ConfigError: by its key, for one that is of another type than the class says.
    """
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return
    known = [item.name for item in fields(kind) if item.init]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"it has no setting {_cut(unknown[0])}; it has {', '.join(known) or 'none'}")
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):  # what is imported for type checkers alone
        return
    for name, value in given.items():
        if not fits(value, hints.get(name, Any)):
            raise ConfigError(f"{what}.{name} should be {_words(hints[name])}, got {_cut(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type, as far as types of plain values go; true of all others.

    A whole number is a fraction as well, but true and false are no numbers.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(fits(value, one) for one in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if typing.get_origin(hint) in (list, Sequence):
        (one,) = typing.get_args(hint)
        return isinstance(value, list | tuple) and all(fits(item, one) for item in value)
    return True


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def _is_name(target: object) -> bool:
    return bool(re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", str(target), re.ASCII))


def _cut(value: Any, quoted: bool = True) -> str:
    try:
        text = repr(value) if quoted else str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}..."
