"""What a run or sweep would do, before it does anything: ``--dry-run``.

Its cells, what of them is stored already, what cannot be and why, and what each takes: memory with
the model loaded and with ``--stream``, disk, and time on this machine. Only headers and
configurations are read, so a checkpoint of any size is planned in seconds; the one thing that would
take long, its fingerprint, is left out where the files are large, and with it the look into the
store. Without a tokenizer or data the plan says so and gives the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from qbench.baseline import Baseline
from qbench.errors import QBenchError
from qbench.evaluation.tasks import PreparedTask, TaskSpec
from qbench.models.streamed import why_not_streamed
from qbench.study.cells import Cell, CellPlan
from qbench.study.costs import Estimate, Work, estimate
from qbench.study.runner import Workbench
from qbench.study.shapes import ModelShape, model_shape
from qbench.study.speed import Speed, free_memory, measure

HASHED = 4 * 2**30
"""Checkpoints of more bytes than this are not fingerprinted for a plan."""
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def plan_lines(cells: Sequence[tuple[Workbench, Cell]]) -> Iterator[str]:
    """The plan as text: for every checkpoint its costs and a line per cell, then a summary.

    Raises:
        QBenchError: for a data folder that does not exist.
    """
    counts = {"to run": 0, "stored": 0, "failed before": 0, "not applicable": 0}
    measurements, seconds = 0, 0.0
    speed = None
    for bench, own in groupby(cells, key=lambda pair: pair[0]):
        outlook = Outlook(bench)
        plans = [outlook.plan(cell) for _, cell in own]
        costs = [None if plan.is_done else outlook.cost(plan) for plan in plans]
        yield from _checkpoint_lines(outlook, [cost for cost in costs if cost])
        for plan, cost in zip(plans, costs, strict=True):
            state, detail = _state(plan)
            counts[state] += 1
            measurements += len(plan.pending) if state == "to run" else 0
            seconds += cost.seconds if cost else 0.0
            yield f"  {state:15} {plan.cell}{detail}{_cost(cost, outlook.why_not_streamed)}"
            yield from (f"  {'':15}   {line}" for line in plan.left_out_lines())
        speed = outlook.speed if outlook.shape else speed
    parts = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    yield f"{len(cells)} cells: {parts}; {measurements} measurements to make{_time(seconds, speed)}"


class Outlook:
    """What can be known of one checkpoint and its cells without reading a weight."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.problems: dict[str, None] = {}
        """Why something is not known, each once and in order."""

    @cached_property
    def shape(self) -> ModelShape | None:
        """The model's shapes, None where its configuration cannot be understood."""
        try:
            return model_shape(self.bench.checkpoint)
        except QBenchError as error:
            self.problems[f"costs unknown: {error}"] = None
            return None

    @cached_property
    def size(self) -> int:
        """Bytes of the checkpoint's files."""
        return sum(path.stat().st_size for path in self.bench.checkpoint.weight_files)

    @cached_property
    def speed(self) -> Speed:
        """How fast this machine is at what this checkpoint needs."""
        settings = self.bench.settings
        width = self.shape.hidden if self.shape else 0
        files = self.bench.checkpoint.weight_files
        return measure(width, settings.dtype, settings.device, files)

    @property
    def why_not_streamed(self) -> str | None:
        """One sentence why ``--stream`` cannot be, judged by the files; None if it can."""
        return why_not_streamed(self.bench.checkpoint)

    @property
    def is_hashed(self) -> bool:
        """Whether the fingerprint is known or soon found."""
        return "fingerprint" in self.bench.checkpoint.__dict__ or self.size <= HASHED

    def plan(self, cell: Cell) -> CellPlan:
        """What is stored of a cell, or everything as to be done where that is not known."""
        bench = self.bench
        try:
            if self.is_hashed:
                return bench.plan(cell)
            reason = bench.why_not(cell)
        except QBenchError as error:
            self._forgive(error)
            reason = cell.not_applicable
        return CellPlan(
            cell,
            key=None,  # type: ignore[arg-type]
            not_applicable=reason,
            pending=list(dict.fromkeys(bench.settings.tasks)),
        )

    def cost(self, plan: CellPlan) -> Estimate | None:
        """What is left of a cell costs this; None if the model's shapes are not known."""
        if self.shape is None:
            return None
        return estimate(self.shape, self._work(plan), self.speed)

    def _work(self, plan: CellPlan) -> Work:
        settings, cell = self.bench.settings, plan.cell
        quantizes = not cell.changes_nothing
        reads = quantizes and passes(cell) > 0
        lengths = [n for spec in plan.pending for n in self._lengths(spec)]
        context = self.bench.context or settings.calibration.seqlen
        return Work(
            dtype=settings.dtype,
            stored_bytes=self.size,
            is_cast=self._is_cast,
            quantizes=quantizes,
            copies=not self.bench.one_cell or any(spec.is_agreement for spec in plan.pending),
            on_cpu=not settings.device.startswith("cuda"),
            nsamples=settings.calibration.nsamples if reads else 0,
            seqlen=min(settings.calibration.seqlen, context) if reads else 0,
            hessians=reads and uses_hessians(cell),
            passes=passes(cell) if reads else 0,
            evaluated=sum(lengths),
            longest=max(lengths, default=0),
            batch_tokens=settings.options.batch_tokens or 0,
        )

    @property
    def _is_cast(self) -> bool:
        """Whether most bytes of the files are of another dtype than the run."""
        tensors = self.bench.checkpoint.tensors.values()
        kinds = [tensor.dtype for tensor in tensors if len(tensor.shape) > 1]
        return kinds.count(_STORED[self.bench.settings.dtype]) * 2 <= len(kinds)

    def _lengths(self, spec: TaskSpec) -> list[int]:
        """Tokens of every row of a task, none where it cannot be prepared."""
        try:
            return list(_row_lengths(self.bench.prepared(spec)))
        except QBenchError as error:
            self._forgive(error)
            return []

    def _forgive(self, error: QBenchError) -> None:
        """Remember what is missing, unless it is a slip on the command line."""
        folder = self.bench.settings.options.data_dir
        if folder is not None and not folder.is_dir():
            raise error
        self.problems[f"not looked up: {error}"] = None


def _row_lengths(task: PreparedTask) -> Iterable[int]:
    """Tokens of the rows of a perplexity, or of a task with options."""
    found: Any = task
    if hasattr(found, "parts"):
        return (len(window.row.tokens) for part in found.parts for window in part.windows)
    return (len(row.tokens) for rows in getattr(found, "rows", []) for row in rows)


def passes(cell: Cell) -> int:
    """How often calibration windows run through a block: to be observed, and to be handed on."""
    from qbench.quantization.quantize import needs_calibration

    method, scheme = cell.baseline.instance, cell.scheme
    if not needs_calibration(method, scheme):
        return 0
    transforms = type(method).transform is not Baseline.transform
    observed = scheme.needs_static_scales or (scheme.quantizes_weights and method.weight_statistics)
    return 1 + transforms + bool(observed)


def uses_hessians(cell: Cell) -> bool:
    """Whether a cell collects the hessians of its inputs."""
    method = cell.baseline.instance
    wanted: tuple[Any, ...] = method.transform_statistics
    if cell.scheme.quantizes_weights:
        wanted += method.weight_statistics
    return any(getattr(statistic, "name", statistic) == "hessian" for statistic in wanted)


def _state(plan: CellPlan) -> tuple[str, str]:
    if plan.not_applicable:
        return "not applicable", f": {plan.not_applicable}"
    if plan.failed is not None:
        return "failed before", f": {plan.failed} (repeat with --retry-failed)"
    if plan.is_done:
        return "stored", ""
    return "to run", f": {', '.join(str(spec) for spec in plan.pending) or 'quantization'}"


def _checkpoint_lines(outlook: Outlook, costs: Sequence[Estimate]) -> Iterator[str]:
    checkpoint, shape = outlook.bench.checkpoint, outlook.shape
    size = f"{scaled(outlook.size, 'GB', 'MB')} on disk"
    count = f"{scaled(shape.parameters, 'B', 'M')} parameters, " if shape else ""
    mark = f", fingerprint {checkpoint.fingerprint[:12]}" if outlook.is_hashed else ""
    yield f"{checkpoint.name}: {count}{size}{mark}"
    yield from (f"    {line}" for line in checkpoint.load_report)
    if costs:
        yield f"  {_advice(outlook, costs)}"
    if not outlook.is_hashed:
        hashing = outlook.size / min(outlook.speed.hashed, outlook.speed.read)
        yield (
            "  no fingerprint was taken, so what is stored was not looked up; it takes a run about "
            f"{duration(hashing)}"
        )
    yield from (f"  {problem}" for problem in outlook.problems)


def _advice(outlook: Outlook, costs: Sequence[Estimate]) -> str:
    memory = max(cost.memory for cost in costs)
    streamed = max(cost.streamed_memory for cost in costs)
    parts = [f"memory about {gib(memory)}"]
    if reason := outlook.why_not_streamed:
        parts.append(f"no --stream: {reason}")
    else:
        files = max(cost.work_files for cost in costs)
        parts.append(
            f"with --stream about {gib(streamed)} and {gib(files)} of work files"
            if files
            else f"with --stream about {gib(streamed)}"
        )
        free = free_memory(outlook.bench.settings.device)
        if free is not None and memory > free:
            parts.append(
                f"{gib(free)} are free here, so "
                + ("it needs --stream" if streamed < free else "neither fits")
            )
    parts.append(f"--save writes about {gib(max(cost.disk for cost in costs))} per cell")
    return "; ".join(parts)


def _cost(cost: Estimate | None, why_not_streamed: str | None) -> str:
    if cost is None:
        return ""
    streamed = "" if why_not_streamed else f", streamed {gib(cost.streamed_memory)}"
    return f" · {gib(cost.memory)}{streamed}, about {duration(cost.seconds)}"


def _time(seconds: float, speed: Speed | None) -> str:
    if speed is None or not seconds:
        return ""
    return (
        f"; about {duration(seconds)} on this machine (products at {speed.products / 1e9:.0f} "
        f"GFLOP/s, {speed.threads} thread{'s' if speed.threads > 1 else ''})"
    )


def gib(count: float) -> str:
    """Bytes as people read them: 497 KiB, 9.8 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def scaled(count: float, billions: str, millions: str) -> str:
    """A count with its decimal unit: 0.127 M, 70.6 B."""
    if count >= 1e9:
        return f"{count / 1e9:.3g} {billions}"
    return f"{count / 1e6:.3g} {millions}"


def duration(seconds: float) -> str:
    """Seconds as people read them: 4 s, 12 min, 31 h, 5 days."""
    for unit, size, above in (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= above:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
