"""Sweep files: which checkpoints, baselines, schemes and tasks, and the cells they make.

    checkpoints: [../models/opt-125m, bundled:b158-2m, {path: bundled:b158-2m, latent: true}]
    baselines: [none, absmax, {name: gptq, act_order: true, schemes: [W4A16, W2A16]}]
    schemes: [W8A8, W4A16, "W2A16g64:grid=asym"]
    calibration: {source: c4, nsamples: 128, seqlen: 2048, seed: 0}
    seeds: 5
    tasks: [wikitext2, piqa, {name: hellaswag, num_fewshot: 4, limit: 1000}]
    results: results/runs

Every baseline meets every scheme, or its own list. The baseline ``none`` is the full-precision row:
it runs once at W16A16 and at every scheme of 16-bit weights. A method at W16A16 would be that same
model, so only ``none`` runs there. A BitNet checkpoint has one row, at the scheme of its training;
with ``latent: true`` its latent weights are quantized as an ordinary model's.

``seeds`` repeats every cell that depends on chance: the calibration text is drawn anew and the
method's own randomness is seeded anew, both from the same seed; cells without either run once.
``calibration`` may be a list of texts, on each of which every cell that calibrates is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from qbench.errors import QBenchError, unknown
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.record import CalibrationSpec
from qbench.registry import LoadedBaseline, load_baseline
from qbench.scheme import WEIGHT_BITS, Scheme
from qbench.study.cells import Cell, Draw, Settings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CheckpointEntry(_Strict):
    """A checkpoint with its options."""

    path: str
    """As on the command line: a folder, ``bundled:NAME`` or a Hub id."""
    latent: bool = False
    """The latent weights of a BitNet checkpoint, as an ordinary model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaselineEntry(BaseModel):
    """A baseline with its fields; any other key is a field of the method."""

    model_config = ConfigDict(extra="allow")

    name: str
    schemes: list[str] | None = None
    """Only these, instead of the sweep's."""


class TaskEntry(_Strict):
    """A task with its options."""

    name: str
    """As on the command line, so ``wikitext2@documents`` too."""
    num_fewshot: int | None = None
    limit: int | None = None
    protocol: str | None = None


class CalibrationEntry(_Strict):
    """Which text methods see."""

    source: str = "c4"
    nsamples: int = Field(default=128, gt=0)
    seqlen: int = Field(default=2048, gt=1)
    seed: int = 0


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Calibrations = Annotated[
    Annotated[CalibrationEntry, Tag("one")]
    | Annotated[list[CalibrationEntry], Field(min_length=1), Tag("many")],
    Discriminator(_one_or_many),
]


class Sweep(_Strict):
    """A sweep file."""

    checkpoints: list[str | CheckpointEntry] = Field(min_length=1)
    baselines: list[str | BaselineEntry] = Field(min_length=1)
    schemes: list[str] = Field(min_length=1)
    tasks: list[str | TaskEntry] = Field(min_length=1)
    calibration: Calibrations = CalibrationEntry()
    """One text, or several: every cell that calibrates is run on each."""
    num_fewshot: int = 0
    """Of tasks that do not say."""
    limit: int | None = None
    """Of tasks that do not say."""
    results: Path = Path("results/runs")
    data: Path | None = None
    max_length: int | None = None
    encoding: str = "joint+bos"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    seeds: int | list[int] | None = None
    """How many seeds, from ``seed`` on, or which: each of them draws the calibration text and the
    method's own numbers."""
    stream: bool | None = None
    """Keep decoder blocks on disk and bring them in one at a time; where it is not said, when two
    copies of the weights do not fit into memory."""

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a sweep file; relative checkpoint and data paths are relative to where you are.

        Raises:
            QBenchError: naming the file, the field, what is wrong and the nearest field.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise QBenchError(f"cannot read {path}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:  # bad UTF-8 and impossible dates, too
            raise QBenchError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise QBenchError(f"{path} holds no mapping; see README, 'Sweep'")
        for key in data:
            if key not in cls.model_fields:
                raise unknown(f"field in {path}", str(key), cls.model_fields)
        try:
            return cls(**data)
        except ValidationError as error:
            raise QBenchError(f"{path}: {_explain(error)}") from None

    def checkpoint_entries(self) -> list[CheckpointEntry]:
        """The checkpoints, without repeats."""
        given = (CheckpointEntry(path=c) if isinstance(c, str) else c for c in self.checkpoints)
        return list(dict.fromkeys(given))

    def task_specs(self) -> tuple[TaskSpec, ...]:
        """The tasks, with the sweep's own limit and shots where a task does not say."""
        specs = []
        for entry in self.tasks:
            given = entry if isinstance(entry, TaskEntry) else TaskEntry(name=entry)
            limit = given.limit if "limit" in given.model_fields_set else self.limit
            spec = task_spec(given.name, self.num_fewshot, limit)
            if given.num_fewshot is not None:
                spec = replace(spec, num_fewshot=given.num_fewshot)
            specs.append(replace(spec, protocol=given.protocol or spec.protocol))
        return tuple(specs)

    def cells(self) -> list[Cell]:
        """Every baseline at every scheme it is asked for, without repeats."""
        cells: dict[str, Cell] = {}
        for entry in self.baselines:
            given = entry if isinstance(entry, BaselineEntry) else BaselineEntry(name=entry)
            baseline = load_baseline(given.name, given.model_extra or {})
            schemes = [Scheme.parse(text) for text in given.schemes or self.schemes]
            schemes = [scheme for scheme in schemes if not scheme.is_identity]
            if keeps_weights(baseline):
                schemes = [Scheme(), *(s for s in schemes if not s.quantizes_weights)]
            for scheme in schemes:
                cell = Cell.of(baseline, scheme)
                cells.setdefault(f"{baseline.spec.digest()} {cell.scheme}", cell)
        if not cells:
            raise QBenchError(
                "this sweep has no cell: a method at 16 bits is the model itself; "
                "add the baseline none, or schemes below 16 bits"
            )
        return together(cells.values())

    def draws(self) -> tuple[Draw, ...]:
        """What chance decides, in every way that is asked for.

        Raises:
            QBenchError: for seeds that are none, or that contradict another field.
        """
        given = self.calibration if isinstance(self.calibration, list) else [self.calibration]
        texts = [CalibrationSpec(**entry.model_dump()) for entry in given]
        if self.seeds is None:
            return tuple(Draw(text, self.seed) for text in texts)
        own = {text.seed for text in given if "seed" in text.model_fields_set} - {self.seed}
        if isinstance(self.seeds, list):
            own |= {self.seed} if "seed" in self.model_fields_set else set()
            seeds = list(dict.fromkeys(self.seeds))
        else:
            seeds = list(range(self.seed, self.seed + self.seeds))
        if not seeds or min(seeds) < 0:
            raise QBenchError(
                f"seeds: {self.seeds} cannot be; say how many (seeds: 5) or which ([0, 1, 7])"
            )
        if own:
            raise QBenchError(
                f"seeds: {self.seeds} and a seed of {min(own)} contradict each other, as seeds are "
                "those of the calibration text and of the methods; leave the other one out"
            )
        return tuple(
            Draw(text.model_copy(update={"seed": seed}), seed) for seed in seeds for text in texts
        )

    def settings(self, retry_failed: bool = False) -> Settings:
        """What every cell shares."""
        options = EvaluationOptions(
            data_dir=self.data, max_length=self.max_length, encoding=self.encoding
        )
        draws = self.draws()
        first, several = draws[0], len(draws) > 1
        assert first.calibration is not None and first.seed is not None
        return Settings(
            tasks=self.task_specs(),
            options=options,
            calibration=first.calibration,
            seed=first.seed,
            draws=draws if several else (),
            dtype=self.dtype,
            device=self.device,
            retry_failed=retry_failed,
            stream=self.stream,
        )


def together(cells: Iterable[Cell]) -> list[Cell]:
    """The same cells, those with the same quantized weights one after the other."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.baseline.spec.digest(), str(cell.scheme.weights_only))
        groups.setdefault(key, []).append(cell)
    return [cell for group in groups.values() for cell in group]


def keeps_weights(baseline: LoadedBaseline) -> bool:
    """Whether a baseline declines every width below 16: then it is the full-precision row."""
    widths = (bits for bits in WEIGHT_BITS if bits < 16)
    return all(baseline.instance.supports(Scheme(wbits=bits)) for bits in widths)


def task_spec(text: str, num_fewshot: int = 0, limit: int | None = None) -> TaskSpec:
    """A task's text form with the run's own limit and number of shots."""
    spec = TaskSpec.parse(text)
    shots = 0 if spec.is_perplexity else num_fewshot
    return TaskSpec(spec.name, num_fewshot=shots, limit=limit, protocol=spec.protocol)


def _explain(error: ValidationError) -> str:
    """The first problem in one line; alternatives of a list entry are told apart by its form."""
    problems: list[Any] = error.errors()
    problem = next((p for p in problems if p["type"] != "string_type"), problems[0])
    where = ".".join(str(part) for part in problem["loc"] if part not in _ENTRIES)
    if problem["type"] == "extra_forbidden":
        entry = next((_ENTRIES[part] for part in problem["loc"] if part in _ENTRIES), None)
        fields = (entry or CalibrationEntry).model_fields
        return str(unknown(f"field {where.rpartition('.')[0]}", where.rpartition(".")[2], fields))
    if problem["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {problem['msg']} (got {problem.get('input')!r:.80})"


_ENTRIES: dict[str, type[BaseModel]] = {
    "str": BaseModel,
    "CheckpointEntry": CheckpointEntry,
    "BaselineEntry": BaselineEntry,
    "TaskEntry": TaskEntry,
    "one": CalibrationEntry,
    "many": CalibrationEntry,
}
"""Names that pydantic puts into a place for the alternatives of a list entry."""
