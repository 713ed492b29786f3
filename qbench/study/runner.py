"""One checkpoint, many cells: quantize the model, measure it, store every result as it comes.

What does not depend on the cell (the model in memory, the
calibration windows, prepared tasks) is made once. What is stored already is not measured again;
a failure is stored with its error and repeated only on request.
"""

from __future__ import annotations

import fnmatch
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, RunFailed
from qbench.evaluation.tasks import PreparedTask, TaskSpec
from qbench.models.checkpoints import Checkpoint
from qbench.models.dimensions import dimensions, stored_bytes
from qbench.process import uncollected
from qbench.progress import Reporter
from qbench.quantization.outcome import Quantization, batching_of
from qbench.quantization.quantize import needs_calibration
from qbench.record import (
    LayerReport,
    QuantizationKey,
    QuantizationRecord,
    TaskKey,
    TaskRecord,
)
from qbench.registry import load_baseline
from qbench.scheme import Scheme
from qbench.study.cells import Cell, CellPlan, Settings
from qbench.study.draws import CalibrationTexts, drawn
from qbench.study.environment import environment, peak_memory
from qbench.study.store import Store
from qbench.study.supply import Supply, supply_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PreparedKey = tuple[str, int | None, TaskSpec]
"""Tokenizer, context and task: what the tokens of a task depend on, in one run or sweep."""
NO_TWIN = "the checkpoint is quantized already and holds no full-precision model to agree with"


class Workbench:
    """Everything one process needs to run the cells of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        store: Store,
        prepared: dict[PreparedKey, PreparedTask] | None = None,
        one_cell: bool = False,
    ) -> None:
        self.checkpoint, self.settings, self.store = checkpoint, settings, store
        self.one_cell = one_cell
        """Whether there are no others: then its weights are not copied before they change."""
        self._prepared = {} if prepared is None else prepared
        self._overlaps: dict[tuple[str | None, TaskSpec], float | None] = {}
        self.texts = CalibrationTexts(
            lambda: self.tokenizer, lambda: self.context, settings.options.data_dir
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def supply(self) -> Supply:
        """Where the cells' models come from."""
        return supply_of(self.checkpoint, self.settings, self.one_cell)

    def cell(self, asked: Cell) -> Cell:
        """What a cell is on this checkpoint: one left alone is at the scheme it brings with it.

        So rows of a BitNet stand at W1.58A8 and not at W16A16.
        """
        own = self.checkpoint.own_scheme
        left_alone = own is not None and asked.scheme.is_identity
        return Cell(asked.baseline, own.scheme, own) if own and left_alone else asked

    def cells(self, asked: Sequence[Cell]) -> list[Cell]:
        """The cells of a sweep on this checkpoint; its own scheme alone, where it brings one."""
        if self.checkpoint.own_scheme is None:
            # draw after draw: each calibration text goes through the model once
            turns = itertools.zip_longest(*(self._drawn(cell) for cell in asked))
            return [cell for turn in turns for cell in turn if cell is not None]
        return [self.cell(Cell(load_baseline("none"), Scheme()))]

    def _drawn(self, cell: Cell) -> Iterable[Cell]:
        """A cell as often as chance decides about it in another way."""
        draws = self.settings.draws
        if not draws or self.why_not(cell):
            return [cell]
        return drawn(cell, draws, self._reads_data(cell), self._is_random(cell))

    def release(self) -> None:
        """Let go of the model and the calibration text: another checkpoint needs the memory."""
        if "supply" in self.__dict__:
            self.supply.release()
        self.texts.clear()

    @cached_property
    def context(self) -> int | None:
        """The model's context in tokens, from its configuration alone."""
        from qbench.evaluation.evaluate import context_length

        return context_length(self.checkpoint.load_config())

    def prepared(self, spec: TaskSpec) -> PreparedTask:
        """A task, loaded and tokenized once for all checkpoints with the same tokenizer."""
        from qbench.evaluation.evaluate import prepare_task

        key = (self.checkpoint.tokenizer_fingerprint, self.context, spec)
        if key not in self._prepared:
            options = self.settings.options
            with uncollected():
                self._prepared[key] = prepare_task(spec, self.tokenizer, self.context, options)
        return self._prepared[key]

    def why_not(self, cell: Cell) -> str | None:
        """One sentence why this checkpoint cannot be quantized so, or None."""
        if self.checkpoint.own_scheme is not None:
            return None if cell.own else self.checkpoint.why_not_quantized
        if cell.not_applicable or not (cell.scheme.has_groups or cell.scheme.overrides):
            return cell.not_applicable
        from qbench.grid import check_group_size

        names = self.checkpoint.row_lengths
        for pattern, _ in cell.scheme.overrides:  # one with a typing error would change nothing
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"no matrix is called {pattern}; they are called like {next(iter(names))}"
        for name, length in names.items():
            scheme = cell.scheme.for_linear(name)
            try:
                check_group_size(length, scheme.group_size if scheme.wbits < 16 else -1)
            except QBenchError as error:
                return f"{error} ({name})"
        return None

    def key(self, cell: Cell) -> QuantizationKey:
        """What names the quantized model; at W16A16 it is the same model for every method."""
        reads_data = self._reads_data(cell) and not self.why_not(cell)
        asked = self.settings.calibration_of(cell)
        return QuantizationKey(
            weights=self.checkpoint.fingerprint,
            baseline=cell.method,
            scheme=str(cell.scheme),
            calibration=self.texts.spec(asked) if reads_data else None,
            seed=self.settings.seed_of(cell) if self._is_random(cell) else 0,
            dtype=self.settings.dtype,
        )

    def _reads_data(self, cell: Cell) -> bool:
        return not cell.changes_nothing and needs_calibration(cell.baseline.instance, cell.scheme)

    def _is_random(self, cell: Cell) -> bool:
        return cell.baseline.instance.is_random and not cell.changes_nothing

    def task_key(self, key: QuantizationKey, spec: TaskSpec) -> TaskKey:
        """What names one measurement."""
        fields = self.prepared(spec).key_fields
        return TaskKey(quantization=key.digest(), dtype=self.settings.dtype, **fields)

    def plan(self, cell: Cell) -> CellPlan:
        """Look up what is stored of a cell.

        Raises:
            QBenchError: for a task whose data are missing, before anything is run.
        """
        plan = CellPlan(cell, self.key(cell), not_applicable=self.why_not(cell))
        if plan.not_applicable:
            return plan
        name = self.checkpoint.name
        record = self.store.find_quantization(name, plan.key)
        if record is not None and record.status == "failed":
            plan.failed = None if self.settings.retry_failed else record.error
        elif record is not None:
            plan.quantized = True
        known = set()
        for spec in self.settings.tasks:
            if cell.own is not None and spec.is_agreement:
                plan.left_out[spec] = NO_TWIN
                continue
            key = self.task_key(plan.key, spec)
            if key in known:  # one measurement under two names
                continue
            known.add(key)
            found = self.store.find_task(name, plan.key, key)
            failed = found is not None and found.status == "failed"
            if found is None or (failed and self.settings.retry_failed):
                plan.pending.append(spec)
            else:
                plan.stored.append(spec)
                plan.failed_tasks += failed
        return plan

    def run(
        self, cell: Cell, reporter: Reporter, save: Path | None = None
    ) -> Iterator[TaskRecord | QuantizationRecord]:
        """Do what is left of a cell, yielding each record once it is on disk.

        Raises:
            QBenchError: an impossible request. A run that breaks is a record with status
                "failed", not an exception.
        """
        plan = self.plan(cell)
        if plan.not_applicable:
            record = self._record(plan, status="not_applicable", error=plan.not_applicable)
            known = self.store.find_quantization(self.checkpoint.name, plan.key)
            if known is None and self.checkpoint.own_scheme is None:  # others have one row
                self.store.save_quantization(record)
            yield record
            return
        if plan.is_done and save is None:
            self.clear(plan)
            return
        quantized = self._quantize(plan, reporter)
        if isinstance(quantized, QuantizationRecord):
            self.store.save_quantization(quantized)
            yield quantized
            return
        model, record = quantized
        if not plan.quantized:
            self.store.save_quantization(record)
        yield record
        if save is not None:
            self._save(model, record, save)
        failed = False
        for spec in plan.pending:
            measured = self._measure(plan, spec, model, reporter)
            failed |= measured.status == "failed"
            yield measured
        if not failed:
            self.supply.done(self.store.folder(self.checkpoint.name, plan.key))

    def clear(self, plan: CellPlan) -> None:
        """Remove the work files of a cell of which everything is stored."""
        if plan.quantized and not (plan.failed or plan.failed_tasks):
            self.supply.done(self.store.folder(self.checkpoint.name, plan.key))

    def _quantize(
        self, plan: CellPlan, reporter: Reporter
    ) -> tuple[PreTrainedModel, QuantizationRecord] | QuantizationRecord:
        cell, key = plan.cell, plan.key
        asked = self.settings.calibration_of(cell)
        windows = (lambda: self.texts.windows(asked)) if key.calibration else None
        started = time.perf_counter()
        folder = self.store.folder(self.checkpoint.name, key)
        with (
            peak_memory(self.settings.device) as peak,
            reporter.step(f"quantize {cell}") as progress,
        ):
            try:
                self.supply.before(self.prepared(spec) for spec in plan.pending)
                model, result = self.supply.model_of(
                    cell, windows, folder, lambda done, total, _: progress(done, total)
                )
            except Exception as error:
                if isinstance(error, QBenchError) and not isinstance(error, RunFailed):
                    raise
                return self._record(plan, status="failed", error=_describe(error))
        return model, self._record(
            plan,
            result,
            seconds=time.perf_counter() - started,
            peak=peak["bytes"],
            model=model,
            dimensions=dimensions(model, stored_bytes(self.checkpoint)),
        )

    def _record(
        self,
        plan: CellPlan,
        result: Quantization | None = None,
        seconds: float | None = None,
        peak: int | None = None,
        model: PreTrainedModel | None = None,
        **status: Any,
    ) -> QuantizationRecord:
        layers: list[LayerReport] = result.layers if result else []
        notes = [*self.checkpoint.load_report, *(result.notes if result else [])]
        if result and result.batching:
            notes.append(_BATCHING_NOTES[result.batching])
        return QuantizationRecord(
            key=plan.key,
            checkpoint=self.checkpoint.name,
            trained=plan.cell.trained,
            quantized_elsewhere=plan.cell.own is not None and not plan.cell.trained,
            parameters=self.checkpoint.parameters or None,
            effective_bits=result.effective_bits if result else None,
            layers=layers,
            skipped=result.skipped if result else {},
            notes=notes,
            wall_seconds=seconds,
            peak_memory_bytes=peak,
            environment=environment(self.settings.device, model),
            created=_now(),
            **status,
        )

    def _measure(
        self,
        plan: CellPlan,
        spec: TaskSpec,
        model: PreTrainedModel,
        reporter: Reporter,
    ) -> TaskRecord:
        """Run one task and store it; a failure is stored too."""
        task = self.prepared(spec)
        key = self.task_key(plan.key, spec)
        started = time.perf_counter()
        record, items = TaskRecord(key=key), None
        with (
            peak_memory(self.settings.device) as peak,
            reporter.step(f"{key.task} of {plan.cell}") as progress,
        ):
            try:
                task, batching = self.supply.against(task), batching_of(model)
                started = time.perf_counter()  # without a reference, which serves all cells
                sharing = None if batching else self.supply.sharing(task, model)
                result = task.run(model, progress, batching, sharing)
            except Exception as error:
                record.status, record.error = "failed", _describe(error)
            else:
                record.metrics, record.n_items = result.metrics, result.n_items
                record.details, items = result.details | self._overlap(plan, spec), result.items
        record.wall_seconds = time.perf_counter() - started
        record.peak_memory_bytes = peak["bytes"]
        record.environment = environment(self.settings.device, model)
        record.created = _now()
        self.store.save_task(self.checkpoint.name, plan.key, record, items)
        return record

    def _overlap(self, plan: CellPlan, spec: TaskSpec) -> dict[str, float | None]:
        """The share of a task's tokens that stand in the text its method was calibrated on."""
        if plan.key.calibration is None:
            return {}
        from qbench.evaluation.overlap import overlap

        key = (plan.key.calibration.tokens, spec)
        if key not in self._overlaps:
            windows = self.texts.windows(self.settings.calibration_of(plan.cell))
            self._overlaps[key] = overlap(windows, self.prepared(spec).token_rows())
        return {"calibration_overlap": self._overlaps[key]}

    def _save(self, model: PreTrainedModel, record: QuantizationRecord, folder: Path) -> None:
        from qbench.models.bitnet.saving import save_trained
        from qbench.models.saving import save_checkpoint

        if record.trained:
            save_trained(self.checkpoint, model, self.tokenizer, folder, record)
        else:
            save_checkpoint(model, self.tokenizer, record, folder)


_BATCHING_NOTES = {
    "unshared": "activation scales per input tensor: taken over each row alone, "
    "rows share no beginning",
    "one row": "activation scales per input tensor: evaluated one unpadded row at a time",
}


def _describe(error: BaseException) -> str:
    kind = "" if isinstance(error, QBenchError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:2000]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
