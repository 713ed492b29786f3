"""BitNet (arXiv 2310.11453) Fig. 1: energy saved against size, and accuracy against weight bits.

On the right bits run from many to few on a linear axis, quantized models are hollow black markers
with a line through the best of each width, stars were trained at theirs. Methods stand a little
apart so that they do not hide each other. Published accuracies are other tasks of other weights and
stand in a panel of their own; energies are computed alike and share theirs.

Left out on purpose: the width of activations, which the paper's figure does not tell either
(``accuracy-vs-bits`` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qbench.comparison import reference
from qbench.comparison.entries import Entry, mean_of
from qbench.comparison.headings import size_text
from qbench.comparison.panels import Panel, Point, accuracy_panels, caption
from qbench.comparison.run_costs import TOKENS
from qbench.comparison.savings import joules, savings
from qbench.comparison.scaling import SAME_SIZE
from qbench.comparison.sizes import average, role
from qbench.errors import QBenchError, unknown
from qbench.plots.style import (
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
from qbench.plots.wanted import Wanted
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEST = "#0072B2"
_APART = 0.17  # bits between methods that share a width
_PAGE_IN = 6.75


def draw_bitnet_fig1(wanted: Wanted) -> Figure:
    """The figure: energy on the left where trained rows have twins, bits on the right.

    Raises:
        QBenchError: for another metric, or nothing to draw.
    """
    if wanted.metric not in METRICS:
        raise unknown("metric", wanted.metric, METRICS)
    measured, published = wanted.measured(), wanted.published()
    ratios = savings([*measured, *published], joules, "energy_ratio")
    panels = accuracy_panels(measured, "wbits")
    about = caption(measured, panels, True, wanted.metric)
    panels = _largest([panel for panel in panels if panel.points], about)
    theirs = published_panel(published, wanted.against or "")
    panels += [theirs] if theirs.points else []
    if not panels:
        raise QBenchError(
            "nothing to draw against bits: no run has accuracies; measure tasks, or add the "
            "paper's points with --against bitnet-table3"
        )
    about += _sources(ratios, published)
    looks = _looks(panels)
    with our_style(wanted.width_in or _PAGE_IN):
        n_panels = len(panels) + bool(ratios)
        figure, grid, width = empty_figure(n_panels, wanted.width_in or _PAGE_IN, share_y=False)
        drawn = [axes for row in grid for axes in row]
        if ratios:
            _draw_energy(drawn.pop(0), ratios)
        for axes, panel in zip(drawn, panels, strict=True):
            _draw_bits(axes, panel, looks)
            axes.set_ylabel(f"mean {wanted.metric} (%)" if panel is not theirs else "mean (%)")
        lines = legend_below(figure, _legend(panels, ratios, looks), about, width)
        height = panel_height(width, len(grid[0]), len(grid))
        figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)
    return figure


def published_panel(entries: Sequence[Entry], name: str) -> Panel:
    """The published averages against bits; without points where the table has none."""
    panel = Panel("")
    for entry in entries:
        numbers = [number for (_, protocol), number in entry.cells.items() if not protocol]
        mean = average(entry) or (mean_of(numbers) if numbers else None)
        if mean is None or mean.value is None:
            continue
        facts = entry.facts
        panel.title = f"{facts['checkpoint'].split(' (')[0]}, {facts['reference'].split(',')[0]}"
        panel.points.append(
            Point(
                x=facts["wbits"],
                y=mean.value,
                stderr=None,
                role=role(entry),
                series=entry.series,
                wbits=facts["wbits"],
                abits=facts["abits"],
                name=facts["label"],
                published=True,
            )
        )
    if panel.points:
        panel.title = f"published: {panel.title}"
        panel.chance = published_chance(name)
    return panel


def published_chance(name: str, protocol: str | None = None) -> float | None:
    """The average that a published table gives for guessing; None where it has none."""
    table = reference.load(name)
    rows = table[(table["method"] == "Random") & (table["task"] == "average")]
    if protocol is not None:
        rows = rows[rows["protocol"] == protocol]
    return None if rows.empty else float(rows["value"].iloc[0]) / 100


def _largest(panels: list[Panel], about: list[str]) -> list[Panel]:
    """The last panel, which is that of the largest checkpoint; ``about`` is told of the others."""
    if len(panels) > 1:
        others = ", ".join(panel.title for panel in panels[:-1])
        about.append(f"The largest checkpoint; choose with --checkpoint: {others}")
    return panels[-1:]


def _sources(ratios: Sequence[Point], published: Sequence[Entry]) -> list[str]:
    lines = []
    if ratios:
        lines.append(
            f"Energy: arithmetic only, {TOKENS} tokens, 7 nm, INT8 additions, as the paper counts."
        )
    sources = list(dict.fromkeys(entry.facts["reference"] for entry in published))
    return [*lines, f"Published: {'; '.join(sources)}"] if sources else lines


def _looks(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Hollow black markers, one shape per method."""
    names = sorted({p.series for panel in panels for p in panel.points if p.role == "ptq"})
    look = {"color": FULL, "markerfacecolor": "white", "markersize": 5, "markeredgewidth": 1.0}
    return {
        name: look | {"marker": MARKERS[index % len(MARKERS)]} for index, name in enumerate(names)
    }


def _draw_energy(axes: Axes, ratios: Sequence[Point]) -> None:
    draw_savings(axes, ratios)
    axes.set_ylabel("energy, FP16 over trained")
    axes.set_title("energy saved", fontsize="medium")


def draw_savings(axes: Axes, ratios: Sequence[Point]) -> None:
    """Ratios against size, a line per trained width, published ones hollow and dashed."""
    lines: dict[tuple[float, bool], list[Point]] = {}
    for point in ratios:
        lines.setdefault((point.wbits, point.published), []).append(point)
    for (wbits, hollow), points in lines.items():
        look = star(wbits, hollow)
        style = {"linestyle": "--" if hollow else "-", "linewidth": 0.9, "zorder": 3}
        axes.plot([p.x for p in points], [p.y for p in points], **(look | style))
    label_sizes(axes, [point.x for point in ratios])
    axes.set_ylim(0, 1.12 * max(point.y for point in ratios))
    axes.set_xlabel("parameters")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)


def label_sizes(axes: Axes, sizes: Sequence[float], most: int = 4) -> list[float]:
    """A logarithmic axis with a few of the sizes on it, the first and last among them.

    Sizes within 5 % have one label. Returns the sizes that have one.
    """
    first = sorted(set(sizes))[0]
    sizes = [first, *(b for a, b in pairwise(sorted(set(sizes))) if b > SAME_SIZE * a)]
    axes.set_xscale("log")
    octaves = math.log2(sizes[-1] / sizes[0])
    ticks = [sizes[0], sizes[-1]] if octaves else [sizes[0]]
    for size in sizes[1:-1]:
        if all(abs(math.log2(size / other)) >= octaves / most for other in ticks):
            ticks.append(size)
    axes.set_xticks(sorted(ticks), [size_text(int(size)) for size in sorted(ticks)])
    axes.set_xticks([], minor=True)
    margin = 2 ** (0.08 * octaves + 0.1)
    axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    return ticks


def _draw_bits(axes: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    for point in panel.points:
        if point.role == "full precision":
            axes.axhline(100 * point.y, color=FULL, linewidth=0.9, linestyle=":", zorder=1)
    if panel.chance is not None:
        axes.axhline(100 * panel.chance, color=GREY, linewidth=1.1, linestyle="--", zorder=1)
    shown = [point for point in panel.points if point.role != "full precision"]
    places = _places(shown, list(looks))
    best = panel.best(lower=False)
    if len(best) > 1:
        across = [places[id(point)] for point in best]
        up = [100 * point.y for point in best]
        axes.plot(across, up, color=_BEST, linewidth=1.3, zorder=2, label="_best")
        if any(point.band for point in best):
            ends = [point.band or (point.y, point.y) for point in best]
            low, high = ([100 * end[side] for end in ends] for side in (0, 1))
            axes.fill_between(across, low, high, color=_BEST, alpha=0.2, linewidth=0, zorder=1.5)
    for point in shown:
        trained = point.role == "trained"
        look = star(point.wbits, False) if trained else looks[point.series]
        error = None if point.stderr is None else 100 * point.stderr
        mark(axes, places[id(point)], 100 * point.y, error, look)
    widths = sorted({8.0, 4.0, 2.0, 1.0, *(point.x for point in shown)}, reverse=True)
    whole = [width for width in widths if width == int(width)]
    between = [width for width in widths if width != int(width)]
    axes.set_xticks(whole, [f"{width:g}" for width in whole])
    axes.set_xticks(between, [f"{width:g}" for width in between], minor=True)
    axes.tick_params(axis="x", which="minor", length=3, pad=14)  # 1.58 is too near to 2
    axes.set_xlim(widths[0] + 0.6, widths[-1] - 0.6)
    axes.margins(y=0.1)
    axes.set_xlabel("bits per weight")
    axes.set_title(panel.title, fontsize="medium")


def _places(points: Sequence[Point], names: Sequence[str]) -> dict[int, float]:
    """Where each point stands: the quantized ones of a width apart, a star at its width."""
    places = {id(point): point.x for point in points}
    for width in {point.x for point in points}:
        group = [point for point in points if point.x == width and point.role == "ptq"]
        there = [name for name in names if any(point.series == name for point in group)]
        for point in group:
            shift = (len(there) - 1) / 2 - there.index(point.series)
            places[id(point)] = width + _APART * shift
    return places


def star(wbits: float, hollow: bool) -> dict[str, Any]:
    """The look of a trained model's point; hollow is published."""
    look = trained_look(wbits) | {"markersize": 9}
    return look | {"markerfacecolor": "white", "markeredgewidth": 1.0} if hollow else look


def _legend(
    panels: Sequence[Panel], ratios: Sequence[Point], looks: dict[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    entries: list[tuple[str, dict[str, Any]]] = list(looks.items())
    points = [point for panel in panels for point in panel.points]
    if any(len(panel.best(lower=False)) > 1 for panel in panels):
        entries.append(("best PTQ per width", {"color": _BEST, "linestyle": "-"}))
    trained = [point for point in [*points, *ratios] if point.role == "trained"]
    for wbits in sorted({point.wbits for point in trained}):
        entries.append((f"trained at {wbits:g} bit{'s' * (wbits != 1)}", star(wbits, False)))
    if any(point.published for point in ratios) and not all(p.published for p in ratios):
        entries.append(("published", star(ratios[-1].wbits, True) | {"linestyle": "--"}))
    if any(point.role == "full precision" for point in points):
        entries.append(("full precision", {"color": FULL, "linestyle": ":"}))
    if any(panel.chance is not None for panel in panels):
        entries.append(("random guessing", {"color": GREY, "linestyle": "--"}))
    return entries
