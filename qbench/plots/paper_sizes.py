"""BitNet (arXiv 2310.11453) Fig. 3 and Fig. 6: loss against size and energy, averages against size.

Fig. 3 has the loss against the parameters, with fitted power laws, and against the energy of the
arithmetic. Fig. 6 has the mean accuracy with a line per method, zero-shot and few-shot. Published
numbers are other tasks and texts of other weights: they stand in panels of their own, hollow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.comparison.entries import Entry
from qbench.comparison.run_costs import TOKENS
from qbench.comparison.savings import joules
from qbench.comparison.scaling import PowerLaw
from qbench.comparison.sizes import (
    LOSSES,
    SizePanel,
    accuracy_panels,
    in_families,
    left_out_line,
    loss_panels,
    size_caption,
    with_sizes,
)
from qbench.errors import QBenchError, unknown
from qbench.plots.against_size import (
    align_sizes,
    draw_panel,
    family_looks,
    loss_label,
    size_legend,
)
from qbench.plots.paper_bits import published_chance
from qbench.plots.style import empty_figure, our_style, panel_height
from qbench.plots.wanted import Wanted
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAGE_IN = 6.75


@dataclass(frozen=True)
class _LawOverEnergy(PowerLaw):
    """A law of size with joules across.

    Energy is no power of the size, so losses that follow L(N) follow no power law of energy. The
    size at an energy is read between those of the family's models, on logarithmic axes.
    """

    pairs: tuple[tuple[float, float], ...] = ()
    """(log joules, log parameters), least first."""

    @classmethod
    def of(cls, law: PowerLaw, pairs: Sequence[tuple[float, float]]) -> _LawOverEnergy:
        """The law at the energies of (joules, parameters), of which there are two at least."""
        fitted = [energy for energy, size in pairs if law.smallest <= size <= law.largest]
        ends = {"smallest": fitted[0], "largest": fitted[-1]} if fitted else {}
        logs = tuple((math.log(energy), math.log(size)) for energy, size in pairs)
        return cls(**(asdict(law) | ends), pairs=logs)

    def __call__(self, parameters: float) -> float:
        """The loss at so many joules."""
        energies, sizes = zip(*self.pairs, strict=True)
        return super().__call__(math.exp(np.interp(math.log(parameters), energies, sizes)))


_USUAL = ("W4A4", "W2A16")
"""The quantized rows of Fig. 6, where nobody asks for others."""


def draw_bitnet_fig3(wanted: Wanted) -> Figure:
    """Loss against size and against energy.

    Raises:
        QBenchError: for another metric, or fewer than two sizes.
    """
    metric = LOSSES[0] if wanted.metric == METRICS[0] else wanted.metric
    if metric not in LOSSES:
        raise unknown("loss", metric, LOSSES)
    everything = wanted.measured(baselines=None, schemes=None)
    shown, left_out = in_families(everything, wanted.asked() if everything else None)
    theirs, _ = in_families(wanted.published())
    panels = loss_panels(shown, metric) if shown else []
    of_paper = _titled(loss_panels(theirs, metric) if theirs else [], "published")
    panels = with_sizes([*panels, *of_paper], "losses")
    about = [*size_caption([*shown, *theirs], panels, False, metric), *left_out_line(left_out)]
    by_energy = [_over_energy(panel, [*shown, *theirs]) for panel in panels]
    if any(panel is not None for panel in by_energy):
        about.append(
            f"Energy: arithmetic only, {TOKENS} tokens, 7 nm, INT8 additions, as the paper counts."
        )
        if any(panel is not None and panel.laws for panel in by_energy):
            about.append("Curves against energy: L(N) again, N between the sizes drawn.")
    return _draw(panels, by_energy, about, wanted.width_in or _PAGE_IN, accuracy=False)


def draw_bitnet_fig6(wanted: Wanted) -> Figure:
    """Mean accuracy against size, a line per method, a panel per number of examples.

    Raises:
        QBenchError: for another metric, or fewer than two sizes.
    """
    if wanted.metric not in METRICS:
        raise unknown("metric", wanted.metric, METRICS)
    panels, about = [], []
    for shots in wanted.shots():
        own = wanted.entries(baselines=None, schemes=None, num_fewshot=shots)
        families, left_out = in_families(own, _asked(wanted, own))
        here = _titled(accuracy_panels(families), f"{shots}-shot")
        panels += here
        about += [
            *size_caption(families, here, True, wanted.metric),
            *left_out_line(left_out),
        ]
    for shots in _published_shots(wanted):
        theirs, _ = in_families(wanted.published(shots), published_ptq=True)
        there = _titled(accuracy_panels(theirs), f"published: {shots}-shot")
        for panel in there:
            panel.chance = published_chance(str(wanted.against), f"{shots}-shot")
        panels += there
        about += size_caption(theirs, there, True, wanted.metric)
    if wanted.against and not any(p.published for panel in panels for p in panel.points):
        raise QBenchError(f"{wanted.against} has no average accuracies; take bitnet-fig6")
    panels = with_sizes(panels, "accuracies")
    about = list(dict.fromkeys(about))
    return _draw(panels, [None] * len(panels), about, wanted.width_in or _PAGE_IN, accuracy=True)


def _asked(wanted: Wanted, entries: Sequence[Entry]) -> frozenset[str]:
    """The quantized runs to draw: those asked for, or the paper's widths."""
    if wanted.baselines or wanted.schemes:
        return wanted.asked()
    return frozenset(e.facts["run"] for e in entries if e.facts["label"] in _USUAL)


def _published_shots(wanted: Wanted) -> list[int]:
    if wanted.against is None:
        return []
    from qbench.comparison.reference import load

    protocols = {str(p) for p in load(wanted.against)["protocol"] if str(p).endswith("-shot")}
    return sorted(int(protocol.removesuffix("-shot")) for protocol in protocols)


def _titled(panels: Iterable[SizePanel], title: str) -> list[SizePanel]:
    """The panels that have points, under another title."""
    kept = [panel for panel in panels if panel.points or panel.remarks]
    for panel in kept:
        panel.title = title
    return kept


def _over_energy(panel: SizePanel, entries: Sequence[Entry]) -> SizePanel | None:
    """The same losses with joules across; None where fewer than two energies are known."""
    energies: dict[tuple[str, float], float] = {}
    for entry in entries:
        energy, size = joules(entry), entry.facts["parameters"]
        if energy and size:
            energies[str(entry.facts.get("run") or entry.series), float(size)] = energy
    moved = SizePanel(panel.title, unit=panel.unit)
    for point in panel.points:
        found = energies.get((point.run or point.series, point.x))
        if found is not None:
            moved.points.append(replace(point, x=found))
    if len({point.x for point in moved.points}) < 2:
        return None
    for line, points in panel.lines().items():
        keys = {point.x: (point.run or point.series, point.x) for point in points}
        pairs = sorted((energies[key], size) for size, key in keys.items() if key in energies)
        if line in panel.laws and len(pairs) > 1:
            moved.laws[line] = _LawOverEnergy.of(panel.laws[line], pairs)
    return moved


def _draw(
    panels: Sequence[SizePanel],
    by_energy: Sequence[SizePanel | None],
    about: list[str],
    width: float,
    accuracy: bool,
) -> Figure:
    """Panels by size, each followed by its panel by energy where it has one."""
    looks = family_looks(panels)
    in_order = [(p, q) for pair in zip(panels, by_energy, strict=True) for p, q in _pair(*pair)]
    with our_style(width):
        figure, grid, width = empty_figure(len(in_order), width, share_y=False)
        drawn = [axes for row in grid for axes in row]
        for axes, (panel, energy) in zip(drawn, in_order, strict=True):
            draw_panel(axes, energy or panel, looks, accuracy)
            axes.set_ylabel("mean accuracy (%)" if accuracy else loss_label([panel]))
            if energy is None:
                _align(axes, panel, panels, width / len(grid[0]) - 0.8)
            else:
                _label_energies(axes, energy)
        lines = size_legend(figure, panels, looks, about, width)
        height = panel_height(width, len(grid[0]), len(grid))
        figure.set_size_inches(width, height * len(grid) + 0.17 * lines + 0.3)
    return figure


def _pair(panel: SizePanel, energy: SizePanel | None) -> list[tuple[SizePanel, SizePanel | None]]:
    return [(panel, None)] if energy is None else [(panel, None), (panel, energy)]


def _align(axes: Axes, panel: SizePanel, panels: Sequence[SizePanel], room_in: float) -> None:
    """Measured panels share their sizes, and so do published ones."""
    published = panel.points[0].published
    align_sizes([axes], [p for p in panels if p.points[0].published == published], room_in)


def _label_energies(axes: Axes, panel: SizePanel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    places = [point.x for point in panel.points]
    wide = max(places) > 50 * min(places)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_joules_text))
    axes.set_xlabel(f"energy of {TOKENS} tokens")


def _joules_text(value: float, _: Any) -> str:
    for unit, name in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if value >= 0.999 * unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} J"
