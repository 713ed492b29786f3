"""What all figures share: their settings, colours and shapes, legends below, files that repeat.

Drawn with the object interface: no pyplot and no lasting change of matplotlib's settings. The same
results give the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, RunFailed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# Methods have Okabe and Ito's colours, full precision their black, trained models reds. Readers
# who are colour-blind can tell all of them apart (tested), and shapes differ as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
FULL = "#000000"
TRAINED = "#D55E00"
GREY = "#555555"
TRAINED_LOOKS: dict[float, tuple[str, Any]] = {1.0: (TRAINED, "*"), 1.58: ("#990000", (4, 1, 0))}
"""Trained weight width -> colour and marker, the same in every figure; stars of 5 and 4 points."""
OTHER_TRAINED: tuple[str, Any] = ("#332288", (6, 1, 0))
NARROW_IN = 5.0
"""Under this width a figure stands in one column of a page."""
PANEL_IN = 2.2
"""The narrowest panel that is legible, in inches."""
_COLUMN_IN = 5.2
"""Height of all rows together, in inches: a page's, less legend, notes and the paper's caption."""
SMALLEST_PT = 6.0
"""No text is smaller, in points, at any width."""

_SETTINGS = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # TrueType, embedded: publishers refuse Type 3
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # looks the same where the font is not installed
    "svg.hashsalt": "qbench",
}
_NARROW: dict[str, Any] = {
    "font.size": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.linewidth": 0.6,
}
_DPI = 220
_UNITS_IN = {"in": 1.0, '"': 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}  # TeX's point
_NO_DATE: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


@contextmanager
def our_style(width_in: float | None = None) -> Iterator[None]:
    """Matplotlib's defaults and a few settings of ours, for as long as the context lasts.

    A figure as narrow as a column of a page has smaller letters, none under ``SMALLEST_PT``.
    """
    from matplotlib import style

    narrow = width_in is not None and width_in < NARROW_IN
    with style.context(["default", _SETTINGS | (_NARROW if narrow else {})]):
        yield


def empty_figure(
    n_panels: int, width_in: float | None, share_y: bool
) -> tuple[Figure, list[list[Axes]], float]:
    """A figure with axes for some panels.

    Returns:
        the figure, its axes row by row, and its width in inches.
    """
    from matplotlib.figure import Figure

    most = min(n_panels, 3, max(1, int(width_in / PANEL_IN)) if width_in else 3)
    rows = math.ceil(n_panels / most)
    columns = math.ceil(n_panels / rows)  # four panels as two by two
    figure = Figure(layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for axes in grid.flat[n_panels:]:
        axes.remove()
    kept = list(grid.flat[:n_panels])
    by_row = [kept[start : start + columns] for start in range(0, n_panels, columns)]
    return figure, by_row, width_in or (5.2 if columns == 1 else 3.3 * columns)


def trained_look(wbits: float) -> dict[str, Any]:
    """Colour and marker of a model that was trained at a weight width."""
    colour, marker = TRAINED_LOOKS.get(round(wbits, 2), OTHER_TRAINED)
    return {"color": colour, "marker": marker}


def method_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, by the order of their names; 35 of them differ."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(sorted(set(names)))
    }


def panel_height(width_in: float, columns: int, rows: int = 1) -> float:
    """Height in inches of a row of panels: three quarters of one panel's width.

    Rows are flatter where several would be taller than a page together.
    """
    height = min(max(0.75 * width_in / columns, 1.9), 2.9)
    return min(height, max(_COLUMN_IN / rows, 1.55))


def inches(text: str) -> float:
    """A width as a person writes it: ``3.25in``, ``8cm``, ``84mm``, ``234pt``; plain is inches.

    Raises:
        QBenchError: for anything else, and for widths under ``PANEL_IN`` or over 40 inches.
    """
    number = text.strip().lower().rstrip('abcdefghijklmnopqrstuvwxyz"').strip()
    unit = text.strip().lower().removeprefix(number).strip() or "in"
    try:
        value = float(number) * _UNITS_IN[unit]
    except (KeyError, ValueError):
        raise QBenchError(
            f"cannot read the width {text!r}; write 3.25in, 8cm, 84mm or 234pt"
        ) from None
    if not PANEL_IN <= value <= 40:
        limits = f"{PANEL_IN:g} to 40 inches"
        raise QBenchError(f"a figure is {limits} wide to be legible, not {text} ({value:g} in)")
    return value


def check_suffix(output: Path) -> None:
    """Refuse a file that is not a picture we can draw.

    Raises:
        QBenchError: naming the suffixes.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise QBenchError(
            f"cannot draw {output.name!r}: the name must end in {', '.join(SUFFIXES[:-1])} "
            f"or {SUFFIXES[-1]}"
        )


def save(figure: Figure, output: Path) -> None:
    """Write a figure; its folder is made if need be.

    A PNG has a palette of 256 colours, which no eye tells from all of them (a channel is at most
    8 of 255 off) and which takes a third of the space.

    Raises:
        RunFailed: if the file cannot be written.
    """
    suffix = output.suffix.lower()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with our_style():
            if suffix == ".png":
                _save_png(figure, output)
            else:
                figure.savefig(output, format=suffix[1:], metadata=_NO_DATE[suffix])
    except OSError as error:
        reason = error.strerror or error
        raise RunFailed(f"cannot write {output} ({reason}); name another file") from error


def _save_png(figure: Figure, output: Path) -> None:
    """Drawn by Agg and reduced before it is written, so that it is compressed once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib itself writes PNG with it

    before = figure.dpi
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    reduced = image.convert("RGB").quantize(256, method=method, dither=dither)
    reduced.save(output, format="PNG", dpi=(_DPI, _DPI))
    figure.set_dpi(before)


def mark(axes: Axes, x: float, y: float, error: float | None, look: dict[str, Any]) -> None:
    """One point, with its standard error where there is one."""
    axes.errorbar(
        [x], [y], yerr=None if error is None else [error], linestyle="none", capsize=2,
        elinewidth=0.8, zorder=3, **look,
    )  # fmt: skip


def legend_below(
    figure: Figure,
    entries: Sequence[tuple[str, dict[str, Any]]],
    about: Sequence[str],
    width: float,
) -> int:
    """A legend under the panels, headed by what is shown; returns how many lines it takes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=name, **({"linestyle": "none"} | look)) for name, look in entries
    ]
    letter, font, title_font = (0.05, 7, 6.5) if width < NARROW_IN else (0.06, 8, 7)
    longest = max(len(name) for name, _ in entries)
    columns = max(1, min(len(entries), int(width / (letter * longest + 0.45))))
    letters = int(width * (18 if width < NARROW_IN else 16))
    title = [line for text in about for line in textwrap.wrap(text, letters)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=font, frameon=False,
        title="\n".join(title), title_fontsize=title_font,
    )  # fmt: skip
    return math.ceil(len(entries) / columns) + len(title)
