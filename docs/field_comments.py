"""The comments behind fields and constants, for the API reference: griffe, which reads the modules, knows docstrings.

`steps: int = 4  # a round` is documented, as people read it. A class gets a table of its fields with what their
comments say (in the schema, what --help says of a setting), a module's constant that comment as its docstring; a
constant without one is left out.
"""

import ast
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function, Object


@cache
def comments(path: Path) -> dict[int, str]:
    """Comments by line, of lines that begin with something else."""
    with tokenize.open(path) as stream:
        return {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(stream.readline)
            if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
        }


class FieldComments(Extension):
    """Called by griffe for each object that it has read."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, agent: Any, **kwargs: Any) -> None:
        """A module's constant is shown if something is said of it."""
        if attr.parent is None or not attr.parent.is_module or attr.docstring or not isinstance(attr.filepath, Path):
            return
        said = comments(attr.filepath).get(attr.endlineno or 0)
        if said:
            attr.docstring = _docstring(said, attr, agent)
        else:
            attr.public = False

    def on_class_members(self, *, node: Any, cls: Class, agent: Any, **kwargs: Any) -> None:
        """Fields go into one table, unless the docstring has it already."""
        if not isinstance(cls.filepath, Path):
            return
        known, lines = comments(cls.filepath), []
        told = {item.target.id: _help(item.value) for item in node.body if isinstance(item, ast.AnnAssign)}
        for name, member in cls.members.items():
            if not isinstance(member, Attribute) or name.startswith("_") or "property" in member.labels:
                continue
            member.public = False
            lines.append(f"    {name}: {known.get(member.endlineno or 0) or told.get(name, '')}".rstrip())
        text = cls.docstring.value if cls.docstring else ""
        if lines and "Attributes:" not in text:
            table = "\n".join(["Attributes:", *lines])
            cls.docstring = _docstring(f"{text}\n\n{table}", cls, agent)

    def on_function_instance(self, *, node: Any, func: Function, agent: Any, **kwargs: Any) -> None:
        """What Python calls by itself is left out."""
        if func.name.startswith("__"):
            func.public = False


def _help(value: ast.expr | None) -> str:
    """The text of a setting of the schema, `option(default, text)`."""
    match value:
        case ast.Call(func=ast.Name(id="option"), args=[_, ast.Constant(value=str(text)), *_]):
            return text
    return ""


def _docstring(text: str, of: Object, agent: Any) -> Docstring:
    return Docstring(
        text, parent=of, lineno=of.lineno, parser=agent.docstring_parser, parser_options=agent.docstring_options
    )
