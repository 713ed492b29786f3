"""Bits × method as a heat map: a panel per checkpoint, the number printed in every cell.

The colour is the mean accuracy, or the logarithm of a perplexity; darker is worse. Hatched cells
are not applicable: the method declines that width. An empty cell was not measured. Cividis is the
colour map, made for readers who are colour-blind (Nuñez, Anderton and Renslow 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry
from qbench.comparison.panels import Panel, accuracy_panels, caption, perplexity_panels
from qbench.errors import QBenchError, unknown
from qbench.plots.style import GREY, legend_below, our_style
from qbench.plots.wanted import Wanted
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_IN = 0.46  # inches that a printed number needs
_LEAST_CELL_IN = 0.25  # with the smallest letters
_BAR_IN = 0.65  # what the colour bar takes
_ROW_IN = 0.24
_SEEDS = "Means over seeds where there are several."
_LARGEST_POWER = 15  # of ten: beyond it a perplexity says nothing more


@dataclass
class Grid:
    """The numbers of one panel."""

    title: str
    rows: list[str]
    columns: list[str]
    values: dict[tuple[str, str], float]
    """(method, widths) -> what was measured; may be infinite or NaN."""
    declined: set[tuple[str, str]] = field(default_factory=set)
    """Cells that the method cannot do."""
    failed: set[tuple[str, str]] = field(default_factory=set)
    reference: float | None = None
    """The full-precision row's number."""
    crowded: list[str] = field(default_factory=list)
    """Cells with several runs, of which the best is shown."""


def draw_heatmap(wanted: Wanted) -> Figure:
    """The heat map of an accuracy or of ``perplexity``.

    Raises:
        QBenchError: for published points, an unknown metric or nothing to draw.
    """
    if wanted.against is not None:
        raise QBenchError("heatmap has no published points; leave --against out")
    if wanted.metric not in (*METRICS, "perplexity"):
        raise unknown("metric", wanted.metric, (*METRICS, "perplexity"))
    accuracy = wanted.metric in METRICS
    entries = wanted.entries()
    panels = accuracy_panels(entries, "wbits") if accuracy else perplexity_panels(entries, "wbits")
    about = caption(entries, panels, accuracy, wanted.metric)
    # neither bars nor bands are drawn
    about = [line.replace("; bars: standard error", "") for line in about]
    about = [_SEEDS if line.startswith("Shaded:") else line for line in about]
    grids = [grid_of(panel, entries, not accuracy) for panel in panels if _quantized(panel)]
    if not grids:
        whole = any(panel.points for panel in panels)
        why = "no quantized run was measured" if whole or not about else "; ".join(about)
        raise QBenchError(f"nothing to draw: {why}; measure more, or choose with --task")
    return draw_grids(grids, accuracy, about, wanted)


def grid_of(panel: Panel, entries: Sequence[Entry], lower: bool) -> Grid:
    """The cells of one panel: methods down, widths across from many bits to few.

    Args:
        panel: what was measured; its title's first line is the checkpoint.
        entries: all rows, for the cells that are not applicable or failed.
        lower: whether less is better, to choose among runs that share a cell.
    """
    labels = {entry.facts["run"]: str(entry.facts["label"]) for entry in entries}
    widths: dict[str, tuple[float, int]] = {}
    found: dict[tuple[str, str], list[float]] = {}
    reference = None
    for point in panel.points:
        if point.role == "full precision":
            reference = point.y
            continue
        label = labels[point.run]
        row = "trained" if point.role == "trained" else point.series
        widths[label] = -point.wbits, -point.abits
        found.setdefault((row, label), []).append(point.y)
    states: dict[str, set[tuple[str, str]]] = {"not_applicable": set(), "failed": set()}
    for entry in entries:
        facts = entry.facts
        if entry.ptq and facts["checkpoint"] == panel.title.split("\n")[0]:
            if facts["status"] in states:
                states[facts["status"]].add((entry.series, facts["label"]))
                widths[facts["label"]] = -facts["wbits"], -facts["abits"]
    empty = (states["not_applicable"] | states["failed"]) - set(found)
    methods = {row for row, _ in {*found, *empty}} - {"trained"}
    crowded = [" ".join(cell) for cell, values in found.items() if len(values) > 1]
    return Grid(
        title=panel.title,
        rows=sorted(methods) + (["trained"] if any(r == "trained" for r, _ in found) else []),
        columns=sorted(widths, key=lambda label: (widths[label], label)),
        values={cell: _best(values, lower) for cell, values in found.items()},
        declined=states["not_applicable"] - set(found),
        failed=states["failed"] - set(found),
        reference=reference,
        crowded=crowded,
    )


def draw_grids(
    grids: Sequence[Grid], accuracy: bool, about: Sequence[str], wanted: Wanted
) -> Figure:
    """The figure of some grids, which share their colours.

    Raises:
        QBenchError: for a width that leaves no room for the numbers.
    """
    from matplotlib.figure import Figure

    n_columns = max(len(grid.columns) for grid in grids)
    names_in = 0.07 * max(len(row) for grid in grids for row in grid.rows) + 0.1
    own = n_columns * _CELL_IN + names_in
    width = wanted.width_in or max(3.25, min(len(grids), 2) * (own + 0.1) + 0.7)
    across = max(1, min(len(grids), int((width - 0.6) / own)))
    down = math.ceil(len(grids) / across)
    cell_in = (width - _BAR_IN - across * names_in) / (across * n_columns)
    if cell_in < _LEAST_CELL_IN:
        least = names_in + n_columns * _LEAST_CELL_IN + _BAR_IN
        raise QBenchError(
            f"a heat map of {n_columns} widths needs {math.ceil(20 * least) / 20:.2f} in, not "
            f"{width:g}; make it wider, or choose with --scheme"
        )
    colours, label = _colours(grids, accuracy)
    about = [*about, *_remarks(grids)]
    with our_style(width):
        figure = Figure(layout="constrained")
        every = figure.subplots(down, across, squeeze=False)
        for axes, grid in zip(every.flat, grids, strict=False):
            _draw_grid(axes, grid, colours, accuracy, 7 if cell_in > 0.29 else 6)
        for axes in list(every.flat)[len(grids) :]:
            axes.remove()
        drawn = list(every.flat)[: len(grids)]
        bar = figure.colorbar(colours, ax=drawn, label=label, pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)
        entries: list[tuple[str, dict[str, Any]]] = [("not measured", {"marker": "$–$"} | _BOX)]
        if any(grid.declined for grid in grids):
            entries.append(("not applicable", {"marker": "$///$"} | _BOX))
        if any(grid.failed for grid in grids):
            entries.append(("failed", {"marker": "x"} | _BOX))
        lines = legend_below(figure, entries, about, width)
        tall = sum(
            max(len(grid.rows) for grid in grids[start : start + across]) * _ROW_IN + 1.0
            for start in range(0, len(grids), across)
        )
        figure.set_size_inches(width, tall + 0.15 * lines + 0.2)
    return figure


_BOX: dict[str, Any] = {"color": GREY, "markersize": 8}


def _draw_grid(axes: Axes, grid: Grid, colours: Any, accuracy: bool, font: float) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, len(grid.columns))
    axes.set_ylim(len(grid.rows), 0)
    for down, row in enumerate(grid.rows):
        for across, column in enumerate(grid.columns):
            cell, place = (row, column), (across, down)
            if cell in grid.values:
                value = grid.values[cell]
                colour, ink = _paint(value, colours, accuracy)
                axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white"))
                text = cell_text(value, accuracy)
            else:
                hatch = "////" if cell in grid.declined else None
                axes.add_patch(
                    Rectangle(
                        place, 1, 1, facecolor="white", edgecolor="#bbbbbb", hatch=hatch, lw=0.4
                    )
                )
                text = "" if hatch else "✕" if cell in grid.failed else "–"
                ink = GREY
            axes.text(
                across + 0.5, down + 0.5, text, ha="center", va="center", color=ink, fontsize=font
            )
    in_two_lines = [label.replace("A", "\nA", 1) for label in grid.columns]
    axes.set_xticks([i + 0.5 for i in range(len(grid.columns))], in_two_lines)
    axes.set_yticks([i + 0.5 for i in range(len(grid.rows))], grid.rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    whole = ""
    if grid.reference is not None:
        whole = f"\nfull precision {cell_text(grid.reference, accuracy)}"
    axes.set_title(grid.title + whole, fontsize="medium")


def cell_text(value: float, accuracy: bool) -> str:
    """A number in at most five letters: 91.1, 4.12, 1032, 4.8e4, 3e23, inf."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf"
    if accuracy:
        return f"{100 * value:.1f}"
    if value < 10:
        return f"{value:.2f}"
    if value < 9999.5:
        return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits if int(power) < 10 else round(float(digits))}e{int(power)}"


def _colours(grids: Sequence[Grid], accuracy: bool) -> tuple[Any, str]:
    """The colour of every number, and what the bar beside it says."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    numbers = [v for grid in grids for v in grid.values.values()]
    numbers += [grid.reference for grid in grids if grid.reference is not None]
    finite = [v for v in numbers if math.isfinite(v)] or [1.0]
    low, high = min(finite), max(finite)
    if accuracy:
        return ScalarMappable(Normalize(100 * low, 100 * high), "cividis"), "mean accuracy (%)"
    high = min(high, 10.0**_LARGEST_POWER)
    return ScalarMappable(LogNorm(low, max(high, 1.01 * low)), "cividis_r"), "perplexity"


def _paint(value: float, colours: Any, accuracy: bool) -> tuple[Any, str]:
    """The colour of a cell and of the letters in it, black or white by what is read better."""
    if not math.isfinite(value):
        return "#dddddd", "black"
    red, green, blue, _ = colours.to_rgba(100 * value if accuracy else value)
    return (red, green, blue), "black" if contrast_with_black((red, green, blue)) else "white"


def contrast_with_black(colour: tuple[float, float, float]) -> bool:
    """Whether black letters have more contrast on a colour than white ones (WCAG 2.1, 1.4.3)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05)


def _remarks(grids: Sequence[Grid]) -> list[str]:
    crowded = list(dict.fromkeys(name for grid in grids for name in grid.crowded))
    return [f"Best of several runs: {', '.join(crowded[:5])}"] if crowded else []


def _best(values: Sequence[float], lower: bool) -> float:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return values[0]
    return min(finite) if lower else max(finite)


def _quantized(panel: Panel) -> bool:
    return any(point.role != "full precision" for point in panel.points)
