"""QuIP: LDLQ rounding after incoherence processing.

QuIP 2307.13304. Algorithm 1 (pre-processing), eq. 2-3 (LDLQ), Algorithm 2 (post-processing). W, H
are rescaled and rotated by seeded random orthogonal matrices so that no weight and no direction of
H stands out, W' = U W Vᵀ and H' = V H Vᵀ; W' is rounded onto 2^b levels over ±2.4·rms; then all is
undone. LDLQ takes columns from last to first and corrects each by the errors behind it, weighted
with the unit-triangular factor of H. It equals GPTQ on reversed columns (Theorem 6).

The released code is followed where it differs from the paper: rescale, then rotate (adding 1e-2 to
the normalized diagonal), then damp, where Algorithm 1 damps first in the original basis; rotations
are "butterflies" with a different small orthogonal matrix per block, where the paper's Kronecker
product repeats one (``rotation="kronecker"``). Weights are clamped to the grid before rounding in
both, so what the clipping loses is never fed back. Left out: the ADMM variant and stochastic
rounding, which the paper finds worse, and the cast of results to half precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from qbench import (
    Affine,
    Baseline,
    CannotQuantize,
    Corrections,
    QBenchError,
    QuantizedWeight,
    Rounding,
    Scheme,
    Statistics,
    damped,
    feedback_factor,
    get_grid,
    round_columns_,
    rows_of,
)

ROUNDINGS = ("ldlq", "ldlq_rg", "greedy", "nearest")
ROTATIONS = ("butterfly", "kronecker")


@dataclass(frozen=True)
class QuIP(Baseline):
    """Incoherence processing and LDLQ."""

    version: ClassVar[int] = 2
    weight_statistics: ClassVar[tuple[str, ...]] = ("hessian",)
    on_grid: ClassVar[bool] = False
    weights_ignore_activations: ClassVar[bool] = True

    rounding: str = "ldlq"
    """ldlq; ldlq_rg (columns by the diagonal of H, then greedy passes); greedy; nearest."""
    incoherence: bool = True
    """Rescale and rotate before rounding; without it, rows are rounded as they are."""
    rotation: str = "butterfly"
    """butterfly (as released) or kronecker (as in the paper)."""
    rescale: bool = True
    """Balance the diagonals of H and WᵀW before rotating."""
    percdamp: float = 0.01
    """Share of the rotated hessian's mean diagonal that is added to its diagonal."""
    greedy_passes: int = 0
    """Passes of coordinate descent after LDLQ; the paper uses 10 (5 for the largest models)."""

    def default_grid(self, scheme: Scheme) -> str:
        """2.4·rms with incoherence; per-row asymmetric without; beyond the paper below 2 bits."""
        beyond = {1: "sign", 1.58: "ternary"}
        return beyond.get(scheme.wbits, "rms" if self.incoherence else "asym")

    def default_granularity(self, scheme: Scheme) -> str:
        """One scale for the rotated matrix; one per row without rotation."""
        return "tensor" if self.incoherence else "channel"

    def check(self) -> None:
        """Known names, and nothing negative."""
        for value, known in ((self.rounding, ROUNDINGS), (self.rotation, ROTATIONS)):
            if value not in known:
                raise QBenchError(f"QuIP has no {value!r}; choose one of {', '.join(known)}")
        if self.percdamp < 0 or self.greedy_passes < 0:
            raise QBenchError(
                f"QuIP percdamp={self.percdamp:g}, greedy_passes={self.greedy_passes}: "
                "neither can be negative; use 0.01 and 0"
            )

    def supports(self, scheme: Scheme) -> str | None:
        """Groups do not exist in a rotated basis."""
        if scheme.group_size > 0:
            return "QuIP has one scale per matrix; groups of input channels do not survive rotation"
        return None

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Quantize ``weight`` (out_features, in_features); rotations are drawn from ``generator``.

        Raises:
            CannotQuantize: if the hessian cannot be factorized with any damping.
        """
        if not self.incoherence:  # QuIP's is the mean over sequences without GPTQ's factor
            return self.round(weight, stats.hessian / 2, scheme)
        left = Rotation.draw(weight.shape[0], generator, shared=self.rotation == "kronecker")
        right = Rotation.draw(weight.shape[1], generator, shared=self.rotation == "kronecker")
        return self.round_incoherent(weight, stats.hessian, scheme, left, right)

    def round_incoherent(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, left: Orthogonal, right: Orthogonal
    ) -> QuantizedWeight:
        """Algorithm 1, rounding, Algorithm 2, with U = ``left`` and V = ``right``.

        The scale of ``hessian`` (in_features, in_features) cancels; it is left untouched.
        """
        peak = torch.stack(torch.aminmax(hessian)).abs().max()
        if not (torch.isfinite(peak) and peak > 0):
            raise CannotQuantize("the hessian is zero or not finite")
        hessian, scale = hessian / peak, torch.ones_like(hessian[0])
        if self.rescale:
            mass = weight.square().sum(0).clamp(min=1e-8)
            scale = (hessian.diagonal().clamp(min=1e-8) / mass).pow(0.25)
        rotated = left.turn(right.turn((weight * scale).T).T)
        hessian.div_(scale).div_(scale.unsqueeze(1))
        hessian.mul_(hessian.shape[0] / hessian.trace())
        hessian.diagonal().add_(1e-2)
        hessian = right.turn(right.turn(hessian).T)
        found = self.round(rotated, hessian, scheme)
        restored = left.turn_back(right.turn_back(found.weight.T).T).div_(scale)
        return QuantizedWeight(
            weight=restored,
            codes=found.codes,
            scale=found.scale,
            zero_point=found.zero_point,
            # what undoes the basis: the rescaling vector; rotations come back from their seed
            stored_bits=weight.numel() * _code_bits(scheme)
            + 16.0 * (rows_of(weight, scheme).shape[0] + self.rescale * scale.numel()),
            report=found.report,
        )

    def round(self, weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedWeight:
        """Round in the basis given, and return the result in the same basis."""
        grid, bits = get_grid(scheme.grid), scheme.wbits
        fitted = grid.fit(rows_of(weight, scheme), bits)
        affine = Affine(*(part.squeeze(-1) for part in fitted))
        weight = weight.masked_fill(hessian.diagonal() == 0, 0)
        low, high = grid.qmin(bits), grid.qmax(bits)
        target = (weight / affine.scale + affine.zero_point).clamp(low, high)
        limits = Limits(low, high)
        if self.rounding == "nearest":
            codes, damping = limits.round(target), None
        else:
            codes, damping = self.descend(target, hessian, limits)
        return QuantizedWeight(
            weight=grid.decode(codes, affine),
            codes=codes,
            scale=affine.scale,
            zero_point=affine.zero_point,
            report={"damping": damping},
        )

    def descend(self, target: Tensor, hessian: Tensor, limits: Limits) -> tuple[Tensor, float]:
        """Codes for ``target`` (in code units) that lower the proxy loss under ``hessian``."""
        order = None
        if self.rounding == "ldlq_rg":  # LDLQ starts at the last column: the largest diagonal
            diagonal = hessian.diagonal()
            order = diagonal.masked_fill(diagonal == 0, 1).argsort()
            target = target[:, order]
        factor, damping = feedback_factor(hessian, self.percdamp, order)
        if self.rounding == "greedy":
            codes, passes = limits.round(target), max(self.greedy_passes, 1)
        else:
            codes, passes = ldlq(target, factor, limits), self.greedy_passes
        if passes:
            del factor
            codes = greedy(codes, target, damped(hessian, damping, order), limits, passes)
        return codes if order is None else codes[:, order.argsort()], damping


class Limits(NamedTuple):
    """Smallest and largest code."""

    low: float
    high: float

    def rounding(self) -> Rounding:
        """The same for :func:`round_columns_`."""
        return Rounding(self.low, self.high, half_up=True)

    def round(self, x: Tensor) -> Tensor:
        """Half up, as QuIP's code rounds, then clamp."""
        return torch.floor(x + 0.5).clamp_(self.low, self.high)


def ldlq(target: Tensor, factor: Tensor, limits: Limits, block_size: int = 128) -> Tensor:
    """Eq. 2: Ŵ_k = Q(W_k + (W - Ŵ) L_k), k from last to first, L the unit factor minus identity.

    Args:
        target: weights in code units (out_features, in_features).
        factor: unit lower triangular L with H = L D Lᵀ.
        limits: of the codes.
        block_size: columns whose corrections are summed one at a time; those of later blocks come
            in one product (the result is the same).
    """
    codes, error = torch.empty_like(target), target.clone()
    corrections = Corrections(error, factor)
    for end in range(target.shape[1], 0, -block_size):
        start = max(end - block_size, 0)
        block = error[:, start:end]
        torch.add(block, corrections.of(start, end), out=codes[:, start:end])
        square = factor[start:end, start:end]
        round_columns_(codes[:, start:end], block, square, code_units(target), limits.rounding())
    return codes


def greedy(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    limits: Limits,
    passes: int,
    block_size: int = 128,
) -> Tensor:
    """Coordinate descent on the proxy loss, columns from last to first (QuIP, "greedy updates").

    Column k moves to the nearest code of c_k - (C - W) H_k / H_kk. A column that moves by d changes
    what later ones of its block see by -d H_jk / H_kk: the walk of LDLQ, with another factor.

    As released, codes are clamped after a whole pass, and the running error keeps what they were
    before; the paper clamps each coordinate.
    """
    codes, error, diagonal = codes.clone(), codes - target, hessian.diagonal()
    free = Limits(-math.inf, math.inf).rounding()
    for _ in range(passes):
        for end in range(codes.shape[1], 0, -block_size):
            start = max(end - block_size, 0)
            here, moved = diagonal[start:end], codes[:, start:end].clone()
            current = moved - error @ hessian[:, start:end] / here
            square = hessian[start:end, start:end] / here
            round_columns_(current, moved, square, code_units(target), free)
            error[:, start:end] -= moved
            codes[:, start:end] = current
        codes.clamp_(limits.low, limits.high)
    return codes


def code_units(like: Tensor) -> Affine:
    """The grid of the integers."""
    return Affine(like.new_ones(1, 1), like.new_zeros(1, 1))


class Orthogonal(Protocol):
    """A rotation of the columns of a matrix."""

    def turn(self, x: Tensor) -> Tensor:
        """Q x for x (n, m)."""

    def turn_back(self, x: Tensor) -> Tensor:
        """Qᵀ x for x (n, m)."""


class Rotation:
    """A seeded two-factor orthogonal matrix of size n = p·q, applied in O(n·(p+q)).

    A vector is permuted, laid out as p × q, each of the p rows turned by a q × q matrix, each of
    the q columns by a p × p matrix, and permuted again. ``shared`` uses one matrix for all rows and
    one for all columns: the Kronecker product of the paper.
    """

    def __init__(self, rows: Tensor, columns: Tensor, first: Tensor, last: Tensor) -> None:
        self.rows, self.columns = rows, columns
        """(p or 1, q, q) and (q or 1, p, p)"""
        self.first, self.last = first, last
        """Permutations before and after."""

    @classmethod
    def draw(cls, n: int, generator: Generator, shared: bool = False) -> Rotation:
        """Draw the factors and permutations for size ``n``."""
        p, q = two_factors(n)
        rows = random_orthogonal(1 if shared else p, q, generator)
        columns = random_orthogonal(1 if shared else q, p, generator)
        first, last = (torch.randperm(n, generator=generator) for _ in range(2))
        return cls(rows, columns, first, last)

    def turn(self, x: Tensor) -> Tensor:
        """Q x for x (n, m): two batched products between two permutations of rows."""
        rows, columns = self.rows.to(x), self.columns.to(x)
        p, q = columns.shape[-1], rows.shape[-1]
        y = x.contiguous()[self.first.to(x.device)].view(p, q, -1)
        y = torch.bmm(rows.expand(p, -1, -1), y)
        y = torch.bmm(columns.expand(q, -1, -1), y.transpose(0, 1))  # lies as (q, p, m)
        return y.flatten(0, 1)[(self.last % q * p + self.last // q).to(x.device)]

    def turn_back(self, x: Tensor) -> Tensor:
        """Qᵀ x for x (n, m)."""
        rows, columns = self.rows.to(x), self.columns.to(x)
        p, q = columns.shape[-1], rows.shape[-1]
        y = x.contiguous()[self.last.argsort().to(x.device)].view(p, q, -1)
        y = torch.bmm(columns.mT.expand(q, -1, -1), y.transpose(0, 1)).transpose(0, 1)
        y = torch.bmm(rows.mT.expand(p, -1, -1), y)
        return y.flatten(0, 1)[self.first.argsort().to(x.device)]


def two_factors(n: int) -> tuple[int, int]:
    """Deal the prime factors of n = p·q out alternately, smallest first, as QuIP's code does."""
    primes, rest, divisor = [], n, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    primes += [rest] if rest > 1 else []
    p = q = 1
    for i, prime in enumerate(primes):
        p, q = (p * prime, q) if i % 2 == 0 else (p, q * prime)
    return p, q


def random_orthogonal(count: int, size: int, generator: Generator) -> Tensor:
    """``count`` orthogonal matrices with determinant 1, Haar distributed, (count, size, size)."""
    gaussian = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    q[:, :, 0] *= torch.linalg.det(q).sign().unsqueeze(-1)
    return q.float()


def _code_bits(scheme: Scheme) -> float:
    return get_grid(scheme.grid).bits_per_code(scheme.wbits)
