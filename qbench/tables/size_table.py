"""The table of sizes: a row is a size, a family has its losses, its average and its gap there.

Twins that differ by a few norms share a row: trained rows join the full-precision checkpoint
nearest in size, if within 5 %. The gap is what a family loses against the full-precision model of
its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from qbench.comparison.entries import Entry, perplexity_keys
from qbench.comparison.headings import size_text
from qbench.comparison.panels import Tasks
from qbench.comparison.scaling import SAME_SIZE
from qbench.comparison.sizes import (
    Line,
    average,
    in_families,
    is_latent,
    law_lines,
    left_out_line,
    loss_of,
    loss_panels,
    role,
)
from qbench.tables.columns import mean_column, run_notes, score_column
from qbench.tables.sheet import (
    MISSING,
    Cell,
    Column,
    Sheet,
    accuracy_text,
    difference_text,
    perplexity_text,
)

_HEADINGS = {"perplexity": "loss", "bits_per_byte": "bits/byte"}
_WHOLE = "full precision"


@dataclass
class _Row:
    size: int | None
    checkpoint: str
    members: dict[Line, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measure:
    """One number of every row."""

    heading: tuple[str, ...]
    cells: dict[int, Cell]
    """By the identity of the row's entry."""
    notes: tuple[str, ...] = ()
    gap: Callable[[float], str] | None = None
    """How its difference to full precision is written; None writes none."""


def size_sheet(
    entries: Sequence[Entry], metric: str = "acc", asked: Collection[str] | None = None
) -> Sheet:
    """The table of some rows, measured and published.

    Args:
        entries: rows.
        metric: an accuracy, or ``bits_per_byte`` for losses in that.
        asked: the runs of quantized rows that are wanted; None wants all.
    """
    shown, left_out = in_families(entries, asked)
    rows = _rows(shown)
    loss = metric if metric in _HEADINGS else "perplexity"
    names = ["; ".join(dict.fromkeys(map(_checkpoint, row.members.values()))) for row in rows]
    columns = [
        Column(("Size",), [Cell(size_text(row.size)) for row in rows], numeric=False),
        Column(("Checkpoints",), [Cell(name) for name in names], numeric=False, detail=True),
    ]
    tasks = Tasks.of([entry for entry in shown if entry.source == "measured"])
    measures = [*_losses(shown, loss), *_averages(shown, tasks)]
    for line in dict.fromkeys(map(_line, shown)):
        columns += _family(line, rows, measures)
    remarks = _remarks(measures, tasks, loss)
    if any(line.startswith("Δ") for column in columns for line in column.heading):
        remarks.append("Δ: difference to full precision in the same row.")
    remarks += [*law_lines(loss_panels(shown, loss)), *left_out_line(left_out)]
    facts = [
        {"checkpoint": name, "parameters": row.size} for name, row in zip(names, rows, strict=True)
    ]
    return Sheet("Loss and accuracy against model size", columns, facts, frozenset(), remarks)


def _rows(shown: Sequence[Entry]) -> list[_Row]:
    rows: list[_Row] = []
    for entry in sorted(shown, key=_turn):
        line, name = _line(entry), entry.facts["checkpoint"]
        free = [row for row in rows if line not in row.members]
        if _turn(entry) < 2:
            found = next((row for row in free if row.checkpoint == name), None)
        else:
            found = _nearest(entry, free)
        if found is None:
            found = _Row(entry.facts["parameters"], name)
            rows.append(found)
        found.members[line] = entry
    return sorted(rows, key=lambda row: (row.size or 0, row.checkpoint))


def _turn(entry: Entry) -> int:
    """When a row is placed: whole models, what is made of them, then what joins by its size."""
    if entry.source != "measured":
        return 3
    if role(entry) == "trained" or is_latent(entry):
        return 2
    return 0 if role(entry) == "full precision" else 1


def _nearest(entry: Entry, rows: Sequence[_Row]) -> _Row | None:
    """The row of this size, one with a full-precision model to compare with before others."""
    size, whole = entry.facts["parameters"], (_WHOLE, entry.source != "measured")
    apart = {
        index: abs(math.log(row.size / size))
        for index, row in enumerate(rows)
        if row.size and size and abs(math.log(row.size / size)) <= math.log(SAME_SIZE)
    }
    order = sorted(apart, key=lambda index: (whole not in rows[index].members, apart[index]))
    return rows[order[0]] if order else None


def _losses(shown: Sequence[Entry], loss: str) -> list[_Measure]:
    """For each text and protocol, the loss and the perplexity of every row."""
    found = []
    for key in perplexity_keys(shown):
        column = score_column((), shown, key, stderr=False)
        losses = [_loss_cell(cell, loss) for cell in column.cells]
        # a mark says whatever is to be said once for both
        plain = [replace(cell, notes=()) for cell in column.cells]
        heading = (_HEADINGS[loss], *key)
        found.append(_Measure(heading, _with_facts(losses, shown), column.notes, _loss_gap))
        found.append(_Measure(("PPL", *key), _with_facts(plain, shown), column.notes))
    return found


def _loss_cell(cell: Cell, loss: str) -> Cell:
    number = loss_of(cell.measured, loss) if cell.measured else None
    if number is None or number.value is None:
        return replace(cell, text=cell.text if cell.measured is None else MISSING, measured=None)
    finite = math.isfinite(number.value)
    text = f"{number.value:.3f}" if finite else perplexity_text(number.value)
    return replace(cell, text=text, measured=number)


def _averages(shown: Sequence[Entry], tasks: Tasks) -> list[_Measure]:
    """The mean accuracy of every row, of published ones as printed."""
    parts = [score_column((key[0],), shown, key) for key in tasks.keys]
    cells = mean_column((), shown, parts, True, len(parts)).cells
    for index, entry in enumerate(shown):
        printed = average(entry) if entry.source == "published" else None
        if printed is not None and printed.value is not None:
            cells[index] = Cell(accuracy_text(printed.value), measured=printed)
    notes = tuple(note for part in parts for note in part.notes)
    return [_Measure(("Avg",), _with_facts(cells, shown), notes, _accuracy_gap)]


def _with_facts(cells: Sequence[Cell], shown: Sequence[Entry]) -> dict[int, Cell]:
    """The cells by row, each with the facts of its own run."""
    return {
        id(entry): replace(
            cell, facts=entry.facts | {"method": entry.method, "source": entry.source}
        )
        for entry, cell in zip(shown, cells, strict=True)
    }


def _family(line: Line, rows: Sequence[_Row], measures: Sequence[_Measure]) -> list[Column]:
    """The columns of one family: what any of its rows has, and the gap to full precision."""
    family, published = line
    name = f"{family} (published)" if published else family
    members = [row.members.get(line) for row in rows]
    wholes = [row.members.get((_WHOLE, published)) for row in rows]
    columns = []
    for measure in measures:
        cells = [measure.cells[id(m)] if m else Cell(MISSING) for m in members]
        if not any(cell.measured for cell in cells):
            continue
        columns.append(Column((name, *measure.heading), cells, notes=measure.notes))
        if family != _WHOLE and measure.gap and any(wholes):
            base = [measure.cells[id(whole)] if whole else Cell(MISSING) for whole in wholes]
            gaps = [Cell(_gap(*pair, measure.gap)) for pair in zip(cells, base, strict=True)]
            columns.append(Column((name, f"Δ {measure.heading[0]}", *measure.heading[1:]), gaps))
    return _with_run_notes(columns, members, name)


def _with_run_notes(
    columns: list[Column], members: Sequence[Entry | None], name: str
) -> list[Column]:
    """What is to be said of whole runs, at their first number; of published ones at the heading."""
    notes = [run_notes(member) if member else () for member in members]
    if not columns:  # nothing was measured; say why
        if not any(notes):
            return []
        columns = [Column((name,), [Cell(MISSING) for _ in members])]
    first = columns[0]
    if any(member and member.source == "published" for member in members):
        own = tuple(dict.fromkeys(note for every in notes for note in every))
        return [replace(first, notes=(*first.notes, *own)), *columns[1:]]
    cells = [
        replace(cell, notes=(*cell.notes, *own))
        for cell, own in zip(first.cells, notes, strict=True)
    ]
    return [replace(first, cells=cells), *columns[1:]]


def _gap(own: Cell, base: Cell, text: Callable[[float], str]) -> str:
    both = [cell.measured.value for cell in (own, base) if cell.measured and cell.comparable]
    values = [value for value in both if value is not None]
    return text(values[0] - values[1]) if len(values) == 2 else MISSING


def _loss_gap(difference: float) -> str:
    if not math.isfinite(difference):
        return difference_text(difference, percent=False)
    return f"{difference:+.3f}".replace("-", "−")


def _accuracy_gap(difference: float) -> str:
    return difference_text(difference, percent=True)


def _remarks(measures: Sequence[_Measure], tasks: Tasks, loss: str) -> list[str]:
    found = ["Size: all parameters of the checkpoint, embeddings included."]
    if any(measure.heading[0] == "PPL" for measure in measures):
        what = "bits of loss per byte" if loss == "bits_per_byte" else "log2 of the perplexity"
        found.append(
            f"{_HEADINGS[loss]}: {what}; PPL: perplexity; lower is better; text and protocol "
            "stand in the heading."
        )
    if tasks.keys:
        names = ", ".join(key[0] for key in tasks.keys)
        found.append(f"Avg: mean of {names}, in percent ± standard error, higher is better.")
    if tasks.rare:
        found.append(f"Not part of the mean, as few runs have it: {', '.join(tasks.rare)}.")
    if any(cell.best for measure in measures for cell in measure.cells.values()):
        found.append(
            "Best: of the post-training quantized rows of one checkpoint with the same W/A."
        )
    return found


def _line(entry: Entry) -> Line:
    return entry.series, entry.source == "published"


def _checkpoint(entry: Entry) -> str:
    return str(entry.facts["checkpoint"])
