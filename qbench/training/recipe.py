"""Recipe files: which twins are trained, how large, on what, and with which learning rates.

A recipe in full; ``preset: bitnet-b1.58-700m`` would give every field but the paths:

    name: 2m                      # the folders are fp16-2m, b1-2m and b158-2m
    twins: [fp16, b1, b158]
    shape: {hidden_size: 192, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 6}
    corpus: data/train.jsonl      # {"text": ...} on each line; in a .txt, a line is a document
    held_out: data/held_out.jsonl # optional; its loss is in the curves
    tokenizer: data/tokenizer     # a folder that transformers can read
    seqlen: 256
    tokens_per_step: 8192
    steps: 3000
    learning_rate: {fp16: 1e-3, b1: 2e-3, b158: [2e-3, 1e-3]}
    schedule: {fp16: linear, b1: linear, b158: two-stage}
    warmup: 100
    weight_decay: 0.1
    betas: [0.9, 0.95]
    seed: 0
    output: checkpoints

``two-stage`` wants two learning rates; the second one holds, and weight decay is off, from the
half-way step on. ``learning_rates: [1e-3, 4e-3]`` instead of ``learning_rate`` trains every twin
once per value, which is BitNet's test of stability (Fig. 5). Twins share everything but what the
recipe gives by kind, so that what differs between them is the width of their weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qbench.errors import QBenchError, unknown
from qbench.training.presets import PRESETS

Kind: TypeAlias = Literal["fp16", "b1", "b158"]
Schedule: TypeAlias = Literal["linear", "polynomial", "two-stage"]
Rate: TypeAlias = float | tuple[float, float]
Decay: TypeAlias = Annotated[float, Field(ge=0)]
Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
KINDS: tuple[Kind, ...] = ("fp16", "b1", "b158")


_VERSION = 1  # raised when the same recipe gives other weights


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Shape(_Strict):
    """A decoder's size, by the names of its configuration."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    max_position_embeddings: int | None = Field(default=None, gt=0)
    """None: the recipe's ``seqlen``."""
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    initializer_range: float = Field(default=0.02, gt=0)

    def check(self) -> None:
        """Refuse a size whose heads do not divide it.

        Raises:
            QBenchError: naming both numbers.
        """
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise QBenchError(
                f"hidden_size {self.hidden_size} is no even multiple of num_attention_heads {heads}"
            )
        if self.num_key_value_heads and heads % self.num_key_value_heads:
            raise QBenchError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )


class Recipe(_Strict):
    """A recipe file, its preset resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    twins: list[Kind] = Field(default=list(KINDS), min_length=1)
    shape: Shape
    corpus: str
    held_out: str | None = None
    tokenizer: str
    seqlen: int = Field(gt=1)
    tokens_per_step: int = Field(gt=0)
    steps: int = Field(gt=0)
    learning_rate: Rate | dict[Kind, Rate] | None = None
    learning_rates: list[float] | dict[Kind, list[float]] | None = None
    schedule: Schedule | dict[Kind, Schedule] = "linear"
    power: float = Field(default=1.0, gt=0)
    """Of the polynomial schedule; 1 is linear."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises."""
    weight_decay: Decay | dict[Kind, Decay] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; BitNet clips none, the training tips do not say."""
    bitlinear: dict[str, Any] = {}
    """Options of the b1 twin's layers that differ from the published defaults."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass; weights, gradients and optimizer are float32 in both."""
    output: Path = Path("checkpoints")
    batch_size: int | None = Field(default=None, gt=0)
    """Windows per pass and device; smaller needs less memory and gives the same step."""
    save_every: int | None = Field(default=None, gt=0)
    """Steps between the checkpoints that a killed training continues from."""
    log_every: int | None = Field(default=None, gt=0)
    eval_every: int | None = Field(default=None, gt=0)
    eval_tokens: int = Field(default=32768, gt=0)
    """How much of the held-out text is measured while training; at the end it is all."""

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe; its paths are relative to where you are.

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
            raise QBenchError(f"{path} holds no mapping; see 'Train' in the README")
        try:
            return cls.of(data)
        except QBenchError as error:
            raise QBenchError(f"{path}: {error}") from None

    @classmethod
    def of(cls, data: dict[str, Any]) -> Recipe:
        """A recipe from its fields, with a preset's filled in.

        Raises:
            QBenchError: naming the field, what is wrong and the nearest field or preset.
        """
        data = _with_preset(dict(data))
        for key in data:
            if key not in cls.model_fields:
                raise unknown("field", str(key), [*cls.model_fields, "preset"])
        try:
            recipe = cls(**data)
        except ValidationError as error:
            raise QBenchError(_explain(error)) from None
        recipe.shape.check()
        recipe._check()
        return recipe

    def _check(self) -> None:
        if self.tokens_per_step % self.seqlen:
            raise QBenchError(
                f"tokens_per_step {self.tokens_per_step} is no multiple of seqlen {self.seqlen}"
            )
        context = self.shape.max_position_embeddings
        if context is not None and context < self.seqlen:
            raise QBenchError(f"seqlen {self.seqlen} is beyond max_position_embeddings {context}")
        if self.warmup >= self.steps:
            raise QBenchError(f"warmup {self.warmup} leaves nothing of {self.steps} steps")
        if (self.learning_rate is None) == (self.learning_rates is None):
            raise QBenchError(
                "give learning_rate, or learning_rates to train once for each of them"
            )
        self.runs()
        self._check_layers()

    def _check_layers(self) -> None:
        """What only the models know, before a folder is claimed; loads torch only where needed."""
        if self.shape.hidden_act != "silu":
            from transformers.activations import ACT2FN

            if self.shape.hidden_act not in ACT2FN:
                raise unknown("activation function", self.shape.hidden_act, ACT2FN)
        if self.bitlinear:
            from qbench.models.bitnet.architecture import BitNetB1Config
            from qbench.models.bitnet.layers import B1

            BitNetB1Config(bitlinear=B1.to_dict() | self.bitlinear)

    def runs(self) -> list[TwinRun]:
        """Every training that the recipe asks for.

        Raises:
            QBenchError: for a twin without a learning rate, or with too few or too many.
        """
        found = []
        for kind in dict.fromkeys(self.twins):
            schedule = _for_kind(self.schedule, kind, "linear")
            decay = _for_kind(self.weight_decay, kind, 0.0)
            for suffix, rate in self._rates(kind):
                peaks = rate if isinstance(rate, tuple) else (rate,)
                if len(peaks) != (2 if schedule == "two-stage" else 1):
                    wanted = (
                        "two learning rates" if schedule == "two-stage" else "one learning rate"
                    )
                    raise QBenchError(f"schedule {schedule} of {kind} wants {wanted}, not {rate}")
                if min(peaks) <= 0:
                    raise QBenchError(f"learning rate {min(peaks)} of {kind} is not above 0")
                name = f"{kind}-{self.name}{suffix}"
                found.append(TwinRun(self, kind, name, peaks, schedule, decay))
        return found

    def _rates(self, kind: Kind) -> list[tuple[str, Rate]]:
        if self.learning_rates is not None:
            several = _for_kind(self.learning_rates, kind, None)
            if not several:
                raise QBenchError(f"learning_rates has none for the twin {kind}")
            if _for_kind(self.schedule, kind, "linear") == "two-stage":
                raise QBenchError("learning_rates goes with schedule linear or polynomial only")
            return [(f"-lr{rate:g}", rate) for rate in several]
        one = _for_kind(self.learning_rate, kind, None)
        if one is None:
            raise QBenchError(f"learning_rate has none for the twin {kind}")
        return [("", one)]

    def as_yaml(self) -> str:
        """The recipe with nothing implied and no folder of this machine, to be run again."""
        fields = self.model_dump(mode="json", exclude={"output"}, exclude_none=True)
        for field in ("corpus", "held_out", "tokenizer"):
            if Path(fields.get(field, "")).is_absolute():
                fields[field] = Path(fields[field]).name
        return yaml.safe_dump(fields, sort_keys=False, default_flow_style=None)


@dataclass(frozen=True)
class TwinRun:
    """One training: a twin of a recipe at its learning rate."""

    recipe: Recipe
    kind: Kind
    name: str
    """Of its folder."""
    peaks: tuple[float, ...]
    """Learning rates: one, or those of the two stages."""
    schedule: Schedule
    weight_decay: float

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the update after ``step`` updates.

        It rises linearly over the warm-up and falls to 0 at the last step. In two stages, one line
        falls from 1 to 0 over the whole training and the peak that it scales changes half-way, as
        in the training tips' figure: 1.5e-3 to about 8e-4, then 5e-4 to 0, for peaks 1.5e-3, 1e-3.
        """
        recipe = self.recipe
        peak = self.peaks[-1] if self.in_second_stage(step) else self.peaks[0]
        if step < recipe.warmup:
            return peak * (step + 1) / recipe.warmup
        left = max(recipe.steps - step, 0) / (recipe.steps - recipe.warmup)
        return peak * left ** (recipe.power if self.schedule == "polynomial" else 1.0)

    def weight_decay_at(self, step: int) -> float:
        """The weight decay of the update after ``step`` updates."""
        return 0.0 if self.in_second_stage(step) else self.weight_decay

    def in_second_stage(self, step: int) -> bool:
        """Whether the update after ``step`` updates belongs to the second half of two stages."""
        return self.schedule == "two-stage" and 2 * step >= self.recipe.steps

    def identity(self, corpus: str, vocabulary: int) -> dict[str, Any]:
        """What decides the trained weights, by field.

        Args:
            corpus: fingerprint of the tokens.
            vocabulary: number of tokens the tokenizer knows.
        """
        shared = (
            "seqlen tokens_per_step steps power warmup betas epsilon clip seed precision shape"
        ).split()
        return {
            "kind": self.kind,
            "learning_rate": list(self.peaks),
            "schedule": self.schedule,
            "weight_decay": self.weight_decay,
            **self.recipe.model_dump(mode="json", include=set(shared)),
            **({"bitlinear": self.recipe.bitlinear} if self.kind == "b1" else {}),
            "corpus": corpus,
            "vocabulary": vocabulary,
            "version": _VERSION,
        }


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 of what :meth:`TwinRun.identity` says."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _for_kind(given: Any, kind: Kind, default: Any) -> Any:
    return given.get(kind, default) if isinstance(given, dict) else given


def _with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """The fields with those of the preset below them; a shape is merged field by field."""
    base: dict[str, Any] = {}
    if "preset" in data:
        base = _preset("preset", data.pop("preset"))
    shape = data.get("shape")
    if isinstance(shape, str):
        data["shape"] = _preset("shape", shape)["shape"]
    elif isinstance(shape, dict):
        data["shape"] = base.get("shape", {}) | shape
    if "learning_rates" in data:
        base.pop("learning_rate", None)
    return base | data


def _preset(field: str, name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown(field, str(name), PRESETS)
    return dict(PRESETS[name])


def _explain(error: ValidationError) -> str:
    """The first problem in one line; of a mapping, that inside it, as no alternative reaches it."""
    problems: list[Any] = list(error.errors())
    first = problems[0]
    problem = first
    if isinstance(first.get("input"), (dict, list)):
        same = [p for p in problems if p["loc"][0] == first["loc"][0]]
        problem = max(same, key=lambda p: (len(_named(p["loc"])), p["type"] != "float_type"))
    where = _named(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return str(unknown(f"field {'.'.join(where[:-1])}", where[-1], Shape.model_fields))
    if problem["type"] == "missing":
        return f"{'.'.join(where)} is missing"
    return f"{'.'.join(where)}: {problem['msg']} (got {problem.get('input')!r:.80})"


def _named(place: Iterable[int | str]) -> list[str]:
    """The place of a problem, without what pydantic put in to tell alternatives of a type apart."""
    types = ("float", "int", "str", "list", "dict", "constrained-float")
    return [str(part) for part in place if "[" not in str(part) and part not in types]
