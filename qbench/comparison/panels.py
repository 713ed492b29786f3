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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qbench.comparison.entries import (
    TOP_1,
    Entry,
    Key,
    Measured,
    accuracy_keys,
    agreement_keys,
    by_size,
    common,
    deviations,
    mean_of,
    perplexity_keys,
    say,
)

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
    mixed: bool = False
    """Whether some matrices have widths of their own, so that its place does not say it all."""
    published: bool = False
    fitted: bool = True
    """Whether a curve through its series is fitted on it."""
    run: str = ""
    """Its place in the store; "" for what was not measured here."""
    draws: tuple[float, ...] = ()
    """The number of every seed, where ``y`` is their mean."""

    @property
    def band(self) -> tuple[float, float] | None:
        """The lowest and the highest finite number of its seeds, None for a point of one."""
        finite = [draw for draw in self.draws if math.isfinite(draw)]
        return (min(finite), max(finite)) if len(finite) > 1 else None


@dataclass
class Panel:
    """One set of axes."""

    title: str
    points: list[Point] = field(default_factory=list)
    chance: float | None = None
    tasks: list[str] = field(default_factory=list)
    """What an accuracy is the mean of."""
    limits: dict[str, int] = field(default_factory=dict)
    """What was measured on its first items only -> how many."""
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What a reader must know -> the runs it is about."""

    def best(self, lower: bool) -> list[Point]:
        """The best finite, comparable PTQ point of each weight width, widest first.

        One with per-layer overrides stands at a width that not all of its weights have.
        """
        widths: dict[float, list[Point]] = defaultdict(list)
        for point in self.points:
            competes = point.role == "ptq" and point.comparable and not point.mixed
            if competes and math.isfinite(point.y):
                widths[point.wbits].append(point)
        sign = 1 if lower else -1
        best = [min(points, key=lambda point: sign * point.y) for points in widths.values()]
        return sorted(best, key=lambda point: -point.x)


@dataclass(frozen=True)
class Tasks:
    """What accuracies are averaged over, and how most runs measured each of them."""

    keys: list[Key]
    rare: list[str]
    """Tasks that fewer than half of the runs have: no part of the mean."""
    usual: dict[Key, dict[str, Any]]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Tasks:
        """The tasks at least half of the measured runs have."""
        every = accuracy_keys(entries)
        runs = [entry for entry in entries if any(key in entry.cells for key in every)]
        counts = {key: sum(key in entry.cells for entry in runs) for key in every}
        keys = [key for key in every if 2 * counts[key] >= len(runs)]
        usual = {key: common(e.cells[key] for e in entries if key in e.cells) for key in keys}
        return cls(keys, [key[0] for key in every if key not in keys], usual)


def averages(
    panel: Panel, entries: Sequence[Entry], tasks: Tasks, call: Callable[[Entry], str]
) -> Iterator[tuple[Entry, Measured, set[str]]]:
    """Each run that has all tasks, its mean over them, and how that was measured differently.

    The panel is told what it is the mean of, and what was left out, by the name ``call`` gives.
    """
    panel.tasks = [key[0] for key in tasks.keys]
    panel.limits = {
        key[0]: usual["limit"] for key, usual in tasks.usual.items() if usual.get("limit")
    }
    for task in tasks.rare:
        panel.remarks["not part of the mean, as few runs have it"].append(task)
    for entry in entries:
        numbers = [entry.cells[key] for key in tasks.keys if key in entry.cells]
        if len(numbers) < len(tasks.keys) or any(number.value is None for number in numbers):
            if numbers:
                panel.remarks["not shown, as a task is missing"].append(call(entry))
            continue
        if numbers:
            mean = mean_of(numbers)
            panel.chance = mean.chance
            yield entry, mean, {deviations(n, tasks.usual[n.task, ""]) for n in numbers} - {""}


def accuracy_panels(entries: Sequence[Entry], x: str) -> list[Panel]:
    """One panel per checkpoint: the mean accuracy of each run over the tasks."""
    tasks = Tasks.of(entries)
    panels = []
    for title, members in _by_checkpoint(entries).items():
        panel = Panel(title)
        for entry, mean, different in averages(panel, members, tasks, run_name):
            _add(panel, entry, mean, x, different)
        panels.append(panel)
    return panels


def perplexity_panels(entries: Sequence[Entry], x: str) -> list[Panel]:
    """One panel per checkpoint, text and protocol."""
    return _text_panels(entries, x, perplexity_keys(entries))


def agreement_panels(entries: Sequence[Entry], x: str, top_1: bool) -> list[Panel]:
    """One panel per checkpoint, text and protocol: the divergence, or the top-1 agreement."""
    keys = [key for key in agreement_keys(entries) if key[1].endswith(TOP_1) == top_1]
    return _text_panels(entries, x, keys)


def _text_panels(entries: Sequence[Entry], x: str, keys: Sequence[Key]) -> list[Panel]:
    panels = []
    for key in keys:
        usual = common(e.cells[key] for e in entries if key in e.cells)
        name = f"{key[0]} {key[1].removesuffix(TOP_1)}"
        limits = {name: usual["limit"]} if usual.get("limit") else {}
        for title, members in _by_checkpoint(entries).items():
            panel = Panel(f"{title}\n{key[0]}, {key[1].removesuffix(TOP_1)}", limits=limits)
            for entry in members:
                number = entry.cells.get(key)
                if number is not None and number.value is not None:
                    _add(panel, entry, number, x, {deviations(number, usual)} - {""})
            panels.append(panel)
    return [panel for panel in panels if panel.points]


def caption(
    entries: Sequence[Entry], panels: Sequence[Panel], accuracy: bool, metric: str
) -> list[str]:
    """What the numbers are, and everything that was left out or is not like the rest."""
    lines = []
    limits = {name: limit for panel in panels for name, limit in panel.limits.items()}
    if accuracy and panels and panels[0].tasks:
        cells = [number for e in entries for key, number in e.cells.items() if not key[1]]
        shots = sorted({c.conditions["num_fewshot"] for c in cells if c.conditions})
        how = ["/".join(map(str, shots)) + "-shot", metric]
        if len(set(limits.values())) == 1 and len(limits) == len(panels[0].tasks):
            how.append(say("limit", next(iter(limits.values()))))
            limits = {}
        tasks = ", ".join(panels[0].tasks)
        lines.append(f"Mean of {tasks} ({', '.join(how)}); bars: standard error.")
    seeds = sorted({len(p.draws) for panel in panels for p in panel.points if p.band})
    if seeds:
        count = "/".join(map(str, seeds))
        lines.append(f"Shaded: lowest to highest of {count} seeds; markers are at their mean.")
    for limit in sorted(set(limits.values())):
        names = ", ".join(name for name, own in limits.items() if own == limit)
        lines.append(f"{say('limit', limit)}: {names}")
    remarks: dict[str, list[str]] = {}
    for panel in panels:
        for text, runs in panel.remarks.items():
            told = remarks.setdefault(text, [])
            told += [name for name in runs if name not in told]
    for text, runs in remarks.items():
        more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
        lines.append(f"{text}: {', '.join(runs[:5])}{more}")
    return lines


def _add(panel: Panel, entry: Entry, number: Measured, x: str, different: set[str]) -> None:
    facts = entry.facts
    place = 16.0 if entry.full_precision else facts[x]
    if place is None:
        panel.remarks["not shown, as effective bits are unknown"].append(run_name(entry))
        return
    if different:
        how = f"measured differently ({', '.join(sorted(different))})"
        panel.remarks[how].append(run_name(entry))
    if entry.mixed and entry.ptq:
        panel.remarks["pale, with per-layer overrides, not on the best line"].append(
            run_name(entry)
        )
    panel.points.append(point_of(entry, number, place, different))


def point_of(entry: Entry, number: Measured, place: float, different: set[str]) -> Point:
    """The point of one run.

    Args:
        entry: the run.
        number: what is on the other axis.
        place: where it stands on the axis.
        different: how it was measured differently from the rest; empty where it was not.
    """
    facts = entry.facts
    role = "trained" if entry.trained else "full precision" if entry.full_precision else "ptq"
    return Point(
        x=place,
        y=math.nan if number.value is None else number.value,
        stderr=number.stderr,
        role=role,
        series=entry.series,
        wbits=facts["wbits"],
        abits=facts["abits"],
        name=facts["checkpoint"] if entry.as_stored else facts["label"],
        comparable=not different,
        mixed=entry.mixed,
        run=facts.get("run") or "",
        draws=number.draws,
    )


def _by_checkpoint(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    homes: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=by_size):
        if not entry.as_stored:
            homes[entry.facts["checkpoint"]].append(entry)
    sizes = {name: members[0].facts["parameters"] for name, members in homes.items()}
    guests = [entry for entry in entries if entry.as_stored]
    if not homes:
        return {"": guests}
    for entry in guests:
        for name in _nearest(entry.facts["parameters"], sizes):
            homes[name].append(entry)
    return dict(homes)


_TWINS = 1.05
"""Ratio of sizes up to which models count as equally large."""


def _nearest(size: int | None, sizes: dict[str, int | None]) -> list[str]:
    """The checkpoint nearest in size, by ratio; all of them where a size is unknown.

    Twins, which differ by some norms, are equally near: a trained model stands in the panel of its
    full-precision twin and in that of its own latent weights.
    """
    known = {name: other for name, other in sizes.items() if other}
    if not size or len(known) < len(sizes):
        return list(sizes)
    nearest = min(known.values(), key=lambda other: abs(math.log(other / size)))
    return [n for n, other in known.items() if 1 / _TWINS <= other / nearest <= _TWINS]


def run_name(entry: Entry) -> str:
    """What captions call a run."""
    if entry.as_stored:
        return str(entry.facts["checkpoint"])
    return entry.name
