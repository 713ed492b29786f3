"""Presets: what a published row was measured with, as data.

``results/reproductions/*.yaml`` holds one family of presets per published table: the paper's
settings, its rows as baselines and schemes, and the checkpoints it was measured on, each of which
is one preset (``gptq-opt-125m``). Published numbers are not repeated there: a row says which lines
of which table under ``results/reference`` are its own. ``checkpoints.yaml`` beside them says what
the checkpoints are, so that their size and cost are known before anything is downloaded.

Torch-free. Left out: running anything (:mod:`qbench.reproduction.running`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qbench.errors import QBenchError, unknown
from qbench.evaluation.tasks import ENCODINGS, TaskSpec
from qbench.record import CalibrationSpec
from qbench.scheme import Scheme

FULL_PRECISION = "none"
"""The baseline of the full-precision row, and of a checkpoint as it was trained."""
MEAN = "average"
"""The name of a column that is the plain mean of others."""
ITEMS = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "hellaswag": 10042,
    "lambada_openai": 5153,
    "openbookqa": 500,
    "piqa": 1838,
    "storycloze_2018": 1571,
    "winogrande": 1267,
}
"""Questions of the splits that papers report on; a number over fewer is another number."""
_CHECKPOINTS = "checkpoints"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointFacts(_Strict):
    """What is known of a public checkpoint without downloading it."""

    model_type: str
    """As its ``config.json`` names it."""
    stored: Literal["float32", "bfloat16", "float16", "ternary"]
    """What its weights are stored as; ternary: four codes in a byte, the rest in bfloat16."""
    files: Literal["safetensors", "bin"] = "safetensors"
    """bin: pickled files, which need ``--allow-pickle``."""
    gated: bool = False
    """Whether the Hub asks for an agreement first."""
    parameters: float
    """About how many, in millions."""
    config: dict[str, Any]
    """The fields of its configuration that decide its shapes."""
    note: str = ""


class Measure(_Strict):
    """A column of the published table, and how it is measured."""

    task: str
    """The task, or ``average``."""
    metric: str
    protocol: str | None = None
    """Of a perplexity: family and window length, ``gptq-2048``."""
    of: tuple[str, ...] = ()
    """The tasks an ``average`` is the mean of."""
    num_fewshot: int = 0
    published: dict[str, str] = Field(default_factory=dict)
    """Columns of the reference table that pick this number; the task of the same name if empty."""

    @property
    def is_perplexity(self) -> bool:
        """Whether lower is better."""
        return self.metric.endswith("perplexity")

    @property
    def title(self) -> str:
        """What tables call it: "wikitext2 gptq-2048", "piqa acc_norm"."""
        how = self.protocol or self.metric
        return f"{self.task} {how}" + (f", {self.num_fewshot}-shot" if self.num_fewshot else "")

    def spec(self, limit: int | None = None) -> TaskSpec:
        """The task as the runner asks for it."""
        return TaskSpec(self.task, self.num_fewshot, limit, self.protocol)

    @property
    def where(self) -> dict[str, str]:
        """What the lines of this number have in the reference table."""
        return self.published or {"task": self.task}


class RowEntry(_Strict):
    """A method of the paper at one or several schemes."""

    name: str
    """As the paper calls it."""
    baseline: str = FULL_PRECISION
    fields: dict[str, Any] = Field(default_factory=dict)
    """Of the baseline, where they are not its defaults."""
    schemes: tuple[str, ...] = ("W16A16",)
    published: dict[str, str] = Field(default_factory=dict)
    """Columns of the reference table, where method, widths and group are not those given here."""
    label: str | None = None
    """The widths the reference table gives the row, where they are not the scheme's own."""
    reasons: tuple[str, ...] = ()
    """Why this row may come out otherwise."""


class Row(_Strict):
    """One row of a preset."""

    name: str
    """Method and widths: "GPTQ W4A16"."""
    baseline: str
    fields: dict[str, Any]
    scheme: str
    published: dict[str, str]
    reasons: tuple[str, ...]

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is quantized afterwards."""
        return self.baseline == FULL_PRECISION


class Tolerance(_Strict):
    """How far a number may be off where model, text and protocol are the same.

    It covers what differs between two careful measurements: dtype, kernels, library versions.
    """

    perplexity: float = 0.5
    """In percent of the published number."""
    accuracy: float = 1.0
    """In points; two papers print 39.69 and 40.03 of ARC-easy for one OPT-125M."""


class Calibration(_Strict):
    """Which text a method sees."""

    source: str = "c4"
    nsamples: int = Field(default=128, gt=0)
    seqlen: int = Field(default=2048, gt=1)
    seed: int = 0


class Target(_Strict):
    """A checkpoint the table was measured on."""

    name: str
    """Of the preset."""
    hub: str | None
    """Its Hub id; None where the weights were never released."""
    published: dict[str, str] = Field(default_factory=dict)
    """Columns of the reference table that pick this checkpoint's lines."""
    reference: str | None = None
    """Its table, where each checkpoint has one of its own."""
    fields: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Fields that rows have on this checkpoint only, by a pattern of the row's name."""
    without: tuple[str, ...] = ()
    """Rows and tasks (patterns) the paper does not give for it."""
    reasons: tuple[str, ...] = ()


class StandIn(_Strict):
    """Bundled checkpoints that take the place of weights that were never released."""

    checkpoints: tuple[str, ...]
    data: str
    tasks: tuple[str, ...]
    calibration: Calibration


class Family(_Strict):
    """One file: a published table and the checkpoints it was measured on."""

    paper: str
    """Title in short, arXiv number, tables."""
    about: str
    """One line for the list."""
    weights: Literal["released", "nearest", "unreleased"] = "released"
    """Whether the very weights are public; numbers of others are for orientation only."""
    reference: str | None = None
    measures: tuple[Measure, ...]
    rows: tuple[RowEntry, ...]
    targets: tuple[Target, ...] = Field(min_length=1)
    calibration: Calibration = Calibration()
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """What the paper computed in."""
    encoding: str = "joint"
    max_length: int | None = None
    seed: int = 0
    seeds: int = Field(default=1, ge=1)
    """How often rows that draw at random are measured, with consecutive seeds."""
    tolerance: Tolerance = Tolerance()
    ambiguous: tuple[str, ...] = ()
    """What the paper leaves open, and what was taken."""
    reasons: tuple[str, ...] = ()
    """Why any of its rows may come out otherwise."""
    not_expressed: tuple[str, ...] = ()
    """Rows of the paper that no preset has, and why."""
    layout: str | None = None
    """The table layout that shows it, where there are no verdicts."""
    stand_in: StandIn | None = None


class Preset(_Strict):
    """One published table on one checkpoint."""

    family: Family
    target: Target

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.target.name

    @property
    def reference(self) -> str:
        """The table under ``results/reference``."""
        name = self.target.reference or self.family.reference
        assert name is not None  # checked when it was read
        return name

    @property
    def facts(self) -> CheckpointFacts | None:
        """What is known of its checkpoint."""
        return None if self.target.hub is None else checkpoints()[self.target.hub]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Its rows, the full-precision one first."""
        rows = [row for entry in self.family.rows for row in self._expanded(entry)]
        return tuple(sorted(rows, key=lambda row: not row.is_full_precision))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Its columns."""
        return tuple(m for m in self.family.measures if not self._is_without(m.task))

    def has_size(self, parameters: float) -> bool:
        """Whether a checkpoint of so many weights can be the paper's; unknown sizes can."""
        facts = self.facts
        return facts is None or not parameters or abs(parameters / facts.parameters - 1e6) < 1e4

    @property
    def is_trained(self) -> bool:
        """Whether the checkpoint itself is what was published: nothing is quantized."""
        return all(row.is_full_precision for row in self.rows)

    def reasons(self, row: Row) -> list[str]:
        """Why a row may come out otherwise, the most particular first."""
        return [*row.reasons, *self.target.reasons, *self.family.reasons]

    def calibration(self) -> CalibrationSpec:
        """As the runner takes it."""
        return CalibrationSpec(**self.family.calibration.model_dump())

    def _is_without(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.target.without)

    def _expanded(self, entry: RowEntry) -> Iterator[Row]:
        for text in entry.schemes:
            scheme = Scheme.parse(text)
            widths = replace(scheme, group_size=-1, w_granularity="auto").label
            group = str(scheme.group_size) if scheme.group_size > 0 else ""
            quantizes = entry.baseline != FULL_PRECISION
            says = not quantizes or scheme.label in entry.name
            name = entry.name if says else f"{entry.name} {scheme.label}"
            if self._is_without(name):
                continue
            fields = dict(entry.fields)
            for pattern, own in self.target.fields.items():
                fields |= own if fnmatch.fnmatchcase(name, pattern) else {}
            yield Row(
                name=name,
                baseline=entry.baseline,
                fields=fields,
                scheme=text,
                published={
                    **self.target.published,
                    "method": entry.name,
                    "label": widths if entry.label is None else entry.label,
                    "group_size": group,
                    **entry.published,
                },
                reasons=entry.reasons,
            )


def presets() -> dict[str, Preset]:
    """Every preset by its name, in the order of the files."""
    return {preset.name: preset for family in _families() for preset in _of(family)}


def find(name: str) -> Preset:
    """A preset by its name.

    Raises:
        QBenchError: for a name that is not there, with the nearest ones.
    """
    known = presets()
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


@cache
def checkpoints() -> dict[str, CheckpointFacts]:
    """What is known of public checkpoints, by Hub id."""
    found = _read(_folder() / f"{_CHECKPOINTS}.yaml")
    return {hub: _checked(CheckpointFacts, facts, hub) for hub, facts in found.items()}


@cache
def _families() -> tuple[Family, ...]:
    paths = sorted(_folder().iterdir(), key=lambda path: path.name)
    return tuple(
        read_family(_read(path), path.name)
        for path in paths
        if path.name.endswith(".yaml") and path.name != f"{_CHECKPOINTS}.yaml"
    )


def read_family(data: dict[str, Any], source: str) -> Family:
    """A family from the content of its file.

    Raises:
        QBenchError: naming the file, the field and what is wrong with it.
    """
    family = _checked(Family, data, source)
    if family.encoding not in ENCODINGS:
        raise unknown(f"encoding in {source}", family.encoding, ENCODINGS)
    for target in family.targets:
        if (target.reference or family.reference) is None:
            raise QBenchError(f"{source}: {target.name} names no reference table")
        if target.hub is not None and target.hub not in checkpoints():
            raise unknown(f"checkpoint in {source}", target.hub, checkpoints())
    for measure in family.measures:
        if (measure.task == MEAN) != bool(measure.of):
            raise QBenchError(f"{source}: {measure.title} needs 'of', the tasks it is the mean of")
    return family


def _of(family: Family) -> Iterator[Preset]:
    return (Preset(family=family, target=target) for target in family.targets)


def _folder() -> Any:
    return files("qbench_results") / "reproductions"


def _read(path: Any) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise QBenchError(f"{path} holds no mapping")
    return found


def _checked(kind: Any, data: Any, source: str) -> Any:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise QBenchError(f"{source}: {where}: {problem['msg']}") from None
