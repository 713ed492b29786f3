"""Rounding with error feedback, one block of columns at a time: the inner loop of GPTQ and LDLQ.

With H = L D Lᵀ, L unit lower triangular, and columns taken from last to first, column k is rounded
after every later column j has added its error times L[j, k] (QuIP 2307.13304 eq. 2-3). GPTQ
(2210.17323 Algorithm 1) is the same walk on reversed columns (QuIP Theorem 6): its factor U of the
inverse, H = R Rᵀ and U = R⁻¹, cancels, so that one Cholesky of the reversed hessian serves it and
nothing is inverted.

:func:`walk_` below is the readable definition and runs anywhere. On the CPU numba does the same
(:mod:`columns_cpu`), on CUDA Triton (:mod:`columns_cuda`), where they are installed; both give its
results to the last bit, and neither is imported before it is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """How a value in code units becomes a code."""

    low: float
    """Smallest code."""
    high: float
    """Largest code."""
    half_up: bool = False
    """Ties go up, as QuIP's code rounds; otherwise to even, as GPTQ's does."""


class Corrections:
    """What rounded columns add to others: errors (rows, n) times a factor (n, n), in two levels.

    A product of all rounded columns with one block is a narrow one; so the far columns of several
    blocks are multiplied at once, and only the near ones block by block. ``errors`` is read when
    asked: columns from ``end`` on must have been rounded by then, and blocks come downwards.
    """

    def __init__(self, errors: Tensor, factor: Tensor, width: int = 512) -> None:
        self.errors, self.factor, self.width = errors, factor, width
        self.top = self.bottom = errors.shape[1]
        self.far: Tensor | None = None

    def of(self, start: int, end: int) -> Tensor:
        """Of columns ``start`` to ``end`` by all from ``end`` on, (rows, end - start)."""
        errors, factor = self.errors, self.factor
        if end <= self.bottom:
            self.top, self.bottom = end, max(end - self.width, 0)
            self.far = errors[:, end:] @ factor[end:, self.bottom : end]
        if start < self.bottom or self.far is None:
            return errors[:, end:] @ factor[end:, start:end]
        near = errors[:, end : self.top] @ factor[end : self.top, start:end]
        return near.add_(self.far[:, start - self.bottom : end - self.bottom])


def round_columns_(
    current: Tensor,
    original: Tensor,
    factor: Tensor,
    affine: tuple[Tensor, Tensor],
    rounding: Rounding,
    group: Tensor | None = None,
) -> None:
    """Round one block of columns in place, from last to first, feeding errors back.

    Args:
        current: the values to round (rows, width), corrected by every column already rounded;
            becomes the codes.
        original: the values wanted, (rows, width); becomes the errors, wanted minus rounded.
        factor: (width, width), row j the feedback of column j on the columns before it; what
            stands on and above the diagonal is not read.
        affine: scale and zero point, (rows or 1, n_groups) both; a value is
            ``scale * (code - zero_point)``, encoded as :meth:`qbench.grid.Grid.encode` does.
        rounding: to codes.
        group: which scale each column has, (width,) integers; all have the first if None.
    """
    rows, width = current.shape
    if not rows or not width:
        return
    if group is None:
        group = torch.zeros(width, dtype=torch.int64, device=current.device)
    group = group.to(torch.int64).contiguous()
    scale, zero_point = (part.expand(rows, -1) for part in affine)
    parts = (current, original, factor, scale, zero_point)
    single = all(part.dtype == torch.float32 for part in parts)
    walk = compiled_walk(current.device.type) if single else walk_
    walk(*parts, group, rounding)


Walk = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rounding], None]


@cache
def compiled_walk(device: str) -> Walk:
    """The fastest walk there is on this kind of device; a warning where that is the torch loop."""
    try:
        if device == "cpu":
            from qbench.quantization import columns_cpu

            return columns_cpu.walk_
        if device == "cuda":
            from qbench.quantization import columns_cuda

            return columns_cuda.walk_
    except ImportError as error:
        warnings.warn(f"columns are rounded in torch, many times slower: {error}", stacklevel=2)
    return walk_


def walk_(
    current: Tensor,
    original: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    rounding: Rounding,
) -> None:
    """What :func:`round_columns_` says, column by column in torch."""
    scale, zero_point = (part.index_select(1, group) for part in (scale, zero_point))
    whole = zero_point.floor()
    part = zero_point - whole  # split as Grid.encode does, so that ties fall the same way
    for column in reversed(range(current.shape[1])):
        step, zero = scale[:, column], zero_point[:, column]
        x = current[:, column] / step + part[:, column]
        x = torch.floor(x + 0.5) if rounding.half_up else torch.round(x)
        codes = (x + whole[:, column]).clamp_(rounding.low, rounding.high)
        error = original[:, column] - step * (codes - zero)
        current[:, column] = codes
        original[:, column] = error
        current[:, :column] += error.unsqueeze(1) * factor[column, :column]
