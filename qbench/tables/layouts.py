"""Which columns a table has and how its rows are ordered, by name.

``comparison`` (default), ``sizes`` (:mod:`qbench.tables.size_table`), ``costs``
(:mod:`qbench.tables.costs_table`), and those of the BitNet papers
(:mod:`qbench.tables.paper_layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from qbench.comparison.entries import Entry, accuracy_keys
from qbench.errors import unknown
from qbench.tables.arrangement import (
    Options,
    agreements,
    average,
    checkpoint,
    ordered,
    perplexities,
    published_rows,
    sheet_of,
)
from qbench.tables.columns import method_column, scheme_column, score_column, text_column
from qbench.tables.costs_table import TITLE, cost_columns, cost_remarks
from qbench.tables.paper_layouts import b158_table1, b158_table2, bitnet_table3, bitnet_table4
from qbench.tables.sheet import MISSING, Sheet
from qbench.tables.size_table import size_sheet


def lay_out(layout: str, entries: Sequence[Entry], options: Options) -> Sheet:
    """Build the table.

    Raises:
        QBenchError: for a layout or published table nobody knows.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    return LAYOUTS[layout](list(entries), options)


def _comparison(entries: list[Entry], options: Options) -> Sheet:
    keys = accuracy_keys(entries)
    rows, rules = ordered(entries + published_rows(options, keys))
    columns = [
        text_column("Checkpoint", rows, checkpoint),
        text_column("W/A", rows, lambda e: e.facts["label"]),
        method_column("Method", rows),
        scheme_column(rows),
    ]
    if any(entry.facts.get("effective_bits") for entry in rows):
        columns.append(text_column("Bits/weight", rows, _effective_bits, numeric=True))
    columns += perplexities(rows, options)
    columns += agreements(rows)
    scores = [score_column((key[0],), rows, key, options.metric) for key in keys]
    columns += scores
    if len(scores) > 1:
        columns += average(rows, scores, options, len(scores), stderr=True)
    return sheet_of("Comparison of quantized models", columns, rows, rules, options)


def _sizes(entries: list[Entry], options: Options) -> Sheet:
    return size_sheet([*entries, *published_rows(options, [])], options.metric, options.asked)


def _costs(entries: list[Entry], options: Options) -> Sheet:
    keys = accuracy_keys(entries)
    rows, rules = ordered(entries + published_rows(options, keys))
    parts = [score_column((key[0],), rows, key, options.metric) for key in keys]
    scores = perplexities(rows, options)
    scores += average(rows, parts, options, len(parts), stderr=True) if parts else []
    sheet = sheet_of(TITLE, [*cost_columns(rows), *scores], rows, rules, options)
    return replace(sheet, remarks=[*cost_remarks(rows), *sheet.remarks])


LAYOUTS: dict[str, Callable[[list[Entry], Options], Sheet]] = {
    "comparison": _comparison,
    "bitnet-table3": bitnet_table3,
    "bitnet-table4": bitnet_table4,
    "b158-table1": b158_table1,
    "b158-table2": b158_table2,
    "sizes": _sizes,
    "costs": _costs,
}
BY_SIZE = ("sizes",)
FEW_SHOT = {"bitnet-table4": 4}
"""Layouts with columns at another number of examples, beside zero-shot."""


def _effective_bits(entry: Entry) -> str:
    bits = entry.facts.get("effective_bits")
    return f"{bits:.2f}" if bits else MISSING
