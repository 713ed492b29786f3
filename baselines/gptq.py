"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

GPTQ 2210.17323 Algorithm 1. With H = 2XXᵀ + λI and U the upper Cholesky factor of H⁻¹, column j is
rounded, its error (w_j - q_j) / U_jj is subtracted from the later columns along U_j, and updates to
columns outside the current block of 128 are applied once per block. λ is 1 % of the mean diagonal.

U itself is not computed. With H = R Rᵀ, R upper triangular with columns scaled to a unit diagonal,
the weight that U's recursion has in column k when its turn comes is w_k + Σ_j<k (w_j - q_j) R_jk,
of original weights w (QuIP 2307.13304, Theorem 6). R is a Cholesky factor of H in reversed order,
so here the columns are reversed and walked from the last one on, as :func:`round_columns_` does.

Beyond the paper, as in the released code: dead inputs (H_jj = 0) are zeroed; ``act_order`` goes by
decreasing diagonal; group grids are fitted when their first column comes up, from the weights as
they stood when the block of columns began (``fresh_groups`` uses the weights of that moment;
``static_groups`` fits all before the start). The reference's row grid is fitted before dead
columns are zeroed, and so is this one. Left out: packing, and the trits mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from qbench import (
    Baseline,
    Corrections,
    QBenchError,
    QuantizedWeight,
    Rounding,
    Scheme,
    Statistics,
    check_group_size,
    get_grid,
    lower_cholesky,
    round_columns_,
    rows_of,
    search_clip,
)

if TYPE_CHECKING:
    from qbench.grid import Affine, Grid
    from qbench.models.blocks import Block


@dataclass(frozen=True)
class GPTQ(Baseline):
    """Second-order rounding with error feedback along the input channels."""

    version: ClassVar[int] = 2
    is_random: ClassVar[bool] = False
    rows_are_independent: ClassVar[bool] = True
    weights_ignore_activations: ClassVar[bool] = True
    weight_statistics: ClassVar[tuple[str, ...]] = ("hessian",)

    percdamp: float = 0.01
    """Share of the hessian's mean diagonal that is added to its diagonal."""
    act_order: bool = False
    """Take columns by decreasing diagonal of the hessian instead of left to right."""
    static_groups: bool = False
    """Fit every group's grid before the first column is rounded."""
    fresh_groups: bool = False
    """Fit a group's grid from fully updated weights, where the reference uses those of the
    beginning of the block of columns."""
    true_sequential: bool = False
    """Within a block, calibrate each group of linears after the ones before it are rounded."""
    block_size: int = 128
    """Columns whose updates are applied to the rest of the matrix together."""
    mse: bool = False
    """Shrink each range to the one of least rounding error before fitting the grid."""

    def check(self) -> None:
        """At least one column in a block, no negative damping."""
        if self.block_size < 1 or self.percdamp < 0:
            raise QBenchError(
                f"GPTQ block_size={self.block_size}, percdamp={self.percdamp:g}: a block has at "
                "least 1 column and damping is not negative; use 128 and 0.01"
            )

    def stages(self, block: Block) -> list[list[str]]:
        """All linears at once, or one stage per shared input."""
        return block.input_groups if self.true_sequential else super().stages(block)

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Quantize ``weight`` (out_features, in_features) along the hessian of its input.

        Raises:
            CannotQuantize: if the hessian cannot be factorized with any damping.
            QBenchError: for a group size that does not divide.
        """
        check_group_size(weight.shape[1], scheme.group_size)
        key = f"gptq:{self.percdamp}:{self.act_order}"
        path = stats.cached(key, lambda: self._factorize(stats.hessian))
        columns = _Columns(self, weight, scheme, path)
        del weight  # the walk has its own
        columns.walk(path)
        return columns.result(path)

    def _factorize(self, hessian: Tensor) -> _Path:
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        if self.act_order:
            order = diagonal.masked_fill(dead, 1).argsort(descending=True).flip(0)
        else:
            order = torch.arange(len(hessian) - 1, -1, -1, device=hessian.device)
        factor, damping = lower_cholesky(hessian, self.percdamp, order)
        added = dead + damping * diagonal.masked_fill(dead, 1).mean()
        pivots = factor.diagonal().clone()
        return _Path(order, factor.div_(pivots), pivots.square(), added, dead, damping)


class _Path(NamedTuple):
    """What the walk over the columns of every matrix with one input goes along.

    H + added = L D Lᵀ, with rows and columns in ``order``; the walk ends at the first of them.
    """

    order: Tensor
    """Columns in the order of the walk, (in_features,)."""
    factor: Tensor
    """L, unit lower triangular; what stands above the diagonal is not read."""
    pivots: Tensor
    """D, (in_features,), in the order of the walk."""
    added: Tensor
    """What the diagonal got on top, (in_features,), in the order of the inputs."""
    dead: Tensor
    """Inputs that never fire, (in_features,), in the order of the inputs."""
    damping: float


class _Columns:
    """The walk over one matrix, its columns in the order of the walk, from the last one on.

    Column p is step n-1-p of the walk. ``errors`` holds the weights still to be rounded and the
    errors of those that have been; ``codes`` what they were rounded to.
    """

    def __init__(self, config: GPTQ, weight: Tensor, scheme: Scheme, path: _Path) -> None:
        order, dead = path.order, path.dead
        self.config, self.order = config, order
        self.grid: Grid = get_grid(scheme.grid)
        self.bits = scheme.wbits
        self.grouped = scheme.group_size > 0
        self.group_size = scheme.group_size if self.grouped else weight.shape[1]
        self.fits_on_the_way = self.grouped and not config.static_groups
        self.group_of = order // self.group_size
        whole = None if self.grouped else self.fit(rows_of(weight, scheme))
        if dead.any():
            weight = weight.masked_fill(dead, 0)
        if self.fits_on_the_way:
            steps = torch.arange(len(order), device=order.device).flip(0)
            self.group_of = steps // self.group_size
            self.scale = weight.new_ones(weight.shape[0], weight.shape[1] // self.group_size)
            self.zero_point = torch.zeros_like(self.scale)
        else:
            affine = whole or self.fit(rows_of(weight, scheme))
            self.scale, self.zero_point = (part.squeeze(-1) for part in affine)
        self.errors = weight.index_select(1, order)
        self.codes = torch.empty_like(self.errors)
        self.loss = weight.new_zeros(weight.shape[0])
        """Of each row, Σ D (E L)²: tr(ΔHΔᵀ) with what was added to H."""

    def fit(self, rows: Tensor) -> Affine:
        """Scale and zero point of ``rows`` (..., n)."""
        if self.config.mse:
            return search_clip(self.grid, rows, self.bits)
        return self.grid.fit(rows, self.bits)

    def walk(self, path: _Path) -> None:
        """Round all columns, feeding errors back along the path."""
        factor = path.factor
        rounding = Rounding(self.grid.qmin(self.bits), self.grid.qmax(self.bits))
        corrections, bounds = Corrections(self.errors, factor), self.bounds()
        for end, start in zip(bounds, bounds[1:], strict=False):
            block, codes = self.errors[:, start:end], self.codes[:, start:end]
            # groups whose first column is in this block: first to past; they reach down to reach
            first, past = (-(-(len(self.order) - p) // self.group_size) for p in (end, start))
            fitting = self.fits_on_the_way and first < past
            reach = len(self.order) - past * self.group_size if fitting else start
            pulled = corrections.of(reach, end)
            torch.add(block, pulled[:, start - reach :], out=codes)
            if fitting:
                self.fit_groups(first, past, pulled, factor[reach:end, reach:end])
            affine = (self.scale, self.zero_point)
            square = factor[start:end, start:end]
            round_columns_(codes, block, square, affine, rounding, self.group_of[start:end])
            # E L: what later columns added, and this block's own part
            moved = torch.addmm(pulled[:, start - reach :] + block, block, square.tril(-1))
            self.loss.addmv_(moved.square_(), path.pivots[start:end])

    def bounds(self) -> list[int]:
        """Where blocks of columns begin and end, in the order of the walk: downwards to 0."""
        total = len(self.order)
        bounds = {*range(total, 0, -self.config.block_size), 0}
        if self.config.fresh_groups and self.fits_on_the_way:  # a block begins with every group
            bounds |= set(range(0, total, self.group_size))
        return sorted(bounds, reverse=True)

    def fit_groups(self, first: int, past: int, pulled: Tensor, factor: Tensor) -> None:
        """Fit groups ``first`` to ``past`` from the weights as they stand before this block.

        Those are W + E L⁻¹, with E L (``pulled``) the correction by rounded columns, and L the part
        of the factor that belongs to these columns: U of GPTQ, that is, which is needed only here.
        """
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False, unitriangular=True)
        reach = len(self.order) - past * self.group_size
        weight = torch.addmm(self.errors[:, reach : reach + len(factor)], pulled, inverse)
        columns = weight[:, : (past - first) * self.group_size]
        affine = self.fit(columns.unflatten(1, (-1, self.group_size)).flip(1))
        for table, part in zip((self.scale, self.zero_point), affine, strict=True):
            table[:, first:past] = part.squeeze(-1)

    def result(self, path: _Path) -> QuantizedWeight:
        """Everything back in the original order of the columns."""
        proxy = self.loss - self.errors.square() @ path.added[self.order]
        back = self.order.argsort()
        codes, index = self.codes.index_select(1, back), None
        if self.config.act_order and self.fits_on_the_way:  # consecutive in the walk only
            index = self.group_of[back]
            values = self.decode(self.codes, self.scale.flip(1), self.zero_point.flip(1))
            values = values.index_select(1, back)
        else:
            self.codes = codes  # not both orders at a time
            values = self.decode(codes, self.scale, self.zero_point)
        return QuantizedWeight(
            weight=values,
            codes=codes,
            scale=self.scale,
            zero_point=self.zero_point,
            g_idx=index,
            proxy=proxy,
            report={"damping": path.damping},
        )

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Values of ``codes``, written where the errors were, which nobody needs any more."""
        grouped, room = (t.unflatten(1, (-1, self.group_size)) for t in (codes, self.errors))
        torch.sub(grouped, zero_point.unsqueeze(-1), out=room)
        return room.mul_(scale.unsqueeze(-1)).flatten(1)
