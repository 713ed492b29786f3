"""Points of quality against cost, and which of them nothing beats: the Pareto front.

All checkpoints share a panel, because the question is what to spend: a small model in full
precision, or a large one at few bits. A point is on the front if no other comparable one costs no
more and scores better, or costs less and scores no worse. Costs are those of
:mod:`qbench.comparison.run_costs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qbench.comparison.entries import Entry, Measured, common, deviations, perplexity_keys
from qbench.comparison.headings import size_text
from qbench.comparison.panels import Panel, Point, Tasks, averages, point_of, run_name
from qbench.errors import unknown

X_COSTS = {
    "size": "size_bytes",
    "energy": "energy",
    "energy_int32": "energy_int32",
    "effective_bits": "model_bits",
}
"""What can stand on the axis -> the column of the long table it is."""
_WORST = 10
"""Perplexities over so many times the lowest would leave no room to tell the others apart."""


def cost_panels(entries: Sequence[Entry], x: str, accuracy: bool) -> list[Panel]:
    """One panel of mean accuracies, or one per text and protocol of perplexities.

    Args:
        entries: measured rows.
        x: a key of ``X_COSTS``.
        accuracy: whether to take accuracies.

    Raises:
        QBenchError: for another axis.
    """
    if x not in X_COSTS:
        raise unknown("x axis", x, X_COSTS)
    names = _labels(entries)
    if accuracy:
        tasks, panel = Tasks.of(entries), Panel("")
        for entry, mean, different in averages(panel, entries, tasks, _name):
            _add(panel, entry, mean, x, different, names)
        return [panel]
    panels = []
    for key in perplexity_keys(entries):
        usual = common(e.cells[key] for e in entries if key in e.cells)
        limits = {f"{key[0]} {key[1]}": usual["limit"]} if usual.get("limit") else {}
        panel = Panel(f"{key[0]}, {key[1]}", limits=limits)
        numbers = [(e, e.cells[key]) for e in entries if key in e.cells]
        finite = [n.value for _, n in numbers if n.value is not None and math.isfinite(n.value)]
        highest = _WORST * min(finite, default=math.inf)
        for entry, number in numbers:
            if number.value is not None and highest < number.value < math.inf:
                panel.remarks[f"not shown, over {_WORST} times the lowest"].append(_name(entry))
            elif number.value is not None:
                _add(panel, entry, number, x, {deviations(number, usual)} - {""}, names)
        panels.append(panel)
    return panels


def front(points: Sequence[Point], lower: bool) -> list[Point]:
    """The points that no other beats, cheapest first; of equal ones the first.

    Args:
        points: all of them; those measured differently from the rest do not compete.
        lower: whether a lower y is better.
    """
    sign = 1 if lower else -1
    competing = [p for p in points if p.comparable and math.isfinite(p.y)]
    found: list[Point] = []
    for point in sorted(competing, key=lambda p: (p.x, sign * p.y)):
        if not found or sign * point.y < sign * found[-1].y:
            found.append(point)
    return found


def _add(
    panel: Panel,
    entry: Entry,
    number: Measured,
    x: str,
    different: set[str],
    names: dict[int, str],
) -> None:
    place = entry.facts.get(X_COSTS[x])
    if place is None:
        panel.remarks[f"not shown, as what its record says gives no {x}"].append(_name(entry))
        return
    if number.value is None or not math.isfinite(number.value):
        panel.remarks["not shown, as it diverged"].append(_name(entry))
        return
    if different:
        how = f"pale, measured differently ({', '.join(sorted(different))})"
        panel.remarks[how].append(_name(entry))
    point = point_of(entry, number, float(place), different)
    panel.points.append(replace(point, name=names[id(entry)]))


def _labels(entries: Sequence[Entry]) -> dict[int, str]:
    """Short names of points: method and widths, behind the size where there are several models."""
    homes = {str(e.facts["checkpoint"]): e.facts["parameters"] for e in entries if not e.trained}
    sizes = {name: size_text(parameters) for name, parameters in homes.items()}
    if len(homes) == 1:
        sizes = dict.fromkeys(sizes, "")
    elif len(set(sizes.values())) < len(sizes):
        sizes = {name: name for name in sizes}
    found = {}
    for entry in entries:
        name, label = str(entry.facts["checkpoint"]), str(entry.facts["label"])
        what = "full precision" if entry.full_precision else f"{entry.facts['baseline']} {label}"
        found[id(entry)] = name if entry.trained else f"{sizes[name]} {what}".strip()
    return found


def _name(entry: Entry) -> str:
    return run_name(entry) if entry.trained else f"{entry.facts['checkpoint']} {entry.name}"
