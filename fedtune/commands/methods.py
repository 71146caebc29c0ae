"""`fedtune methods`: what `method=` can be."""

import argparse
import ast

from fedtune.commands import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    commands.add_parser("methods", help="list the methods, with their papers").set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Print each method's name, and what its file's docstring opens with."""
    import yaml

    from fedtune.config.compose import CONF, choices

    names = choices("method")
    width = max(map(len, names))
    for name in names:
        chosen = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
        target = chosen.get("method", chosen)["strategy"]["_target_"]
        source = CONF.parent.joinpath(*target.split(".")[:-1]).with_suffix(".py")
        title, _, rest = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n\n")
        print(f"{name:<{width}} {title}")
        for line in rest.split("\n\n")[0].splitlines():
            print(f"{'':<{width}} {line}")
    return 0
