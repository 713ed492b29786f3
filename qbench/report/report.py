"""``qbench report``: everything stored as one page that opens anywhere.

Left out: anything the page would have to fetch, a server, and the texts of data sets unless the
reader has them (``--data``).
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qbench.comparison.entries import Entry
from qbench.comparison.seeds import merged
from qbench.errors import QBenchError, RunFailed
from qbench.report import overview
from qbench.report.answers import Answers, Texts
from qbench.report.figure import figures
from qbench.report.findings import findings
from qbench.report.page import render
from qbench.report.reproductions import reproductions
from qbench.report.runs import page_of
from qbench.report.sheets import shown
from qbench.report.snapshot import Snapshot, anchors, full_precision_of
from qbench.study.store import Store
from qbench.tables.layouts import LAYOUTS, Options, lay_out
from qbench.tables.marks import with_significance
from qbench.tables.table import stored_entries

MOST_TESTED = 3000
"""Numbers of a table up to which their differences are tested."""


@dataclass(frozen=True)
class Choices:
    """What goes into a page."""

    metric: str = "acc"
    """``acc``, ``acc_norm`` or ``acc_token``."""
    against: str | None = None
    """A published table to show beside the measured one."""
    significance: str = "fp16"
    """What the table marks: a mode of :mod:`qbench.tables.marks`."""
    data: Path | str | None = None
    """Where questions are read from; None leaves their texts out."""
    without_texts: Sequence[str] = ()
    """Tasks whose texts are left out, as shell-style patterns."""
    checkpoints: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    schemes: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    num_fewshot: int | None = None


def report(store: Store, output: Path, choices: Choices = Choices()) -> Path:  # noqa: B008
    """Write the page of a store, or of a part of it; returns the path.

    Raises:
        QBenchError: for an empty store, an unknown name or filters that leave nothing.
        RunFailed: if the file cannot be written.
    """
    return write(output, html_of(store, choices))


def html_of(store: Store, choices: Choices = Choices()) -> str:  # noqa: B008
    """The page as text; see :func:`report`."""
    with warnings.catch_warnings(record=True) as unread:
        warnings.simplefilter("always")
        snapshot = Snapshot(store)
        single = stored_entries(
            snapshot,
            choices.metric,
            checkpoints=choices.checkpoints,
            baselines=choices.baselines,
            schemes=choices.schemes,
            tasks=choices.tasks,
            num_fewshot=choices.num_fewshot,
            each_seed=True,
        )
    rows = merged(single)
    measured = [entry for entry in rows if entry.source == "measured"]
    anchor_of = anchors(entry.facts["run"] for entry in single)
    texts = Texts(choices.data, choices.without_texts)
    packed = _pages(snapshot, single, _siblings(measured), choices.metric, anchor_of, texts)
    found, missing = texts.collect()
    packed |= found
    told = findings(snapshot, measured, anchor_of)
    title = _title(measured)
    # a broken record is a warning of the page, said once
    broken = dict.fromkeys(str(w.message).removeprefix("left out: ") for w in unread)
    again, unread_again = reproductions(store.root)
    content = {
        "title": title,
        "lead": _lead(measured, len(single)),
        "findings": list(told.of.items()),
        "tested": told.tested,
        "figures": figures(measured, choices.metric, anchor_of),
        "table": _table(snapshot, rows, choices, anchor_of),
        "published": _published(snapshot, rows, choices, anchor_of),
        "reproductions": again,
        "warnings": overview.warnings(measured, anchor_of, [*broken, *unread_again]),
        "compared": overview.compared(
            measured, [snapshot.run(entry.facts["run"]) for entry in single]
        ),
        "footer": f"Made with qbench {_version()} from stored results; it needs no network.",
    }
    content["data"] = {
        "title": title,
        "figures": content["figures"],
        "runs": {anchor: name for name, anchor in anchor_of.items()},
        "texts": list(found),
        "missing": missing,
    }
    return render(content, packed)


def _pages(
    snapshot: Snapshot,
    entries: Sequence[Entry],
    siblings: dict[str, list[tuple[int, str]]],
    metric: str,
    anchor_of: dict[str, str],
    texts: Texts,
) -> dict[str, Any]:
    """Anchor -> the data of a run's page."""
    full = full_precision_of(entries)
    answers = Answers(snapshot, entries, metric, texts)
    pages = {}
    for entry in entries:
        name = entry.facts["run"]
        base = full.get((entry.facts["checkpoint"], entry.facts["weights"]))
        page = page_of(entry, snapshot.run(name), base, anchor_of)
        page["seeds"] = [(seed, anchor_of[run]) for seed, run in siblings.get(name, [])]
        pages[anchor_of[name]] = page | {"answers": answers.of(entry)}
    return pages


def _siblings(rows: Sequence[Entry]) -> dict[str, list[tuple[int, str]]]:
    """Run -> seed and run of every draw of its row, itself included; nothing for single runs."""
    found = {}
    for row in rows:
        runs = row.facts.get("runs") or ()
        for run in runs if len(runs) > 1 else ():
            found[run] = list(zip(row.facts["seeds"], runs, strict=True))
    return found


def _table(
    snapshot: Snapshot, entries: Sequence[Entry], choices: Choices, anchor_of: dict[str, str]
) -> dict[str, Any]:
    sheet = lay_out("comparison", entries, Options(choices.metric))
    numbers = sum(cell.measured is not None for row in sheet.rows() for cell in row)
    if numbers <= MOST_TESTED:
        tested = with_significance(sheet, snapshot, choices.significance)
        return shown(tested, anchor_of, "table")
    table = shown(with_significance(sheet, snapshot, "off"), anchor_of, "table")
    table["remarks"].append(
        f"Not tested for significance: {numbers:,} numbers in one table are more than "
        f"{MOST_TESTED:,}, and every further test makes all of them weaker; filter the page."
    )
    return table


def _published(
    snapshot: Snapshot, entries: Sequence[Entry], choices: Choices, anchor_of: dict[str, str]
) -> dict[str, Any] | None:
    """The measured rows with the published ones, in the paper's layout where there is one."""
    if choices.against is None:
        return None
    layout = choices.against if choices.against in LAYOUTS else "comparison"
    sheet = lay_out(layout, entries, Options(choices.metric, choices.against))
    return shown(with_significance(sheet, snapshot, "off"), anchor_of, "published")


def _title(entries: Sequence[Entry]) -> str:
    """The checkpoints that were quantized first, the largest before the others."""
    ordered = sorted(entries, key=lambda e: (e.trained, -(e.facts["parameters"] or 0)))
    names = list(dict.fromkeys(str(entry.facts["checkpoint"]) for entry in ordered))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Quantization of {', '.join(names[:3])}{more}"


def _lead(entries: Sequence[Entry], runs: int) -> str:
    def count(n: int, what: str) -> str:
        return f"{n:,} {what}{'' if n == 1 else 's'}"

    methods = {entry.facts["baseline"] for entry in entries if entry.ptq}
    tasks = {key for entry in entries for key in entry.cells}
    checkpoints = {entry.facts["checkpoint"] for entry in entries}
    parts = [count(runs, "run"), count(len(checkpoints), "checkpoint")]
    parts += [count(len(methods), "method")] if methods else []
    return " · ".join([*parts, count(len(tasks), "task")])


def write(output: Path, text: str) -> Path:
    """Write the page under a temporary name first, so that a file that exists is whole.

    Raises:
        QBenchError: for a name that is no HTML file.
        RunFailed: if it cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise QBenchError(f"cannot write a page as {output.name!r}: the name must end in .html")
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(temporary, output)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunFailed(
            f"cannot write {output} ({error.strerror or error}); name another file with -o"
        ) from error
    return output


def _version() -> str:
    try:
        return version("qbench")
    except PackageNotFoundError:
        return ""
