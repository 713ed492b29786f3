"""Loss curves: one CSV per training, and figures of several.

The loss is the mean cross-entropy in nats per predicted token (BitNet's figures are in bits per
token: divide by ln 2; perplexity is e to the loss). A row is written when it is complete, and a
training that continues drops the rows beyond its checkpoint, so that every step is there once.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, RunFailed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("step", "tokens", "loss", "eval_loss", "learning_rate", "seconds")
CURVE_FILE = "loss.csv"

# as in qbench.plots.style: a twin keeps its colour everywhere
_COLOURS = {"fp16": "#000000", "b1": "#D55E00", "b158": "#990000"}
_LABELS = {"fp16": "FP16", "b1": "BitNet", "b158": "BitNet b1.58"}
_OTHER = "#555555"
_HELD_OUT: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 3.5,
    "markerfacecolor": "white",
}
_WIDTH = 5.2  # inches
_STYLES = ("-", "--", ":", "-.")
_SETTINGS = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "qbench",
}
_NO_DATE: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


@dataclass(frozen=True)
class Row:
    """One line of a curve."""

    step: int
    """Updates made."""
    tokens: int
    """Tokens seen."""
    loss: float
    """Training loss in nats per token, mean since the row before."""
    eval_loss: float | None
    """Held-out loss in nats per token."""
    learning_rate: float
    """Of the last update."""
    seconds: float
    """Spent training so far, over all sessions."""

    def cells(self) -> list[str]:
        """As text, in the order of ``COLUMNS``."""
        held_out = "" if self.eval_loss is None else f"{self.eval_loss:g}"
        numbers = (f"{self.loss:g}", held_out, f"{self.learning_rate:g}", f"{self.seconds:.1f}")
        return [str(self.step), str(self.tokens), *numbers]


def read_curve(path: Path) -> list[Row]:
    """The rows of a curve; a line that was cut off while it was written is left out.

    Raises:
        QBenchError: if the file cannot be read or is no curve.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QBenchError(f"cannot read {path}: {error.strerror}") from error
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(whole.splitlines()))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise QBenchError(f"{path} is no loss curve; its first line is {','.join(COLUMNS)}")
    try:
        return [_row(*cells) for cells in lines[1:]]
    except (TypeError, ValueError) as error:
        raise QBenchError(f"{path} is damaged: {error}") from error


def _row(step: str, tokens: str, loss: str, held_out: str, rate: str, seconds: str) -> Row:
    measured = float(held_out) if held_out else None
    return Row(int(step), int(tokens), float(loss), measured, float(rate), float(seconds))


class CurveWriter:
    """Appends rows to a curve; opening drops those beyond the step that a training begins at."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.rows = [row for row in read_curve(path) if row.step <= step] if path.exists() else []
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row.cells() for row in self.rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @property
    def seconds(self) -> float:
        """Spent until the last row."""
        return self.rows[-1].seconds if self.rows else 0.0

    def append(self, row: Row) -> None:
        """Write one row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row.cells())


@dataclass(frozen=True)
class Curve:
    """What one line of a figure shows."""

    kind: str
    """The twin, which decides the colour."""
    label: str
    rows: Sequence[Row]
    diverged_at: int | None = None
    """The step whose loss was not finite."""


def draw(curves: Sequence[Curve], title: str = "") -> Figure:
    """Training loss against tokens, held-out loss as points; a cross where a loss was lost.

    A training that was lost before its first row is in the legend alone.

    Raises:
        QBenchError: if there is nothing to draw.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    lost = [c for c in curves if not c.rows and c.diverged_at is not None]
    curves = [curve for curve in curves if curve.rows]
    if not curves:
        raise QBenchError("nothing to draw: no training has written a loss yet")
    unit, word = _unit(max(row.tokens for curve in curves for row in curve.rows))
    with style.context(["default", _SETTINGS]):
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        seen: dict[str, int] = {}
        for curve in curves:
            line = _STYLES[seen.get(curve.kind, 0) % len(_STYLES)]
            seen[curve.kind] = seen.get(curve.kind, 0) + 1
            _draw_curve(axes, curve, line, unit)
        for curve in lost:
            colour = _COLOURS.get(curve.kind, _OTHER)
            name = f"{curve.label}: lost at step {curve.diverged_at}"
            axes.plot([], [], "x", color=colour, markersize=7, label=name)
        axes.set_ylim(_limits(curves))
        axes.set_xlabel(f"{word}tokens")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
        if title:
            axes.set_title(title, fontsize=9)
        if any(row.eval_loss is not None for curve in curves for row in curve.rows):
            axes.plot([], [], **_HELD_OUT, color=_OTHER, label="held-out text")
        handles, labels = axes.get_legend_handles_labels()
        columns = max(1, min(len(labels), int(_WIDTH / (0.06 * max(map(len, labels)) + 0.45))))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
        )
        figure.set_size_inches(_WIDTH, 3.1 + 0.17 * math.ceil(len(labels) / columns))
    return figure


def _draw_curve(axes: Any, curve: Curve, line: str, unit: float) -> None:
    colour = _COLOURS.get(curve.kind, _OTHER)
    across = [row.tokens / unit for row in curve.rows]
    axes.plot(
        across, [row.loss for row in curve.rows],
        line, color=colour, linewidth=1.2, label=curve.label, zorder=2,
    )  # fmt: skip
    held_out = [(x, row.eval_loss) for x, row in zip(across, curve.rows, strict=True)]
    held_out = [(x, y) for x, y in held_out if y is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), **_HELD_OUT, color=colour, zorder=3)
    if curve.diverged_at is not None:
        axes.plot(across[-1], curve.rows[-1].loss, "x", color=colour, markersize=9, zorder=4)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """What spikes stays in sight, up to the first losses: beyond them is worse than untrained.

    Where nothing spikes, the first twentieth is cut, which would flatten the rest.
    """
    late = [row for c in curves for row in c.rows[len(c.rows) // 20 :]]
    losses = [loss for row in late for loss in (row.loss, row.eval_loss) if loss is not None]
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0, 1.0]
    first = max(c.rows[0].loss for c in curves)
    low, high = min(finite), max(finite)
    high = high if high <= first or first <= low else first
    margin = 0.05 * (high - low) + 1e-6
    return low - margin, high + margin


def _unit(tokens: int) -> tuple[float, str]:
    for unit, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if tokens >= unit:
            return unit, word
    return 1.0, ""


def label(kind: str, note: str = "") -> str:
    """How figures call a twin."""
    return f"{_LABELS.get(kind, kind)}{note}"


def save(figure: Figure, output: Path) -> None:
    """Write a figure; the same curves give the same bytes.

    Raises:
        QBenchError: for a suffix nobody draws.
        RunFailed: if it cannot be written.
    """
    from matplotlib import style

    suffix = output.suffix.lower()
    if suffix not in _NO_DATE:
        raise QBenchError(f"cannot draw {output.name!r}: the name must end in .png, .svg or .pdf")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with style.context(["default", _SETTINGS]):
            figure.savefig(output, format=suffix[1:], dpi=220, metadata=_NO_DATE[suffix])
    except OSError as error:
        raise RunFailed(f"cannot write {output} ({error.strerror or error})") from error
