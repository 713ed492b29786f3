"""Which columns a table has and how its rows are ordered: ours, and two of the BitNet papers.

``comparison`` (default), ``sizes`` (:mod:`qbench.tables.size_table`), ``bitnet-table3`` (BitNet,
arXiv 2310.11453, Table 3) and ``b158-table2`` (BitNet b1.58, arXiv 2402.17764, Table 2). A paper's
layout keeps the paper's columns, so one that was not measured is empty, and an average stands only
where all its tasks were measured. Perplexities of different protocols never share a column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qbench.comparison import reference
from qbench.comparison.entries import (
    TOP_1,
    Entry,
    Key,
    Measured,
    accuracy_keys,
    agreement_keys,
    by_size,
    perplexity_keys,
)
from qbench.comparison.headings import chance_level, short_name, size_text
from qbench.errors import unknown
from qbench.scheme import format_bits
from qbench.tables.columns import (
    difference_column,
    mean_column,
    method_column,
    scheme_column,
    score_column,
    text_column,
)
from qbench.tables.sheet import MISSING, Column, Sheet
from qbench.tables.size_table import size_sheet

_BITNET_TASKS = ("WG", "WGe", "HS", "SC")
_B158_TASKS = ("ARCe", "ARCc", "HS", "BQ", "OQ", "PQ", "WGe")


@dataclass(frozen=True)
class Options:
    """What a layout is asked for beside its rows."""

    metric: str = "acc"
    against: str | None = None
    """Name of a published table whose rows are added."""
    delta: bool = False
    """Whether columns with the difference to the full-precision row are added."""
    asked: Collection[str] | None = None
    """By size: the runs of quantized rows that are wanted; None wants all."""


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
    rows, rules = _ordered(entries + _published(options, keys))
    columns = [
        text_column("Checkpoint", rows, _checkpoint),
        text_column("W/A", rows, lambda e: e.facts["label"]),
        method_column("Method", rows),
        scheme_column(rows),
    ]
    if any(entry.facts.get("effective_bits") for entry in rows):
        columns.append(text_column("Bits/weight", rows, _effective_bits, numeric=True))
    columns += _perplexities(rows, options)
    columns += _agreements(rows)
    scores = [score_column((key[0],), rows, key, options.metric) for key in keys]
    columns += scores
    if len(scores) > 1:
        columns += _average(rows, scores, options, len(scores), stderr=True)
    return _sheet("Comparison of quantized models", columns, rows, rules, options)


def _bitnet_table3(entries: list[Entry], options: Options) -> Sheet:
    keys = _keys_of(_BITNET_TASKS, entries)
    chosen = [key or (heading, "") for heading, key in keys.items()]
    rows, rules = _ordered(entries + _published(options, chosen))
    rows, rules = [_random(chosen), *rows], {1, *(rule + 1 for rule in rules)}
    for index in range(2, len(rows)):
        if rows[index].facts["wbits"] != rows[index - 1].facts["wbits"]:
            rules.add(index)
    columns = [
        text_column("WBits", rows, _bits),
        method_column("Methods", rows),
        text_column("(W/A)", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        text_column("PTQ", rows, lambda e: "✓" if _is_ptq(e) else "✗"),
    ]
    if len({e.facts["checkpoint"] for e in rows if e.source == "measured"}) > 1 or options.against:
        columns.insert(0, text_column("Checkpoint", rows, _checkpoint))
    columns += _perplexities(rows, options)
    columns += _paper_scores(rows, keys, options)
    title = "Post-training quantization in the layout of BitNet (arXiv 2310.11453) Table 3"
    return _sheet(title, columns, rows, rules, options, keys)


def _b158_table2(entries: list[Entry], options: Options) -> Sheet:
    keys = _keys_of(_B158_TASKS, entries)
    chosen = [key or (heading, "") for heading, key in keys.items()]
    rows = entries + _published(options, chosen)
    rows.sort(key=lambda e: (e.facts["parameters"] or 0, e.trained, -e.facts["wbits"]))
    sizes = [size_text(entry.facts["parameters"]) for entry in rows]
    rules = {i for i in range(1, len(rows)) if sizes[i] != sizes[i - 1]}
    columns = [
        text_column("Models", rows, _checkpoint),
        text_column("W/A", rows, lambda e: e.facts["label"]),
        scheme_column(rows),
        method_column("Methods", rows),
        text_column("Size", rows, lambda e: size_text(e.facts["parameters"]), numeric=True),
        *_perplexities(rows, options),
        *_paper_scores(rows, keys, options),
    ]
    title = "Models by size in the layout of BitNet b1.58 (arXiv 2402.17764) Table 2"
    return _sheet(title, columns, rows, rules, options, keys)


def _sizes(entries: list[Entry], options: Options) -> Sheet:
    return size_sheet([*entries, *_published(options, [])], options.metric, options.asked)


LAYOUTS: dict[str, Callable[[list[Entry], Options], Sheet]] = {
    "comparison": _comparison,
    "bitnet-table3": _bitnet_table3,
    "b158-table2": _b158_table2,
    "sizes": _sizes,
}
BY_SIZE = ("sizes",)


def _sheet(
    title: str,
    columns: list[Column],
    rows: list[Entry],
    rules: set[int],
    options: Options,
    keys: dict[str, Key | None] | None = None,
) -> Sheet:
    cells = [cell for column in columns for cell in column.cells]
    remarks = []
    if perplexity_keys(rows):
        remarks.append("PPL: perplexity, lower is better; text and protocol stand in the heading.")
    if agreement_keys(rows):
        remarks.append(
            "KL, top-1: next-token distributions against the same checkpoint in full precision "
            "(mean KL(FP16 || row) in nats, lower is better; percent of positions with the same "
            "most likely token), over the first 16 windows "
            "of the text unless a note says otherwise."
        )
    if any(not key[1] for row in rows for key in row.cells):
        error = " ± standard error" if any("±" in cell.text for cell in cells) else ""
        remarks.append(
            f"Tasks: {options.metric} in percent{error}, higher is better; "
            "0-shot over all items unless a note says otherwise."
        )
    names = [f"{heading} {key[0]}" for heading, key in (keys or {}).items() if key]
    if names:
        remarks.append("Measured as: " + ", ".join(names) + ".")
    if any(cell.best for cell in cells):
        overrides = ", without per-layer overrides" if any(row.mixed for row in rows) else ""
        remarks.append(
            "Best: of the post-training quantized rows of one checkpoint with the same W/A"
            f"{overrides}."
        )
    facts = [row.facts | {"method": row.method, "source": row.source} for row in rows]
    return Sheet(title, columns, facts, frozenset(rules), remarks)


def _ordered(entries: list[Entry]) -> tuple[list[Entry], set[int]]:
    """By checkpoint, smallest first, then bits descending; and where a new checkpoint begins.

    One full-precision checkpoint makes one block with everything in it, so that a trained model or
    a published number stands beside what it is compared with.
    """
    measured = [e for e in entries if e.source == "measured"]
    own = sorted((entry for entry in measured if not entry.trained), key=by_size)
    homes = list(dict.fromkeys(entry.facts["checkpoint"] for entry in own))
    one_block = len(homes) <= 1

    def block(entry: Entry) -> tuple[int, str]:
        if one_block:
            return 0, ""
        name = entry.facts["checkpoint"]
        return (homes.index(name) if name in homes else len(homes)), name

    def order(entry: Entry) -> tuple[Any, ...]:
        facts = entry.facts
        bits = (-facts["wbits"], entry.trained, -facts["abits"])
        name = "" if entry.trained else facts["baseline"]
        return block(entry), *bits, name, entry.source, facts["label"], entry.method

    rows = sorted(entries, key=order)
    return rows, {i for i in range(1, len(rows)) if block(rows[i]) != block(rows[i - 1])}


def _published(options: Options, keys: list[Key]) -> list[Entry]:
    if options.against is None:
        return []
    found = reference.entries(options.against, keys)
    where = found[0].facts["reference"]
    note = f"published: {where}: other weights, other data, what to expect and not what to reach"
    return [replace(entry, facts=entry.facts | {"notes": (note,)}) for entry in found]


def _random(keys: list[Key]) -> Entry:
    """The row of a model that guesses."""
    cells = {}
    for key in keys:
        level = chance_level(key[0])
        if level is not None:
            cells[key] = Measured(key[0], "accuracy", "chance", level, chance=level)
    facts = {"checkpoint": MISSING, "label": "", "wbits": float("inf"), "abits": 16}
    return Entry(facts | {"baseline": "", "parameters": None}, "Random", cells, source="chance")


def _perplexities(rows: list[Entry], options: Options) -> list[Column]:
    columns: list[Column] = []
    for task, protocol in perplexity_keys(rows):
        numbers = [e.cells[task, protocol] for e in rows if (task, protocol) in e.cells]
        special = numbers[0].metric.removesuffix("perplexity").strip("_")
        name = f"{special} PPL" if special else "PPL"
        column = score_column((name, task, protocol), rows, (task, protocol), stderr=False)
        columns.append(column)
        if options.delta and any(number.conditions for number in numbers):
            columns.append(difference_column(("Δ", task, protocol), rows, column, percent=False))
    return columns


def _agreements(rows: list[Entry]) -> list[Column]:
    """KL divergence and top-1 agreement, per text and protocol."""
    columns = []
    for task, protocol in agreement_keys(rows):
        name = "top-1" if protocol.endswith(TOP_1) else "KL"
        heading = (name, task, protocol.removesuffix(TOP_1))
        columns.append(score_column(heading, rows, (task, protocol), name, stderr=False))
    return columns


def _paper_scores(rows: list[Entry], keys: dict[str, Key | None], options: Options) -> list[Column]:
    parts = [
        score_column((heading,), rows, key or (heading, ""), options.metric, stderr=False)
        for heading, key in keys.items()
    ]
    return [*parts, *_average(rows, parts, options, len(keys), stderr=False)]


def _average(
    rows: list[Entry], parts: list[Column], options: Options, n_parts: int, stderr: bool
) -> list[Column]:
    mean = mean_column(("Avg",), rows, parts, stderr, n_parts)
    if not options.delta:
        return [mean]
    return [mean, difference_column(("Δ", "Avg"), rows, mean, percent=True)]


def _keys_of(headings: Sequence[str], entries: list[Entry]) -> dict[str, Key | None]:
    """For each of a paper's tasks, the measured task that most rows have (WSC285 or WSC273)."""
    chosen: dict[str, Key | None] = {}
    for heading in headings:
        keys = [key for key in accuracy_keys(entries) if short_name(key[0]) == heading]
        counts = {key: sum(key in entry.cells for entry in entries) for key in keys}
        chosen[heading] = max(keys, key=lambda key: counts[key]) if keys else None
    return chosen


def _is_ptq(entry: Entry) -> bool:
    identity = entry.full_precision or entry.facts["wbits"] >= 16 and entry.facts["abits"] >= 16
    return not (identity or entry.trained or entry.source == "chance")


def _checkpoint(entry: Entry) -> str:
    return str(entry.facts["checkpoint"])


def _bits(entry: Entry) -> str:
    bits = entry.facts["wbits"]
    return MISSING if bits > 16 else format_bits(bits)


def _effective_bits(entry: Entry) -> str:
    bits = entry.facts.get("effective_bits")
    return f"{bits:.2f}" if bits else MISSING
