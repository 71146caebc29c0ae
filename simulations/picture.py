"""Draw a finished run as the terminal showed it.

python -m simulations.picture runs/demo docs/demo.svg
"""

import csv
import json
import sys
from pathlib import Path

from rich.console import Console

from fedtune.server.progress import cells, closing, rounds_table


def draw(folder: Path, target: Path) -> None:
    """Write the run in `folder` as an SVG picture."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console = Console(record=True, width=100, file=sys.stderr, highlight=False)
    console.print(f"[bold]$ {summary['command']}[/bold]")
    base = summary["base"]
    console.print(f"base {base['source']}, {base['dtype']}, on {summary['machine']['device']}\n", style="dim")
    table = rounds_table()
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            table.add_row(*cells({name: float(value) if value else None for name, value in row.items()} | _counts(row)))
    console.print(table)
    first, *rest = closing(summary, folder)
    console.print(f"\n[bold green]{first}[/bold green]")
    for line in rest:
        console.print(line, highlight=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(console.export_svg(title="fedtune"), encoding="utf-8")


def _counts(row: dict[str, str]) -> dict[str, int]:
    return {name: int(value) for name, value in row.items() if value.isdigit()}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m simulations.picture RUN PICTURE.svg")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
