"""The contract of a quantization method: a frozen dataclass with a few hooks.

The harness owns the loop over blocks, devices, activation quantizers and randomness; a method
says which statistics it wants, may rewrite a block before rounding, and turns one weight matrix
at a time into a quantized one. See :mod:`qbench.quantization.quantize` for when each hook is
called, and ``qbench check`` for whether a method keeps the contract.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qbench.errors import QBenchError, unknown
from qbench.grid import RANGE_GRIDS, QuantizedWeight, default_activation_grid, get_grid
from qbench.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qbench.models.blocks import Block
    from qbench.quantization.observers import Observer, Statistics


@dataclass
class TransformContext:
    """What a baseline sees of one block before its weights are rounded.

    ``inputs`` and ``reference_outputs`` are sequences over calibration batches, worked out when
    they are looked into; a method that needs neither never touches them.
    """

    block: Block
    """The traced block: its linears by name, which share an input, which norm feeds which."""
    scheme: Scheme
    stats: Mapping[str, Statistics]
    """Per linear, the statistics named in ``transform_statistics``."""
    inputs: Sequence[Tensor]
    """Hidden states entering the block, (sequences, tokens, hidden) each."""
    reference_outputs: Sequence[Tensor]
    """What the block made of ``inputs`` before this call, same shapes."""
    generator: torch.Generator
    report: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Per linear name, anything worth keeping in the record."""

    def run(self, index: int) -> Tensor:
        """The block's output on ``inputs[index]`` as it is now, with gradients if enabled."""
        return self.block.run(self.inputs[index], index)


@dataclass(frozen=True)
class Baseline(ABC):
    """Base class of every method. Subclass, add fields, override what differs.

    Each hyperparameter is a field with a default and a docstring under it; construction only
    stores values, so the command line (``--set alpha=0.7``), sweep files and records know them.
    """

    version: ClassVar[int] = 1
    """Raise it when results change: it is part of every key in the store."""
    transform_statistics: ClassVar[tuple[str | type[Observer], ...]] = ()
    """Observers whose results ``transform`` reads: "absmax", "mean_abs", "hessian", or a class."""
    weight_statistics: ClassVar[tuple[str | type[Observer], ...]] = ()
    """Observers whose results ``quantize_weight`` reads."""
    calibrate_on: ClassVar[str] = "quantized"
    """"quantized": inputs pass through the quantized blocks below; or "full_precision"."""
    activation_granularity: ClassVar[str] = "token"
    """What ``a=auto`` means."""
    is_random: ClassVar[bool] = True
    """Whether results depend on the generators; False keeps the run's seed out of the key."""
    preserves_function: ClassVar[bool] = True
    """Whether ``transform`` leaves the full-precision block's outputs as they were."""
    on_grid: ClassVar[bool] = True
    """Whether the returned weight lies on the grid in the original basis (False: another basis)."""

    rows_are_independent: ClassVar[bool] = False
    """Whether a row is rounded alike whatever other rows the matrix has, at scales per row or
    group: linears that read one input then come as one matrix."""
    weights_ignore_activations: ClassVar[bool] = False
    """Whether ``transform`` and ``quantize_weight`` never look at the activation side of the
    scheme: cells that differ only there then share their weights."""

    def default_grid(self, scheme: Scheme) -> str:
        """Which grid ``auto`` means at this width."""
        return {1: "sign", 1.58: "ternary"}.get(scheme.wbits, "asym")

    def default_granularity(self, scheme: Scheme) -> str:
        """What ``w=auto`` means without a group size: "channel" or "tensor"."""
        return "channel"

    def check(self) -> None:  # noqa: B027
        """Raise QBenchError for a hyperparameter out of its range, naming value, limit and fix."""

    def supports(self, scheme: Scheme) -> str | None:
        """None, or one sentence why this method cannot do this (resolved) scheme."""
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: B027
        """Rewrite the whole model in place before the loop, without changing its function."""

    def stages(self, block: Block) -> list[list[str]]:
        """Names of linears that are calibrated and rounded together, in order."""
        return [list(block.linears)]

    def transform(self, block: Block, context: TransformContext) -> None:  # noqa: B027
        """Rewrite one block in place before its weights are rounded."""

    @abstractmethod
    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: torch.Generator
    ) -> Tensor | QuantizedWeight:
        """Quantize one matrix (out_features, in_features); a pure function of its arguments.

        Args:
            weight: full precision, float32; left untouched.
            scheme: resolved for this matrix (overrides applied, no ``auto``).
            stats: what ``weight_statistics`` asked for; ``stats.hessian`` and the like.
            generator: seeded for this matrix; the only source of randomness.
        """

    def parameters(self) -> dict[str, Any]:
        """Every hyperparameter by name, as stored in records."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def resolve_scheme(scheme: Scheme, baseline: Baseline) -> Scheme:
    """Fill in every ``auto`` and check that grids offer the widths asked for.

    Raises:
        QBenchError: for an unknown grid, or a width the grid does not offer.
    """
    values: dict[str, Any] = {}
    if scheme.wbits < 16:
        if scheme.grid == "auto":
            values["grid"] = baseline.default_grid(scheme)
        get_grid(values.get("grid", scheme.grid)).check(scheme.wbits)
        if scheme.w_granularity == "auto":
            values["w_granularity"] = (
                "group" if scheme.group_size > 0 else baseline.default_granularity(scheme)
            )
    if scheme.abits < 16 or scheme.kvbits < 16:
        if scheme.agrid == "auto":
            own = scheme.abits if scheme.abits < 16 else scheme.kvbits
            values["agrid"] = default_activation_grid(own)
        else:
            for bits in {scheme.abits, scheme.kvbits} - {16}:
                get_grid(scheme.agrid).check(bits)
    if scheme.static and scheme.abits < 16:
        check_static_grid(scheme, values.get("agrid", scheme.agrid))
    if scheme.abits < 16 and scheme.a_granularity == "auto":
        values["a_granularity"] = "tensor" if scheme.static else baseline.activation_granularity
    if scheme.static and values.get("a_granularity", scheme.a_granularity) == "token":
        raise QBenchError(f"scheme {scheme}: static activation scales are per tensor; drop a=token")
    values["overrides"] = tuple(
        (pattern, resolve_scheme(inner, baseline)) for pattern, inner in scheme.overrides
    )
    return dataclasses.replace(scheme, **values).normalized()


def check_static_grid(scheme: Scheme, agrid: str) -> None:
    """Refuse static scales on a grid that is not fitted to smallest and largest values.

    Raises:
        QBenchError: naming the grids that can be static.
    """
    if agrid not in RANGE_GRIDS:
        raise QBenchError(
            f"scheme {scheme}: static scales come from smallest and largest values, which grid "
            f"{agrid!r} is not fitted to; choose one of {', '.join(RANGE_GRIDS)} or drop static"
        )


def why_not(baseline: Baseline, scheme: Scheme) -> str | None:
    """None, or one sentence why this baseline cannot do this resolved scheme anywhere in it."""
    for part in (scheme, *(inner for _, inner in scheme.overrides)):
        reason = baseline.supports(part)
        if reason:
            return reason
    return None


def with_fields(cls: type[Baseline], values: Mapping[str, Any]) -> Baseline:
    """Construct a baseline from field values given as text or as Python values.

    Raises:
        QBenchError: for an unknown field (with the nearest names), or a value of the wrong type or
            out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown(f"field of baseline {cls.__name__}", name, fields or ["(it has none)"])
        converted[name] = _convert(cls, name, value, fields[name].default)
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in converted]
    if missing:
        raise QBenchError(f"{cls.__name__} needs a value for {', '.join(missing)}")
    made = cls(**converted)
    made.check()
    return made


def _convert(cls: type[Baseline], name: str, value: Any, default: Any) -> Any:
    """Read ``value`` as the type of the field's default."""
    kind = type(default)
    try:
        if kind is bool:
            text = str(value).lower()
            if text not in ("true", "false", "1", "0", "yes", "no"):
                raise ValueError
            return text in ("true", "1", "yes")
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        return kind(value) if kind in (int, float, str) else value
    except (TypeError, ValueError, OverflowError):
        raise QBenchError(
            f"{cls.__name__}.{name} takes a {kind.__name__}, got {value!r}; "
            f"for example {name}={default!r}"
        ) from None
