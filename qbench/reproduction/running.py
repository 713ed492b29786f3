"""Running a preset: the full-precision row, the gate, then everything else.

Cells run through the ordinary runner into the ordinary store, so a reproduction goes on where it
was stopped, and shares what sweeps have measured. Before anything is quantized the full-precision
row is held against the published one (the gate): where it is off, every other number would be too.

Left out: what a number's verdict is (:mod:`qbench.reproduction.verdicts`), and weights that were
never released (:mod:`qbench.reproduction.unreleased`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from qbench.errors import QBenchError, RunFailed, unknown
from qbench.evaluation.tasks import EvaluationOptions, PreparedTask
from qbench.models.checkpoints import Checkpoint, find_checkpoint
from qbench.models.checks import check_device, check_dtype
from qbench.progress import Reporter
from qbench.registry import load_baseline
from qbench.reproduction.collecting import Collector, judge_gate, reads_data, tasks_of
from qbench.reproduction.outcome import Gate, Outcome, OutcomeRow, joined, save
from qbench.reproduction.presets import Measure, Preset, Row
from qbench.scheme import Scheme
from qbench.study.cells import Cell, Draw, Settings
from qbench.study.commands import describe
from qbench.study.environment import environment
from qbench.study.runner import PreparedKey, Workbench
from qbench.study.store import Store


@dataclass(frozen=True)
class Request:
    """What was asked for beside the preset."""

    results: Path
    checkpoint: str | None = None
    """Local weights in place of the Hub's."""
    rows: tuple[str, ...] = ()
    """Patterns of row names; all of them where none is given."""
    tasks: tuple[str, ...] = ()
    """Patterns of tasks; all that have data where none is given."""
    limit: int | None = None
    data: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    """None: the paper's on an accelerator, float32 on the CPU."""
    seeds: int | None = None
    """How often rows that draw at random are run; None: as the preset says."""
    ignore_gate: bool = False
    allow_pickle: bool = False
    retry_failed: bool = False
    stream: bool | None = None


@dataclass
class Reproduction:
    """A preset on a checkpoint that was found."""

    preset: Preset
    request: Request
    checkpoint: Checkpoint
    missing: dict[str, str] = field(default_factory=dict)
    """Tasks that cannot be prepared here, and why."""

    @classmethod
    def of(cls, preset: Preset, request: Request, cached: str | None = None) -> Reproduction:
        """Find the weights and check that the preset is about such a model.

        Args:
            preset: what to reproduce.
            request: how.
            cached: the folder of the Hub's weights, where it is known; the Hub is then not asked.

        Raises:
            QBenchError: for weights that are not there or of another kind, and for names of rows
                and tasks that the preset does not have.
        """
        check_device(request.device)
        name = request.checkpoint or preset.target.hub
        if name is None:
            raise QBenchError(f"{preset.name}: its weights were never released; give --checkpoint")
        found = find_checkpoint(cached or name, allow_pickle=request.allow_pickle)
        own = cls(preset, request, replace(found, name=name) if cached else found)
        check_dtype(own.dtype)
        own._check_kind()
        _ = own.rows, own.measures
        return own

    @property
    def dtype(self) -> str:
        """What is computed in."""
        if self.request.dtype is not None:
            return self.request.dtype
        return "float32" if self.request.device == "cpu" else self.preset.family.dtype

    @cached_property
    def rows(self) -> list[Row]:
        """The rows asked for; the full-precision row always."""
        wanted, rows = self.request.rows, self.preset.rows
        for pattern in wanted:
            if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
                raise unknown(f"row of {self.preset.name}", pattern, [row.name for row in rows])
        return [
            row
            for row in rows
            if row.is_full_precision
            or not wanted
            or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in wanted)
        ]

    @cached_property
    def measures(self) -> list[Measure]:
        """The columns asked for."""
        wanted, measures = self.request.tasks, self.preset.measures
        for pattern in wanted:
            if not any(fnmatch.fnmatchcase(m.task, pattern) for m in measures):
                raise unknown(f"task of {self.preset.name}", pattern, [m.task for m in measures])
        return [
            measure
            for measure in measures
            if not wanted or any(fnmatch.fnmatchcase(measure.task, p) for p in wanted)
        ]

    @cached_property
    def bench(self) -> Workbench:
        """Where the cells run, with every task that has data.

        Raises:
            QBenchError: if none has, or one that was asked for by name has not.
        """
        family, request = self.preset.family, self.request
        settings = Settings(
            tasks=(),
            options=EvaluationOptions(request.data, self._max_length(), family.encoding),
            calibration=self.preset.calibration(),
            seed=family.seed,
            dtype=self.dtype,
            device=request.device,
            retry_failed=request.retry_failed,
            stream=request.stream,
        )
        prepared: dict[PreparedKey, PreparedTask] = {}
        store = Store(request.results)
        trial = Workbench(self.checkpoint, settings, store, prepared)
        specs = {}
        for measure in self.measures:
            for task in tasks_of(measure):
                one = measure.model_copy(update={"task": task})
                try:
                    trial.prepared(one.spec(request.limit))
                except QBenchError as error:
                    if request.tasks:
                        raise
                    self.missing[task] = str(error)
                else:
                    specs[task] = one.spec(request.limit)
        if not specs:
            raise QBenchError(next(iter(self.missing.values())))
        settings = replace(settings, tasks=tuple(specs.values()))
        return Workbench(self.checkpoint, settings, store, prepared)

    @cached_property
    def cells(self) -> list[tuple[Row, list[Cell]]]:
        """Every row with its cells: one, or one per seed where it draws at random."""
        return [(row, list(self._cells(row))) for row in self.rows]

    def departures(self) -> list[str]:
        """What is not as in the paper, a sentence each."""
        family, facts = self.preset.family, self.preset.facts
        found = []
        hub = self.preset.target.hub
        if self.checkpoint.name != hub:
            found.append(f"weights of {self.checkpoint.name} in place of {hub}")
        size = self.checkpoint.parameters / 1e6
        if facts is not None and not self.preset.has_size(self.checkpoint.parameters):
            found.append(f"{size:.4g} M parameters where {hub} has {facts.parameters:.4g} M")
        if self.dtype != family.dtype:
            found.append(f"computed in {self.dtype}, the paper in {family.dtype}")
        context, seqlen = self.bench.context, family.calibration.seqlen
        if context and context < seqlen and any(map(reads_data, self.preset.rows)):
            found.append(f"calibration windows of {context} tokens, the paper's have {seqlen}")
        return found

    def run(self, reporter: Reporter) -> Outcome:
        """Measure what is missing and store the outcome.

        Raises:
            RunFailed: if the full-precision row is off, before anything is quantized.
        """
        bench = self.bench
        bench.store.check_writable()
        reporter.line(f"{self.preset.name} · {self.preset.family.paper} · {self.checkpoint.name}")
        for task, reason in self.missing.items():
            reporter.line(f"    without {task}: {reason}")
        for _, cells in self.cells:  # a mistake shows before anything is measured
            for cell in cells:
                bench.plan(cell)
        departures = self.departures()
        collector = Collector(self.preset, bench, self.request.limit, self.missing)
        base = [pair for pair in self.cells if pair[0].is_full_precision]
        done = [self._measured(collector, row, cells, None, reporter) for row, cells in base]
        gate = judge_gate(
            done[0] if done else None,
            self.preset,
            self.checkpoint.name,
            self.request.limit,
            departures,
        )
        if gate.state == "failed" and not self.request.ignore_gate:
            bench.release()
            self._store(self.outcome(gate, done, departures))
            raise RunFailed(f"{gate.sentence}; nothing was quantized")
        reporter.line(f"    gate {gate.state}: {gate.sentence}")
        for row, cells in self.cells:
            if not row.is_full_precision:
                done.append(self._measured(collector, row, cells, gate, reporter))
        bench.release()
        outcome = self.outcome(gate, done, departures)
        self._store(outcome)
        return outcome

    def _store(self, outcome: Outcome) -> None:
        """Write the outcome, with what an earlier run under the same conditions had beside it."""
        order = [row.name for row in self.preset.rows]
        titles = [measure.title for measure in self.preset.measures]
        save(joined(outcome, self.request.results, order, titles), self.request.results)

    def outcome(self, gate: Gate, rows: Sequence[OutcomeRow], departures: list[str]) -> Outcome:
        """What is stored and printed."""
        family = self.preset.family
        return Outcome(
            preset=self.preset.name,
            paper=family.paper,
            about=family.about,
            weights=family.weights,
            hub=self.preset.target.hub,
            checkpoint=self.checkpoint.name,
            limit=self.request.limit,
            departures=departures,
            gate=gate,
            rows=list(rows),
            ambiguous=list(family.ambiguous),
            not_expressed=list(family.not_expressed),
            environment=environment(self.request.device),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _max_length(self) -> int | None:
        """The paper's context, or that of a model which has less."""
        from qbench.evaluation.evaluate import context_length

        lengths = (self.preset.family.max_length, context_length(self.checkpoint.load_config()))
        return min((length for length in lengths if length is not None), default=None)

    def _measured(
        self,
        collector: Collector,
        row: Row,
        cells: Sequence[Cell],
        gate: Gate | None,
        reporter: Reporter,
    ) -> OutcomeRow:
        for cell in cells:
            plan = self.bench.plan(cell)
            seed = "" if cell.draw is None else f" · seed {cell.draw.seed}"
            reporter.line(f"{row.name}{seed}: {cell}" + (": stored" if plan.is_done else ""))
            for record in self.bench.run(cell, reporter):
                reporter.line(f"    {describe(record)}")
        return collector.row(row, cells, self.measures, gate)

    def _cells(self, row: Row) -> Iterator[Cell]:
        baseline = load_baseline(row.baseline, row.fields)
        cell = self.bench.cell(Cell.of(baseline, Scheme.parse(row.scheme)))
        seeds = self.request.seeds or self.preset.family.seeds
        if seeds == 1 or not self._is_random(row):
            yield cell
            return
        first = self.preset.family.seed
        for seed in range(first, first + seeds):
            yield replace(cell, draw=Draw(None, seed))

    def _is_random(self, row: Row) -> bool:
        return not row.is_full_precision and load_baseline(row.baseline).instance.is_random

    def _check_kind(self) -> None:
        facts, name = self.preset.facts, self.checkpoint.name
        found = self.checkpoint.config.get("model_type")
        if facts is not None and found != facts.model_type:
            raise QBenchError(
                f"{name} is of the kind {found}, {self.preset.name} is about {facts.model_type}; "
                f"give {self.preset.target.hub} or a copy of it"
            )
        own = self.checkpoint.own_scheme
        if self.preset.is_trained != (own is not None):
            expected = "a BitNet checkpoint" if self.preset.is_trained else "full-precision weights"
            raise QBenchError(
                f"{self.preset.name} is about {expected}, {name} is "
                + ("full precision" if own is None else f"stored at {own.scheme.label}")
            )
