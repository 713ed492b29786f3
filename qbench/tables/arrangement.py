"""What layouts share: which rows in which order, groups of columns, the remarks below.

A paper's layout keeps the paper's columns, so one that was not measured is empty, and an average
stands only where all its tasks were measured. Perplexities of different protocols never share a
column.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from qbench.comparison.headings import chance_level, short_name
from qbench.errors import QBenchError
from qbench.scheme import format_bits
from qbench.tables.columns import difference_column, mean_column, score_column
from qbench.tables.sheet import MISSING, Column, Sheet, accuracy_text

_AGREEMENTS = ("KL", "top-1")


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
    few_shot: Mapping[str, Mapping[Key, Measured]] = field(default_factory=dict)
    """Per run, what it scores with the examples that a layout also shows (``FEW_SHOT``)."""


def sheet_of(
    title: str,
    columns: list[Column],
    rows: list[Entry],
    rules: set[int],
    options: Options,
    keys: dict[str, Key | None] | None = None,
) -> Sheet:
    """The finished table, with the remarks that hold for all of it."""
    cells = [cell for column in columns for cell in column.cells]
    remarks = []
    if perplexity_keys(rows):
        remarks.append("PPL: perplexity, lower is better; text and protocol stand in the heading.")
    if any(column.heading[0] in _AGREEMENTS for column in columns):
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
    if any("(sd " in cell.text for cell in cells):
        remarks.append(
            "Rows of several seeds: the mean over them, and sd, the standard deviation over seeds, "
            "each of which draws the calibration text and the method's own randomness anew."
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


def ordered(entries: list[Entry]) -> tuple[list[Entry], set[int]]:
    """By checkpoint, smallest first, then bits descending; and where a new checkpoint begins.

    One full-precision checkpoint makes one block with everything in it, so that a trained model or
    a published number stands beside what it is compared with.
    """
    measured = [e for e in entries if e.source == "measured"]
    own = sorted((entry for entry in measured if not entry.as_stored), key=by_size)
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
        method = entry.method if entry.source == "measured" else ""  # published: as printed
        return block(entry), *bits, name, entry.source, facts["label"], method

    rows = sorted(entries, key=order)
    return rows, {i for i in range(1, len(rows)) if block(rows[i]) != block(rows[i - 1])}


def published_rows(options: Options, keys: list[Key], num_fewshot: int = 0) -> list[Entry]:
    """The rows of the published table that was asked for, each with a note on where it stands.

    Raises:
        QBenchError: for a name that is not there, or a table without accuracy and perplexity.
    """
    if options.against is None:
        return []
    found = reference.entries(options.against, keys, num_fewshot)
    if not any(entry.cells for entry in found):
        raise QBenchError(
            f"{options.against} holds no accuracy and no perplexity, so no layout has its rows; "
            f"print it with `qbench table --published {options.against}`"
        )
    own = {entry.cells[key].metric for entry in found for key in keys if key in entry.cells}
    how = f"; accuracies are {', '.join(sorted(own))}" if own - {options.metric} else ""
    note = (
        f"published: {found[0].facts['reference']}: other weights, other data, what to expect "
        f"and not what to reach{how}"
    )
    return [replace(entry, facts=entry.facts | {"notes": (note,)}) for entry in found]


def guessing(keys: list[Key]) -> Entry:
    """The row of a model that guesses."""
    cells = {}
    for key in keys:
        level = chance_level(key[0])
        if level is not None:
            cells[key] = Measured(key[0], "accuracy", "chance", level, chance=level)
    facts = {"checkpoint": MISSING, "label": "", "wbits": float("inf"), "abits": 16}
    return Entry(facts | {"baseline": "", "parameters": None}, "Random", cells, source="chance")


def perplexities(rows: list[Entry], options: Options) -> list[Column]:
    """A column per text and protocol."""
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


def agreements(rows: list[Entry]) -> list[Column]:
    """KL divergence and top-1 agreement, per text and protocol."""
    columns = []
    for task, protocol in agreement_keys(rows):
        name = _AGREEMENTS[protocol.endswith(TOP_1)]
        heading = (name, task, protocol.removesuffix(TOP_1))
        columns.append(score_column(heading, rows, (task, protocol), name, stderr=False))
    return columns


def paper_scores(rows: list[Entry], keys: dict[str, Key | None], options: Options) -> list[Column]:
    """A column per task of a paper, by its heading, and their plain mean."""
    parts = [
        score_column((heading,), rows, key or (heading, ""), options.metric, stderr=False)
        for heading, key in keys.items()
    ]
    return [*parts, *average(rows, parts, options, len(keys), stderr=False)]


def average(
    rows: list[Entry], parts: list[Column], options: Options, n_parts: int, stderr: bool
) -> list[Column]:
    """The mean of some columns, and where asked its difference to full precision."""
    mean = mean_column(("Avg",), rows, parts, stderr, n_parts)
    printed = [row.cells.get(("average", "")) for row in rows]
    cells = [
        replace(cell, text=accuracy_text(own.value), measured=own)
        if own and own.value is not None and cell.measured
        else cell
        for cell, own in zip(mean.cells, printed, strict=True)
    ]
    mean = replace(mean, cells=cells)  # 52.5, where the mean of rounded numbers is 52.45
    if not options.delta:
        return [mean]
    return [mean, difference_column(("Δ", "Avg"), rows, mean, percent=True)]


def tasks_of(headings: Sequence[str], entries: list[Entry]) -> dict[str, Key | None]:
    """For each of a paper's tasks, the measured task that most rows have (WSC285 or WSC273)."""
    chosen: dict[str, Key | None] = {}
    for heading in headings:
        keys = [key for key in accuracy_keys(entries) if short_name(key[0]) == heading]
        counts = {key: sum(key in entry.cells for entry in entries) for key in keys}
        chosen[heading] = max(keys, key=lambda key: counts[key]) if keys else None
    return chosen


def is_ptq(entry: Entry) -> bool:
    """Whether a row counts as post-training quantized, measured or published."""
    identity = entry.full_precision or entry.facts["wbits"] >= 16 and entry.facts["abits"] >= 16
    return not (identity or entry.trained or entry.source == "chance")


def checkpoint(entry: Entry) -> str:
    """What a row names its checkpoint."""
    return str(entry.facts["checkpoint"])


def weight_bits(entry: Entry) -> str:
    """A row's width of weights; nothing where it has none."""
    bits = entry.facts["wbits"]
    return MISSING if math.isinf(bits) else format_bits(bits)
