"""What runs and sweeps consist of: cells (a baseline at a scheme), and what is left of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qbench.baseline import resolve_scheme, why_not
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.models.own_scheme import OwnScheme
from qbench.record import BaselineSpec, CalibrationSpec, QuantizationKey
from qbench.registry import LoadedBaseline
from qbench.scheme import Scheme


@dataclass(frozen=True)
class Draw:
    """What chance decides about a cell: the text it is calibrated on, the numbers it draws."""

    calibration: CalibrationSpec | None
    """None where the cell reads no data."""
    seed: int | None
    """Of the method's own randomness; None where it has none."""

    def __str__(self) -> str:
        if self.calibration is None:
            return f"seed {self.seed}"
        return f"{Path(self.calibration.source).name} seed {self.calibration.seed}"


@dataclass(frozen=True)
class Settings:
    """What holds for every cell of a run or sweep."""

    tasks: tuple[TaskSpec, ...]
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    seed: int = 0
    draws: tuple[Draw, ...] = ()
    """What cells that depend on chance are run with, one after the other; none: with the above."""
    dtype: str = "float32"
    device: str = "cpu"
    retry_failed: bool = False
    stream: bool | None = None
    """Keep decoder blocks on disk and bring them in one at a time; None where memory needs it."""

    def calibration_of(self, cell: Cell) -> CalibrationSpec:
        """The text that a cell is calibrated on, if it is."""
        own = None if cell.draw is None else cell.draw.calibration
        return own or self.calibration

    def seed_of(self, cell: Cell) -> int:
        """The seed of a cell's method, if it draws anything."""
        own = None if cell.draw is None else cell.draw.seed
        return self.seed if own is None else own


@dataclass(frozen=True)
class Cell:
    """A baseline at a resolved scheme, or a model at the scheme it brings with it."""

    baseline: LoadedBaseline
    scheme: Scheme
    own: OwnScheme | None = None
    """The checkpoint's own scheme, which is this one: nothing is quantized afterwards."""
    draw: Draw | None = None
    """One of several; None where the settings hold."""

    @classmethod
    def of(cls, baseline: LoadedBaseline, scheme: Scheme) -> Cell:
        """Resolve the scheme for the baseline."""
        return cls(baseline, resolve_scheme(scheme, baseline.instance))

    @property
    def trained(self) -> bool:
        """Whether the checkpoint was trained at the scheme."""
        return self.own is not None and self.own.trained

    @property
    def not_applicable(self) -> str | None:
        """One sentence why this cell cannot be, or None."""
        return None if self.own else why_not(self.baseline.instance, self.scheme)

    @property
    def changes_nothing(self) -> bool:
        """Whether the model is measured as its checkpoint holds it."""
        return self.own is not None or self.scheme.is_identity

    @property
    def method(self) -> BaselineSpec:
        """What its results are stored under."""
        if self.own is not None:
            return self.own.method
        return BaselineSpec(name="none") if self.changes_nothing else self.baseline.spec

    def __str__(self) -> str:
        what = str(self.own or f"{self.baseline.spec.name} {self.scheme}")
        return what if self.draw is None else f"{what} · {self.draw}"


@dataclass
class CellPlan:
    """What is stored of a cell and what is to be done."""

    cell: Cell
    key: QuantizationKey
    not_applicable: str | None = None
    failed: str | None = None
    """Error of a stored failure that will not be repeated."""
    failed_tasks: int = 0
    """How many stored measurements are failures that will not be repeated."""
    stored: list[TaskSpec] = field(default_factory=list)
    pending: list[TaskSpec] = field(default_factory=list)
    left_out: dict[TaskSpec, str] = field(default_factory=dict)
    """Tasks that cannot be measured on this model -> one sentence why."""
    quantized: bool = False
    """Whether a record of the quantization itself is stored."""

    def left_out_lines(self) -> list[str]:
        """A line for every task that cannot be measured on this model."""
        return [f"{spec}: not applicable: {reason}" for spec, reason in self.left_out.items()]

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        closed = self.not_applicable is not None or self.failed is not None
        return closed or (self.quantized and not self.pending)
