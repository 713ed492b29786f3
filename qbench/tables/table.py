"""Tables of everything in a store, in one call.

``table(store)`` compares; other layouts and formats are names. Reading results never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry, entries, select
from qbench.comparison.frame import frame
from qbench.comparison.seeds import merged
from qbench.errors import QBenchError, unknown
from qbench.study.store import Store
from qbench.tables import render
from qbench.tables.arrangement import Options
from qbench.tables.flips import with_flips
from qbench.tables.layouts import BY_SIZE, FEW_SHOT, LAYOUTS, lay_out
from qbench.tables.marks import with_intervals, with_significance
from qbench.tables.published import published_csv, published_sheet
from qbench.tables.sheet import Sheet

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("acc", "acc_norm", "acc_token")
FORMATS: dict[str, Callable[[Sheet], str]] = {
    "md": render.markdown,
    "latex": render.latex,
    "csv": render.tidy_csv,
    "html": render.html_page,
    "terminal": render.terminal,
}


def table(
    store: Store,
    layout: str = "comparison",
    *,
    metric: str = "acc",
    against: str | None = None,
    delta: bool = False,
    format: str = "md",
    width: int = 100,
    checkpoints: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    each_seed: bool = False,
    flips: bool = False,
    significance: str = "off",
    interval: bool = False,
) -> str:
    """Everything stored, as text.

    Args:
        store: where the results are.
        layout: one of :data:`qbench.tables.layouts.LAYOUTS`.
        metric: ``acc``, ``acc_norm`` (per character) or ``acc_token`` (per token); a task that
            has it not shows its ``acc`` and says so. ``sizes`` takes ``bits_per_byte`` as well.
        against: name of a published table whose rows are added, labelled as published.
        delta: add the difference to the full-precision row; ``sizes`` always has it.
        format: ``md``, ``latex``, ``csv``, ``html`` or ``terminal``.
        width: characters in a line, for the terminal.
        checkpoints: keep these only; this and the next three take shell-style patterns.
        baselines: keep these methods only. In ``sizes`` this and the next choose the quantized rows
            that join the full-precision and trained ones; without them there are none.
        schemes: keep these only, by label (``W4A16``) or full text.
        tasks: keep these columns only.
        num_fewshot: keep measurements with this many examples only.
        each_seed: a row for every seed, instead of their mean and spread.
        flips: add the share of answers that differ from full precision's.
        significance: ``fp16`` marks what differs significantly from the full-precision row,
            ``best`` shares the bold mark with rows that are not significantly worse than the best
            of their width, ``off`` tests nothing (:mod:`qbench.tables.marks`).
        interval: give accuracies their 95 % Wilson interval instead of the standard error.

    Raises:
        QBenchError: for an empty store, an unknown name or filters that leave nothing.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    rows = {"checkpoints": checkpoints, "tasks": tasks}
    quantized = {"baselines": baselines, "schemes": schemes}
    options = Options(metric, against, delta)
    sheet = _laid_out(store, layout, options, rows, quantized, num_fewshot, each_seed)
    sheet = with_significance(sheet, store, significance)
    sheet = with_intervals(sheet) if interval else sheet
    sheet = with_flips(sheet, store) if flips else sheet
    return render.terminal(sheet, width) if format == "terminal" else FORMATS[format](sheet)


def _laid_out(
    store: Store,
    layout: str,
    options: Options,
    rows: dict[str, Any],
    quantized: dict[str, Any],
    num_fewshot: int | None,
    each_seed: bool,
) -> Sheet:
    """The table before it is tested; ``quantized`` are the filters on method and scheme."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    metric = options.metric
    if metric not in METRICS and (layout not in BY_SIZE or metric != "bits_per_byte"):
        raise unknown("metric", metric, METRICS)
    if layout in BY_SIZE:
        asked = asked_for(store, num_fewshot=num_fewshot, **rows, **quantized)
        options, quantized = replace(options, asked=asked), {}
    of = metric if metric in METRICS else METRICS[0]
    if layout in FEW_SHOT:
        chosen = select(_stored(store), **rows, **quantized)
        chosen = chosen[(chosen["num_fewshot"] == FEW_SHOT[layout]).fillna(False)]
        examples = entries(chosen, of) if each_seed else merged(entries(chosen, of))
        few = {str(entry.facts["run"]): entry.cells for entry in examples}
        options, num_fewshot = replace(options, few_shot=few), 0
    shown = stored_entries(
        store, of, num_fewshot=num_fewshot, each_seed=each_seed, **rows, **quantized
    )
    return lay_out(layout, shown, options)


def published_table(name: str, format: str = "md", width: int = 100) -> str:
    """One published table as its paper lays it out, without any store; as CSV the file behind it.

    Args:
        name: as ``qbench list published`` has it.
        format: ``md``, ``latex``, ``csv``, ``html`` or ``terminal``.
        width: characters in a line, for the terminal.

    Raises:
        QBenchError: for an unknown name.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "csv":
        return published_csv(name)
    sheet = published_sheet(name)
    return render.terminal(sheet, width) if format == "terminal" else FORMATS[format](sheet)


def stored_entries(
    store: Store,
    metric: str = "acc",
    *,
    checkpoints: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    each_seed: bool = False,
) -> list[Entry]:
    """The rows behind tables and plots, filtered as :func:`table` says.

    Runs that differ in their seed alone are one row, unless ``each_seed`` is set.

    Raises:
        QBenchError: for an empty store, an unknown name or filters that leave nothing.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    chosen = select(_stored(store), checkpoints, baselines, schemes, tasks, num_fewshot)
    found = entries(chosen, metric)
    return found if each_seed else merged(found)


def asked_for(
    store: Store,
    *,
    baselines: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    checkpoints: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
) -> frozenset[str]:
    """The runs that filters on method and scheme name, none without such filters.

    Where sizes are compared, these are the quantized rows shown beside the full-precision and
    trained ones, which are always there.

    Raises:
        QBenchError: as :func:`stored_entries`.
    """
    if not (baselines or schemes):
        return frozenset()
    chosen = select(_stored(store), checkpoints, baselines, schemes, tasks, num_fewshot)
    return frozenset(chosen["run"])


def _stored(store: Store) -> DataFrame:
    long = frame(store)
    if long.empty:
        raise QBenchError(
            f"no results are stored in {store.root}; make some with `qbench demo`, `qbench run` "
            "or `qbench sweep`, or name another folder with --results"
        )
    return long
