"""Accuracy and perplexity against bits as plotly figures: plain dictionaries, drawn in the page.

One figure per panel of :mod:`qbench.comparison.panels` and kind of bits, with the points, lines and
remarks of the printed one (BitNet, arXiv 2310.11453, Fig. 1, top right). A point carries the anchor
of its run. Left out: colours of text and axes, which follow the page's style sheet in light, dark
and print, and plotly's Python objects, which take a second to import and add nothing to JSON.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qbench.comparison.entries import Entry
from qbench.comparison.panels import (
    X_AXES,
    Panel,
    Point,
    accuracy_panels,
    caption,
    perplexity_panels,
)
from qbench.plots.style import COLOURS, OTHER_TRAINED, TRAINED_LOOKS
from qbench.scheme import format_bits
from qbench.tables.sheet import perplexity_text

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
_FULL = "#767676"
"""Grey with a contrast of 4.5 on white and on the dark page alike."""
_TICKS = (1, 1.58, 2, 3, 4, 5, 6, 8, 16)
_APART = 0.05
"""Between methods at the same nominal width, in octaves."""
_AXES = {"wbits": "nominal bits per weight", "effective_bits": "effective bits per weight"}


def figures(
    entries: Sequence[Entry], metric: str, anchors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Every figure the rows give, accuracies first.

    Args:
        entries: measured rows.
        metric: which accuracy.
        anchors: run -> anchor of its page.

    Returns:
        dictionaries with ``label`` (what is shown), ``axis``, ``caption`` (lines) and ``figure``
        (``data`` and ``layout`` of plotly.js).
    """
    found = []
    for accuracy in (True, False):
        for x in X_AXES:
            panels = accuracy_panels(entries, x) if accuracy else perplexity_panels(entries, x)
            looks = _looks([point for panel in panels for point in panel.points])
            for panel in panels:
                if any(math.isfinite(point.y) for point in panel.points):
                    title = " · ".join(line for line in panel.title.split("\n") if line)
                    what = f"{title}: mean {metric}" if accuracy else f"{title}: perplexity"
                    found.append(
                        {
                            "label": what,
                            "axis": _AXES[x],
                            "caption": caption(entries, [panel], accuracy, metric),
                            "figure": _figure(panel, looks, x, accuracy, anchors),
                        }
                    )
    return sorted(found, key=lambda one: [f["label"] for f in found].index(one["label"]))


def _looks(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Method -> colour and symbol, in the order of the printed figures."""
    names = sorted({point.series for point in points if point.role == "ptq"})
    return {
        name: (COLOURS[i % len(COLOURS)], _SYMBOLS[i % len(_SYMBOLS)])
        for i, name in enumerate(names)
    }


def _figure(
    panel: Panel,
    looks: Mapping[str, tuple[str, str]],
    x: str,
    accuracy: bool,
    anchors: Mapping[str, str],
) -> dict[str, Any]:
    finite = [point.y for point in panel.points if math.isfinite(point.y)]
    top = 4 * max(finite)  # where diverged perplexities are marked
    places = _places(panel.points, looks, x)
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in panel.points:
        groups[point.role, point.name if point.role == "trained" else point.series].append(point)
    data = [_best_line(panel, places, accuracy)]
    for (role, name), points in groups.items():
        colour, symbol = looks.get(name, (_FULL, "circle"))
        if role == "trained":
            colour = TRAINED_LOOKS.get(round(points[0].wbits, 2), OTHER_TRAINED)[0]
            symbol = "star"
        solid = role != "ptq"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": inert(f"{name} (trained)" if role == "trained" else name),
                "x": [places[id(point)] for point in points],
                "y": [_height(point, accuracy, top) for point in points],
                "error_y": _errors(points, accuracy),
                "text": [_hover(point, accuracy) for point in points],
                "hovertemplate": "%{text}<extra></extra>",
                "customdata": [anchors.get(point.run, "") for point in points],
                "marker": {
                    "color": colour,
                    "size": 14 if role == "trained" else 10,
                    "symbol": [_symbol(symbol, point, solid) for point in points],
                    "opacity": [0.4 if point.mixed and role == "ptq" else 1 for point in points],
                    "line": {"width": 2, "color": colour},
                },
            }
        )
        data += _bands(points, places, accuracy, colour)
    return {"data": data, "layout": _layout(panel, x, accuracy, top)}


def _bands(
    points: Sequence[Point], places: Mapping[int, float], accuracy: bool, colour: str
) -> list[dict[str, Any]]:
    """From the lowest to the highest number of the seeds, behind the marker of their mean."""
    scale = 100 if accuracy else 1
    drawn = [(places[id(point)], point.band) for point in points if point.band]
    if not drawn:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for place, _ in drawn for x in (place, place, None)],
            "y": [y for _, (low, high) in drawn for y in (scale * low, scale * high, None)],
            "line": {"color": colour, "width": 9},
            "opacity": 0.35,
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def _best_line(panel: Panel, places: Mapping[int, float], accuracy: bool) -> dict[str, Any]:
    best = panel.best(lower=not accuracy)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best of each width",
        "x": [places[id(point)] for point in best],
        "y": [100 * point.y if accuracy else point.y for point in best],
        "line": {"color": _FULL, "width": 1.5},
        "hoverinfo": "skip",
    }


def _layout(panel: Panel, x: str, accuracy: bool, top: float) -> dict[str, Any]:
    lines = [point.y for point in panel.points if point.role == "full precision"]
    marks = [(y, "dot", "full precision") for y in lines if math.isfinite(y)]
    marks += [(panel.chance, "dash", "guessing")] if accuracy and panel.chance is not None else []
    if not accuracy and any(not math.isfinite(point.y) for point in panel.points):
        marks.append((top, "solid", "diverged"))
    scale = 100 if accuracy else 1
    ticks = [t for t in _TICKS if any(0.9 < point.x / t < 1.1 for point in panel.points)]
    return {
        "xaxis": {
            "title": {"text": _AXES[x]},
            "type": "log",
            "tickvals": ticks,
            "ticktext": [format_bits(t) for t in ticks],
        },
        "yaxis": {
            "title": {"text": "percent right" if accuracy else "perplexity"},
            "type": "linear" if accuracy else "log",
        },
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": scale * y, "y1": scale * y}
            | {"line": {"dash": dash, "width": 1, "color": _FULL}, "layer": "below"}
            for y, dash, _ in marks
        ],
        "annotations": [
            {"xref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
            # plotly takes the exponent of a value on a logarithmic axis, but for shapes
            | {"y": scale * y if accuracy else math.log10(y), "text": text, "font": {"size": 11}}
            for y, _, text in marks
        ],
    }


def _places(
    points: Sequence[Point], looks: Mapping[str, tuple[str, str]], x: str
) -> dict[int, float]:
    """Where points stand: methods a little apart where only nominal widths are shown."""
    names = list(looks)
    places = {}
    for point in points:
        index = names.index(point.series) if point.series in looks else (len(names) - 1) / 2
        step = _APART * (index - (len(names) - 1) / 2) if x == "wbits" else 0.0
        places[id(point)] = round(point.x * 2**step, 4)
    return places


def _height(point: Point, accuracy: bool, top: float) -> float:
    if not math.isfinite(point.y):
        return top
    return round(100 * point.y, 4) if accuracy else float(f"{point.y:.6g}")


def _errors(points: Sequence[Point], accuracy: bool) -> dict[str, Any]:
    if not accuracy:
        return {"visible": False}
    errors = [100 * point.stderr if point.stderr is not None else 0 for point in points]
    return {"type": "data", "array": [round(e, 4) for e in errors], "thickness": 1, "width": 3}


def _symbol(symbol: str, point: Point, solid: bool) -> str:
    """Hollow where activations keep 16 bits, as in the printed figures."""
    return symbol if solid or point.abits < 16 else f"{symbol}-open"


def _hover(point: Point, accuracy: bool) -> str:
    """Plotly reads tags in here, so names must not hold any."""
    if accuracy:
        error = f" ± {100 * point.stderr:.1f}" if point.stderr is not None else ""
        value = f"{100 * point.y:.1f}{error} %"
    else:
        value = f"perplexity {perplexity_text(point.y)}"
    how = "" if point.comparable else "<br>measured differently"
    bits = f"{point.x:.2f} bits per weight"
    return f"{inert(point.series)} · {inert(point.name)}<br>{value}<br>{bits}{how}"


def inert(text: str) -> str:
    """A name in which plotly reads no tag: it knows some, and turns these entities back."""
    return html.escape(text, quote=False)
