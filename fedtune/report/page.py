"""A comparison as one HTML file that needs nothing else, with its figures and numbers beside it.

The charts are drawn by Vega, which comes with the page. A Content-Security-Policy lets the browser run the page's own
two scripts, known by their hashes, and reach no network: labels and error texts come from files of others.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedtune import __version__
from fedtune.core.errors import ConfigError
from fedtune.report import comparison as compared
from fedtune.report.comparison import Comparison
from fedtune.report.figures import ALL_ROWS, Figure
from fedtune.report.own_files import owned
from fedtune.report.sections import Question, Section, section
from fedtune.report.specs import SLOTS, complete, in_page, standing_alone

PAGE = "report.html"
FIGURES = "figures"
RESULTS = ("results.csv", "results.parquet", "summary.csv")
COSTS = ("loss-bytes", "loss-time", "loss-memory")
SELF, NONE = "'self'", "'none'"
WAITING = "No run has begun here yet."


@dataclass(frozen=True)
class Shown:
    """A comparison laid out: what the page and its files are made from."""

    comparison: Comparison
    sections: tuple[Section, ...]

    def figures(self) -> list[tuple[str, Section, Figure]]:
        """Those that are drawn, with the names of their files."""
        alone = len(self.sections) == 1
        return [
            (figure.name if alone else f"{part.id}-{figure.name}", part, figure)
            for part in self.sections
            for figure in part.figures
            if figure.spec is not None
        ]


def report(
    paths: Sequence[str],
    out: str | None = None,
    at: dict[str, float | None] | None = None,
    target: float | None = None,
    reference: str | None = None,
) -> Path:
    """Compare runs and write the page; returns its path.

    Args:
        paths: run folders, or folders that have runs below them.
        out: where to write; None is the folder that all runs are in.
        at: by rounds, bytes or seconds, the limits to compare within; none: those that fit the runs.

    Raises:
        RunFolderError: if a path holds no run, or the page can't be written.
        ConfigError: if no entry is called what `reference` says.
    """
    comparison = compared.load([Path(path).expanduser() for path in paths])
    asked = tuple(compared.Protocol(kind, limit) for kind, limit in (at or {}).items() if limit is not None)
    found = [run.path for group in comparison.groups for entry in group.entries for run in entry.runs]
    folder = Path(out).expanduser() if out is not None else _around(found or [Path(path) for path in paths])
    return write(comparison, folder, Question(asked, target, reference))


def _around(runs: Sequence[Path]) -> Path:
    try:
        return Path(os.path.relpath(os.path.commonpath([path.resolve() for path in runs])))
    except ValueError as error:  # on different drives
        raise ConfigError("these runs have no folder in common: name one with --out") from error


def lay_out(comparison: Comparison, question: Question | None = None) -> Shown:
    """Everything that the page shows: sections of text, tables and figures, one for each group of entries.

    Raises:
        ConfigError: if no entry is called what `reference` says.
    """
    question = question or Question()
    labels = sorted({entry.label for group in comparison.groups for entry in group.entries})
    if question.reference is not None and question.reference not in labels:
        raise ConfigError(f"reference={question.reference} is none of the entries: choose one of {', '.join(labels)}")
    parts = [section(group, place, question) for place, group in enumerate(comparison.groups)]
    return Shown(comparison, tuple(parts))


def render(comparison: Comparison, question: Question | None = None, live: bool = False, state: str = "") -> str:
    """The page.

    Args:
        live: whether it asks its server for changes.
        state: what the server calls this state of the runs.
    """
    return _page(lay_out(comparison, question), live, state)


def write(comparison: Comparison, folder: Path, question: Question | None = None) -> Path:
    """Write the page, its figures as SVG and PNG, and the numbers behind it; returns the page's path.

    Raises:
        ConfigError: if no entry is called what `reference` says.
        RunFolderError: if a file can't be written, or one of a report's names isn't a report's.
    """
    shown = lay_out(comparison, question)
    drawn = shown.figures()
    images = [f"{FIGURES}/{name}.{kind}" for name, _, _ in drawn for kind in ("svg", "png")]
    with owned(folder, [PAGE, *RESULTS, *images]) as put:
        compared.write_results(comparison, folder, question.reference if question else None)
        for name, part, figure in drawn:
            svg, png = image(part, figure)
            put(f"{FIGURES}/{name}.svg", svg)
            put(f"{FIGURES}/{name}.png", png)
        put(PAGE, _page(shown, live=False, state="").encode())
    return folder / PAGE


def image(part: Section, figure: Figure) -> tuple[bytes, bytes]:
    """A figure that is drawn, for papers: SVG and PNG."""
    import vl_convert

    assert figure.spec is not None
    spec = complete(figure.spec, [entry.label for entry in part.entries], part.slots, len(part.entries) <= ALL_ROWS)
    svg = vl_convert.vegalite_to_svg(standing_alone(spec, figure.title, len(part.slots)))
    return svg.encode(), vl_convert.svg_to_png(svg, scale=2)


def _page(shown: Shown, live: bool, state: str) -> str:
    library, script = _library(), _asset("page.js")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(library)} {_hash(script)}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        f"connect-src {SELF if live else NONE}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    comparison = shown.comparison
    parts = [_with_kinds(part) for part in shown.sections]
    going = [
        {
            "label": entry.label,
            "seed": run.experiment.seed,
            "done": int(run.rounds.max(initial=0)),
            "of": run.experiment.rounds,
        }
        for group in comparison.groups
        for entry in group.entries
        for run in entry.runs
        if run.status == "running"
    ]
    return _template().render(
        title=_title(shown),
        policy="; ".join(policy),
        version=__version__,
        css=Markup(_asset("page.css")),
        library=Markup(library),
        script=Markup(script),
        data=Markup(_json({"groups": [_data(part) for part in shown.sections]})),
        sections=parts,
        slots=SLOTS,
        going=going if live else [],
        empty=WAITING,
        failures=[
            (failure.label, "" if failure.seed is None else str(failure.seed), failure.reason)
            for failure in comparison.failures
        ],
        notes=comparison.notes,
        command=comparison.command,
        live=live,
        state=state,
    )


def _title(shown: Shown) -> str:
    if not shown.sections:
        return "Waiting for runs"
    return shown.sections[0].title if len(shown.sections) == 1 else f"{len(shown.sections)} tasks"


def _with_kinds(part: Section) -> dict[str, Any]:
    """As the template takes it: how wide each figure is, so that no row has a hole."""
    drawn = [figure.name for figure in part.figures if figure.spec is not None]
    costs = [name for name in drawn if name in COSTS]
    wide = dict.fromkeys(costs, {1: "whole", 3: "third"}.get(len(costs), ""))
    others = [name for name in drawn if name not in COSTS]
    if len(others) % 2:
        wide[others[-1]] = "whole"
    shown = {field: getattr(part, field) for field in part.__dataclass_fields__}
    shown["figures"] = [{**vars(figure), "kind": wide.get(figure.name, "")} for figure in part.figures]
    return shown


def _data(part: Section) -> dict[str, Any]:
    names = [entry.label for entry in part.entries]
    few = len(names) <= ALL_ROWS
    return {
        "title": part.title,
        "names": names,
        "chosen": list(part.slots),
        "every": few,
        "figures": [
            {
                "name": figure.name,
                "spec": in_page(complete(figure.spec, names, part.slots, few)),
                "views": [view.x for view in figure.views],
            }
            for figure in part.figures
            if figure.spec is not None
        ],
    }


def _json(value: Any) -> str:
    """JSON that can't end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _library() -> str:
    """Vega, Vega-Lite and their embedding, as one script."""
    import vl_convert

    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
    bundle = bundle.replace("\r\n", "\n").replace("\r", "\n")
    return str(re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE).replace("<!--", "<\\!--"))


@cache
def _asset(name: str) -> str:
    return (files("fedtune.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_asset("page.html"))
