"""Quantized models for the cells of one checkpoint: in memory, or streamed from disk.

In memory a pristine model is kept and copied, the calibration text goes through it once, and cells
that differ only in the bits of activations share one quantized copy; one cell alone takes the model
itself. Streamed, a cell's quantized blocks lie in a work folder until all its tasks are measured,
so that a killed run goes on at the block it had reached.
"""

from __future__ import annotations

import copy
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qbench.errors import QBenchError
from qbench.models.checkpoints import Checkpoint
from qbench.models.gptq_format import damage
from qbench.process import give_memory_back
from qbench.quantization.outcome import Quantization
from qbench.quantization.quantize import Progress, quantize_model, requantize_activations
from qbench.scheme import Scheme
from qbench.study.cells import Cell, Draw, Settings
from qbench.study.costs import WIDTHS
from qbench.study.speed import free_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from qbench.evaluation.sharing import Sharing
    from qbench.evaluation.tasks import PreparedTask
    from qbench.quantization.passes import Calibration

WORK = "blocks"
"""Folder of a streamed cell's quantized blocks, inside the cell's own folder in the store."""
Windows = Callable[[], "Tensor"]


class Supply(ABC):
    """Gives every cell its model."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self._references: dict[PreparedTask, Any] = {}

    @abstractmethod
    def model_of(
        self, cell: Cell, windows: Windows | None, folder: Path, progress: Progress | None
    ) -> tuple[PreTrainedModel, Quantization]:
        """The model of a cell, good until the next one is asked for.

        Args:
            cell: whose scheme the checkpoint can be quantized at.
            windows: gives the calibration windows; None where the cell reads no data.
            folder: of the cell in the store.
            progress: told about every block.
        """

    def before(self, tasks: Iterable[PreparedTask]) -> None:  # noqa: B027 - most need not ask
        """Ask of full precision what a cell's tasks will want to know of it."""

    def sharing(self, task: PreparedTask, model: PreTrainedModel) -> Sharing | None:
        """Whether a task's rows may share their beginning on a cell's model."""
        return task.test_sharing(model)

    def against(self, task: PreparedTask) -> PreparedTask:
        """A task that compares with full precision, ready to run on this checkpoint's cells."""
        if not task.needs_reference:
            return task
        if task not in self._references:
            self._references[task] = task.refer(self.pristine())
        return task.against(self._references[task])

    @abstractmethod
    def pristine(self) -> PreTrainedModel:
        """The model in full precision, never changed, beside that of the cell."""

    def done(self, folder: Path) -> None:
        """Everything about the cell with this folder is stored: no blocks are needed any more."""
        shutil.rmtree(folder / WORK, ignore_errors=True)

    def release(self) -> None:
        """Let go of what is in memory."""
        self._references.clear()


def supply_of(checkpoint: Checkpoint, settings: Settings, one_cell: bool = False) -> Supply:
    """The supply that the settings ask for, or that fits into memory.

    Raises:
        QBenchError: for a checkpoint that is asked to be streamed and cannot be.
    """
    if not is_streamed(checkpoint, settings):
        return InMemory(checkpoint, settings, one_cell)
    from qbench.models.streamed import why_not_streamed

    if reason := why_not_streamed(checkpoint):
        raise QBenchError(f"{reason}; --no-stream loads it")
    return Streamed(checkpoint, settings)


def is_streamed(checkpoint: Checkpoint, settings: Settings) -> bool:
    """Whether blocks stay on disk: as asked, or where two copies of the weights do not fit."""
    from qbench.models.streamed import why_not_streamed

    if settings.stream is not None:
        return settings.stream
    free = free_memory(settings.device)
    needed = 2 * checkpoint.parameters * WIDTHS[settings.dtype]
    return free is not None and needed > free and why_not_streamed(checkpoint) is None


@dataclass
class _Quantized:
    """The model of the last cell that was quantized."""

    baseline: str
    weights: Scheme
    draw: Draw | None
    model: PreTrainedModel
    result: Quantization
    reads_data: bool

    @classmethod
    def of(
        cls, cell: Cell, model: PreTrainedModel, result: Quantization, reads_data: bool
    ) -> _Quantized:
        """What is to be known of a cell's model."""
        weights = cell.scheme.weights_only
        return cls(cell.baseline.spec.digest(), weights, cell.draw, model, result, reads_data)


def shared_with(last: _Quantized | None, cell: Cell, reads_data: bool) -> _Quantized | None:
    """The last cell, if its weights are this one's and scales need no calibration."""
    scheme = cell.scheme
    alike = (
        last is not None
        and cell.baseline.instance.weights_ignore_activations
        and scheme.quantizes_weights
        and not (scheme.needs_static_scales or last.result.scheme.needs_static_scales)
        and last.baseline == cell.baseline.spec.digest()
        and last.weights == scheme.weights_only
        and last.draw == cell.draw
        and last.reads_data == reads_data
    )
    return last if alike else None


class InMemory(Supply):
    """One pristine model and at most one quantized copy; for one cell, itself."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, one_cell: bool = False) -> None:
        super().__init__(checkpoint, settings)
        self._one_cell = one_cell
        self._unloadable: QBenchError | None = None
        self._last: _Quantized | None = None
        self._calibration: tuple[Tensor, Calibration] | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in full precision, until one cell takes it; a damaged one is tried once."""
        if self._unloadable is not None:
            raise self._unloadable
        try:
            return self.checkpoint.load_model(self.settings.dtype, self.settings.device)
        except QBenchError as error:
            self._unloadable = error
            raise

    def model_of(
        self, cell: Cell, windows: Windows | None, folder: Path, progress: Progress | None
    ) -> tuple[PreTrainedModel, Quantization]:
        """The pristine model, the last cell's with other activations, or a fresh copy."""
        if cell.changes_nothing:
            layers = self.checkpoint.layer_reports(self.model) if cell.own else []
            return self.model, Quantization(cell.scheme, layers, notes=damage(layers))
        known = shared_with(self._last, cell, windows is not None)
        if known is not None:
            known.result = requantize_activations(known.model, cell.scheme, known.result)
            return known.model, known.result
        self._last = None  # before there is a third model in memory
        model = self.model
        if self._one_cell:  # whoever asks for full precision has it loaded again
            del self.model
        else:
            model = copy.deepcopy(model)
        result = quantize_model(
            model,
            cell.baseline.instance,
            cell.scheme,
            None if windows is None else self._passes(windows),
            seed=self.settings.seed_of(cell),
            progress=progress,
        )
        self._last = _Quantized.of(cell, model, result, windows is not None)
        return model, result

    def _passes(self, windows: Windows) -> Calibration | Tensor:
        """The calibration text in the pristine model, shared by all cells; or the text alone."""
        from qbench.quantization.passes import Calibration

        ids = windows()
        if self._one_cell:
            return ids
        if self._calibration is None or self._calibration[0] is not ids:
            self._calibration = None  # before there are two of them
            self._calibration = ids, Calibration(self.model, ids)
        return self._calibration[1]

    def pristine(self) -> PreTrainedModel:
        """The model that copies are made of; loaded again where one cell has taken it."""
        return self.model

    def before(self, tasks: Iterable[PreparedTask]) -> None:
        """Ask whether rows may share their beginning before one cell takes the model."""
        if self._one_cell:
            for task in tasks:
                task.test_sharing(self.model)

    def sharing(self, task: PreparedTask, model: PreTrainedModel) -> Sharing | None:
        """Asked of the pristine model, once for all its copies; the one that is taken knows."""
        return task.test_sharing(model if self._one_cell else self.model)

    def release(self) -> None:
        """Let go of both models."""
        super().release()
        self._last = self._calibration = None
        self.__dict__.pop("model", None)


class Streamed(Supply):
    """Decoder blocks stay on disk and come one at a time."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        super().__init__(checkpoint, settings)
        give_memory_back()
        self._last: _Quantized | None = None
        self._work: Path | None = None
        """Where the blocks of the last cell lie."""
        self._lock: IO[str] | None = None
        self._finished = False
        self._verdicts: dict[str, Any] = {}
        self._pristine: PreTrainedModel | None = None

    def model_of(
        self, cell: Cell, windows: Windows | None, folder: Path, progress: Progress | None
    ) -> tuple[PreTrainedModel, Quantization]:
        """A streamed model, quantized from the block on that an earlier run had reached."""
        from qbench.evaluation.sharing import keep_verdicts_
        from qbench.models.streamed import open_streamed

        settings = self.settings
        if cell.changes_nothing:
            model = open_streamed(self.checkpoint, settings.dtype, settings.device)
            keep_verdicts_(model, self._verdicts)
            return model, Quantization(cell.scheme)
        known = shared_with(self._last, cell, windows is not None)
        if known is not None:
            known.result = requantize_activations(known.model, cell.scheme, known.result)
            return known.model, known.result
        self._let_go()
        self._work = folder / WORK
        self._lock = _lock(self._work)
        if self._lock is None:
            self._work = self._work.with_name(f"{WORK}-{os.getpid()}")
        model = open_streamed(self.checkpoint, settings.dtype, settings.device, self._work)
        keep_verdicts_(model, self._verdicts)
        result = quantize_model(
            model,
            cell.baseline.instance,
            cell.scheme,
            None if windows is None else windows(),
            seed=settings.seed_of(cell),
            progress=progress,
        )
        self._last = _Quantized.of(cell, model, result, windows is not None)
        return model, result

    def done(self, folder: Path) -> None:
        """The blocks stay for cells with the same weights until others are asked for."""
        if self._work is not None and self._work.parent == folder:
            self._finished = True
        else:
            super().done(folder)

    def pristine(self) -> PreTrainedModel:
        """A model of its own: the cell's has hooks, and blocks in a work folder."""
        from qbench.models.streamed import open_streamed

        if self._pristine is None:
            settings = self.settings
            self._pristine = open_streamed(self.checkpoint, settings.dtype, settings.device)
        return self._pristine

    def release(self) -> None:
        """Let go of the last cell and of what is known of full precision."""
        super().release()
        self._pristine = None
        self._let_go()

    def _let_go(self) -> None:
        """Let go of the last cell, and of its blocks where everything about it is stored."""
        if self._work is not None and self._finished:
            shutil.rmtree(self._work, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self._last, self._work, self._lock, self._finished = None, None, None, False


def _lock(work: Path) -> IO[str] | None:
    """The open lock of a work folder; None where another process is at work in it."""
    work.mkdir(parents=True, exist_ok=True)
    lock = (work / "lock").open("w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on Windows
        return lock
    except OSError:
        lock.close()
        return None
    return lock
