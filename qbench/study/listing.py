"""What ``qbench list`` prints; nothing here imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from qbench.errors import QBenchError, unknown


def lines(what: str, results: Path) -> Iterator[str]:
    """The lines for one kind of thing.

    Raises:
        QBenchError: for an unknown kind.
    """
    kinds = {
        "baselines": _baselines,
        "tasks": _tasks,
        "corpora": _corpora,
        "runs": lambda: _runs(results),
        "checkpoints": lambda: _checkpoints(results),
        "published": _published,
    }
    if what not in kinds:
        raise unknown("kind", what, kinds)
    return kinds[what]()


def _aligned(entries: dict[str, str]) -> Iterator[str]:
    width = max(map(len, entries), default=0)
    for name, text in entries.items():
        yield f"{name:{width}}  {text}".rstrip()


def _baselines() -> Iterator[str]:
    """Names and the first line of each module: reading it needs no import of the method."""
    import ast

    from qbench.registry import baseline_entry_points

    found = {}
    for name, point in sorted(baseline_entry_points().items()):
        spec = importlib.util.find_spec(point.module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        text = ast.get_docstring(ast.parse(source)) or ""
        found[name] = text.partition("\n")[0]
    return _aligned(found)


def _tasks() -> Iterator[str]:
    from qbench.evaluation.tasks import known_tasks

    return _aligned(known_tasks())


def _corpora() -> Iterator[str]:
    from qbench.evaluation.corpora import known_corpora

    return _aligned(known_corpora())


def _published() -> Iterator[str]:
    """Each published table, where it stands, and how many numbers it has."""
    import csv
    from importlib.resources import files

    found = {}
    for path in (files("qbench_results") / "reference").iterdir():
        if path.name.endswith(".csv"):
            lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
            tables = list(dict.fromkeys(line["table"] for line in lines))
            where = ", ".join(tables) if len(tables) < 4 else f"{tables[0]} and others"
            errors = sum(line["printed_error"] != "" for line in lines)
            marked = f", {errors} marked as misprinted" if errors else ""
            text = f"{lines[0]['paper']}, {where}: {len(lines)} numbers{marked}"
            found[path.name.removesuffix(".csv").replace("_", "-")] = text
    return _aligned(dict(sorted(found.items())))


def _runs(results: Path) -> Iterator[str]:
    from qbench.study.store import Store

    runs = list(Store(results).runs())
    if not runs:
        raise QBenchError(f"no results under {results}; name another folder with --results")
    for run in runs:
        record = run.quantization
        tasks = ", ".join(sorted(task.key.task for task in run.tasks)) or "no tasks"
        yield (
            f"{record.checkpoint}  {record.key.scheme}  {record.key.baseline.name}  "
            f"{record.status}  {tasks}"
        )


def _checkpoints(results: Path) -> Iterator[str]:
    """Bundled ones with their size, and those of stored results with their fingerprints."""
    from qbench.models.checkpoints import find_checkpoint
    from qbench.models.files import BUNDLED, bundled_checkpoints
    from qbench.study.store import Store

    found = {}
    for name in bundled_checkpoints():
        checkpoint = find_checkpoint(f"{BUNDLED}{name}")
        own = checkpoint.own_scheme
        how = "trained" if own and own.trained else "quantized"
        kind = f"{how} at {own.scheme.label}" if own else "full precision"
        found[f"{BUNDLED}{name}"] = f"{checkpoint.parameters / 1e6:.2f} M parameters, {kind}"
    seen: dict[str, set[str]] = {}
    for run in Store(results).runs():
        fingerprint = run.quantization.key.weights[:12]
        seen.setdefault(run.quantization.checkpoint, set()).add(fingerprint)
    found |= {name: f"in {results}: {' '.join(sorted(seen[name]))}" for name in sorted(seen)}
    if not found:
        raise QBenchError(
            f"no results under {results}, so no checkpoint is known; "
            "any folder or Hub id can be given to qbench run"
        )
    return _aligned(found)
