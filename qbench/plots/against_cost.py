"""Accuracy and perplexity against what a model costs, with the Pareto front drawn.

All checkpoints share a panel; a larger marker is a larger checkpoint. Hollow markers have 16-bit
activations, filled ones have quantized activations, filled stars were trained at their width. The
grey steps are the front: what scores best at its cost or less. Its points are named where there is
room. Costs spanning more than a factor of eight stand on a logarithmic axis.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qbench.comparison.cost_points import cost_panels, front
from qbench.comparison.footprint import size_text
from qbench.comparison.headings import size_text as count_text
from qbench.comparison.panels import Panel, Point, caption
from qbench.comparison.run_costs import TOKENS
from qbench.errors import QBenchError, unknown
from qbench.plots.style import (
    FULL,
    GREY,
    NARROW_IN,
    empty_figure,
    legend_below,
    mark,
    method_looks,
    our_style,
    panel_height,
    trained_look,
)
from qbench.plots.wanted import Wanted
from qbench.tables.costs_table import joules_text
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_AXES: dict[str, tuple[str, Callable[[float], str]]] = {
    "size": ("size of the whole model", size_text),
    "energy": (f"energy, arithmetic only: {TOKENS} tokens, 7 nm, INT8 additions", joules_text),
    "energy_int32": (
        f"energy, arithmetic only: {TOKENS} tokens, 7 nm, INT32 additions",
        joules_text,
    ),
    "effective_bits": ("bits per weight, whole model", lambda bits: f"{bits:g}"),
}
_LETTERS_PER_IN = 14
_LOG_FROM = 8.0
_AROUND = ((0, 8, "center", "bottom"), (0, -8, "center", "top"), (7, 0, "left", "center"),
           (-7, 0, "right", "center"), (6, 7, "left", "bottom"), (-6, 7, "right", "bottom"),
           (6, -7, "left", "top"), (-6, -7, "right", "top"), (0, 17, "center", "bottom"),
           (0, -17, "center", "top"))  # fmt: skip
_SAME_PT = 4.0
"""Points nearer than this are one to the eye: any of them may have the name."""
_SIZES = (5.0, 9.0)
"""Size of the markers of the smallest and of the largest checkpoint, in points."""
_STAR = 1.7
"""How much larger stars are than other markers."""


def draw_against_cost(wanted: Wanted) -> Figure:
    """The figure: ``accuracy-vs-cost`` or ``perplexity-vs-cost``.

    Args:
        wanted: what is shown; ``x`` is ``size``, ``energy``, ``energy_int32`` or
            ``effective_bits``.

    Raises:
        QBenchError: for published points, another axis or metric, or nothing to draw.
    """
    if wanted.against is not None:
        raise QBenchError(f"{wanted.kind} has no published points; leave --against out")
    if wanted.metric not in (*METRICS, "perplexity"):
        raise unknown("metric", wanted.metric, (*METRICS, "perplexity"))
    accuracy = wanted.kind == "accuracy-vs-cost" and wanted.metric in METRICS
    entries, x = wanted.entries(), wanted.x
    panels = cost_panels(entries, x, accuracy)
    sizes = {e.facts["run"]: e.facts["parameters"] for e in entries if e.facts.get("parameters")}
    about = [*caption(entries, panels, accuracy, wanted.metric), *_about(panels, sizes, x)]
    panels = [panel for panel in panels if panel.points]
    if not panels:
        why = "; ".join(about) or f"no run has {'accuracies' if accuracy else 'perplexities'}"
        raise QBenchError(f"nothing to draw: {why}")
    points = [point for panel in panels for point in panel.points]
    looks = method_looks(p.series for p in points if p.role == "ptq")
    with our_style(wanted.width_in):
        figure, grid, width = empty_figure(len(panels), wanted.width_in, share_y=False)
        drawn = [axes for row in grid for axes in row]
        for axes, panel in zip(drawn, panels, strict=True):
            _draw_panel(axes, panel, looks, sizes, accuracy, 0.75 if width < NARROW_IN else 1.0)
            _label_x(axes, panel, x, width / len(grid[0]) - 0.8)
        for row in grid:
            row[0].set_ylabel(f"mean {wanted.metric} (%)" if accuracy else "perplexity (log scale)")
        lines = legend_below(figure, _legend(panels, looks), about, width)
        height = max(panel_height(width, len(grid[0])), 2.4)
        figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)
        figure.draw_without_rendering()  # settles the layout, in which names find their places
        for axes, panel in zip(drawn, panels, strict=True):
            _name_front(axes, panel, sizes, accuracy)
    return figure


def _draw_panel(
    axes: Axes,
    panel: Panel,
    looks: dict[str, dict[str, Any]],
    sizes: dict[str, int],
    accuracy: bool,
    shrink: float,
) -> None:
    scale = 100 if accuracy else 1
    axes.margins(x=0.12, y=0.14)
    places = [point.x for point in panel.points]
    if max(places) > _LOG_FROM * min(places):
        axes.set_xscale("log")
    if not accuracy:
        axes.set_yscale("log")
        _label_y(axes, panel)
    if accuracy and panel.chance is not None:
        axes.axhline(100 * panel.chance, color=GREY, linewidth=1.1, linestyle="--", zorder=1)
    best = front(panel.points, lower=not accuracy)
    if len(best) > 1:
        across, up = [point.x for point in best], [scale * point.y for point in best]
        axes.plot(
            across, up, drawstyle="steps-post", color=GREY, linewidth=1.1, zorder=2, label="_front"
        )
    for point in panel.points:
        look = _look(point, looks, sizes)
        look["markersize"] *= shrink
        if point.band is not None:
            low, high = (scale * end for end in point.band)
            axes.vlines(point.x, low, high, look["color"], linewidth=6, alpha=0.25, zorder=1.5)
        error = scale * point.stderr if accuracy and point.stderr is not None else None
        mark(axes, point.x, scale * point.y, error, look)
    axes.set_title(panel.title, fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)


def _label_x(axes: Axes, panel: Panel, x: str, room_in: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    text, write = _AXES[x]
    axes.set_xlabel(textwrap.fill(text, max(16, int(room_in * _LETTERS_PER_IN))))
    if axes.get_xscale() == "log":
        low, high = min(p.x for p in panel.points), max(p.x for p in panel.points)
        steps = (1.0, 2.0, 5.0) if high < 60 * low else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(write, value)))


def _label_y(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(p.y for p in panel.points), max(p.y for p in panel.points)
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 8 * low else (1.0, 3.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps if high < 1000 * low else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(write: Callable[[float], str], value: float) -> str:
    """A tick's text without needless zeros: "500 kB", "2 MB"."""
    number, _, unit = write(value).partition(" ") if value > 0 else ("0", "", "")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".strip()


def _name_front(axes: Axes, panel: Panel, sizes: dict[str, int], accuracy: bool) -> None:
    """Name the points of the front wherever a name covers no point and no other name.

    Nor does a name stand nearer to another point, which it would seem to name.

    Beside the front's own line where that is possible, else on it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    scale = 100 if accuracy else 1
    renderer: Any = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[arg-type]
    best = front(panel.points, lower=not accuracy)
    line = _steps(axes, best, scale)
    taken = [_box(axes, point, sizes, scale) for point in panel.points]
    places = [axes.transData.transform((point.x, scale * point.y)) for point in panel.points]
    inside = axes.get_window_extent(renderer)
    for point in best:
        own = axes.transData.transform((point.x, scale * point.y))
        others = [at for at in places if math.dist(at, own) > _SAME_PT * axes.figure.dpi / 72]
        for place, avoided in _tries(line):
            text = _written(axes, point, scale, place)
            box = text.get_window_extent(renderer)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1
            fits = fits and inside.y0 <= box.y0 and box.y1 <= inside.y1
            nearest = min((_distance(box, at) for at in others), default=math.inf)
            fits = fits and _distance(box, own) < nearest
            if fits and not any(box.overlaps(other) for other in [*taken, *avoided]):
                taken.append(box)
                break
            text.remove()


def _distance(box: Any, at: Any) -> float:
    """From a point to the nearest of a box, in pixels."""
    return math.hypot(
        max(box.x0 - at[0], 0.0, at[0] - box.x1), max(box.y0 - at[1], 0.0, at[1] - box.y1)
    )


def _tries(line: list[Any]) -> list[tuple[tuple[float, float, str, str], list[Any]]]:
    """Every place, first with the front's line to avoid, then without."""
    return [(place, avoided) for avoided in (line, []) for place in _AROUND]


def _steps(axes: Axes, best: Sequence[Point], scale: int) -> list[Any]:
    """The treads and risers of the front, in pixels."""
    from matplotlib.transforms import Bbox

    corners = [axes.transData.transform((point.x, scale * point.y)) for point in best]
    found = []
    for (left, low), (right, high) in pairwise(corners):
        found.append(Bbox([[left, low - 1], [right, low + 1]]))
        found.append(Bbox([[right - 1, min(low, high)], [right + 1, max(low, high)]]))
    return found


def _written(
    axes: Axes, point: Point, scale: int, place: tuple[float, float, str, str]
) -> Annotation:
    across, up, ha, va = place
    text = axes.annotate(
        point.name, (point.x, scale * point.y), (across, up), textcoords="offset points",
        ha=ha, va=va, fontsize=6.5, color=GREY, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )  # fmt: skip
    text.set_in_layout(False)  # the axes keep the place that the names were fitted to
    return text


def _box(axes: Axes, point: Point, sizes: dict[str, int], scale: int) -> Any:
    """What a marker with its error bar covers, in pixels."""
    from matplotlib.transforms import Bbox

    error = point.stderr or 0.0 if scale == 100 else 0.0
    wide = _STAR if point.role == "trained" else 1.0
    half = 0.5 * wide * _marker_size(sizes.get(point.run), sizes) * axes.figure.dpi / 72
    ends = [(point.x, scale * (point.y + side * error)) for side in (-1, 1)]
    (left, low), (_, high) = axes.transData.transform(ends)
    return Bbox([[left - half, low - half], [left + half, high + half]])


def _look(point: Point, looks: dict[str, dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    size = _marker_size(sizes.get(point.run), sizes)
    if point.role == "trained":
        look = trained_look(point.wbits) | {"markersize": _STAR * size}
    elif point.role == "full precision":
        look = {"color": FULL, "marker": "o", "markersize": size}
    else:
        look = looks[point.series] | {"markersize": size, "markeredgewidth": 1.3}
        if point.abits == 16:
            look |= {"markerfacecolor": "white"}
    return look if point.comparable else look | {"alpha": 0.4}


def _marker_size(parameters: int | None, sizes: dict[str, int]) -> float:
    smallest, largest = min(sizes.values(), default=1), max(sizes.values(), default=1)
    if parameters is None or largest < 1.5 * smallest:
        return 6.0
    share = math.log(parameters / smallest) / math.log(largest / smallest)
    return _SIZES[0] + share * (_SIZES[1] - _SIZES[0])


def _about(panels: Sequence[Panel], sizes: dict[str, int], x: str) -> list[str]:
    found = []
    shown = {point.run for panel in panels for point in panel.points}
    counts = [count for run, count in sizes.items() if run in shown]
    if counts and max(counts) >= 1.5 * min(counts):
        ends = f"{count_text(min(counts))} to {count_text(max(counts))}"
        found.append(f"Larger markers: larger checkpoints, {ends} parameters.")
        if x == "effective_bits":
            found.append("Bits per weight leave out how many weights there are: see also --x size.")
    if counts:
        found.append("The front goes by the numbers alone, however small a difference is.")
    if x.startswith("energy"):
        found.append(
            "Energy: arithmetic only, as BitNet counts it, without memory access, embeddings and "
            "output head; weight-only schemes compute in FP16."
        )
    return found


def _legend(
    panels: Sequence[Panel], looks: dict[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    points = [point for panel in panels for point in panel.points]
    ptq = [point for point in points if point.role == "ptq"]
    hollow = {"markerfacecolor": "white", "markersize": 6.5, "markeredgewidth": 1.3}
    found = [(name, look | hollow) for name, look in looks.items()]
    if any(point.abits < 16 for point in ptq):
        found.append(
            ("filled: quantized activations", {"color": GREY, "marker": "o", "markersize": 6.0})
        )
    for wbits in sorted({point.wbits for point in points if point.role == "trained"}):
        found.append((f"trained at W{wbits:g}", trained_look(wbits) | {"markersize": 10.0}))
    if any(point.role == "full precision" for point in points):
        found.append(("full precision", {"color": FULL, "marker": "o", "markersize": 6.0}))
    if any(len(panel.points) > 1 for panel in panels):
        found.append(("Pareto front", {"color": GREY, "linestyle": "-"}))
    if any(panel.chance is not None for panel in panels):
        found.append(("random guessing", {"color": GREY, "linestyle": "--"}))
    return found
