"""Round the linears of one stage and report each of them.

Linears that read one input are handed to a method as one matrix where its rows do not depend on
each other (``Baseline.rows_are_independent``): one factorization, one walk over the columns.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.baseline import Baseline
from qbench.errors import QBenchError, RunFailed
from qbench.grid import QuantizedWeight, round_to_nearest, stored_bits
from qbench.models.blocks import Block
from qbench.models.checks import is_finite
from qbench.models.linear import Linear, attach
from qbench.quantization.factorize import CannotQuantize
from qbench.quantization.observers import Statistics
from qbench.record import LayerReport
from qbench.scheme import Scheme

STACKED = 1 << 22
"""Most weights in a stack of matrices: larger ones fill the machine alone, and need the memory."""


@dataclass
class _InputTransform:
    """Hook that hands a linear's input to the method's own transform first."""

    transform: Callable[[Tensor], Tensor]

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return self.transform(x)


@dataclass(frozen=True)
class Rounder:
    """One method at one scheme, with the run's seed."""

    baseline: Baseline
    scheme: Scheme
    seed: int

    def generator(self, name: str) -> torch.Generator:
        """A generator that depends on the run's seed and a name, not on what ran before."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def round_(
        self, block: Block, names: list[str], stats: dict[str, Statistics]
    ) -> list[LayerReport]:
        """Quantize the named linears of a block in place; one kept at 16 bits is reported too.

        ``stats`` loses its entries as they are used up: a hessian is as large as a matrix.
        """
        reports = {}
        for together in self._stacks(block, names, stats):
            schemes = [self.scheme.for_linear(f"{block.name}.{name}") for name in together]
            if schemes[0].wbits >= 16:
                for name in together:
                    reports[name] = _untouched(block, block.linears[name], schemes[0])
            else:
                for name, report in zip(
                    together, self._round_stack_(block, together, schemes[0], stats), strict=True
                ):
                    reports[name] = report
            for name in together:
                stats.pop(name)
        return [reports[name] for name in names]

    def _stacks(
        self, block: Block, names: list[str], stats: dict[str, Statistics]
    ) -> list[list[str]]:
        """The names, those that are rounded as one matrix together."""
        stacks: dict[tuple[Any, ...], list[str]] = {}
        for name in names:
            scheme = self.scheme.for_linear(f"{block.name}.{name}")
            shared = self.baseline.rows_are_independent and scheme.w_granularity != "tensor"
            # experts share their input only where the same tokens reach them
            alone = not shared or block.linears[name].expert is not None
            key = (name,) if alone else (id(stats[name]), str(scheme))
            stacks.setdefault(key, []).append(name)
        return [part for stack in stacks.values() for part in _no_larger(stack, block)]

    def _round_stack_(
        self, block: Block, names: list[str], scheme: Scheme, stats: dict[str, Statistics]
    ) -> list[LayerReport]:
        started = time.perf_counter()
        linears = [block.linears[name] for name in names]
        seen = stats[names[0]]
        full_names = [f"{block.name}.{name}" for name in names]
        quantized, fallback = self._round(full_names[0], linears, scheme, seen)
        parts = _split(quantized, [linear.shape[0] for linear in linears])
        del quantized
        seconds = (time.perf_counter() - started) / len(names)
        reports = []
        for name, linear, part in zip(full_names, linears, parts, strict=True):
            self._check(name, part, scheme)
            weight = linear.weight.float()
            reports.append(_report(name, weight, part, scheme, seen, fallback, seconds))
            del weight  # as large as the matrix, or the matrix itself
            linear.set_weight_(part.weight)
            if part.input_transform is not None:
                attach([linear], _InputTransform(part.input_transform))
        return reports

    def _round(
        self, name: str, linears: list[Linear], scheme: Scheme, stats: Statistics
    ) -> tuple[QuantizedWeight, str | None]:
        """The method's own rounding, or rounding to nearest and the reason for it.

        A method may err and write into what it is given: that is a copy, and nobody else holds it.
        """
        try:
            if self.baseline.weight_statistics and not stats.n_tokens:
                raise CannotQuantize("no calibration token reached it")
            generator = self.generator(name)
            quantized = self.baseline.quantize_weight(_whole(linears), scheme, stats, generator)
        except CannotQuantize as reason:
            return round_to_nearest(_whole(linears), scheme), str(reason)
        if isinstance(quantized, Tensor):
            quantized = QuantizedWeight(quantized)
        return quantized, None

    def _check(self, name: str, quantized: QuantizedWeight, scheme: Scheme) -> None:
        method = type(self.baseline).__name__
        if not is_finite(quantized.weight):
            raise RunFailed(f"{method} gave non-finite weights in {name} at {scheme}")
        if quantized.input_transform is not None and self.scheme.needs_static_scales:
            raise QBenchError(
                f"{method} transforms inputs at run time, where scales fixed "
                "before it mean nothing; drop static from the scheme"
            )


def _no_larger(stack: list[str], block: Block) -> list[list[str]]:
    """The stack, or its members one by one where it would be too large."""
    size = sum(block.linears[name].weight.numel() for name in stack)
    return [stack] if size <= STACKED else [[name] for name in stack]


def _whole(linears: list[Linear]) -> Tensor:
    """A copy of the matrices, one below the other, in float32."""
    return torch.cat([linear.weight.float() for linear in linears])


def _untouched(block: Block, linear: Linear, scheme: Scheme) -> LayerReport:
    return LayerReport(
        name=f"{block.name}.{linear.name}",
        shape=linear.shape,
        scheme=str(scheme),
        relative_error=0.0,
        stored_bits=16.0 * linear.weight.numel(),
    )


def _split(quantized: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    """A stack of matrices taken apart again."""
    if len(rows) == 1:
        return [quantized]
    total = len(quantized.weight)

    def apart(tensor: Tensor | None) -> list[Tensor | None]:
        return [None] * len(rows) if tensor is None else list(tensor.split(rows))

    fields = (
        quantized.weight,
        quantized.codes,
        quantized.scale,
        quantized.zero_point,
        quantized.proxy,
    )
    bits = quantized.stored_bits
    return [
        replace(
            quantized,
            weight=weight,
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            proxy=proxy,
            stored_bits=None if bits is None else bits * count / total,
        )
        for count, weight, codes, scale, zero_point, proxy in zip(
            rows, *(apart(field) for field in fields), strict=True
        )
    ]


def _report(
    name: str,
    weight: Tensor,
    quantized: QuantizedWeight,
    scheme: Scheme,
    stats: Statistics,
    fallback: str | None,
    seconds: float,
) -> LayerReport:
    extra = dict(quantized.report or {})
    damping: Any = extra.pop("damping", None)
    rotated = quantized.input_transform is not None
    extra |= {"input_transform": True} if rotated else {}
    delta = None if rotated else weight - quantized.weight.float()
    out_features, in_features = weight.shape
    return LayerReport(
        name=name,
        shape=(out_features, in_features),
        scheme=str(scheme),
        relative_error=None if delta is None else _ratio(_square(delta), _square(weight)),
        proxy_loss=None if delta is None else _proxy_loss(name, delta, weight, quantized, stats),
        stored_bits=stored_bits(quantized, scheme),
        damping=damping,
        fallback=fallback,
        seconds=round(seconds, 4),
        extra=extra,
    )


def _proxy_loss(
    name: str, delta: Tensor, weight: Tensor, quantized: QuantizedWeight, stats: Statistics
) -> float | None:
    """tr(ΔHΔᵀ) / tr(WHWᵀ) in the original basis, undamped; None without a hessian.

    Either is a product as large as the method's own work, so what is known already is taken: the
    method's loss, and the energy of the linear's outputs.
    """
    if "hessian" not in stats or stats.hessian is None:
        return None
    lost = None if quantized.proxy is None else quantized.proxy.double().sum().clamp(min=0)
    if lost is None:
        lost = quadratic(delta, stats.hessian)
    energy = stats.energies.get(name)
    whole = quadratic(weight, stats.hessian) if energy is None else energy * (2 / stats.n_sequences)
    return _ratio(lost, whole)


def quadratic(matrix: Tensor, hessian: Tensor) -> Tensor:
    """tr(M H Mᵀ) for a matrix (out_features, in_features)."""
    product = F.linear(matrix, hessian.to(matrix.device))  # M Hᵀ, whose trace with M is the same
    return product.mul_(matrix).sum(1).double().sum()


def _square(x: Tensor) -> Tensor:
    # row by row: a copy in float64 would be twice the matrix
    return torch.linalg.vector_norm(x, dim=1).double().square().sum()


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
