"""What a measurement leaves behind: keys that name it and records that hold it.

A key holds everything that can change a number and nothing else: no machine, no path, no version
of this format. Its digest names the files in the store, so a result is found again exactly when
the same thing would be measured. Records add what a reader wants to know: environment, time,
memory, what every layer went through.

Torch-free, so that tables and plots open in a moment. Texts of data sets are never stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RECORD_FORMAT = 1
"""Raised when the layout of a record changes; readers migrate. Never part of a key."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Key(_Model):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, in hexadecimal."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class BaselineSpec(_Key):
    """Which method ran, with which hyperparameters."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Every field of the baseline, defaults included."""
    version: int = 1
    source: str | None = None
    """SHA-256 of the file for a ``file.py:Class`` baseline, None for an installed one."""


class CalibrationSpec(_Key):
    """Which text a method saw."""

    source: str = "c4"
    """Corpus name, or a path to a text or JSONL file."""
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    tokens: str | None = None
    """SHA-256 of the token ids, once they are known: two files called c4 are not one corpus."""


class QuantizationKey(_Key):
    """One quantized model: checkpoint × baseline × scheme × calibration."""

    weights: str
    """Fingerprint of the checkpoint's tensors and configuration."""
    baseline: BaselineSpec
    scheme: str
    """Text form of the resolved scheme (no ``auto`` in it)."""
    calibration: CalibrationSpec | None = None
    """None where the method and the scheme need no data."""
    seed: int = 0
    """Seed of the method's own randomness (rotations); 0 where it draws nothing."""
    dtype: str = "float32"
    """Dtype of weights and activations while quantizing."""


class TaskKey(_Key):
    """One measurement of one quantized model."""

    quantization: str
    """Digest of the QuantizationKey."""
    task: str
    protocol: str
    """Perplexity: the protocol id. Zero-shot: "lm-eval"."""
    definition: str
    """SHA-256 of what defines the task: its YAML and helper functions, or the protocol's fields."""
    data: str
    """SHA-256 of the data it was measured on."""
    version: int = 1
    num_fewshot: int = 0
    seed: int = 0
    """Seed that draws the few-shot examples; 0 when there are none."""
    limit: int | None = None
    encoding: str
    """How context and continuation become tokens: lmeval03, joint or joint+bos."""
    dtype: str = "float32"
    """Compute dtype of the model."""
    max_length: int
    """Context length in tokens the model was run with."""


class Metric(_Model):
    """One number with its uncertainty; a number that is not finite says which kind it is."""

    value: float | None
    stderr: float | None = None
    non_finite: Literal["inf", "-inf", "nan"] | None = None

    @classmethod
    def of(cls, value: float, stderr: float | None = None) -> Metric:
        """Build from a float that may be infinite or NaN."""
        if stderr is not None and not math.isfinite(stderr):
            stderr = None
        if math.isfinite(value):
            return cls(value=value, stderr=stderr)
        kind = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return cls(value=None, stderr=stderr, non_finite=kind)  # type: ignore[arg-type]

    def as_float(self) -> float:
        """The number, infinite and NaN included."""
        return float(self.non_finite) if self.non_finite else float(self.value or 0.0)


class LayerReport(_Model):
    """What one weight matrix went through."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)"""
    scheme: str
    relative_error: float | None
    """||W - Ŵ||² / ||W||² against the full-precision weight."""
    proxy_loss: float | None = None
    """tr((W-Ŵ)H(W-Ŵ)ᵀ) / tr(WHWᵀ), where the method collected a hessian."""
    stored_bits: float
    """Bits this matrix needs: codes, scales, zero points, anything the method adds."""
    damping: float | None = None
    """Share of the mean diagonal that was added to the hessian."""
    fallback: str | None = None
    """Why the method's own rounding was replaced by rounding to nearest; None if it was not."""
    seconds: float = 0.0
    extra: dict[str, Any] = Field(default_factory=dict)


class MatrixShape(_Model):
    """Equal matrices of the decoder blocks."""

    out_features: int
    in_features: int
    count: int
    """How many there are."""
    active: float
    """How many of them one token meets: fewer than ``count`` where they are experts."""


class Dimensions(_Model):
    """The shape of a model, as far as memory and arithmetic depend on it."""

    hidden_size: int
    intermediate_size: int | None
    """Width inside the MLP; None where the configuration does not say it."""
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    tied_embeddings: bool
    embedding_parameters: int
    """Weights of the token embedding."""
    head_parameters: int
    """Weights of the output head, 0 where it is the embedding."""
    matrices: list[MatrixShape]
    """Matrices of the decoder blocks, quantized or not, by shape."""
    stored_bytes: int | None = None
    """Size of the checkpoint's weight files; None for one that has no files."""

    @property
    def attention_width(self) -> int:
        """Channels of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def matrix_weights(self) -> int:
        """Weights of the decoder blocks' matrices, all experts counted."""
        return sum(m.out_features * m.in_features * m.count for m in self.matrices)


class QuantizationRecord(_Model):
    """One quantized model: how it came about."""

    format: int = RECORD_FORMAT
    key: QuantizationKey
    checkpoint: str
    """Display name."""
    status: Literal["ok", "failed", "not_applicable"] = "ok"
    error: str | None = None
    """What went wrong, or the sentence why the method cannot do this scheme."""
    trained: bool = False
    """Whether the low bit width was trained (BitNet) rather than applied afterwards."""
    quantized_elsewhere: bool = False
    """Whether the checkpoint was quantized when it came (a GPTQ checkpoint)."""
    parameters: int | None = None
    """Number of parameters of the model."""
    dimensions: Dimensions | None = None
    """The model's shape; None in records from before it was kept, and where nothing was loaded."""
    effective_bits: float | None = None
    """Mean stored bits per weight over the quantized matrices."""
    layers: list[LayerReport] = Field(default_factory=list)
    skipped: dict[str, str] = Field(default_factory=dict)
    """Matrices of decoder blocks that stayed in full precision: name -> why."""
    notes: list[str] = Field(default_factory=list)
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    created: str | None = None

    @property
    def fallbacks(self) -> int:
        """How many layers were rounded to nearest because the method could not run."""
        return sum(layer.fallback is not None for layer in self.layers)


class TaskRecord(_Model):
    """One measurement."""

    format: int = RECORD_FORMAT
    key: TaskKey
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    metrics: dict[str, Metric] = Field(default_factory=dict)
    n_items: int = 0
    """Items scored (questions, or windows of a perplexity)."""
    details: dict[str, Any] = Field(default_factory=dict)
    """Token and byte counts, batching policy, truncated items."""
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    created: str | None = None
