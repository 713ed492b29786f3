"""Which stored run a user means: by its folder, or by how it reads.

``opt-125m/W4A16/gptq``, ``gptq-0670``, or any beginning that only one run has. Left out: patterns,
which name several runs (:func:`qbench.comparison.entries.select`).
"""

from __future__ import annotations

from pathlib import Path

from qbench.comparison.two_runs import Side
from qbench.errors import QBenchError, unknown
from qbench.scheme import Scheme
from qbench.study.store import Run, Store, slug


def find_run(results: Path | str, text: str) -> Side:
    """The run that a folder, a beginning of its name, or checkpoint/scheme/baseline names.

    Args:
        results: the store to look in; a folder may lie in another one.
        text: what the user typed.

    Raises:
        QBenchError: if no run or more than one is meant.
    """
    folder = Path(text).expanduser().resolve()
    is_folder = (folder / "quantization.json").is_file() and len(folder.parents) > 2
    store = Store(folder.parents[2] if is_folder else results)
    runs = list(store.runs())
    if is_folder:
        return next(Side(store, run) for run in runs if run.path.resolve() == folder)
    if not runs:
        raise QBenchError(f"no results under {results}; name another folder with --results")
    wanted = text.rstrip("/")
    names = {run.path: _names(store, run) for run in runs}
    found = [run for run in runs if wanted in names[run.path]]
    if not found:
        found = [run for run in runs if any(n.startswith(wanted) for n in names[run.path])]
    if len(found) == 1:
        return Side(store, found[0])
    paths = [run.path.relative_to(store.root).as_posix() for run in found]
    if not found:
        raise unknown("run", text, [name for own in names.values() for name in own])
    shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    raise QBenchError(f"{text!r} names {len(paths)} runs ({shown}); say more of the name")


def _names(store: Store, run: Run) -> set[str]:
    record = run.quantization
    scheme = Scheme.parse(record.key.scheme)
    checkpoints = {record.checkpoint, slug(record.checkpoint)}
    baseline = record.key.baseline.name
    found = {run.path.relative_to(store.root).as_posix(), run.path.name}
    for checkpoint in checkpoints:
        for widths in (scheme.label, record.key.scheme, slug(record.key.scheme)):
            found |= {f"{checkpoint}/{widths}/{name}" for name in (baseline, run.path.name)}
    return found
