"""A column with the share of questions that a row answers otherwise than full precision.

An accuracy can stay where it is while answers change both ways; how many changed says how much the
model did (Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141). Counted is every
question whose chosen option is another one, whichever is right, by the accuracy the table shows;
the column is the mean over the table's tasks, as its average is.

Left out: questions without options, and rows without a full-precision row of the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qbench.comparison.entries import Entry, Measured
from qbench.comparison.pairing import NotPaired, flips, pair
from qbench.comparison.significance import Tester
from qbench.errors import QBenchError
from qbench.study.store import Store
from qbench.tables.columns import weights_of, with_spread
from qbench.tables.sheet import MISSING, Cell, Column, Sheet, accuracy_text

_REMARK = (
    "Flips: percent of questions answered with another option than the full-precision row of the "
    "same checkpoint, right or wrong; the mean over the tasks."
)


def with_flips(sheet: Sheet, store: Store) -> Sheet:
    """The same sheet with one more column.

    Args:
        sheet: a table with one run, or the seeds of one, per row.
        store: where the items of its numbers are.

    Raises:
        QBenchError: for a table whose rows hold several runs.
    """
    if any(cell.facts is not None for column in sheet.columns for cell in column.cells):
        raise QBenchError(
            "this layout has several runs in a row, and no flips; take --layout comparison"
        )
    tester = Tester(store)
    rows = [Entry(facts, str(facts["method"]), {}, facts["source"]) for facts in sheet.facts]
    tasks = [place for place, column in enumerate(sheet.columns) if _is_task(column)]
    wholes = {weights_of(row): i for i, row in enumerate(rows) if row.full_precision}
    cells = []
    for index, row in enumerate(rows):
        whole = wholes.get(weights_of(row))
        if whole is None or not row.ptq or not tasks:
            cells.append(Cell(MISSING))
            continue
        numbers = [
            tuple(sheet.columns[place].cells[i].measured for i in (whole, index)) for place in tasks
        ]
        cells.append(_cell(tester, rows[whole], row, numbers))
    column = Column(("Flips",), cells)
    remarks = [*sheet.remarks, _REMARK]
    return replace(sheet, columns=[*sheet.columns, column], remarks=remarks)


def _is_task(column: Column) -> bool:
    numbers = [cell.measured for cell in column.cells if cell.measured is not None]
    return any(n.kind == "accuracy" and n.conditions and not n.parts for n in numbers)


def _cell(
    tester: Tester, whole: Entry, row: Entry, numbers: Sequence[tuple[Measured | None, ...]]
) -> Cell:
    """The mean over tasks, for each seed and over the seeds."""
    every = row.facts.get("runs") or (row.facts["run"],)
    runs = [(own.runs if own else ()) or every for _, own in numbers]
    try:
        shares = [
            [_share(tester, whole, run, *both) for run in of_task]
            for both, of_task in zip(numbers, runs, strict=True)
        ]
    except QBenchError as error:
        return Cell(MISSING, (f"no flips of {row.method} {row.facts['label']}: {error}",))
    alike = len(set(runs)) == 1  # else the seeds of one task are not those of another
    draws = [sum(own) / len(own) for own in zip(*shares, strict=True)] if alike else []
    number = Measured(
        task="mean over the tasks",
        kind="agreement",
        metric="flips",
        value=sum(sum(own) / len(own) for own in shares) / len(shares),
        draws=tuple(draws) if len(draws) > 1 else (),
    )
    return Cell(with_spread(accuracy_text(number.value or 0.0), number), measured=number)


def _share(
    tester: Tester, whole: Entry, run: str, of_whole: Measured | None, of_row: Measured | None
) -> float:
    if of_whole is None or of_row is None or of_whole.value is None or of_row.value is None:
        raise NotPaired("a task was not measured on both")
    if of_whole.metric != of_row.metric:
        raise NotPaired("the two show other accuracies")
    both = pair(tester.measurement(whole.facts["run"], of_whole), tester.measurement(run, of_row))
    return float(flips(both.a, both.b, of_row.metric)["kind"].str.contains("->").mean())
