"""A finished table before it is written: columns of cells, and how numbers read.

Perplexities above 10,000 are written as the papers do (4.8e4), infinite ones as "inf (diverged)";
accuracies in percent with one decimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from qbench.comparison.entries import Measured
from qbench.comparison.headings import MISSING
from qbench.comparison.significance import Verdict


@dataclass(frozen=True)
class Cell:
    """What one cell shows, and for numbers where it came from."""

    text: str
    notes: tuple[str, ...] = ()
    """Footnotes. One that begins with † is marked so, the others are numbered."""
    best: bool = False
    measured: Measured | None = None
    comparable: bool = True
    """False where it was measured differently from the rest of the column."""
    facts: dict[str, Any] | None = None
    """The facts of the number's own run, in a table whose rows hold several runs."""
    verdict: Verdict | None = None
    """What the paired test against the table's reference says, where there was one."""
    interval: tuple[float, float] | None = None
    """The interval that stands in place of the standard error."""


@dataclass(frozen=True)
class Column:
    """A heading of one or more lines over one cell per row."""

    heading: tuple[str, ...]
    cells: list[Cell]
    numeric: bool = True
    notes: tuple[str, ...] = ()
    detail: bool = False
    """Whether it is not said again where a table continues below, unless rows would read alike."""


@dataclass(frozen=True)
class Sheet:
    """A table: columns of equal length, one dictionary of facts per row."""

    title: str
    columns: list[Column]
    facts: list[dict[str, Any]]
    rules: frozenset[int] = frozenset()
    """Rows with a line above them."""
    remarks: list[str] = field(default_factory=list)
    """What holds for the whole table, before the footnotes."""

    def rows(self) -> list[list[Cell]]:
        """The cells row by row."""
        return [list(row) for row in zip(*(column.cells for column in self.columns), strict=True)]

    def footnotes(self) -> dict[str, str]:
        """Every note and its mark, in order of appearance: {"limit=100 …": "1"}."""
        found: dict[str, str] = {}
        headings = [note for column in self.columns for note in column.notes]
        for note in [*headings, *(n for row in self.rows() for cell in row for n in cell.notes)]:
            if note not in found:
                numbered = sum(mark != "†" for mark in found.values())
                found[note] = "†" if note.startswith("†") else str(numbered + 1)
        return found


def marks(notes: tuple[str, ...], footnotes: dict[str, str]) -> list[str]:
    """The marks of some notes, each once."""
    return list(dict.fromkeys(footnotes[note] for note in notes))


def perplexity_text(value: float) -> str:
    """15.19, 1032, 4.8e4, inf (diverged), NaN."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf (diverged)"
    if value < 1000:
        return f"{value:.2f}"
    if value < 10_000:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def divergence_text(value: float) -> str:
    """0.0123, 1.50, 3.10e-05, 0, inf, NaN: three digits, whatever the size."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf"
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def spread_text(value: float, kind: str) -> str:
    """A standard deviation with the decimals of its mean: 0.4 in percent, 0.03, <0.01, 340.

    A divergence has two digits, whatever its size.
    """
    if kind in ("accuracy", "agreement"):
        return f"{100 * value:.1f}"
    if kind == "divergence":
        return f"{value:.2g}"
    return "<0.01" if 0 < value < 0.005 else perplexity_text(value)


def accuracy_text(value: float, stderr: float | None = None) -> str:
    """61.2, or 61.2 ± 0.9, in percent."""
    if math.isnan(value):
        return "NaN"
    return f"{100 * value:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def difference_text(difference: float, percent: bool) -> str:
    """A signed difference: +0.42, −3.1 (in points where ``percent``)."""
    if math.isnan(difference):
        return MISSING
    if math.isinf(difference):
        return "+inf"
    text = f"{100 * difference:+.1f}" if percent else f"{difference:+.2f}"
    if abs(difference) >= 10_000 and not percent:
        text = "+" + perplexity_text(difference)
    return text.replace("-", "−")
