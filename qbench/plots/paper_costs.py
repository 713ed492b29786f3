"""BitNet b1.58 (arXiv 2402.17764) Fig. 2 and Fig. 3: latency, memory and energy against size.

Filled points are stored runs, hollow ones the paper's sizes. Latency is measured nowhere in qbench
yet: its panel has the published points alone, or says so. Where published points are asked for, the
same formulas are also applied to the papers' shapes, as a grey line for memory and as points for
energy, with the printed ratios written beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench.comparison import shapes
from qbench.comparison.energy import (
    FP16,
    PICOJOULES,
    arithmetic_of,
    model_energy,
    products_at,
    ratio_of_one,
)
from qbench.comparison.entries import Entry
from qbench.comparison.footprint import footprint_at, memory_of
from qbench.comparison.panels import Point
from qbench.comparison.run_costs import TOKENS
from qbench.comparison.savings import joules, memory, savings
from qbench.comparison.sizes import role
from qbench.errors import QBenchError
from qbench.plots.paper_bits import draw_savings, label_sizes, star
from qbench.plots.style import (
    COLOURS,
    FULL,
    GREY,
    empty_figure,
    legend_below,
    our_style,
    panel_height,
)
from qbench.plots.wanted import Wanted
from qbench.scheme import Scheme
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pairs = list[tuple[float, float]]
"""(parameters, joules), smallest first."""
Legend = list[tuple[str, dict[str, Any]]]

_PAGE_IN = 6.75
_WITHOUT = "; of the papers' shapes with codes of 2 bits, without allocator and workspaces"
_TRAINED = Scheme.parse("W1.58A8:w=tensor,a=token,grid=ternary,agrid=restricted")
_SHAPES = {1.3e9: "1.3B", 3e9: "3B", 7e9: "7B", 13e9: "13B", 70e9: "70B"}
"""Parameters as Fig. 2 and 3 print them -> size of the shapes of b1.58."""
_ENERGY_SHAPES = _SHAPES | {3e9: "2.7B", 7e9: "6.7B"}
"""The same -> size of BitNet's shapes, which reproduce the ratios of Fig. 3."""


def draw_b158_fig2(wanted: Wanted) -> Figure:
    """Latency and memory saved against size.

    Raises:
        QBenchError: for a metric, or where there is neither a twin nor a published point.
    """
    entries = _entries(wanted)
    latency = savings(entries, lambda _: None, "speedup")
    saved = savings(entries, memory, "memory_ratio")
    if not (latency or saved):
        raise _nothing("b158-fig2")
    published = any(point.published for point in saved)
    about = [
        f"Memory: weights, and keys and values of {TOKENS} tokens in 16 bits"
        f"{_WITHOUT if published else ''}. "
        "Latency: not measured here.",
        *_sources(entries),
    ]
    width = wanted.width_in or _PAGE_IN
    with our_style(width):
        figure, grid, width = empty_figure(2, width, share_y=False)
        left, right = [axes for row in grid for axes in row]
        _draw_panel(left, "decoding latency saved", latency)
        _draw_panel(right, "memory saved", saved)
        if published:
            line = [(size, _memory_ratio(name)) for size, name in _SHAPES.items()]
            right.plot(*zip(*line, strict=True), color=GREY, linewidth=1.0, zorder=2)
            right.set_ylim(0, 1.12 * max(ratio for _, ratio in line))
        legend = _legend([*latency, *saved])
        if published:
            legend.append(("computed for the papers' shapes", {"color": GREY, "linestyle": "-"}))
        _finish(figure, grid, legend, about, width)
    return figure


def draw_b158_fig3(wanted: Wanted) -> Figure:
    """Energy of one multiply-add by its parts, and of a whole forward pass against size.

    Raises:
        QBenchError: for a metric, or where there is neither a twin nor a published point.
    """
    entries = _entries(wanted)
    printed = [p for p in savings(entries, lambda _: None, "energy_ratio") if p.published]
    whole = _stored(entries, "full precision")
    trained = {
        wbits: _stored([e for e in entries if e.facts["wbits"] == wbits], "trained")
        for wbits in sorted({e.facts["wbits"] for e in entries if role(e) == "trained"})
    }
    if not (whole or printed):
        raise _nothing("b158-fig3")
    about = [
        f"Energy: arithmetic only, 7 nm; end to end: {TOKENS} tokens, INT8 additions, as the "
        f"paper counts.{' Ratios as printed.' if printed else ''}",
        *_sources(entries),
    ]
    width = wanted.width_in or _PAGE_IN
    with our_style(width):
        figure, grid, width = empty_figure(2, width, share_y=False)
        left, right = [axes for row in grid for axes in row]
        _draw_parts(left)
        _draw_joules(right, whole, trained, printed)
        legend: Legend = [("full precision (FP16)", _full(hollow=not whole))]
        widths = {w for w, pairs in trained.items() if pairs} | ({1.58} if printed else set())
        legend += [(f"trained at {w:g} bit{'s' * (w != 1)}", star(w, not whole)) for w in widths]
        if whole and printed:
            legend.append(("computed for the papers' shapes", _full(hollow=True)))
        _finish(figure, grid, legend, about, width)
    return figure


def _entries(wanted: Wanted) -> list[Entry]:
    if wanted.metric != METRICS[0]:
        raise QBenchError(f"{wanted.kind} shows costs, not {wanted.metric}; leave --metric out")
    return [*wanted.measured(), *wanted.published()]


def _draw_panel(axes: Axes, title: str, points: Sequence[Point]) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel("FP16 over trained")
    if points:
        draw_savings(axes, points)
        return
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not measured here", transform=axes.transAxes, ha="center", color=GREY)


def _memory_ratio(size: str) -> float:
    dimensions = shapes.shape(f"b158-{size}")
    whole = memory_of(dimensions, footprint_at(dimensions, Scheme()), TOKENS)
    packed = footprint_at(dimensions, _TRAINED, packed=True)
    return whole.total / memory_of(dimensions, packed, TOKENS).total


def _draw_parts(axes: Axes) -> None:
    """What one multiply-add takes: both parts of FP16 stacked, additions alone where ternary."""
    prices = PICOJOULES["7nm"]
    add, multiply = prices["fp16"]
    axes.bar(0, add, 0.6, color=COLOURS[4], edgecolor=FULL, linewidth=0.6)
    axes.bar(0, multiply, 0.6, bottom=add, color="white", edgecolor=FULL, linewidth=0.6, hatch="//")
    axes.text(0, add / 2, "add", ha="center", va="center")
    axes.text(
        0, add + multiply / 2, "multiply", ha="center", va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip
    for place, kind in ((1, "int8"), (2, "int32")):
        axes.bar(place, prices[kind][0], 0.6, color=COLOURS[4], edgecolor=FULL, linewidth=0.6)
        ratio = ratio_of_one("7nm", kind)
        axes.text(place, prices[kind][0] + 0.012, f"{ratio:.1f}×\nless", ha="center", va="bottom")
    axes.set_xticks([0, 1, 2], ["FP16", "ternary,\nINT8 add", "ternary,\nINT32 add"])
    axes.set_ylabel("pJ per multiply-add")
    axes.set_title("one multiply-add", fontsize="medium")


def _draw_joules(
    axes: Axes, whole: Pairs, trained: dict[float, Pairs], printed: Sequence[Point]
) -> None:
    style: dict[str, Any] = {"linestyle": "-", "linewidth": 0.9, "zorder": 3}
    if whole:
        axes.plot(*zip(*whole, strict=True), **(_full(hollow=False) | style))
    for wbits, pairs in trained.items():
        if pairs:
            axes.plot(*zip(*pairs, strict=True), **(star(wbits, False) | style))
    sizes = [x for pairs in (whole, *trained.values()) for x, _ in pairs]
    printed = [point for point in printed if point.x in _ENERGY_SHAPES]
    if printed:
        both = [_shape_energies(_ENERGY_SHAPES[point.x]) for point in printed]
        across = [point.x for point in printed]
        axes.plot(across, [full for full, _ in both], **(_full(hollow=True) | style))
        axes.plot(across, [own for _, own in both], **(star(1.58, True) | style))
        sizes += across
    axes.set_yscale("log")
    axes.margins(y=0.18)
    labelled = label_sizes(axes, sizes)
    for point in printed:
        if point.x in labelled:  # the others have no room
            own = _shape_energies(_ENERGY_SHAPES[point.x])[1]
            axes.annotate(
                f"{point.y:g}×", (point.x, own), (0, -7), textcoords="offset points",
                ha="center", va="top",
            )  # fmt: skip
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"J per {TOKENS} tokens")
    axes.set_title("end to end", fontsize="medium")


def _shape_energies(size: str) -> tuple[float, float]:
    """Joules of a shape of BitNet in FP16, and with ternary weights."""
    dimensions = shapes.shape(f"bitnet-{size}")
    kinds = (FP16, arithmetic_of(_TRAINED.wbits, _TRAINED.abits))
    whole, trained = (
        model_energy(dimensions, products_at(dimensions, kind), TOKENS).total for kind in kinds
    )
    return whole, trained


def _stored(entries: Sequence[Entry], kind: str) -> Pairs:
    """Size and energy of the stored rows of a role, equal ones once."""
    pairs = {
        (float(entry.facts["parameters"]), energy)
        for entry in entries
        if entry.source == "measured" and role(entry) == kind and entry.facts["parameters"]
        if (energy := joules(entry))
    }
    return sorted(pairs)


def _full(hollow: bool) -> dict[str, Any]:
    look: dict[str, Any] = {"color": FULL, "marker": "o", "markersize": 5}
    return look | {"markerfacecolor": "white"} if hollow else look


def _legend(points: Sequence[Point]) -> Legend:
    """One entry per trained width, and one that says what hollow means."""
    here = {point.wbits for point in points if not point.published}
    there = {point.wbits for point in points if point.published}
    entries: Legend = [
        (f"trained at {w:g} bit{'s' * (w != 1)}", star(w, False)) for w in sorted(here)
    ]
    entries += [
        (f"published, {w:g} bit{'s' * (w != 1)}", star(w, True) | {"linestyle": "--"})
        for w in sorted(there)
    ]
    return entries


def _sources(entries: Sequence[Entry]) -> list[str]:
    sources = [e.facts["reference"] for e in entries if e.source == "published"]
    return [f"Published: {'; '.join(dict.fromkeys(sources))}"] if sources else []


def _finish(
    figure: Figure, grid: list[list[Axes]], legend: Legend, about: list[str], width: float
) -> None:
    lines = legend_below(figure, legend, about, width)
    height = panel_height(width, len(grid[0]), len(grid))
    figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)


def _nothing(kind: str) -> QBenchError:
    return QBenchError(
        f"nothing to draw: {kind} takes a trained checkpoint and its full-precision twin, recorded "
        f"with their dimensions; measure both, or add the paper's points with --against {kind}"
    )
