"""Accuracy and perplexity against bits, as in BitNet (arXiv 2310.11453) Fig. 1, top right.

Hollow markers are quantized weights with 16-bit activations, half-filled ones have quantized
activations too, filled stars were trained at their width. The line joins the best post-training
point of each weight width; runs with per-layer overrides are pale and never on it. With ``wbits``
on the axis, methods are set a little apart so that they do not hide each other. A perplexity that
is infinite or NaN stands in a band at the top. Rows of several seeds stand at their mean, shaded
from the lowest to the highest seed, and so is the line where it joins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry
from qbench.comparison.panels import (
    Panel,
    Point,
    accuracy_panels,
    agreement_panels,
    caption,
    perplexity_panels,
)
from qbench.errors import QBenchError, unknown
from qbench.plots.style import (
    GREY,
    empty_figure,
    legend_below,
    mark,
    method_looks,
    our_style,
    panel_height,
    trained_look,
)
from qbench.plots.wanted import Wanted
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGREEMENTS = ("kl_divergence", "top1_agreement")
_FILLS = {16: "full", 8: "left", 4: "bottom"}  # activation width -> how the marker is filled
_OTHER_FILL = "top"
_AXIS_LABELS = {
    "wbits": "bits per weight, nominal",
    "effective_bits": "effective bits per weight (scales and zero points included)",
}
_BAND = 7  # width of the bar over the seeds of a point, in points
_STEP = 0.06  # height of one diverged marker, as a share of the axes


def draw_against_bits(
    entries: Sequence[Entry], accuracy: bool, x: str, metric: str, width_in: float | None
) -> Figure:
    """The figure of some rows: accuracies or perplexities, bits on the axis.

    Raises:
        QBenchError: for nothing to draw.
    """
    panels = accuracy_panels(entries, x) if accuracy else perplexity_panels(entries, x)
    about = caption(entries, panels, accuracy, metric)
    what = "accuracies" if accuracy else "perplexities"
    why = "; ".join(about) or f"no run has {what}"
    name = f"mean {metric} (%)" if accuracy else "perplexity (log scale)"
    return _figure(panels, about, accuracy, x, name, why, width_in)


def draw_agreement(wanted: Wanted) -> Figure:
    """How far rows are from full precision: KL divergence (the default), or top-1 agreement.

    Raises:
        QBenchError: for published points, another metric or nothing to draw.
    """
    if wanted.against is not None:
        raise QBenchError(f"{wanted.kind} has no published points; leave --against out")
    metric = AGREEMENTS[0] if wanted.metric == METRICS[0] else wanted.metric
    if metric not in AGREEMENTS:
        raise unknown("measure of agreement", metric, AGREEMENTS)
    top_1 = metric == AGREEMENTS[1]
    entries, x = wanted.entries(), wanted.x or "wbits"
    panels = agreement_panels(entries, x, top_1)
    about = caption(entries, panels, accuracy=False, metric=metric)
    if top_1:
        about = ["Bars: standard error over windows.", *about]
        name = "same most likely token as FP16 (%)"
    else:
        name = "KL(FP16 || quantized), nats (log scale)"
        for panel in panels:  # no logarithm: full precision diverges from itself by nothing
            panel.points = [point for point in panel.points if not point.y <= 0]
    why = "no run has an agreement with full precision (--tasks corpus@agreement)"
    return _figure(panels, about, top_1, x, name, why, wanted.width_in)


def _figure(
    panels: Sequence[Panel],
    about: list[str],
    accuracy: bool,
    x: str,
    name: str,
    why: str,
    width_in: float | None,
) -> Figure:
    """Panels of shares on a linear axis of percent, or of what has a logarithmic one."""
    panels = [panel for panel in panels if panel.points]
    if not panels:
        raise QBenchError(f"nothing to draw: {why}; measure more, or choose with --task")
    with our_style(width_in):
        figure, grid, width = empty_figure(len(panels), width_in, share_y=accuracy)
        drawn = [axes for row in grid for axes in row]
        styles = _styles(panels)
        for axes, panel in zip(drawn, panels, strict=True):
            _draw_panel(axes, panel, styles, x, accuracy)
        for row in grid:
            row[0].set_ylabel(name)
        _align_x(drawn, panels, x)
        lines = _legend(figure, panels, styles, about, accuracy, width)
        height = panel_height(width, len(grid[0]), len(grid))
        figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)
    return figure


def _draw_panel(
    axes: Axes, panel: Panel, styles: dict[str, dict[str, Any]], x: str, accuracy: bool
) -> None:
    places = _places(panel.points, styles, x)
    scale = 100 if accuracy else 1
    axes.set_xscale("log", base=2)
    axes.margins(y=0.1)
    if not accuracy:
        axes.set_yscale("log")
    for point in panel.points:
        if point.role == "full precision" and math.isfinite(point.y):
            axes.axhline(scale * point.y, color="black", linewidth=0.9, linestyle=":", zorder=1)
    if accuracy and panel.chance is not None:
        axes.axhline(100 * panel.chance, color=GREY, linewidth=1.1, linestyle="--", zorder=1)
    best = panel.best(lower=not accuracy)
    if len(best) > 1:
        across = [places[id(point)] for point in best]
        up = [scale * point.y for point in best]
        axes.plot(across, up, color=GREY, linewidth=1.2, zorder=2, label="_best")
        _shade_line(axes, best, across, scale)
    for point in panel.points:
        if math.isfinite(point.y):
            error = scale * point.stderr if accuracy and point.stderr is not None else None
            look = _look(point, styles)
            if point.band is not None:
                low, high = (scale * end for end in point.band)
                axes.vlines(
                    places[id(point)], low, high, color=look["color"], linewidth=_BAND, alpha=0.3,
                    zorder=2.5, label="_band",
                )  # fmt: skip
            mark(axes, places[id(point)], scale * point.y, error, look)
    _name_stars(axes, panel, places, scale)
    _draw_diverged(axes, panel, places, styles)
    axes.set_xlabel(_AXIS_LABELS[x])
    axes.set_title(panel.title, fontsize="medium")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)


def _shade_line(axes: Axes, best: Sequence[Point], across: Sequence[float], scale: int) -> None:
    """The noise band of the line over the best points, where seeds are known of any of them."""
    if not any(point.band for point in best):
        return
    ends = [point.band or (point.y, point.y) for point in best]
    low, high = ([scale * end[side] for end in ends] for side in (0, 1))
    axes.fill_between(across, low, high, color=GREY, alpha=0.15, linewidth=0, zorder=1.5)


def _name_stars(axes: Axes, panel: Panel, places: dict[int, float], scale: int) -> None:
    """Name trained models where the panel shows several, the names spread so that they part."""
    stars = [point for point in panel.points if point.role == "trained" and math.isfinite(point.y)]
    stars.sort(key=lambda point: point.y)
    for index, point in enumerate(stars if len(stars) > 1 else []):
        axes.annotate(
            point.name,
            (places[id(point)], scale * point.y),
            (-8, 9 * index),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            color=trained_look(point.wbits)["color"],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def _draw_diverged(
    axes: Axes, panel: Panel, places: dict[int, float], styles: dict[str, dict[str, Any]]
) -> None:
    """Points without a finite value: stacked in a band at the top, with what they are."""
    from matplotlib.patches import Rectangle

    stacks: dict[int, list[Point]] = {}
    for point in panel.points:
        if not math.isfinite(point.y):  # neighbours on the axis share a stack
            stacks.setdefault(round(2 * math.log2(point.x)), []).append(point)
    if not stacks:
        return
    band = _STEP * (max(map(len, stacks.values())) + 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, low * (high / low) ** (1 / (1 - band)))
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    axes.set_yticks([10.0**power for power in powers[:: len(powers) // 8 + 1]])
    axes.set_yticks([], minor=True)
    axes.add_patch(
        Rectangle((0, 1 - band), 1, band, transform=axes.transAxes, color="#f0f0f0", zorder=0.5)
    )
    axes.text(0.01, 0.99, "diverged", transform=axes.transAxes, fontsize=7, va="top")
    across = axes.get_xaxis_transform()
    for stack in stacks.values():
        for index, point in enumerate(stack):
            place = (places[id(point)], 1 - _STEP * (index + 0.75))
            look = _look(point, styles)
            axes.plot(*place, transform=across, linestyle="none", zorder=4, **look)
            axes.annotate(
                "NaN" if math.isnan(point.y) else "inf",
                place,
                (-6, 0),
                xycoords=across,
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=7,
            )


def _align_x(grid: Sequence[Axes], panels: Sequence[Panel], x: str) -> None:
    """Bits run from many to few, alike in every panel, with a tick at every width there is."""
    widths = sorted({point.x for panel in panels for point in panel.points} | {16.0})
    nominal = x == "wbits"
    ticks = widths if nominal else [t for t in (1, 2, 3, 4, 8, 16) if t >= 0.7 * widths[0]]
    # 1.58 stands so near to 2 that its label goes below
    labels = [f"{tick:g}" if tick == int(tick) else f"\n{tick:g}" for tick in ticks]
    for axes in grid:
        axes.set_xticks(ticks, labels)
        axes.set_xticks([], minor=True)
        axes.set_xlim(16 * 1.3, min(widths[0], ticks[0]) / 1.3)


def _places(points: Sequence[Point], styles: dict[str, dict[str, Any]], x: str) -> dict[int, float]:
    """Where each point stands on the axis: methods a little apart where widths are nominal."""
    places = {id(point): point.x for point in points}
    if x != "wbits":
        return places
    for width in {point.x for point in points}:
        group = [point for point in points if point.x == width and point.role == "ptq"]
        names = [name for name in styles if any(point.series == name for point in group)]
        step = min(0.07, 0.24 / max(len(names), 1))  # octaves; 5 and 4 bits are 0.32 apart
        for point in group:
            shift = step * ((len(names) - 1) / 2 - names.index(point.series))
            places[id(point)] = width * 2**shift
    return places


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Colour and shape of each method: the same in every panel."""
    return method_looks(p.series for panel in panels for p in panel.points if p.role == "ptq")


def _look(point: Point, styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if point.role == "trained":
        return trained_look(point.wbits) | {"markersize": 12}
    if point.role == "full precision":
        return {"color": "black", "marker": "o", "markersize": 5}
    look = styles[point.series] | _filled(point.abits, styles[point.series]["color"])
    return look | {"alpha": 0.4} if point.mixed else look


def _filled(abits: int, color: str) -> dict[str, Any]:
    """Hollow is white inside, so that an error bar does not cross the marker."""
    fill = _FILLS.get(abits, _OTHER_FILL)
    inside = {"markerfacecolor": "white" if fill == "full" else color}
    return inside | {
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "markersize": 6.5,
        "markeredgewidth": 1.3,
    }


def _legend(
    figure: Figure,
    panels: Sequence[Panel],
    styles: dict[str, dict[str, Any]],
    about: list[str],
    accuracy: bool,
    width: float,
) -> int:
    """A legend under the panels, headed by what is shown; returns how many lines it takes."""
    points = [point for panel in panels for point in panel.points]
    ptq = [point for point in points if point.role == "ptq"]
    entries: list[tuple[str, dict[str, Any]]] = [
        (name, look | _filled(16, look["color"])) for name, look in styles.items()
    ]
    if any(point.abits < 16 for point in ptq):
        for bits in sorted({point.abits for point in ptq}, reverse=True):
            look = {"color": GREY, "marker": "o"} | _filled(bits, GREY)
            entries.append((f"{bits}-bit activations", look))
    stars = {(point.wbits, point.name) for point in points if point.role == "trained"}
    for wbits in sorted({wbits for wbits, _ in stars}):
        same = [name for own, name in stars if own == wbits]
        name = same[0] if len(same) == 1 else f"{wbits:g} bits"
        entries.append((f"trained: {name}", trained_look(wbits) | {"markersize": 11}))
    if any(point.role == "full precision" for point in points):
        look = {"color": "black", "marker": "o", "markersize": 5, "linestyle": ":"}
        entries.append(("full precision", look))
    if any(len(panel.best(lower=not accuracy)) > 1 for panel in panels):
        entries.append(("best PTQ per width", {"color": GREY, "linestyle": "-"}))
    if accuracy and any(panel.chance is not None for panel in panels):
        entries.append(("random guessing", {"color": GREY, "linestyle": "--"}))
    return legend_below(figure, entries, about, width)
