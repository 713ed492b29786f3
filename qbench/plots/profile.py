"""The error of every weight matrix: a panel per kind of matrix, blocks across, a line per method.

A band is the range over seeds (and over experts, which share a panel). A cross marks a matrix that
was rounded to nearest because the method could not run on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qbench.comparison.layer_errors import ERRORS, Profile, Spread, profile
from qbench.errors import QBenchError, unknown
from qbench.plots.style import legend_below, method_looks, our_style
from qbench.plots.wanted import Wanted
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {"relative_error": "relative error", "proxy_loss": "proxy loss"}
_FORMULAS = {
    "relative_error": "Relative error ‖W−Ŵ‖² / ‖W‖²",
    "proxy_loss": "Proxy loss tr(ΔHΔᵀ) / tr(WHWᵀ), Δ = W−Ŵ,",
}
_PANEL_IN = 1.5  # the narrowest of these panels


def draw_layer_errors(wanted: Wanted) -> Figure:
    """The profile of one checkpoint at one width: of those asked for, what most methods have.

    Raises:
        QBenchError: for published points, another metric, or nothing to draw.
    """
    if wanted.against is not None:
        raise QBenchError("layer-errors has no published points; leave --against out")
    metric = ERRORS[0] if wanted.metric == METRICS[0] else wanted.metric
    if metric not in ERRORS:
        raise unknown("error of a matrix", metric, ERRORS)
    return draw_profile(profile(wanted.entries(), wanted.records(), metric), wanted.width_in)


def draw_profile(shown: Profile, width_in: float | None) -> Figure:
    """The figure of a profile."""
    from matplotlib.figure import Figure

    width = width_in or 6.75
    names = shown.short_names()
    columns = min(len(names), 4, max(1, int(width / _PANEL_IN)))
    rows = math.ceil(len(names) / columns)
    looks = method_looks(shown.methods)
    about, blocks = _about(shown), sorted({b for f in shown.methods.values() for _, b in f})
    with our_style(width):
        figure = Figure(layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
        for index, (axes, (kind, name)) in enumerate(zip(grid.flat, names.items(), strict=False)):
            for method, found in shown.methods.items():
                own = {block: s for (k, block), s in found.items() if k == kind and s.mean > 0}
                _draw_line(axes, dict(sorted(own.items())), looks[method])
            axes.set_title(name, fontsize="medium")
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
            axes.set_xticks(blocks[:: math.ceil(len(blocks) / 6)])
            if index + columns >= len(names):  # nothing stands below
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("block")
        for axes in list(grid.flat)[len(names) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel(_LABELS[shown.metric])
        _scale(grid[0, 0], shown)
        figure.suptitle(f"{shown.checkpoint} {shown.label}", fontsize="large")
        entries: list[tuple[str, dict[str, Any]]] = [
            (name, look | {"linestyle": "-", "markersize": 4}) for name, look in looks.items()
        ]
        if any(s.fallback for found in shown.methods.values() for s in found.values()):
            look = {"color": "black", "marker": "x", "markersize": 8}
            entries.append(("fell back to rounding to nearest", look))
        lines = legend_below(figure, entries, about, width)
        height = min(max(0.8 * width / columns, 1.25), 2.0)
        figure.set_size_inches(width, height * rows + 0.16 * lines + 0.5)
    return figure


def _draw_line(axes: Axes, found: dict[int, Spread], look: dict[str, Any]) -> None:
    across, spreads = list(found), list(found.values())
    axes.plot(across, [s.mean for s in spreads], linewidth=1.1, markersize=4, zorder=3, **look)
    if any(spread.low < spread.high for spread in spreads):
        low, high = [s.low for s in spreads], [s.high for s in spreads]
        axes.fill_between(across, low, high, color=look["color"], alpha=0.2, linewidth=0, zorder=2)
    for block, spread in found.items():
        if spread.fallback:
            axes.plot(block, spread.mean, "x", color="black", markersize=8, zorder=4)


def _scale(axes: Axes, shown: Profile) -> None:
    """A logarithmic axis that begins and ends at 1, 2 or 5 times a power of ten, plainly written.

    The axes share it, so one of them is enough.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    every = [v for f in shown.methods.values() for s in f.values() for v in (s.low, s.high)]
    positive = [value for value in every if value > 0] or [1.0]
    low, high = (_round(min(positive), down=True), _round(max(positive), down=False))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades <= 2.5 else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _round(value: float, down: bool) -> float:
    """The nearest of 1, 2, 5 times a power of ten with a little room to the value."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [step * power * scale for scale in (0.1, 1.0, 10.0) for step in (1, 2, 5)]
    if down:
        return max(step for step in steps if step <= value / 1.04)
    return min(step for step in steps if step >= value * 1.04)


def _about(shown: Profile) -> list[str]:
    more = max(shown.n_runs.values())
    bands = f" (line: mean of up to {more} runs, band: their range)" if more > 1 else ""
    lines = [f"{_FORMULAS[shown.metric]} by decoder block{bands}."]
    if shown.without:
        lines.append(f"No {shown.metric} is stored of {', '.join(shown.without)}.")
    zero = sorted(n for n, f in shown.methods.items() if any(s.mean == 0 for s in f.values()))
    if zero:
        lines.append(f"Not drawn where nothing was lost: {', '.join(zero)}.")
    if shown.others:
        few = ", ".join(shown.others[:4]) + (
            f" and {len(shown.others) - 4} more" if len(shown.others) > 4 else ""
        )
        lines.append(f"Also stored, choose with --checkpoint and --scheme: {few}.")
    return lines
