"""From stored records to the rows of an outcome: what came out, beside what was published.

Reads the store alone, so an outcome is made again from its records whenever it is wanted. Left out:
measuring anything (:mod:`qbench.reproduction.running`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from qbench.comparison.pairing import Measurement, pair
from qbench.errors import QBenchError
from qbench.record import Metric, QuantizationRecord, TaskRecord
from qbench.registry import load_baseline
from qbench.reproduction import published as published_numbers
from qbench.reproduction.outcome import Gate, Number, OutcomeRow
from qbench.reproduction.presets import ITEMS, Measure, Preset, Row
from qbench.reproduction.published import UNUSABLE, Published
from qbench.reproduction.verdicts import (
    DIFFERS,
    GATE_ERRORS,
    WITHIN,
    Reproduced,
    noise,
    paired_error,
    too_wide,
    verdict,
)
from qbench.scheme import Scheme
from qbench.study.cells import Cell
from qbench.study.runner import Workbench
from qbench.study.store import Run


@dataclass(frozen=True)
class Stored:
    """One cell of a row: its record and the measurements on it."""

    quantization: QuantizationRecord | None
    tasks: dict[str, TaskRecord]
    """By the name the preset asks for them."""
    run: Run | None
    folder: str = ""
    """Relative to the results."""


@dataclass
class Collector:
    """Reads the rows of one preset on one checkpoint."""

    preset: Preset
    bench: Workbench
    limit: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be prepared, and why."""
    full_precision: Stored | None = None
    """What quantized rows are paired with."""
    _bases: dict[str, Measurement] = field(default_factory=dict)
    """Its items, by task."""

    def row(
        self, row: Row, cells: Sequence[Cell], measures: Sequence[Measure], gate: Gate | None
    ) -> OutcomeRow:
        """A row with every number that was published in it.

        Args:
            row: of the preset.
            cells: of the row, one per seed.
            measures: the columns that were asked for.
            gate: None while the gate is still to be decided.
        """
        stored = [self.stored(cell) for cell in cells]
        if row.is_full_precision and self.full_precision is None:
            self.full_precision = stored[0]
        wanted = [m.title for m in measures]
        return OutcomeRow(
            name=row.name,
            baseline=row.baseline,
            parameters=dict(row.fields),
            scheme=str(cells[0].scheme),
            numbers=[
                self._number(row, measure, published, stored, gate)
                for measure, published in published_numbers.numbers(self.preset, row)
                if measure.title in wanted
            ],
        )

    def stored(self, cell: Cell) -> Stored:
        """What the store has of a cell."""
        bench = self.bench
        key, name = bench.key(cell), bench.checkpoint.name
        record = bench.store.find_quantization(name, key)
        if record is None:
            return Stored(None, {}, None)
        tasks = {}
        for spec in bench.settings.tasks:
            found = bench.store.find_task(name, key, bench.task_key(key, spec))
            if found is not None:
                tasks[spec.name] = found
        folder = bench.store.folder(name, key)
        run = Run(folder, record, list(tasks.values()))
        return Stored(record, tasks, run, folder.relative_to(bench.store.root).as_posix())

    def _number(
        self,
        row: Row,
        measure: Measure,
        printed: Published,
        stored: Sequence[Stored],
        gate: Gate | None,
    ) -> Number:
        number = Number(
            title=measure.title,
            task=measure.task,
            metric=measure.metric,
            unit="perplexity" if measure.is_perplexity else "percent",
            published=printed.value,
            printed=printed.printed,
            source=printed.source,
            printed_error=printed.error,
            verdict="",
            records=[s.folder for s in stored if s.folder],
        )
        if reason := self._why_not_measured(measure, stored):
            return number.model_copy(update={"verdict": reason})
        found = self._reproduced(measure, stored, paired=reads_data(row))
        centre = found.centre(measure)
        allowed = noise(printed, measure, found, self.preset.family.tolerance)
        number.measured_as = stored[0].tasks[tasks_of(measure)[0]].key.protocol
        number.reproduced = Metric.of(centre, found.stderr)
        number.seeds = [Metric.of(v) for v in found.values] if len(found.values) > 1 else []
        gap = centre - printed.value
        number.difference = gap if math.isfinite(gap) else None
        number.noise = allowed
        none = self._why_no_verdict(row, measure, stored, gate) or _says_nothing(
            printed, measure, gap, allowed
        )
        number.verdict = f"no verdict: {none}" if none else verdict(gap, allowed)
        if self.limit is not None:
            number.verdict = f"partial: first {self.limit}"
        if number.verdict == DIFFERS:
            number.reasons = self._reasons(row, found)
        elif number.verdict == WITHIN and not row.is_full_precision:
            number.caveat = self._caveat(measure, printed, allowed)
        return number

    def _caveat(self, measure: Measure, printed: Published, allowed: float) -> str:
        """Said where the noise is no smaller than what quantization changes."""
        base = self.full_precision
        if base is None or self._why_not_measured(measure, [base]):
            return ""
        full = self._reproduced(measure, [base], paired=False).centre(measure)
        if verdict(full - printed.value, allowed) == DIFFERS:
            return ""
        return f"full precision itself, {full:.5g}, is within this noise of the published number"

    def _why_not_measured(self, measure: Measure, stored: Sequence[Stored]) -> str:
        for one in stored:
            record = one.quantization
            if record is not None and record.status == "not_applicable":
                return f"not applicable: {record.error}"
            if record is not None and record.status == "failed":
                return f"failed: {record.error}"
            for task in tasks_of(measure):
                if task in self.missing:
                    return f"not measured: {self.missing[task]}"
                measured = one.tasks.get(task)
                if measured is None:
                    return "not measured"
                if measured.status == "failed":
                    return f"failed: {measured.error}"
                if measure.metric not in measured.metrics:
                    return f"not measured: {task} has no {measure.metric}"
        return ""

    def _why_no_verdict(
        self, row: Row, measure: Measure, stored: Sequence[Stored], gate: Gate | None
    ) -> str:
        if self.preset.family.weights != "released":
            return "published on other weights"
        if not self.preset.has_size(self.bench.checkpoint.parameters):
            return f"other weights than {self.preset.target.hub}, which has another size"
        for one in stored:
            for task in tasks_of(measure):
                items = one.tasks[task].n_items
                if self.limit is None and items != ITEMS.get(task, items):
                    return f"{task} over {items} questions, published over {ITEMS[task]}"
                protocol = one.tasks[task].key.protocol
                if measure.protocol not in (None, protocol):
                    return f"measured as {protocol}, published as {measure.protocol}"
        if gate is not None and gate.state == "failed" and not row.is_full_precision:
            return "the full-precision row is off"
        return ""

    def _reproduced(self, measure: Measure, stored: Sequence[Stored], paired: bool) -> Reproduced:
        unit = 1 if measure.is_perplexity else 100
        tasks = tasks_of(measure)
        values = []
        for one in stored:
            found = [one.tasks[task].metrics[measure.metric] for task in tasks]
            values.append(unit * sum(m.as_float() for m in found) / len(found))
        errors = [stored[0].tasks[task].metrics[measure.metric].stderr for task in tasks]
        gaps = [self._paired(measure, stored[0], task) for task in tasks] if paired else [None]
        stderr = _of_mean(errors)
        return Reproduced(tuple(values), None if stderr is None else unit * stderr, _of_mean(gaps))

    def _paired(self, measure: Measure, one: Stored, task: str) -> float | None:
        base = self.full_precision
        if base is None or base.run is None or one.run is None or task not in base.tasks:
            return None
        store = self.bench.store
        try:
            if task not in self._bases:
                self._bases[task] = Measurement.read(store, base.run, base.tasks[task])
            before = self._bases[task]
            after = Measurement.read(store, one.run, one.tasks[task])
            value = one.tasks[task].metrics[measure.metric].as_float()
            return paired_error(pair(before, after), measure, value)
        except QBenchError:  # other items, or none that are stored
            return None

    def _reasons(self, row: Row, found: Reproduced) -> list[str]:
        diverged = [] if all(map(math.isfinite, found.values)) else ["it diverged here"]
        return [*diverged, *self.preset.reasons(row)]


def reads_data(row: Row) -> bool:
    """Whether calibration data changes a row."""
    from qbench.quantization.quantize import needs_calibration

    if row.is_full_precision:
        return False
    instance = load_baseline(row.baseline, row.fields).instance
    return needs_calibration(instance, Scheme.parse(row.scheme))


def _says_nothing(printed: Published, measure: Measure, gap: float, allowed: float) -> str:
    """Why a verdict on a number would say nothing; "" where it would."""
    if UNUSABLE in printed.error:
        return f"in the paper it is {printed.error.partition(':')[0]}"
    if too_wide(printed, measure, allowed) and abs(gap) <= allowed:
        return f"its noise of ±{allowed:.2g} is too wide to tell; measure more seeds (--seeds)"
    return ""


def tasks_of(measure: Measure) -> tuple[str, ...]:
    """The tasks a column is made of."""
    return measure.of or (measure.task,)


def judge_gate(
    row: OutcomeRow | None,
    preset: Preset,
    checkpoint: str,
    limit: int | None,
    departures: list[str],
) -> Gate:
    """Whether the full-precision row came out as published.

    Args:
        row: the full-precision row; None where the table has none.
        preset: whose tolerance holds.
        checkpoint: what was measured.
        limit: how many items, where not all; the gate is then wider by three standard errors.
        departures: what is not as in the paper.
    """
    if preset.family.weights != "released":
        return Gate(state="none", sentence="no gate: the numbers were published on other weights")
    if preset.is_trained or row is None:
        return Gate(state="none", sentence="no gate: the checkpoint as it was trained is the row")
    measured = [n for n in row.numbers if n.reproduced is not None]
    if not measured:
        why = "; ".join(sorted({n.verdict for n in row.numbers})) or "no column was asked for"
        return Gate(state="failed", sentence=f"{row.name} was not measured: {why}")
    passed = []
    for number in measured:
        found = number.reproduced
        assert found is not None
        allowed = number.noise or 0.0
        if limit is not None:
            allowed += GATE_ERRORS * (found.stderr or 0.0)
        text = (
            f"{number.title} of {checkpoint} at full precision is {found.as_float():.6g}, "
            f"published {number.printed}, tolerance {allowed:.2g}"
        )
        if number.difference is None or abs(number.difference) > allowed:
            likely = _likely(number, limit, departures)
            return Gate(state="failed", sentence=f"{text}; likely: {likely}")
        passed.append(text)
    return Gate(state="passed", sentence="; ".join(passed))


def _likely(number: Number, limit: int | None, departures: list[str]) -> str:
    """Why a full-precision row may be off, the surest first."""
    found = [*departures]
    if number.unit == "perplexity" and number.measured_as not in number.title:
        found.append(f"measured as {number.measured_as}")
    if limit is not None:
        found.append(f"only the first {limit} items were measured")
    generic = (
        "another tokenizer (a BOS, a fast one for a slow one), another text or task version, "
        "another context"
    )
    return "; ".join([*found, generic])


def _of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of the plain mean of independent numbers."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None
