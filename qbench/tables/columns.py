"""The columns tables are made of: text, one score, the mean of several, the difference to FP16.

Within a column the best PTQ row of each checkpoint and W/A label is marked, where at least two
compete and were measured alike. Rows with per-layer overrides do not compete: their label does not
say how many bits they have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from qbench.comparison.entries import (
    Entry,
    Key,
    Measured,
    common,
    deviations,
    is_agreement,
    mean_of,
    say,
)
from qbench.comparison.seeds import n_seeds, spread
from qbench.tables.sheet import (
    MISSING,
    Cell,
    Column,
    accuracy_text,
    difference_text,
    divergence_text,
    perplexity_text,
    spread_text,
)


def text_column(
    heading: str, entries: Sequence[Entry], text: Callable[[Entry], str], numeric: bool = False
) -> Column:
    """A column that names the rows."""
    return Column((heading,), [Cell(text(entry)) for entry in entries], numeric)


def scheme_column(entries: Sequence[Entry]) -> Column:
    """How weights and activations are rounded, beside the widths; nothing for published rows."""
    column = text_column("Scheme", entries, lambda entry: entry.scheme_text or MISSING)
    return replace(column, detail=True)


def method_column(heading: str, entries: Sequence[Entry]) -> Column:
    """The method, with what a reader must know of the whole run: fallbacks, failures, source."""
    return Column((heading,), [Cell(_method(e), run_notes(e)) for e in entries], False)


def score_column(
    heading: tuple[str, ...],
    entries: Sequence[Entry],
    key: Key,
    wanted: str = "acc",
    stderr: bool = True,
) -> Column:
    """One task.

    Args:
        heading: its lines.
        entries: the rows.
        key: what the column shows.
        wanted: the metric asked for; a column that shows another says so.
        stderr: whether accuracies carry their standard error.
    """
    usual = common(entry.cells[key] for entry in entries if key in entry.cells)
    cells = [_score(entry, key, usual, stderr) for entry in entries]
    told = []
    if usual and not key[1]:
        told += [say("metric", usual["metric"])] if usual["metric"] != wanted else []
        told += [say("num_fewshot", usual["num_fewshot"])] if usual["num_fewshot"] else []
    if usual and usual["limit"] is not None:
        told.append(say("limit", usual["limit"]))
    own = (f"{key[0]}: {', '.join(told)}",) if told else ()
    return Column(heading, _best(entries, cells), notes=own)


def mean_column(
    heading: tuple[str, ...],
    entries: Sequence[Entry],
    parts: Sequence[Column],
    stderr: bool = True,
    n_parts: int | None = None,
) -> Column:
    """The plain mean of accuracy columns, for rows that have a number in every one of them."""
    cells = []
    for row in zip(*(part.cells for part in parts), strict=True):
        numbers = [cell.measured for cell in row]
        if len(numbers) < (n_parts or 1) or any(m is None or m.value is None for m in numbers):
            cells.append(Cell(MISSING))
            continue
        mean = mean_of([m for m in numbers if m is not None])
        comparable = all(cell.comparable for cell in row)
        text = with_spread(accuracy_text(mean.value or 0.0, mean.stderr if stderr else None), mean)
        note = () if comparable else ("mean over numbers that were not all measured alike",)
        cells.append(Cell(text, note, measured=mean, comparable=comparable))
    if not parts:
        cells = [Cell(MISSING) for _ in entries]
    return Column(heading, _best(entries, cells))


def difference_column(
    heading: tuple[str, ...], entries: Sequence[Entry], of: Column, percent: bool
) -> Column:
    """What each row loses or gains against the full-precision row of its checkpoint."""
    reference = {
        weights_of(entry): cell.measured.value
        for entry, cell in zip(entries, of.cells, strict=True)
        if entry.full_precision and cell.measured and cell.comparable
    }
    cells = []
    for entry, cell in zip(entries, of.cells, strict=True):
        base = reference.get(weights_of(entry))
        value = cell.measured.value if cell.measured else None
        shown = entry.ptq and cell.comparable and base is not None and value is not None
        cells.append(
            Cell(difference_text(value - base, percent))
            if shown and value is not None and base is not None
            else Cell(MISSING)
        )
    return Column(heading, cells)


def weights_of(entry: Entry) -> tuple[object, object]:
    """What a row may be compared within: checkpoints of one name may hold other weights."""
    return entry.facts.get("checkpoint"), entry.facts.get("weights")


def _score(entry: Entry, key: Key, usual: dict[str, object], stderr: bool) -> Cell:
    number = entry.cells.get(key)
    if number is None:
        status = entry.facts.get("status") if usual else None  # no verdict where nobody measured
        if usual and is_agreement(key) and entry.as_stored:
            status = "not_applicable"  # there is nothing it could agree with
        return Cell({"failed": "failed", "not_applicable": "n/a"}.get(str(status), MISSING))
    if number.value is None:
        return Cell("failed", number.notes, measured=number)
    different = deviations(number, usual)
    notes = (f"measured differently: {different}", *number.notes) if different else number.notes
    if number.kind == "perplexity":
        text = perplexity_text(number.value)
    elif number.kind == "divergence":
        text = divergence_text(number.value)
    else:
        text = accuracy_text(number.value, number.stderr if stderr else None)
    return Cell(with_spread(text, number), notes, measured=number, comparable=not different)


def with_spread(text: str, number: Measured) -> str:
    """A number's text with its standard deviation over seeds: "61.2 ± 0.9 (sd 0.4)"."""
    over_seeds = spread(number)
    if over_seeds is None:
        return text
    return f"{text} (sd {spread_text(over_seeds, number.kind)})"


def _best(entries: Sequence[Entry], cells: list[Cell]) -> list[Cell]:
    """The same cells with the best PTQ row of each checkpoint and W/A label marked."""
    rivals: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (entry, cell) in enumerate(zip(entries, cells, strict=True)):
        value = cell.measured.value if cell.measured else None
        competes = entry.ptq and not entry.mixed and cell.comparable
        if competes and value is not None and math.isfinite(value):
            rivals[(*weights_of(entry), entry.facts["label"])].append(index)
    marked = list(cells)
    for indices in rivals.values():
        if len(indices) < 2:
            continue
        lower = cells[indices[0]].measured.lower_is_better  # type: ignore[union-attr]
        values = {i: cells[i].measured.value or 0.0 for i in indices}  # type: ignore[union-attr]
        best = min(values.values()) if lower else max(values.values())
        for index in indices:
            if values[index] == best:
                marked[index] = replace(cells[index], best=True)
    return marked


def _method(entry: Entry) -> str:
    if n_seeds(entry) > 1:
        return f"{entry.method} ({n_seeds(entry)} seeds)"
    return f"{entry.method} (published)" if entry.source == "published" else entry.method


def run_notes(entry: Entry) -> tuple[str, ...]:
    """What a reader must know of a whole run: layers that fell back, failures, its source."""
    facts, notes = entry.facts, []
    where = f"{entry.name} on {facts.get('checkpoint', '')}"
    if facts.get("fallbacks"):
        notes.append(
            f"† {where}: {facts['fallbacks']} of {facts['n_layers']} layers were rounded to "
            "nearest because the method could not run on them"
        )
    if facts.get("status") in ("failed", "not_applicable"):
        word = "failed" if facts["status"] == "failed" else "not applicable"
        reason = (facts.get("error") or "no reason was stored").splitlines()[0]
        notes.append(f"{where}: {word}: {reason}")
    return (*notes, *facts.get("notes", ()))
