"""Tables whose weights were never released: their rows on checkpoints that somebody has.

BitNet's Table 3 (arXiv 2310.11453) was measured on the authors' own 6.7 B models. What can be had
again is its shape: the same methods at the same widths, on a full-precision checkpoint and, where
there is one, its BitNet twin. The published rows stand beside for orientation; nothing gets a
verdict, so no outcome is stored: the runs are, and every table and page finds them there.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from qbench.errors import QBenchError, unknown
from qbench.models.checkpoints import find_checkpoint
from qbench.progress import Reporter
from qbench.reproduction.presets import Preset, Row
from qbench.reproduction.running import Request
from qbench.scheme import Scheme
from qbench.study.commands import run_sweep
from qbench.study.store import Store
from qbench.study.sweep import BaselineEntry, CalibrationEntry, Sweep, TaskEntry


def reproduce(
    preset: Preset,
    request: Request,
    checkpoints: Sequence[str] = (),
    form: str = "terminal",
    dry_run: bool = False,
    width: int = 100,
) -> int:
    """Run the rows on each checkpoint and print them beside the published ones.

    Args:
        preset: whose weights were never released.
        request: what was asked for.
        checkpoints: the user's, BitNet ones among them; none: the bundled twins.
        form: format of the table.
        dry_run: print the plan of the runs instead.
        width: characters in a line, for the terminal.

    Raises:
        QBenchError: where there are neither checkpoints nor stand-ins, and for unknown names.
    """
    sweep, reporter = _sweep(preset, request, checkpoints), Reporter()
    named = ", ".join(str(path) for path in sweep.checkpoints)
    reporter.line(
        f"{preset.name} · {preset.family.paper} · its weights were never released: its rows on "
        f"{named}, the published ones beside them for orientation"
    )
    code = run_sweep(sweep, reporter, dry_run, request.retry_failed, request.allow_pickle)
    if dry_run:
        for point in preset.family.ambiguous:
            print(f"  left open by the paper: {point}")
        return code
    print(_table(preset, request, sweep, form, width), end="")
    for point in preset.family.ambiguous:
        print(f"left open by the paper: {point}", file=sys.stderr)
    return code


def _sweep(preset: Preset, request: Request, checkpoints: Sequence[str]) -> Sweep:
    family, stand_in = preset.family, preset.family.stand_in
    if not checkpoints and stand_in is None:
        raise QBenchError(f"{preset.name}: its weights were never released; give --checkpoint")
    text = family.calibration
    data: Path | None = request.data
    if checkpoints or stand_in is None:
        tasks = [TaskEntry(name=m.task, protocol=m.protocol) for m in preset.measures]
    else:
        checkpoints, text = stand_in.checkpoints, stand_in.calibration
        tasks = [TaskEntry(name=name) for name in stand_in.tasks]
        data = Path(stand_in.data) if data is None else data
    for pattern in request.tasks:
        if not any(fnmatch.fnmatchcase(task.name, pattern) for task in tasks):
            raise unknown(f"task of {preset.name}", pattern, [task.name for task in tasks])
    chosen = [
        task
        for task in tasks
        if not request.tasks or any(fnmatch.fnmatchcase(task.name, p) for p in request.tasks)
    ]
    return Sweep(
        checkpoints=list(checkpoints),
        baselines=[_entry(row) for row in _rows(preset, request)],
        schemes=["W16A16"],
        tasks=list(chosen),
        calibration=CalibrationEntry(**text.model_dump()),
        limit=request.limit,
        results=request.results,
        data=data,
        max_length=family.max_length,
        encoding=family.encoding,
        device=request.device,
        dtype=request.dtype or family.dtype,
        seed=family.seed,
        seeds=request.seeds,
        stream=request.stream,
    )


def _rows(preset: Preset, request: Request) -> list[Row]:
    names = [row.name for row in preset.rows]
    for pattern in request.rows:
        if not fnmatch.filter(names, pattern):
            raise unknown(f"row of {preset.name}", pattern, names)
    return [
        row
        for row in preset.rows
        if row.is_full_precision
        or not request.rows
        or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in request.rows)
    ]


def _entry(row: Row) -> BaselineEntry:
    schemes = None if row.is_full_precision else [row.scheme]
    return BaselineEntry(name=row.baseline, schemes=schemes, **row.fields)


def _table(preset: Preset, request: Request, sweep: Sweep, form: str, width: int) -> str:
    """The paper's layout with the rows of this sweep and those that were published."""
    from qbench.tables.table import table

    found = [
        find_checkpoint(entry.path, allow_pickle=request.allow_pickle)
        for entry in sweep.checkpoint_entries()
    ]
    own = [checkpoint.own_scheme for checkpoint in found]
    schemes = [str(cell.scheme) for cell in sweep.cells()]
    schemes += [str(one.scheme) for one in own if one is not None]
    return table(
        Store(request.results),
        preset.family.layout or "comparison",
        metric=preset.measures[-1].metric,
        against=preset.reference,
        format=form,
        width=width,
        checkpoints=[checkpoint.name for checkpoint in found],
        schemes=list(dict.fromkeys([*schemes, str(Scheme())])),
        tasks=[spec.name for spec in sweep.task_specs()],
    )
