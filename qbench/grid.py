"""Grids: the code sets that "W4" or "W2" can mean, each under a name that every table prints.

Published implementations disagree about the codes of a width (relative error on Gaussian weights
at 2 bits: 0.21 to 0.76), and the usual formulas break at 1 bit. So a grid is named, never implied.
All of them are affine: a value is ``scale * (code - zero_point)`` with codes in
``qmin(bits) .. qmax(bits)``; they differ in the codes and in how scale and zero point follow from
the values. Fitting reduces the last dimension; :func:`round_to_nearest` arranges a weight matrix
so that this is the row, the group or the whole tensor.

Sources: BitNet 2310.11453 eq. 2-5 and 12 (bitnet, sign), BitNet b1.58 2402.17764 (ternary),
GPTQ 2210.17323 and its released code (asym, gptq_sym), SmoothQuant's released code and LLM.int8
2208.07339 (restricted), QuIP 2307.13304 Alg. 1 line 6 (rms).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.errors import QBenchError, unknown
from qbench.scheme import Scheme, format_bits

QUIP_RHO = 2.4
"""Half the width of the ``rms`` grid in units of the root mean square (QuIP section 4)."""


class Affine(NamedTuple):
    """Scale and zero point of every row that was fitted, both (..., 1); scales are positive."""

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Grid:
    """One named code set."""

    name: str
    summary: str
    """The codes and the scale, in words."""
    min_bits: float
    max_bits: float
    codes: Callable[[float], tuple[int, int]]
    """bits -> (qmin, qmax)"""
    fit_affine: Callable[[Tensor, float], Affine]
    """values (..., n), bits -> scale and zero point"""

    def offers(self, bits: float) -> bool:
        """Whether the grid is defined at this width."""
        return self.min_bits <= bits <= self.max_bits and (bits != 1.58 or self.min_bits == 1.58)

    def check(self, bits: float) -> None:
        """Raise if the width is not one of the grid's.

        Raises:
            QBenchError: naming the grids that offer it.
        """
        if not self.offers(bits):
            others = ", ".join(g.name for g in GRIDS.values() if g.offers(bits)) or "none"
            raise QBenchError(
                f"grid {self.name!r} has no {format_bits(bits)}-bit codes "
                f"(it offers {self.widths_text()}); at {format_bits(bits)} bits choose: {others}"
            )

    def widths_text(self) -> str:
        """The widths offered, as a table prints them."""
        if self.min_bits == self.max_bits:
            return format_bits(self.min_bits)
        return f"b >= {format_bits(self.min_bits)}"

    def qmin(self, bits: float) -> int:
        """Smallest code."""
        return self.codes(bits)[0]

    def qmax(self, bits: float) -> int:
        """Largest code."""
        return self.codes(bits)[1]

    def levels(self, bits: float) -> int:
        """How many codes there are."""
        low, high = self.codes(bits)
        return high - low + 1

    def bits_per_code(self, bits: float) -> float:
        """What a code costs when stored: log2 of the levels where that exceeds ``bits``."""
        return max(float(bits), math.log2(self.levels(bits)))

    def fit(self, values: Tensor, bits: float) -> Affine:
        """Scale and zero point for each row of ``values`` (..., n); float32 or better.

        Scales are finite and positive also for rows of zeros.
        """
        self.check(bits)
        return self.fit_affine(values, bits)

    def encode(self, values: Tensor, affine: Affine, bits: float) -> Tensor:
        """Codes (float, integral) of ``values`` (..., n), rounding half to even, clamped.

        A fractional zero point (grids without a zero level) is split, so that an integral one is
        added after rounding as the GPTQ code does: ties fall the same way.
        """
        whole = affine.zero_point.floor()
        codes = torch.round(values / affine.scale + (affine.zero_point - whole)) + whole
        return codes.clamp_(self.qmin(bits), self.qmax(bits))

    def decode(self, codes: Tensor, affine: Affine) -> Tensor:
        """Values of codes."""
        return affine.scale * (codes - affine.zero_point)

    def fake_quantize(self, values: Tensor, bits: float) -> Tensor:
        """Each row of ``values`` (..., n) rounded to its own fitted grid, in the input dtype."""
        x = values.float() if values.dtype.itemsize < 4 else values
        affine = self.fit(x, bits)
        return self.decode(self.encode(x, affine, bits), affine).to(values.dtype)


def _positive(scale: Tensor) -> Tensor:
    """Replace scales of all-zero rows by one, which encodes them as zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _almost_zero(scale: Tensor) -> Tensor:
    """The same for grids without a zero level: their levels have to shrink to nothing instead."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _absmax(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def _fit_restricted(x: Tensor, bits: float) -> Affine:
    scale = _positive(_absmax(x) / (2 ** (bits - 1) - 1))
    return Affine(scale, torch.zeros_like(scale))


def _fit_bitnet(x: Tensor, bits: float) -> Affine:
    scale = _positive(_absmax(x) / 2 ** (bits - 1))
    return Affine(scale, torch.zeros_like(scale))


def _fit_gptq_sym(x: Tensor, bits: float) -> Affine:
    # As released: only a row with a negative value gets the symmetric range; a row without one
    # keeps (0, max) but the same zero point, so it saturates below its maximum.
    low, high = x.amin(-1, keepdim=True), _absmax(x)
    span = torch.where(low < 0, 2 * high, high)
    span = torch.where(span > 0, span, torch.full_like(span, 2.0))
    scale = span / (2**bits - 1)
    return Affine(_positive(scale), torch.zeros_like(scale))


def _fit_asym(x: Tensor, bits: float) -> Affine:
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = low - empty.to(low.dtype), high + empty.to(high.dtype)
    scale = _positive((high - low) / (2**bits - 1))
    return Affine(scale, torch.round(-low / scale))


def _fit_rms(x: Tensor, bits: float) -> Affine:
    top = QUIP_RHO * x.square().mean(-1, keepdim=True).sqrt()
    steps = 2**bits - 1
    scale = _almost_zero(2 * top / steps)
    return Affine(scale, torch.full_like(scale, steps / 2))


def _fit_sign(x: Tensor, bits: float) -> Affine:
    scale = _almost_zero(2 * x.abs().mean(-1, keepdim=True))
    return Affine(scale, torch.full_like(scale, 0.5))


def _fit_ternary(x: Tensor, bits: float) -> Affine:
    scale = _positive(x.abs().mean(-1, keepdim=True))
    return Affine(scale, torch.zeros_like(scale))


def _two_complement(bits: float) -> tuple[int, int]:
    half = int(2 ** (bits - 1))
    return -half, half - 1


def _unsigned(bits: float) -> tuple[int, int]:
    return 0, int(2**bits) - 1


def _balanced(bits: float) -> tuple[int, int]:
    half = int(2 ** (bits - 1))
    return -half, half


def _narrow(bits: float) -> tuple[int, int]:
    half = int(2 ** (bits - 1)) - 1
    return -half, half


RANGE_GRIDS = ("restricted", "bitnet", "gptq_sym", "full", "asym")
"""Grids whose scale follows from the smallest and largest value alone."""
GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid(
            "restricted",
            "-(2^(b-1)-1) .. 2^(b-1)-1, scale = absmax / (2^(b-1)-1)",
            2,
            16,
            _narrow,
            _fit_restricted,
        ),
        Grid(
            "bitnet",
            "-2^(b-1) .. 2^(b-1) (2^b+1 levels), scale = absmax / 2^(b-1)",
            1,
            16,
            _balanced,
            _fit_bitnet,
        ),
        Grid(
            "gptq_sym",
            "-2^(b-1) .. 2^(b-1)-1, scale = 2·absmax / (2^b-1)",
            2,
            16,
            _two_complement,
            _fit_gptq_sym,
        ),
        Grid(
            "full",
            "-2^(b-1) .. 2^(b-1)-1, scale = absmax / 2^(b-1); the largest positive value is "
            "clipped by one step",
            2,
            16,
            _two_complement,
            _fit_bitnet,
        ),
        Grid(
            "asym",
            "0 .. 2^b-1 with a zero point, scale = (max-min) / (2^b-1), range includes 0",
            1,
            16,
            _unsigned,
            _fit_asym,
        ),
        Grid(
            "rms",
            "2^b levels evenly on ±2.4·rms, none of them zero",
            1,
            16,
            _unsigned,
            _fit_rms,
        ),
        Grid("sign", "±(mean absolute value), zero goes to minus", 1, 1, _unsigned, _fit_sign),
        Grid(
            "ternary",
            "-1, 0, +1 times the mean absolute value",
            1.58,
            1.58,
            lambda bits: (-1, 1),
            _fit_ternary,
        ),
    )
}


def get_grid(name: str) -> Grid:
    """The grid of that name.

    Raises:
        QBenchError: for an unknown name, with the nearest ones.
    """
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    return GRIDS[name]


def default_activation_grid(bits: float) -> str:
    """``restricted`` (LLM.int8, SmoothQuant's code); at 1 bit BitNet eq. 4 read literally."""
    return "restricted" if bits >= 2 else "bitnet"


@dataclass(frozen=True)
class QuantizedWeight:
    """What a baseline made of one weight matrix (out_features, in_features).

    Only ``weight`` is required. Codes and scales feed tests, effective bits and exports.
    """

    weight: Tensor
    """Dequantized values, (out_features, in_features)."""
    codes: Tensor | None = None
    """Integral codes, (out_features, in_features)."""
    scale: Tensor | None = None
    """(out_features, n_groups); one row for a per-tensor scale."""
    zero_point: Tensor | None = None
    """As ``scale``."""
    g_idx: Tensor | None = None
    """Group of every input channel, (in_features,), where groups are not consecutive."""
    stored_bits: float | None = None
    """Bits in all, where codes, fp16 scales and zero points of the code width do not say it."""
    proxy: Tensor | None = None
    """tr(ΔHΔᵀ) of every row, undamped, (out_features,); worked out where it is not given."""
    input_transform: Callable[[Tensor], Tensor] | None = None
    """Applied to the linear's input at run time, by two threads at once; it must keep no state."""
    report: dict[str, object] | None = None
    """Goes into the layer's record: damping, fallback, anything worth keeping."""


def rows_of(weight: Tensor, scheme: Scheme) -> Tensor:
    """Arrange a weight (out, in) so that the last dimension is what shares one scale.

    Returns:
        (1, 1, out*in) per tensor, (out, 1, in) per channel, (out, n_groups, group_size) per group.

    Raises:
        QBenchError: if the group size does not divide the row.
    """
    if scheme.group_size > 0:
        check_group_size(weight.shape[1], scheme.group_size)
        return weight.reshape(weight.shape[0], -1, scheme.group_size)
    if scheme.w_granularity == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.unsqueeze(1)


def check_group_size(in_features: int, group_size: int) -> None:
    """Raise if ``group_size`` does not divide ``in_features``.

    Raises:
        QBenchError: naming both and the nearest sizes that do divide.
    """
    if group_size > 0 and in_features % group_size:
        divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
        near = sorted(divisors, key=lambda d: abs(math.log(d / group_size)))[:3]
        raise QBenchError(
            f"group size {group_size} does not divide a row of {in_features} weights; "
            f"choose one that does (near: {', '.join(map(str, sorted(near)))}) or -1"
        )


def round_to_nearest(weight: Tensor, scheme: Scheme, mse: bool = False) -> QuantizedWeight:
    """Round a weight (out_features, in_features) to the scheme's grid, no data needed.

    Args:
        weight: left untouched.
        scheme: resolved; its width, grid, granularity and group size are used.
        mse: shrink each range to the one of least |error|^2.4 (see :func:`search_clip`).
    """
    grid, bits = get_grid(scheme.grid), scheme.wbits
    rows = rows_of(weight.float(), scheme)
    affine = search_clip(grid, rows, bits) if mse else grid.fit(rows, bits)
    codes = grid.encode(rows, affine, bits)
    values = grid.decode(codes, affine)
    return QuantizedWeight(
        weight=values.reshape(weight.shape).to(weight.dtype),
        codes=codes.reshape(weight.shape),
        scale=affine.scale.squeeze(-1),
        zero_point=affine.zero_point.squeeze(-1),
    )


def search_clip(
    grid: Grid, rows: Tensor, bits: float, norm: float = 2.4, steps: int = 100, shrink: float = 0.8
) -> Affine:
    """The range, shrunk by up to ``shrink``, whose rounding error |e|^norm is least per row.

    The clip search of GPTQ's quantizer: the ranges p·(min, max) for p = 1, 1-1/steps, ...
    """
    scale, zero_point = grid.fit(rows, bits)
    least = torch.full_like(scale, math.inf)
    for step in range(int(shrink * steps)):
        tried = grid.fit(rows * (1 - step / steps), bits)
        values = grid.decode(grid.encode(rows, tried, bits), tried)
        error = (values - rows).abs_().pow_(norm).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        zero_point = torch.where(better, tried.zero_point, zero_point)
    return Affine(scale, zero_point)


def stored_bits(quantized: QuantizedWeight, scheme: Scheme) -> float:
    """Bits a quantized matrix needs: codes, one fp16 scale and one zero point per group.

    A grid whose zero point is the same for every group stores none.
    """
    if quantized.stored_bits is not None:
        return float(quantized.stored_bits)
    count = quantized.weight.numel()
    if scheme.wbits >= 16:
        return 16.0 * count
    grid = get_grid(scheme.grid)
    scale = quantized.scale
    groups = rows_of(quantized.weight, scheme)[..., 0].numel() if scale is None else scale.numel()
    per_group = 16.0 + (scheme.wbits if scheme.grid == "asym" else 0.0)
    index = 32.0 * quantized.g_idx.numel() if quantized.g_idx is not None else 0.0
    return grid.bits_per_code(scheme.wbits) * count + per_group * groups + index
