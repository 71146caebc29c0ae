"""Figures as Vega-Lite: plain dicts, one for the page's chart and for the SVG and PNG of a paper.

Rows name an entry by its number `e`. Up to eight entries are chosen, and have a hue, a shape and a dash by their slot;
the others are grey, with their name under the pointer. The chosen are the parameter `chosen`, so that a page can choose
others without a new spec.
"""

from collections.abc import Sequence
from typing import Any

from fedtune.report.axes import BYTES, NUMBER, Spec, axis
from fedtune.runs.ledger import Part

Rows = list[dict[str, Any]]

SLOTS = 8
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]
LIGHT = ["#0067a8", "#cf4a00", "#007f5f", "#b1418c", "#8a6a00", "#4f56c9", "#1d1d1f", "#3d9ac4"]
PARTS = ["down: train", "up: train", "down: measuring", "up: measuring", Part.HANDSHAKE, Part.IDLE, Part.FAILED]
PART_HUES = ["#2b7bba", "#d9772b", "#a9cbe3", "#f0c8a2", "#8f8f98", "#c6c6cc", "#b3261e"]
SLOT = {"calculate": "indexof(chosen, datum.e)", "as": "slot"}
NAME = {"calculate": "names[datum.e]", "as": "name"}
CHOSEN = {"filter": "datum.slot >= 0"}
OTHERS = {"filter": "datum.slot < 0"}
GREY: Spec = {"value": "#9a9aa2"}


def front(rows: Rows, x: Spec, y: Spec, tips: list[Spec]) -> Spec:
    """Points with intervals, the cheaper to the left and the better below, and the front of those that nothing beats.

    Args:
        rows: e, x, y, low, high (None without an interval), front (whether nothing is at once as cheap and better).
    """
    around = {"field": "low", "title": y["title"]}
    return _spec(rows, {"x": x, "y": y}) | {
        "layer": [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "strokeDash": [3, 3],
                    "strokeWidth": 1.2,
                    "clip": True,
                },
                "encoding": {"order": {"field": "x"}, "color": GREY},
            },
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 1.5, "clip": True},
                "encoding": {
                    "y": {**y, **around},
                    "y2": {"field": "high"},
                    "color": _color(None),
                    "strokeOpacity": _if_chosen(0.75, 0.3),
                },
            },
            {
                "transform": [OTHERS, _inside(y)],
                "mark": {"type": "point", "filled": True, "size": 34, "opacity": 1, "fillOpacity": 0.65},
                "encoding": {"color": GREY, "tooltip": tips},
            },
            {
                "transform": [CHOSEN, _inside(y)],
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {"color": _color(LEGEND), "shape": _shape(LEGEND), "tooltip": tips},
            },
        ],
    }


def curves(rows: Rows, x: Spec, y: Spec, tips: list[Spec], few: bool) -> Spec:
    """Lines by round with bands, the chosen in colour.

    Args:
        rows: e, r (the round) and what x and y name; low and high are y's interval, None where there is none.
        few: whether there are so few rounds that each may have its point.
    """
    bounds = {"field": "low", "title": y["title"]}
    legend = LEGEND if few else LINES
    lines: list[Spec] = [
        {
            "transform": [OTHERS],
            "mark": {"type": "line", "strokeWidth": 1, "strokeOpacity": 0.5, "clip": True},
            "encoding": {"detail": {"field": "e"}, "color": GREY, "tooltip": [{"field": "name", "title": "entry"}]},
        },
        {
            "transform": [CHOSEN, {"filter": "isValid(datum.low)"}],
            "mark": {"type": "area", "fillOpacity": 0.11, "opacity": 1, "line": False, "clip": True},
            "encoding": {
                "detail": {"field": "e"},
                "y": {**y, **bounds},
                "y2": {"field": "high"},
                "color": _color(None),
            },
        },
        {
            "transform": [CHOSEN],
            "mark": {"type": "line", "strokeWidth": 2, "clip": True},
            "encoding": {
                "detail": {"field": "e"},
                "color": _color(legend),
                "strokeDash": _by_slot(DASHES, legend),
                "order": {"field": "r"},
            },
        },
        {
            "transform": [CHOSEN, _inside(y)],
            "mark": {
                "type": "point",
                "filled": True,
                "size": 42 if few else 90,
                "opacity": 1,
                "fillOpacity": 1 if few else 0,
            },
            "encoding": {"color": _color(legend), "tooltip": tips, **({"shape": _shape(legend)} if few else {})},
        },
    ]
    return _spec(rows, {"x": x, "y": y}) | {"layer": lines}


def stacks(rows: Rows, order: Sequence[str], tips: list[Spec]) -> Spec:
    """A bar an entry, of bytes by part.

    Args:
        rows: e, part (one of PARTS), bytes; total and shown (its text) in the row of an entry's first part.
        order: the names, top to bottom.
    """
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    hues = [PART_HUES[PARTS.index(part)] for part in parts]
    longest = max(row.get("total") or 0 for row in rows)
    scale = {"domain": [0, float(f"{longest * 1.32:.3g}")], "nice": False}
    x = {
        "field": "bytes",
        "title": "bytes a round",
        "scale": scale,
        "axis": {"tickCount": 4, "labelExpr": BYTES},
        **NUMBER,
    }
    return _spec(rows, {"y": _names(order)}, step=24) | {
        "layer": [
            {
                "mark": {"type": "bar", "height": {"band": 0.66}},
                "encoding": {
                    "x": {**x, "stack": "zero"},
                    "order": {"field": "place", **NUMBER},
                    "color": {
                        "field": "part",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": parts, "range": hues},
                        "legend": {"orient": "top", "direction": "horizontal", "symbolType": "square"},
                    },
                    "tooltip": tips,
                },
            },
            {
                "transform": [{"filter": "isValid(datum.total)"}],
                "mark": {"type": "text", "align": "left", "dx": 5},
                "encoding": {"x": {**x, "field": "total"}, "text": {"field": "shown"}},
            },
        ],
    }


def spread(points: Rows, boxes: Rows, order: Sequence[str], title: str, tips: list[Spec]) -> Spec:
    """A row an entry: its clients as points, the middle half as a bar, the median as a tick.

    Args:
        points: e, x. boxes: e, low, q1, median, q3, high.
    """
    x = axis("x", title)
    box: Spec = {"data": {"name": "boxes", "values": boxes}, "transform": [SLOT, NAME, _SHOWN]}
    spec = _spec(points, {"y": _names(order)}, step=26)
    return spec | {
        "layer": [
            {
                "mark": {"type": "tick", "thickness": 1, "height": {"band": 0.5}, "opacity": 1, "fillOpacity": 0.35},
                "encoding": {"x": x, "color": _plain()},
            },
            {
                **box,
                "mark": {"type": "bar", "height": {"band": 0.5}, "fillOpacity": 0.28},
                "encoding": {"x": {**x, "field": "q1"}, "x2": {"field": "q3"}, "color": _plain(), "tooltip": tips},
            },
            {
                **box,
                "mark": {"type": "tick", "thickness": 3, "height": {"band": 0.66}},
                "encoding": {"x": {**x, "field": "median"}, "color": _plain(), "tooltip": tips},
            },
        ]
    }


def complete(spec: Spec, names: Sequence[str], chosen: Sequence[int | None], every: bool) -> Spec:
    """With the parameters that all figures share.

    Args:
        names: by the number of an entry.
        chosen: the entries in the slots, None where one is free.
        every: whether figures with a row an entry show them all, or the chosen.
    """
    slots = [*chosen, *[None] * SLOTS][:SLOTS]
    values = {"names": list(names), "chosen": slots, "every": every}
    return spec | {"params": [{"name": name, "value": value} for name, value in values.items()]}


def standing_alone(spec: Spec, title: str, chosen: int) -> Spec:
    """As a file for a paper: on white, with a title, and with a legend of the chosen, of which there are so many."""
    config = {
        "background": "white",
        "font": "Helvetica, Arial, sans-serif",
        "range": {"category": LIGHT},
        "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 12},
        "axis": {
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "gridColor": "#e6e6ea",
            "labelLimit": 240,
        },
        "legend": {"labelFontSize": 11, "labelLimit": 300, "symbolStrokeWidth": 2},
        "view": {"stroke": None},
    }
    schema = "https://vega.github.io/schema/vega-lite/v6.json"
    return {
        "$schema": schema,
        **_with_slots(spec, chosen, legends=True),
        "width": 560,
        "title": title,
        "config": config,
    }


def in_page(spec: Spec) -> Spec:
    """As a part of a page, which shows hues, shapes and dashes beside the names to choose from."""
    return dict(_with_slots(spec, SLOTS, legends=False))


def _with_slots(part: Any, count: int, legends: bool) -> Any:
    """The spec with so many slots, and with its legends of them or none."""
    if isinstance(part, list):
        return [_with_slots(item, count, legends) for item in part] if part and isinstance(part[0], dict) else part
    if not isinstance(part, dict) or "values" in part:
        return part
    if part.get("field") == "slot":
        found = {**part, "scale": {"domain": list(range(count)), "range": part["scale"]["range"]}}
        if not legends:
            found["legend"] = None
        elif part["legend"] is None:  # which would take it from the other layers too
            del found["legend"]
        return found
    return {key: _with_slots(value, count, legends) for key, value in part.items()}


_SHOWN = {"filter": "every || datum.slot >= 0"}
LEGEND: Spec = {
    "title": None,
    "orient": "right",
    "symbolOpacity": 1,
    "symbolSize": 70,
    "labelExpr": "isValid(chosen[datum.value]) ? names[chosen[datum.value]] : ''",
}
LINES: Spec = {**LEGEND, "symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 300}


def _spec(rows: Rows, encoding: Spec, step: int | None = None) -> Spec:
    shared: list[Spec] = [SLOT, NAME, *([_SHOWN] if step else [])]
    height: Any = {"step": step} if step else 260
    return {
        "width": "container",
        "height": height,
        "data": {"name": "rows", "values": rows},
        "transform": shared,
        "encoding": encoding,
    }


def _inside(y: Spec) -> Spec:
    """Points on the figure: a line may be cut at its edge, but not half a point."""
    low, high = y["scale"]["domain"]
    return {"filter": {"field": y["field"], "range": [low, high]}}


def _names(order: Sequence[str]) -> Spec:
    axis: Spec = {"ticks": False, "domain": False, "labelPadding": 8}
    return {"field": "name", "type": "nominal", "title": None, "sort": list(order), "axis": axis}


def _by_slot(range: Any, legend: Spec | None) -> Spec:
    return {"field": "slot", "type": "nominal", "scale": {"range": range}, "legend": legend}


def _color(legend: Spec | None) -> Spec:
    return {"condition": {"test": "datum.slot >= 0", **_by_slot("category", legend)}, **GREY}


def _plain() -> Spec:
    return _color(None)


def _shape(legend: Spec | None) -> Spec:
    return _by_slot(SHAPES, legend)


def _if_chosen(yes: float, no: float) -> Spec:
    return {"condition": {"test": "datum.slot >= 0", "value": yes}, "value": no}
