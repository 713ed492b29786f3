"""What a plot shows, before it is drawn: panels of points.

One panel per full-precision checkpoint (and per text and protocol, for perplexity). A trained
model joins the panel of the checkpoint nearest in size, or every panel where sizes are unknown.
An accuracy is the plain mean over the tasks that at least half of the runs have; a run that lacks
one of them is left out. What was left out, and what was measured differently from the rest, is
told under the plot.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from qbench.study.columns import mean_of
from qbench.study.entries import Entry, Key, Measured, common, deviations
from qbench.study.layouts import accuracy_keys, by_size, perplexity_keys

X_AXES = ("wbits", "effective_bits")


@dataclass(frozen=True)
class Point:
    """One run in a plot."""

    x: float
    y: float
    """May be infinite or NaN for a perplexity."""
    stderr: float | None
    role: str
    """ptq, trained or full precision."""
    series: str
    wbits: float
    abits: int
    name: str
    comparable: bool = True
    """False where it was measured differently from the rest."""


@dataclass
class Panel:
    """One set of axes."""

    title: str
    points: list[Point] = field(default_factory=list)
    chance: float | None = None
    tasks: list[str] = field(default_factory=list)
    """What an accuracy is the mean of."""
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What a reader must know -> the runs it is about."""

    def best(self, lower: bool) -> list[Point]:
        """The best finite, comparable PTQ point of each weight width, widest first."""
        widths: dict[float, list[Point]] = defaultdict(list)
        for point in self.points:
            if point.role == "ptq" and point.comparable and math.isfinite(point.y):
                widths[point.wbits].append(point)
        sign = 1 if lower else -1
        best = [min(points, key=lambda point: sign * point.y) for points in widths.values()]
        return sorted(best, key=lambda point: -point.x)


def accuracy_panels(entries: Sequence[Entry], x: str) -> list[Panel]:
    """One panel per checkpoint: the mean accuracy of each run over the tasks."""
    keys, rare = _common_tasks(entries)
    usual = {key: common(e.cells[key] for e in entries if key in e.cells) for key in keys}
    panels = []
    for title, members in _by_checkpoint(entries).items():
        panel = Panel(title, tasks=[key[0] for key in keys])
        for task in rare:
            panel.remarks["not part of the mean, as few runs have it"].append(task)
        for entry in members:
            numbers = [entry.cells[key] for key in keys if key in entry.cells]
            if len(numbers) < len(keys) or any(number.value is None for number in numbers):
                if numbers:
                    panel.remarks["not shown, as a task is missing"].append(_name(entry))
                continue
            different = {deviations(n, usual[n.task, ""]) for n in numbers} - {""}
            mean = mean_of(numbers)
            panel.chance = mean.chance
            _add(panel, entry, mean, x, different)
        panels.append(panel)
    return panels


def perplexity_panels(entries: Sequence[Entry], x: str) -> list[Panel]:
    """One panel per checkpoint, text and protocol."""
    panels = []
    for key in perplexity_keys(entries):
        usual = common(e.cells[key] for e in entries if key in e.cells)
        for title, members in _by_checkpoint(entries).items():
            panel = Panel(f"{title}\n{key[0]}, {key[1]}")
            for entry in members:
                number = entry.cells.get(key)
                if number is not None and number.value is not None:
                    _add(panel, entry, number, x, {deviations(number, usual)} - {""})
            panels.append(panel)
    return [panel for panel in panels if panel.points]


def _common_tasks(entries: Sequence[Entry]) -> tuple[list[Key], list[str]]:
    """The tasks at least half of the measured runs have, and the names of the others."""
    keys = accuracy_keys(entries)
    runs = [entry for entry in entries if any(key in entry.cells for key in keys)]
    counts = {key: sum(key in entry.cells for entry in runs) for key in keys}
    rare = [key for key in keys if 2 * counts[key] < len(runs)]
    return [key for key in keys if key not in rare], [key[0] for key in rare]


def _add(panel: Panel, entry: Entry, number: Measured, x: str, different: set[str]) -> None:
    facts = entry.facts
    place = 16.0 if entry.full_precision else facts[x]
    if place is None:
        panel.remarks["not shown, as effective bits are unknown"].append(_name(entry))
        return
    if different:
        how = f"measured differently ({', '.join(sorted(different))})"
        panel.remarks[how].append(_name(entry))
    role = "trained" if entry.trained else "full precision" if entry.full_precision else "ptq"
    name = facts["checkpoint"] if entry.trained else facts["label"]
    panel.points.append(
        Point(
            x=place,
            y=math.nan if number.value is None else number.value,
            stderr=number.stderr,
            role=role,
            series=entry.series,
            wbits=facts["wbits"],
            abits=facts["abits"],
            name=name,
            comparable=not different,
        )
    )


def _by_checkpoint(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    homes: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=by_size):
        if not entry.trained:
            homes[entry.facts["checkpoint"]].append(entry)
    sizes = {name: members[0].facts["parameters"] for name, members in homes.items()}
    trained = [entry for entry in entries if entry.trained]
    if not homes:
        return {"": trained}
    for entry in trained:
        for name in _nearest(entry.facts["parameters"], sizes):
            homes[name].append(entry)
    return dict(homes)


def _nearest(size: int | None, sizes: dict[str, int | None]) -> list[str]:
    """The checkpoint nearest in size, by ratio; all of them where a size is unknown."""
    known = {name: other for name, other in sizes.items() if other}
    if not size or len(known) < len(sizes):
        return list(sizes)
    return [min(known, key=lambda name: abs(math.log(known[name] / size)))]


def _name(entry: Entry) -> str:
    if entry.trained:
        return str(entry.facts["checkpoint"])
    return f"{entry.method} {entry.facts['label']}"
