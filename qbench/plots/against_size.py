"""Loss and accuracy against model size, as in BitNet (arXiv 2310.11453) Fig. 3 and 4.

Filled markers were measured here, hollow ones are published. A curve is a fitted power law, dashed
beyond the sizes it was fitted on; where a family is too small for one, thin lines join the best
point of each size. Sizes are on a logarithmic axis.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry
from qbench.comparison.headings import size_text
from qbench.comparison.panels import Point
from qbench.comparison.scaling import PowerLaw
from qbench.comparison.sizes import (
    SizePanel,
    accuracy_panels,
    in_families,
    left_out_line,
    loss_panels,
    size_caption,
    with_sizes,
)
from qbench.plots.style import (
    COLOURS,
    FULL,
    GREY,
    MARKERS,
    empty_figure,
    legend_below,
    mark,
    our_style,
    panel_height,
    trained_look,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_X_LABEL = "N: all parameters of the checkpoint"
_PTQ_MARKERS = tuple(marker for marker in MARKERS if marker != "o")  # that is full precision
_LABEL_IN = 0.42  # inches that one size on the axis needs
_LETTERS_PER_IN = 14


def draw_against_size(
    entries: Sequence[Entry],
    accuracy: bool,
    metric: str,
    width_in: float | None,
    asked: Collection[str] | None = None,
) -> Figure:
    """The figure of some rows: accuracies or losses, sizes on the axis.

    Args:
        entries: rows, measured and published.
        accuracy: whether to draw accuracies.
        metric: an accuracy, or what losses are made of.
        width_in: width in inches; None fits the number of panels.
        asked: the runs of quantized rows to draw; None draws all.

    Raises:
        QBenchError: for fewer than two sizes.
    """
    shown, left_out = in_families(entries, asked)
    panels = accuracy_panels(shown) if accuracy else loss_panels(shown, metric)
    panels = with_sizes(panels, "accuracies" if accuracy else "losses")
    about = [*size_caption(shown, panels, accuracy, metric), *left_out_line(left_out)]
    looks = family_looks(panels)
    with our_style(width_in):
        figure, grid, width = empty_figure(len(panels), width_in, share_y=accuracy)
        drawn = [axes for row in grid for axes in row]
        for axes, panel in zip(drawn, panels, strict=True):
            draw_panel(axes, panel, looks, accuracy)
        for row in grid:
            row[0].set_ylabel(f"mean {metric} (%)" if accuracy else loss_label(panels))
        align_sizes(drawn, panels, width / len(grid[0]) - 0.8)
        lines = size_legend(figure, panels, looks, about, width)
        height = panel_height(width, len(grid[0]), len(grid))
        figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)
    return figure


def draw_panel(
    axes: Axes, panel: SizePanel, looks: dict[str, dict[str, Any]], accuracy: bool
) -> None:
    """The points of a panel, and what joins them."""
    axes.set_xscale("log")
    axes.margins(y=0.1)
    scale = 100 if accuracy else 1
    if accuracy and panel.chance is not None:
        axes.axhline(100 * panel.chance, color=GREY, linewidth=1.1, linestyle="--", zorder=1)
    lines = panel.lines()
    for line, points in reversed(lines.items()):  # the first family lies on top
        colour = looks[line[0]]["color"]
        if line in panel.laws:
            _draw_law(axes, panel.laws[line], points, colour)
        else:
            best = _best_per_size(points, lower=not accuracy)
            up = [scale * point.y for point in best]
            across = [point.x for point in best]
            axes.plot(across, up, color=colour, linewidth=0.8, alpha=0.6, zorder=2, label="_best")
        _shade(axes, points, scale, colour)
        for point in points:
            error = None if point.stderr is None else scale * point.stderr
            mark(axes, point.x, scale * point.y, error, _look(point, looks))
    axes.set_title(panel.title, fontsize="medium")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)


def _shade(axes: Axes, points: Sequence[Point], scale: int, colour: str) -> None:
    """From the lowest to the highest seed, along a family whose points are one per size."""
    if not any(point.band for point in points) or len({p.x for p in points}) < len(points):
        return
    ends = [point.band or (point.y, point.y) for point in points]
    low, high = ([scale * end[side] for end in ends] for side in (0, 1))
    across = [point.x for point in points]
    axes.fill_between(across, low, high, color=colour, alpha=0.2, linewidth=0, zorder=1.5)


def _draw_law(axes: Axes, law: PowerLaw, points: Sequence[Point], colour: str) -> None:
    def curve(start: float, end: float, style: str, label: str) -> None:
        steps = [start * (end / start) ** (step / 100) for step in range(101)]
        up = [law(size) for size in steps]
        axes.plot(steps, up, color=colour, linewidth=1.2, linestyle=style, zorder=2, label=label)

    curve(law.smallest, law.largest, "-", "_law")
    if points[0].x < law.smallest:
        curve(points[0].x, law.smallest, "--", "_beyond")
    if points[-1].x > law.largest:
        curve(law.largest, points[-1].x, "--", "_beyond")


def _best_per_size(points: Sequence[Point], lower: bool) -> list[Point]:
    sign = 1 if lower else -1
    sizes = sorted({point.x for point in points})
    return [min((p for p in points if p.x == size), key=lambda p: sign * p.y) for size in sizes]


def align_sizes(drawn: Sequence[Axes], panels: Sequence[SizePanel], room_in: float) -> None:
    """Sizes alike in every panel, labelled where there is room between two of them."""
    sizes = sorted({point.x for panel in panels for point in panel.points})
    octaves = math.log2(sizes[-1] / sizes[0])
    apart = octaves * _LABEL_IN / room_in
    ticks = [sizes[0], sizes[-1]]
    for size in sizes[1:-1]:
        if all(abs(math.log2(size / other)) >= apart for other in ticks):
            ticks.append(size)
    margin = 2 ** (0.06 * octaves + 0.1)
    for axes in drawn:
        axes.set_xticks(sorted(ticks), [size_text(int(size)) for size in sorted(ticks)])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(textwrap.fill(_X_LABEL, max(12, int(room_in * _LETTERS_PER_IN))))
        axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)


def family_looks(panels: Sequence[SizePanel]) -> dict[str, dict[str, Any]]:
    """Colour and shape of each family: the same in every panel, measured or published."""
    families: dict[str, Point] = {}
    for panel in panels:
        families |= {point.series: point for point in panel.points}
    looks: dict[str, dict[str, Any]] = {}
    quantized = 0
    for name, point in families.items():
        if point.role == "full precision":
            looks[name] = {"color": FULL, "marker": "o", "markersize": 6.0}
        elif point.role == "trained":
            looks[name] = trained_look(point.wbits) | {"markersize": 10.0}
        else:
            colour = COLOURS[quantized % len(COLOURS)]
            marker = _PTQ_MARKERS[quantized % len(_PTQ_MARKERS)]
            looks[name] = {"color": colour, "marker": marker, "markersize": 6.0}
            quantized += 1
    return looks


def _look(point: Point, looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    look = _filled(looks[point.series], hollow=point.published)
    return look if point.comparable else look | {"alpha": 0.4}


def _filled(look: dict[str, Any], hollow: bool) -> dict[str, Any]:
    """A light edge parts markers that overlap."""
    if hollow:
        return look | {"markerfacecolor": "white", "markeredgewidth": 1.3}
    return look | {"markeredgecolor": "white", "markeredgewidth": 0.6}


def loss_label(panels: Sequence[SizePanel]) -> str:
    """What stands beside an axis of losses."""
    units = {panel.unit for panel in panels}
    return f"loss (bits per {units.pop()})" if len(units) == 1 else "loss (bits)"


def size_legend(
    figure: Figure,
    panels: Sequence[SizePanel],
    looks: dict[str, dict[str, Any]],
    about: list[str],
    width: float,
) -> int:
    """A legend under the panels, headed by what is shown; returns how many lines it takes."""
    points = [point for panel in panels for point in panel.points]
    measured = {point.series for point in points if not point.published}
    entries: list[tuple[str, dict[str, Any]]] = [
        (name, _filled(look, hollow=name not in measured)) for name, look in looks.items()
    ]
    if measured and any(point.published for point in points):
        look = {"color": GREY, "marker": "o", "markersize": 6.0}
        entries.append(("published", _filled(look, hollow=True)))
    styles = {line.get_label() for axes in figure.axes for line in axes.lines}
    if "_law" in styles:
        entries.append(("fitted power law", {"color": GREY, "linestyle": "-"}))
    if "_beyond" in styles:
        entries.append(("beyond the fitted sizes", {"color": GREY, "linestyle": "--"}))
    if any(panel.chance is not None for panel in panels):
        entries.append(("random guessing", {"color": GREY, "linestyle": "--"}))
    return legend_below(figure, entries, about, width)
