"""What a table's differences are worth: marks of significance and intervals, on a finished sheet.

``fp16`` marks every number that is significantly worse (▼) or better (▲) than that of the
full-precision row of its checkpoint, and calls no row the best. ``best`` sets in bold, with the
best row of each checkpoint and W/A, those that are not significantly worse: a lead that may be
chance is shared, and where all share it nobody is marked. ``off`` says that the bold rows lead by
their value alone.

The family that Holm's correction covers is every comparison one table makes. A number that cannot
be tested carries no mark but a footnote with the reason. Left out: tables whose rows hold several
runs (``sizes``), and published numbers, which have no items.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qbench.comparison.entries import Entry
from qbench.comparison.significance import MCNEMAR, RANDOMIZATION, Number, Tester, Verdict
from qbench.comparison.statistics import LEVEL, wilson
from qbench.errors import QBenchError, unknown
from qbench.study.store import Store
from qbench.tables.columns import weights_of
from qbench.tables.sheet import Cell, Column, Sheet

MODES = ("off", "fp16", "best")
WORSE, BETTER = "▼", "▲"
_BEST = "Best:"
_WHOLE = "the full-precision row of the same checkpoint"
_TESTS = {
    MCNEMAR: "McNemar's exact test",
    RANDOMIZATION: "the randomization test, over windows or, for means, questions",
}


@dataclass(frozen=True)
class _Pair:
    """Two rows of one column, the reference first."""

    column: int
    reference: int
    row: int


def with_significance(sheet: Sheet, store: Store, mode: str, seed: int = 0) -> Sheet:
    """The same sheet with its differences tested.

    Args:
        sheet: a table with one run per row.
        store: where the items of its numbers are.
        mode: ``off``, ``fp16`` or ``best``.
        seed: of the randomization tests.

    Raises:
        QBenchError: for an unknown mode, or a table whose rows hold several runs.
    """
    if mode not in MODES:
        raise unknown("significance", mode, MODES)
    if mode == "off":
        return _by_value_alone(sheet)
    if any(cell.facts is not None for column in sheet.columns for cell in column.cells):
        raise QBenchError(
            "this layout has several runs in a row, and marks none of them; "
            "take --layout comparison for significance"
        )
    rows = [Entry(facts, str(facts["method"]), {}, facts["source"]) for facts in sheet.facts]
    pairs = list(_against_whole(sheet, rows) if mode == "fp16" else _against_best(sheet, rows))
    numbers = [
        (_number(sheet, p.column, p.reference), _number(sheet, p.column, p.row)) for p in pairs
    ]
    verdicts = dict(zip(pairs, Tester(store, seed).family(numbers), strict=True))
    name = _WHOLE if mode == "fp16" else "the best row of its W/A"
    columns = _unmarked(sheet.columns) if mode == "fp16" else sheet.columns
    columns = [replace(column, cells=list(column.cells)) for column in columns]
    if mode == "best":
        _leave_out_alike(columns, verdicts)
    for pair, verdict in verdicts.items():
        cells = columns[pair.column].cells
        cells[pair.row] = _marked(cells[pair.row], cells[pair.reference], verdict, mode, name)
    remarks = _remarks(sheet, rows, list(verdicts.values()), mode)
    return replace(sheet, columns=columns, remarks=remarks)


def with_intervals(sheet: Sheet) -> Sheet:
    """The same sheet with Wilson's interval instead of the error of every accuracy.

    Means over tasks keep their standard error: no single share stands behind them.
    """
    columns = [replace(c, cells=[_with_interval(cell) for cell in c.cells]) for c in sheet.columns]
    told = f" with its {1 - LEVEL:.0%} Wilson interval"
    if any("±" in cell.text for column in columns for cell in column.cells):
        told += " (means ± standard error)"
    remarks = [
        re.sub(r"( in percent)( ± standard error)?", rf"\1{told}", line)
        if line.startswith("Tasks:")
        else line
        for line in sheet.remarks
    ]
    return replace(sheet, columns=columns, remarks=remarks)


def _number(sheet: Sheet, column: int, row: int) -> Number:
    measured = sheet.columns[column].cells[row].measured
    assert measured is not None
    facts = sheet.facts[row]
    runs = measured.runs or facts.get("runs") or [facts.get("run")]
    return Number(tuple(run for run in runs if run), measured)


def _shown(column: Column, rows: Sequence[Entry]) -> Iterator[tuple[int, Entry, Cell]]:
    """The measured numbers of a column."""
    for index, (entry, cell) in enumerate(zip(rows, column.cells, strict=True)):
        number = cell.measured
        if entry.source == "measured" and number is not None and number.value is not None:
            yield index, entry, cell


def _against_whole(sheet: Sheet, rows: Sequence[Entry]) -> Iterator[_Pair]:
    for place, column in enumerate(sheet.columns):
        if _is_distance(column):
            continue
        shown = list(_shown(column, rows))
        wholes = {weights_of(e): i for i, e, _ in reversed(shown) if e.full_precision}
        for index, entry, _ in shown:
            reference = wholes.get(weights_of(entry))
            if reference is not None and not entry.full_precision:
                yield _Pair(place, reference, index)


def _is_distance(column: Column) -> bool:
    """Whether a column says how far rows are from full precision: its own row has no more to say.

    That 0 divergence differs from all others is no finding, and would cost the others power.
    """
    kinds = {cell.measured.kind for cell in column.cells if cell.measured is not None}
    return bool(kinds & {"divergence", "agreement"})


def _against_best(sheet: Sheet, rows: Sequence[Entry]) -> Iterator[_Pair]:
    """Every rival against the best of its group: those that compete for the bold mark."""
    for place, column in enumerate(sheet.columns):
        groups: dict[tuple[object, ...], list[tuple[int, Cell]]] = defaultdict(list)
        for index, entry, cell in _shown(column, rows):
            if entry.ptq and not entry.mixed:
                groups[(*weights_of(entry), entry.facts["label"])].append((index, cell))
        for group in groups.values():
            best = next((index for index, cell in group if cell.best), None)
            for index, _ in group:
                if best is not None and index != best:
                    yield _Pair(place, best, index)


def _unmarked(columns: Sequence[Column]) -> list[Column]:
    return [replace(c, cells=[replace(cell, best=False) for cell in c.cells]) for c in columns]


def _leave_out_alike(columns: Sequence[Column], verdicts: Mapping[_Pair, Verdict]) -> None:
    """Take the mark from the best of every group in which no row is significantly worse.

    In place, on the lists of cells: a mark that every row has would say nothing.
    """
    leads = {(p.column, p.reference) for p, verdict in verdicts.items() if verdict.significant}
    for pair in verdicts:
        if (pair.column, pair.reference) not in leads:
            cells = columns[pair.column].cells
            for row in (pair.reference, pair.row):
                cells[row] = replace(cells[row], best=False)


def _marked(cell: Cell, leader: Cell, verdict: Verdict, mode: str, name: str) -> Cell:
    notes = list(cell.notes)
    if verdict.reason and cell.comparable:  # else the cell says already what differs
        notes.append(f"not tested against {name}: {verdict.reason}")
    if verdict.notes:
        notes.append(f"tested against {name} in spite of {'; '.join(verdict.notes)}")
    best, text = cell.best, cell.text
    if mode == "best":
        best = leader.best and (cell.best or (verdict.p is not None and not verdict.significant))
    elif verdict.significant:
        text = f"{text} {BETTER if verdict.better else WORSE}"
    return replace(cell, text=text, notes=tuple(notes), best=best, verdict=verdict)


def _remarks(
    sheet: Sheet, rows: Sequence[Entry], verdicts: Sequence[Verdict], mode: str
) -> list[str]:
    tested = [verdict for verdict in verdicts if verdict.p is not None]
    family = _family(tested, len(verdicts) - len(tested))
    if mode == "best":
        return [
            line.rstrip(".") + f", and those that are not significantly worse; none is marked "
            f"where no row is significantly worse. {family}"
            if line.startswith(_BEST)
            else line
            for line in sheet.remarks
        ]
    kept = [line for line in sheet.remarks if not line.startswith(_BEST)]
    kept.append(
        f"{WORSE} significantly worse, {BETTER} significantly better than {_WHOLE}. {family}"
    )
    if any(map(_is_distance, sheet.columns)):
        kept.append("KL and top-1 are distances from that row themselves, and are not tested.")
    whole = {weights_of(entry) for entry in rows if entry.full_precision}
    own = [e for e in rows if e.source == "measured" and weights_of(e) not in whole]
    without = dict.fromkeys(str(entry.facts["checkpoint"]) for entry in own)
    if without:
        kept.append(f"Not tested, as no full-precision row of it is shown: {', '.join(without)}.")
    return kept


def _family(tested: Sequence[Verdict], untested: int) -> str:
    if not tested:
        return "No comparison could be tested."
    counts = Counter(verdict.test for verdict in tested)
    parts = [f"{count} by {_TESTS[test]}" for test, count in sorted(counts.items())]
    rest = f"; {untested} more could not be tested" if untested else ""
    return (
        f"Paired tests on the same items at the level {LEVEL}, Holm's correction over the "
        f"{_count(len(tested))} of this table ({', '.join(parts)}{rest})."
    )


def _count(comparisons: int) -> str:
    return "only comparison" if comparisons == 1 else f"{comparisons} comparisons"


def _by_value_alone(sheet: Sheet) -> Sheet:
    told = " By value alone, not tested: see --significance."
    remarks = [line + told if line.startswith(_BEST) else line for line in sheet.remarks]
    return replace(sheet, remarks=remarks)


def _with_interval(cell: Cell) -> Cell:
    number = cell.measured
    if number is None or number.kind != "accuracy" or number.parts or number.value is None:
        return cell
    if number.draws:
        return cell  # a mean over seeds
    right = number.value * (number.n_items or 0)
    if not number.n_items or abs(right - round(right)) > 1e-6 * number.n_items:
        return cell  # no share of questions
    low, high = wilson(round(right), number.n_items) or (0.0, 1.0)
    text = f"{100 * number.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return replace(cell, text=text, interval=(low, high))
