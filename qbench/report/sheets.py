"""A table of :mod:`qbench.tables` as the page shows it: cells with sort values, rows with anchors.

Left out: which columns and marks there are, which is the tables' business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qbench.tables.sheet import Cell, Column, Sheet, marks


def shown(sheet: Sheet, anchors: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """What the template needs of a table.

    Args:
        sheet: the table.
        anchors: run -> anchor of its page; a row's method is linked to it.
        prefix: of the ids of its footnotes, which are unique in the page.
    """
    footnotes = sheet.footnotes()
    ids = {note: f"{prefix}-note-{number}" for number, note in enumerate(footnotes, 1)}

    def marked(notes: tuple[str, ...]) -> list[tuple[str, str]]:
        first = {footnotes[note]: ids[note] for note in reversed(notes)}
        return [(mark, first[mark]) for mark in marks(notes, footnotes)]

    columns = [
        {
            "lines": list(column.heading),
            "marks": marked(column.notes),
            "numeric": column.numeric,
            "detail": column.detail,
        }
        for column in sheet.columns
    ]
    rows = []
    for index, (facts, row) in enumerate(zip(sheet.facts, sheet.rows(), strict=True)):
        cells = [
            {
                "text": cell.text,
                "marks": marked(cell.notes),
                "best": cell.best,
                "value": _sort_value(column, cell),
            }
            for column, cell in zip(sheet.columns, row, strict=True)
        ]
        rows.append(
            {
                "anchor": anchors.get(str(facts.get("run")), ""),
                "rule": index in sheet.rules,
                "checkpoint": str(facts.get("checkpoint") or ""),
                "method": str(facts.get("method") or ""),
                "width": str(facts.get("label") or ""),
                "source": str(facts.get("source") or ""),
                "cells": cells,
            }
        )
    return {
        "title": sheet.title,
        "columns": columns,
        "rows": rows,
        "remarks": [_said_here(line) for line in sheet.remarks],
        "notes": [(mark, ids[n], n.removeprefix("†").strip()) for n, mark in footnotes.items()],
        "linked": _linked(sheet),
        "print_size": _print_size(sheet),
    }


def _said_here(remark: str) -> str:
    """A remark in the page's words: marks are bold, and there is no command line."""
    return remark.replace("Best:", "Best, in bold:").replace(": see --significance", "")


def _linked(sheet: Sheet) -> int:
    """The column whose cells name the run: the method's."""
    for index, column in enumerate(sheet.columns):
        if column.heading[-1] in ("Method", "Methods"):
            return index
    return 0


def _sort_value(column: Column, cell: Cell) -> str | None:
    """What a numeric cell is sorted by, where its text does not say it in full."""
    if not column.numeric:
        return None
    value = cell.measured.value if cell.measured else None
    if value is None:
        found = re.match(r"±?([+-]?(?:inf|\d+(\.\d*)?(e[+-]?\d+)?))", _plain(cell.text))
        value = float(found[1]) if found else None
    if value is None or math.isnan(value):
        return ""
    return "Infinity" if math.isinf(value) else f"{value:.6g}"


def _plain(text: str) -> str:
    """A number as Python writes it: "18,687" and "−0.3" are printed so."""
    return text.replace(",", "").replace("−", "-")


_LINE = 1040
"""Width of a landscape page of A4 within its margins, in CSS pixels."""


def _print_size(sheet: Sheet) -> str:
    """Font size in px at which the table fits a landscape page, its details folded."""
    widths = []
    for column in sheet.columns:
        texts = [*column.heading, *(cell.text for cell in column.cells)]
        widest = max(map(len, texts))
        widths.append(min(widest, 18) if not column.numeric else widest)
    # a digit is 0.56 em wide, a cell has 0.8 em of padding
    return f"{max(4.0, min(11.0, _LINE / sum(0.56 * width + 0.8 for width in widths))):.1f}"
