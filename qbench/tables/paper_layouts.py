"""The papers' own layouts: BitNet's Tables 3 and 4, BitNet b1.58's Tables 1 and 2.

BitNet is arXiv 2310.11453, BitNet b1.58 arXiv 2402.17764. Each keeps its paper's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qbench.comparison.entries import Entry, Key
from qbench.comparison.headings import size_text
from qbench.comparison.run_costs import TOKENS
from qbench.tables.arrangement import (
    Options,
    checkpoint,
    guessing,
    is_ptq,
    ordered,
    paper_scores,
    perplexities,
    published_rows,
    sheet_of,
    tasks_of,
    weight_bits,
)
from qbench.tables.columns import method_column, scheme_column, text_column
from qbench.tables.sheet import MISSING, Cell, Column, Sheet

_BITNET_TASKS = ("WG", "WGe", "HS", "SC")
_ABLATION_TASKS = ("HS", "WGe", "WG", "SC")
_B158_TASKS = ("ARCe", "ARCc", "HS", "BQ", "OQ", "PQ", "WGe")
_MEMORY = (
    f"Memory: computed, the model as stored and the keys and values of {TOKENS} tokens; in "
    "parentheses what full precision of the size takes, as a multiple of it."
)
_LATENCY = "Latency: not measured here; it needs real low-bit kernels."
_ALLOCATED = (
    "Published memory and latency were measured on a GPU, with what its kernels and allocator hold."
)


def bitnet_table3(entries: list[Entry], options: Options) -> Sheet:
    """Post-training quantization by weight bits, with a row of guessing and BitNet at the end."""
    keys = tasks_of(_BITNET_TASKS, entries)
    chosen = [key or (heading, "") for heading, key in keys.items()]
    rows, rules = ordered(entries + published_rows(options, chosen))
    rows, rules = [guessing(chosen), *rows], {1, *(rule + 1 for rule in rules)}
    for index in range(2, len(rows)):
        if rows[index].facts["wbits"] != rows[index - 1].facts["wbits"]:
            rules.add(index)
    columns = [
        text_column("WBits", rows, weight_bits),
        method_column("Methods", rows),
        text_column("(W/A)", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        text_column("PTQ", rows, lambda e: "✓" if is_ptq(e) else "✗"),
    ]
    if len({e.facts["checkpoint"] for e in rows if e.source == "measured"}) > 1 or options.against:
        columns.insert(0, text_column("Checkpoint", rows, checkpoint))
    columns += perplexities(rows, options)
    columns += paper_scores(rows, keys, options)
    title = "Post-training quantization in the layout of BitNet (arXiv 2310.11453) Table 3"
    return sheet_of(title, columns, rows, rules, options, keys)


def bitnet_table4(entries: list[Entry], options: Options) -> Sheet:
    """The ablation: perplexity, four tasks without examples, the same four with four."""
    keys = tasks_of(_ABLATION_TASKS, entries)
    chosen = [key or (heading, "") for heading, key in keys.items()]
    printed = {e.facts["published_row"]: e.cells for e in published_rows(options, chosen, 4)}
    few = {**options.few_shot, **printed}
    rows, rules = ordered(entries + published_rows(options, chosen))
    shown = [
        replace(row, cells=dict(few.get(row.facts.get("run") or row.facts["published_row"], {})))
        for row in rows
    ]
    columns = [
        text_column("Checkpoint", rows, checkpoint),
        method_column("Methods", rows),
        text_column("(W/A)", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        *perplexities(rows, options),
    ]
    for shots, of in (("0-shot", rows), ("4-shot", shown)):
        for column in paper_scores(of, keys, options):
            # how many examples stands in the heading already
            notes = tuple(
                note for note in column.notes if note != f"{_task(column, keys)}: {shots}"
            )
            columns.append(replace(column, heading=(shots, *column.heading), notes=notes))
    title = "Ablation in the layout of BitNet (arXiv 2310.11453) Table 4"
    return sheet_of(title, columns, rows, rules, options, keys)


def _task(column: Column, keys: dict[str, Key | None]) -> str:
    key = keys.get(column.heading[-1])
    return key[0] if key else ""


def b158_table1(entries: list[Entry], options: Options) -> Sheet:
    """Size, memory, latency and perplexity, costs as multiples of full precision of the size."""
    rows = _by_size(entries + published_rows(options, []))
    rules = _new_sizes(rows)
    memory = [_gigabytes(row) for row in rows]
    latency = [row.facts.get("costs", {}).get("latency") for row in rows]
    columns = [
        text_column("Models", rows, checkpoint),
        text_column("W/A", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        method_column("Methods", rows),
        text_column("Size", rows, lambda e: size_text(e.facts["parameters"]), numeric=True),
        _with_ratios(("Memory (GB)",), rows, memory),
        _with_ratios(("Latency (ms)",), rows, latency),
        *perplexities(rows, options),
    ]
    title = "Cost and perplexity by size in the layout of BitNet b1.58 (arXiv 2402.17764) Table 1"
    sheet = sheet_of(title, columns, rows, rules, options)
    remarks = [_MEMORY, _LATENCY]
    if options.against:
        remarks.append(_ALLOCATED)
    return replace(sheet, remarks=[*remarks, *(r for r in sheet.remarks if r.startswith("PPL"))])


def b158_table2(entries: list[Entry], options: Options) -> Sheet:
    """Seven zero-shot tasks, models of a size together."""
    keys = tasks_of(_B158_TASKS, entries)
    chosen = [key or (heading, "") for heading, key in keys.items()]
    rows = _by_size(entries + published_rows(options, chosen))
    rules = _new_sizes(rows)
    columns = [
        text_column("Models", rows, checkpoint),
        text_column("W/A", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        method_column("Methods", rows),
        text_column("Size", rows, lambda e: size_text(e.facts["parameters"]), numeric=True),
        *perplexities(rows, options),
        *paper_scores(rows, keys, options),
    ]
    title = "Models by size in the layout of BitNet b1.58 (arXiv 2402.17764) Table 2"
    return sheet_of(title, columns, rows, rules, options, keys)


def _by_size(rows: Sequence[Entry]) -> list[Entry]:
    """Smallest first; of a size full precision, quantized and then trained, widest first.

    Models that read the same size stand together, as twins differ in a few norms.
    """
    smallest: dict[str, int] = {}
    for row in rows:
        size = size_text(row.facts["parameters"])
        count = row.facts["parameters"] or 0
        smallest[size] = min(count, smallest.get(size, count))

    def order(row: Entry) -> tuple[Any, ...]:
        size = smallest[size_text(row.facts["parameters"])]
        return size, row.source, row.trained, -row.facts["wbits"], -row.facts["abits"]

    return sorted(rows, key=order)


def _new_sizes(rows: Sequence[Entry]) -> set[int]:
    sizes = [size_text(entry.facts["parameters"]) for entry in rows]
    return {i for i in range(1, len(rows)) if sizes[i] != sizes[i - 1]}


def _gigabytes(entry: Entry) -> float | None:
    """Published, or computed: the stored model and the cache of one sequence."""
    if entry.source == "published":
        memory: float | None = entry.facts["costs"].get("memory")
        return memory
    size, cache = entry.facts.get("size_bytes"), entry.facts.get("kv_cache_bytes")
    return None if size is None or cache is None else (size + cache) / 1e9


def _with_ratios(
    heading: tuple[str, ...], rows: Sequence[Entry], values: Sequence[float | None]
) -> Column:
    """A cost, and how many times full precision of the same model or size costs as much.

    Where several models of a size are stored in full precision, each is held against its own, and a
    trained one against that of the nearest parameters. A published size without a full-precision
    row is held against the next smaller one, as b1.58 does with its 3.9B.
    """
    whole = [
        (row, value)
        for row, value in zip(rows, values, strict=True)
        if value is not None and _is_whole(row)
    ]
    cells, smaller = [], None
    for row, value in zip(rows, values, strict=True):
        base = _whole_of(row, whole)
        if row.source == "published":
            base = smaller = base or smaller
        text = MISSING if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}"
        cells.append(Cell(text + (f" ({base / value:.2f}x)" if base and value else "")))
    return Column(heading, cells)


def _whole_of(row: Entry, whole: Sequence[tuple[Entry, float]]) -> float | None:
    """What the full-precision model of a row costs; None where there is none of its size."""

    def apart(other: Entry) -> tuple[bool, int]:
        mine, theirs = row.facts["parameters"] or 0, other.facts["parameters"] or 0
        return other.facts["checkpoint"] != row.facts["checkpoint"], abs(theirs - mine)

    size = size_text(row.facts["parameters"])
    alike = [
        (other, value)
        for other, value in whole
        if other.source == row.source and size_text(other.facts["parameters"]) == size
    ]
    return min(alike, key=lambda pair: apart(pair[0]))[1] if alike else None


def _is_whole(entry: Entry) -> bool:
    return entry.full_precision or entry.source == "published" and entry.facts["wbits"] >= 16
