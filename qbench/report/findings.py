"""What the numbers say, in computed sentences: best rows, what they keep, how sure that is.

Means over tasks are compared question by question (:mod:`qbench.comparison.significance`), each
task weighing the same, with Holm's correction over every comparison made here, except where a
sentence says that nothing is lost: a correction would make that easier to say. "No difference
found" is what the test says, not that there is none. A perplexity is named with its ratio to full
precision and is not tested here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qbench.comparison.entries import Entry, mean_of
from qbench.comparison.panels import Panel, Point, Tasks, accuracy_panels, perplexity_panels
from qbench.comparison.significance import Number, Tester, Verdict
from qbench.comparison.statistics import LEVEL
from qbench.report.snapshot import Snapshot
from qbench.tables.sheet import perplexity_text


@dataclass(frozen=True)
class Link:
    """A run by its name; without an anchor, a name in bold."""

    text: str
    anchor: str


Sentence = tuple[str | Link, ...]


@dataclass(frozen=True)
class Findings:
    """Sentences under one heading per checkpoint, and how they were tested."""

    of: dict[str, list[Sentence]]
    tested: str
    """The test, its level and the number of comparisons; "" where nothing was compared."""


class Comparisons:
    """Paired tests between means of rows: asked for first, corrected together, then read."""

    def __init__(self, snapshot: Snapshot, entries: Sequence[Entry]) -> None:
        keys = Tasks.of(entries).keys
        self._snapshot = snapshot
        self._means = {
            entry.facts["run"]: Number(
                tuple(entry.facts.get("runs") or (entry.facts["run"],)),
                mean_of([entry.cells[key] for key in keys]),
            )
            for entry in entries
            if keys and all(key in entry.cells for key in keys)
        }
        self._asked: dict[tuple[str, str], Verdict] = {}

    def ask(self, reference: Point, row: Point) -> None:
        """Compare two rows."""
        if reference.run in self._means and row.run in self._means:
            self._asked[reference.run, row.run] = Verdict()

    def correct(self) -> None:
        """Make all tests that were asked for, with Holm's correction over all of them."""
        numbers = [(self._means[a], self._means[b]) for a, b in self._asked]
        verdicts = Tester(self._snapshot).family(numbers)
        self._asked = dict(zip(self._asked, verdicts, strict=True))

    def p(self, reference: Point, row: Point) -> float | None:
        """The corrected p of a comparison; None where it could not be made."""
        verdict = self._asked.get((reference.run, row.run))
        return verdict.adjusted if verdict else None

    def single(self, reference: Point, row: Point) -> float | None:
        """Its p alone: a correction would make it easier to say that nothing is lost."""
        verdict = self._asked.get((reference.run, row.run))
        return verdict.p if verdict else None

    @property
    def tested(self) -> str:
        """The test in words."""
        made = [verdict for verdict in self._asked.values() if verdict.p is not None]
        if not made:
            return ""
        tests = " or ".join(sorted({verdict.test for verdict in made}))
        return (
            f"Paired tests ({tests}) of the mean over tasks, on up to "
            f"{max(verdict.n for verdict in made):,} questions that both rows answered; Holm's "
            f"correction over the {len(made)} comparison{'s' if len(made) > 1 else ''} of these "
            f"sentences, level {LEVEL:g}."
        )


def findings(snapshot: Snapshot, entries: Sequence[Entry], anchors: Mapping[str, str]) -> Findings:
    """Sentences about the best rows of every checkpoint and width."""
    measured = [entry for entry in entries if entry.source == "measured"]
    panels = [panel for panel in accuracy_panels(measured, "wbits") if panel.points]
    tests = Comparisons(snapshot, measured)
    stories = [_Story(panel, tests, anchors) for panel in panels]
    for story in stories:
        story.ask()
    tests.correct()
    found = {story.panel.title: story.sentences() for story in stories}
    for panel in perplexity_panels(measured, "wbits"):
        title, _, what = panel.title.partition("\n")
        sentence = _perplexities(panel, what, anchors)
        if sentence:
            found.setdefault(title, []).append(sentence)
    return Findings({title: told for title, told in found.items() if told}, tests.tested)


class _Story:
    """What one panel of accuracies says."""

    def __init__(self, panel: Panel, tests: Comparisons, anchors: Mapping[str, str]) -> None:
        self.panel, self.tests, self.anchors = panel, tests, anchors
        known = [point for point in panel.points if math.isfinite(point.y)]
        self.full = next((point for point in known if point.role == "full precision"), None)
        self.trained = sorted(
            (point for point in known if point.role == "trained"), key=lambda p: -p.wbits
        )
        self.widths = _by_width(known)

    def ask(self) -> None:
        """Say which comparisons the sentences need."""
        for best, *others in self.widths.values():
            for other in [*([self.full] if self.full else []), *others[:1]]:
                self.tests.ask(other, best)
        for point in self.trained:
            for rival in (self.full, self.rival(point)):
                if rival is not None:
                    self.tests.ask(rival, point)

    def rival(self, trained: Point) -> Point | None:
        """The best post-training row of the nearest width that is not narrower."""
        wide = [group[0] for group in self.widths.values() if group[0].wbits >= trained.wbits]
        least = min((point.wbits for point in wide), default=None)
        return max((p for p in wide if p.wbits == least), key=lambda p: p.y, default=None)

    def sentences(self) -> list[Sentence]:
        """What there was to keep, how far down nothing is lost, each width, each trained model."""
        told = [*self._start(), *(self._of_width(group) for group in self.widths.values())]
        return [*told, *(self._of_trained(point) for point in self.trained)]

    def _start(self) -> list[Sentence]:
        if self.full is None:
            return []
        n = len(self.panel.tasks)
        over = f"on average over {n} tasks" if n > 1 else f"on {self.panel.tasks[0]}"
        chance = self.panel.chance
        guess = f"; guessing gives {_percent(chance)}" if chance is not None else ""
        start: Sentence = (
            self._link(self.full, "Full precision"),
            f" answers {_percent(self.full.y)} right {over}{guess}.",
        )
        error = self.full.stderr
        if chance is not None and error is not None and self.full.y - chance < 2 * error:
            blind = "That is within two standard errors of guessing: these tasks show no loss here."
            return [start, (blind,)]
        verdicts = [(g[0], self.tests.single(self.full, g[0])) for g in self.widths.values()]
        kept = [b for b, p in verdicts if p is not None and (p >= LEVEL or b.y >= self.full.y)]
        if not kept:
            return [start]
        least = min(kept, key=lambda best: (best.wbits, best.abits))
        no_loss = "The narrowest post-training width at which no loss is found is "
        return [start, (f"{no_loss}{least.name} (", self._link(least), ").")]

    def _of_width(self, group: list[Point]) -> Sentence:
        best, *others = group
        parts: list[str | Link] = [
            Link(best.name, ""),
            ": ",
            self._link(best),
            f" {_percent(best.y)}",
        ]
        parts += [self._against_full(best), "."]
        if others:
            p = self.tests.p(others[0], best)
            how = "" if p is None else " is not told apart" if p >= LEVEL else " is behind"
            rest = f" of {len(others)} others" if len(others) > 1 else ""
            parts += [" Next", rest, ", ", self._link(others[0]), f" {_percent(others[0].y)}"]
            parts.append(f",{how} ({_p_text(p)})." if how else ".")
        return tuple(parts)

    def _of_trained(self, point: Point) -> Sentence:
        width = f"{point.wbits:g}"
        lead = f", trained at {width} bit{'' if width == '1' else 's'}: {_percent(point.y)}"
        parts: list[str | Link] = [self._link(point, point.name), lead]
        parts += [self._against_full(point), "."]
        rival = self.rival(point)
        if rival is not None:
            p = self.tests.p(rival, point)
            how = "" if p is None else ", not told apart" if p >= LEVEL else ", told apart"
            parts += [f" The best post-training row at {rival.name}, ", self._link(rival), ", has "]
            parts.append(f"{_percent(rival.y)}{how}{f' ({_p_text(p)})' if how else ''}.")
        return tuple(parts)

    def _against_full(self, point: Point) -> str:
        """The difference to full precision, what is kept, and the test: in brackets."""
        if self.full is None:
            return ""
        told = [f"{100 * (point.y - self.full.y):+.1f} points".replace("-", "−")]
        chance, p = self.panel.chance, self.tests.p(self.full, point)
        if chance is not None and self.full.y > chance:
            kept = max(0.0, (point.y - chance) / (self.full.y - chance))
            told.append(f"{_percent(kept, 0)} kept of what is above guessing")
        if p is not None:
            told.append(f"{'no difference found' if p >= LEVEL else 'significant'}, {_p_text(p)}")
        return f" ({'; '.join(told)})"

    def _link(self, point: Point, text: str = "") -> Link:
        return Link(text or point.series, self.anchors.get(point.run, ""))


def _by_width(points: Sequence[Point]) -> dict[str, list[Point]]:
    """W/A label -> post-training rows that compete, best first; widest label first."""
    rows = [p for p in points if p.role == "ptq" and p.comparable and not p.mixed]
    rows.sort(key=lambda p: (-p.wbits, -p.abits, -p.y))
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in rows:
        groups[point.name].append(point)
    return dict(groups)


def _perplexities(panel: Panel, what: str, anchors: Mapping[str, str]) -> Sentence:
    finite = [point for point in panel.points if math.isfinite(point.y)]
    full = next((point for point in finite if point.role == "full precision"), None)
    best = [min(g, key=lambda p: p.y) for g in _by_width(finite).values()]
    best += [point for point in finite if point.role == "trained"]
    if not best:
        return ()
    parts: list[str | Link] = [Link("Perplexity", ""), f" on {what}"]
    if full is not None:
        parts += [f", {perplexity_text(full.y)} in full precision"]
    parts.append("; best of each width: ")
    for index, point in enumerate(best):
        text = point.name if point.role == "trained" else f"{point.series} {point.name}"
        ratio = f" (×{point.y / full.y:.3g})" if full is not None else ""
        parts += [", "] if index else []
        parts += [Link(text, anchors.get(point.run, "")), f" {perplexity_text(point.y)}{ratio}"]
    return (*parts, ".")


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _p_text(p: float | None) -> str:
    if p is None:
        return ""
    text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
