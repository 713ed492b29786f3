"""What ``qbench run``, ``sweep``, ``check`` and ``doctor`` do; each returns the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import QBenchError, RunFailed
from qbench.evaluation.tasks import PreparedTask
from qbench.models.checkpoints import find_checkpoint
from qbench.models.checks import check_device, check_dtype
from qbench.models.files import data_folder
from qbench.models.gptq_format import damage
from qbench.progress import Reporter
from qbench.record import QuantizationRecord, TaskRecord
from qbench.registry import load_baseline
from qbench.scheme import Scheme
from qbench.study.cells import Cell, CellPlan, Settings
from qbench.study.runner import PreparedKey, Workbench
from qbench.study.store import Store
from qbench.study.supply import Streamed
from qbench.study.sweep import Sweep


@dataclass(frozen=True)
class Run:
    """What ``qbench run`` was asked for, besides settings."""

    checkpoint: str
    baseline: str
    fields: tuple[str, ...]
    scheme: str
    save: Path | None = None
    allow_pickle: bool = False
    latent: bool = False
    dry_run: bool = False


def run(chosen: Run, settings: Settings, results: Path) -> int:
    """Quantize and measure one cell; print what came out."""
    _hide_library_bars()
    asked = Cell.of(
        load_baseline(chosen.baseline, parse_fields(chosen.fields)), Scheme.parse(chosen.scheme)
    )
    if chosen.save is not None:
        from qbench.models.saving import check_target

        check_target(chosen.save)
    elif not settings.tasks:
        raise QBenchError("--tasks names no task, and there is no --save: nothing is to be done")
    check_dtype(settings.dtype)
    check_device(settings.device)
    checkpoint = find_checkpoint(
        chosen.checkpoint, allow_pickle=chosen.allow_pickle, latent=chosen.latent
    )
    store = Store(results)
    if not chosen.dry_run:
        store.check_writable()
    bench = Workbench(checkpoint, settings, store, one_cell=True)
    cell = bench.cell(asked)
    if reason := bench.why_not(cell):
        raise QBenchError(f"{cell.baseline.spec.name} cannot do {cell.scheme}: {reason}")
    if chosen.save is not None and checkpoint.why_not_saved:
        raise QBenchError(f"--save: {checkpoint.why_not_saved}; run it without --save")
    if chosen.dry_run:
        return _print_plan([(bench, cell)])
    reporter = Reporter()
    reporter.line(f"{checkpoint.name} · {cell}")
    _report_loading(bench, reporter)
    plan = bench.plan(cell)
    for line in plan.left_out_lines():
        reporter.line(line)
    for spec in plan.stored:
        stored = store.find_task(checkpoint.name, plan.key, bench.task_key(plan.key, spec))
        if stored is not None:
            _print_outcome(stored, "  (stored)")
    if plan.failed:
        raise RunFailed(f"this failed before: {plan.failed}; repeat it with --retry-failed")
    failures = plan.failed_tasks
    for record in bench.run(cell, reporter, save=chosen.save):
        failures += record.status == "failed"
        _print_outcome(record)
    bench.release()
    if plan.failed_tasks:
        reporter.line("a stored failure is repeated with --retry-failed")
    if chosen.save is not None:
        reporter.line(f"saved to {chosen.save}")
        if cell.scheme.quantizes_activations and not cell.own:
            reporter.line("note: a checkpoint holds weights; activation quantizers are not in it")
    return 1 if failures else 0


def _print_plan(cells: Sequence[tuple[Workbench, Cell]]) -> int:
    from qbench.study.planning import plan_lines

    print("\n".join(plan_lines(cells)))
    return 0


def _report_loading(bench: Workbench, reporter: Reporter) -> None:
    for line in bench.checkpoint.load_report:
        reporter.line(f"    {line}")
    if bench.settings.stream is None and isinstance(bench.supply, Streamed):
        reporter.line(
            "    two copies of its weights do not fit into memory: its blocks are streamed from "
            "disk (--no-stream, stream: false in a sweep, loads it whole)"
        )


def _print_outcome(record: QuantizationRecord | TaskRecord, suffix: str = "") -> None:
    failed = record.status == "failed"
    print(f"{describe(record)}{suffix}", file=sys.stderr if failed else sys.stdout)


def sweep(
    file: Path,
    data: Path | None,
    results: Path | None,
    dry_run: bool,
    retry_failed: bool,
    allow_pickle: bool,
) -> int:
    """Run, or only plan, every cell of a sweep file."""
    asked = Sweep.read(file)
    asked = asked.model_copy(
        update={k: v for k, v in (("data", data), ("results", results)) if v is not None}
    )
    return run_sweep(asked, Reporter(), dry_run, retry_failed, allow_pickle)


def run_sweep(
    asked: Sweep,
    reporter: Reporter,
    dry_run: bool = False,
    retry_failed: bool = False,
    allow_pickle: bool = False,
) -> int:
    """Plan every cell first, so that a mistake shows at once; then run what is left."""
    _hide_library_bars()
    settings, cells = asked.settings(retry_failed), asked.cells()
    check_dtype(settings.dtype)
    check_device(settings.device)
    store = Store(asked.results)
    if not dry_run:
        store.check_writable()
    prepared: dict[PreparedKey, PreparedTask] = {}
    benches = [
        Workbench(
            find_checkpoint(entry.path, allow_pickle=allow_pickle, latent=entry.latent),
            settings,
            store,
            prepared,
        )
        for entry in asked.checkpoint_entries()
    ]
    draws = f", {len(settings.draws)} draws of what chance decides" if settings.draws else ""
    reporter.line(
        f"{len(benches)} checkpoints, {len(cells)} cells{draws} · looking up what is stored"
    )
    for bench in benches:
        if bench.checkpoint.why_not_quantized:
            how = "was trained" if bench.checkpoint.trained_scheme else "is stored"
            reporter.line(f"only as it {how}: {bench.checkpoint.why_not_quantized}")
    pairs = [(bench, cell) for bench in benches for cell in bench.cells(cells)]
    if dry_run:
        return _print_plan(pairs)
    plans = [(bench, bench.plan(cell)) for bench, cell in pairs]
    failures = _run_plans(plans, reporter)
    reporter.line(
        f"results in {asked.results}"
        + (f"; {failures} failed, repeat them with --retry-failed" if failures else "")
    )
    return 1 if failures else 0


def _run_plans(plans: Sequence[tuple[Workbench, CellPlan]], reporter: Reporter) -> int:
    """Run every cell that is not done, one checkpoint in memory at a time; how many failed."""
    failures = 0
    running: Workbench | None = None
    for number, (bench, plan) in enumerate(plans, 1):
        if bench is not running:
            if running is not None:
                running.release()
            running = bench
            if any(not other.is_done for owner, other in plans if owner is bench):
                _report_loading(bench, reporter)
        failures += plan.failed_tasks
        head = f"[{number}/{len(plans)}] {bench.checkpoint.name} · {plan.cell}"
        if plan.is_done and not plan.not_applicable:
            failed = plan.failed or (f"{plan.failed_tasks} tasks" if plan.failed_tasks else "")
            reporter.line(f"{head}: stored" + (f", failed: {failed}" if failed else ""))
            failures += plan.failed is not None
            bench.clear(plan)
            continue
        reporter.line(head)
        for line in plan.left_out_lines():
            reporter.line(f"    {line}")
        try:
            for record in bench.run(plan.cell, reporter):
                failures += record.status == "failed"
                reporter.line(f"    {describe(record)}")
        except RunFailed:  # results cannot be written: going on would measure for nothing
            raise
        except QBenchError as error:  # this cell cannot be; the others can
            failures += 1
            reporter.line(f"    failed: {error}")
    if running is not None:
        running.release()
    return failures


def _hide_library_bars() -> None:
    """One bar at a time: qbench's own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def describe(record: QuantizationRecord | TaskRecord) -> str:
    """One line about a record."""
    seconds = f", {record.wall_seconds:.1f} s" if record.wall_seconds is not None else ""
    if isinstance(record, QuantizationRecord):
        if record.status == "not_applicable":
            return f"not applicable: {record.error}"
        if record.status == "failed":
            return f"quantization failed: {record.error}"
        if not record.layers:
            return f"weights left at 16 bits{seconds}"
        fallback = f", {record.fallbacks} layers rounded to nearest" if record.fallbacks else ""
        bits = f"{record.effective_bits:.2f} bits per weight" if record.effective_bits else ""
        if record.trained or record.quantized_elsewhere:
            how = "as trained" if record.trained else "as stored"
            kept = sum(Scheme.parse(layer.scheme).is_identity for layer in record.layers)
            left = f", {kept} kept at 16 bits" if kept else ""
            line = f"{len(record.layers) - kept} matrices {how}{left}, {bits}{seconds}"
            return "\n    ".join([line, *damage(record.layers)])
        return f"quantized {len(record.layers)} matrices, {bits}{fallback}{seconds}"
    key = record.key
    shots = f", {key.num_fewshot}-shot" if key.num_fewshot else ""
    head = f"{key.task} [{key.protocol}{shots}]"
    if record.status == "failed":
        return f"{head} failed: {record.error}"
    numbers = "  ".join(
        f"{name} {metric.as_float():.4f}" + (f" ± {metric.stderr:.4f}" if metric.stderr else "")
        for name, metric in record.metrics.items()
    )
    return f"{head}  {numbers}  (n={record.n_items}{seconds})"


def parse_fields(pairs: Sequence[str]) -> dict[str, str]:
    """``["alpha=0.7"]`` as a mapping.

    Raises:
        QBenchError: for an entry that is not name=value.
    """
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise QBenchError(f"--set {pair!r} is not field=value, as in --set percdamp=0.01")
        fields[name.strip()] = value.strip()
    return fields


def check(baseline: str, fields: Iterable[str]) -> int:
    """Run the conformance suite over one baseline and print a line per check."""
    from qbench.testing import check_baseline

    loaded = load_baseline(baseline, parse_fields(tuple(fields)))
    outcomes = check_baseline(loaded.instance)
    for outcome in outcomes:
        print(outcome)
    failed = sum(outcome.problem is not None for outcome in outcomes)
    verdict = f"{failed} of {len(outcomes)} checks failed" if failed else "all checks passed"
    print(f"{loaded.spec.name}: {verdict}")
    return 1 if failed else 0


def doctor(data: Path | None, results: Path, ask_hub: bool = False) -> int:
    """Print what was found; 1 if something a run needs is missing."""
    from qbench.study.doctor import examine
    from qbench.study.findings import report

    findings = examine(data_folder(data), results, ask_hub)
    print("\n".join(report(findings)))
    return 1 if any(finding.is_problem for finding in findings) else 0
