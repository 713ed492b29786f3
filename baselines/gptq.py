"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

GPTQ 2210.17323 Algorithm 1. With H = 2XXᵀ + λI and U the upper Cholesky factor of H⁻¹, column j is
rounded, its error (w_j - q_j) / U_jj is subtracted from the later columns along U_j, and updates to
columns outside the current block of 128 are applied once per block. λ is 1 % of the mean diagonal.

Beyond the paper, as in the released code: dead inputs (H_jj = 0) are zeroed; ``act_order`` goes by
decreasing diagonal; group grids are fitted when their first column comes up, from the weights as
they stood when the block of columns began (``fresh_groups`` uses the weights of that moment;
``static_groups`` fits all before the start). The reference's row grid is fitted before dead
columns are zeroed, and so is this one. Left out: packing, and the trits mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, Tensor

from qbench import (
    Baseline,
    QBenchError,
    QuantizedWeight,
    Scheme,
    Statistics,
    check_group_size,
    get_grid,
    inverse_upper_cholesky,
    rows_of,
    search_clip,
)

if TYPE_CHECKING:
    from qbench.grid import Affine, Grid
    from qbench.models.blocks import Block


@dataclass(frozen=True)
class GPTQ(Baseline):
    """Second-order rounding with error feedback along the input channels."""

    is_random: ClassVar[bool] = False
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
        dead, order, upper, damping = stats.cached(
            f"gptq:{self.percdamp}:{self.act_order}", lambda: self._factorize(stats.hessian)
        )
        columns = _Columns(self, weight, scheme, dead, order)
        columns.walk(upper)
        return columns.result(damping)

    def _factorize(self, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Dead inputs, order of the columns, U in that order, and the damping it took."""
        hessian = hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        order = torch.arange(hessian.shape[0], device=hessian.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True)
        upper, damping = inverse_upper_cholesky(hessian[order][:, order], self.percdamp)
        return dead, order, upper, damping


class _Columns:
    """The walk over one matrix, its columns already in order."""

    def __init__(
        self, config: GPTQ, weight: Tensor, scheme: Scheme, dead: Tensor, order: Tensor
    ) -> None:
        self.config, self.scheme, self.order = config, scheme, order
        self.grid: Grid = get_grid(scheme.grid)
        self.bits = scheme.wbits
        self.group_size = scheme.group_size
        whole = self.fit(rows_of(weight, scheme)) if self.group_size < 0 else None
        weight = weight.clone()
        weight[:, dead] = 0
        if config.static_groups and self.group_size > 0:
            whole = self.fit(rows_of(weight, scheme))
        self.static = None if whole is None else type(whole)(*(part.squeeze(-1) for part in whole))
        self.group_of = order // self.group_size if self.group_size > 0 else torch.zeros_like(order)
        self.fitted: list[Affine] = []
        self.weight = weight[:, order]
        self.codes = torch.empty_like(self.weight)
        self.values = torch.empty_like(self.weight)

    def fit(self, rows: Tensor) -> Affine:
        """Scale and zero point of ``rows`` (..., n)."""
        if self.config.mse:
            return search_clip(self.grid, rows, self.bits)
        return self.grid.fit(rows, self.bits)

    def walk(self, upper: Tensor) -> None:
        """Round all columns, feeding errors forward along ``upper`` (in_features, in_features)."""
        total = self.weight.shape[1]
        for start in range(0, total, self.config.block_size):
            end = min(start + self.config.block_size, total)
            block = self.weight[:, start:end].clone()
            errors = torch.zeros_like(block)
            for i, column in enumerate(range(start, end)):
                affine = self.affine_at(column, start, errors[:, :i], upper)
                w = block[:, i : i + 1]
                codes = self.grid.encode(w, affine, self.bits)
                values = self.grid.decode(codes, affine)
                self.codes[:, column : column + 1] = codes
                self.values[:, column : column + 1] = values
                error = (w - values) / upper[column, column]
                block[:, i:] -= error * upper[column, column:end]
                errors[:, i : i + 1] = error
            self.weight[:, end:] -= errors @ upper[start:end, end:]

    def affine_at(self, column: int, start: int, errors: Tensor, upper: Tensor) -> Affine:
        """Grid of one column, (out_features, 1); fits the next group's when its turn comes."""
        if self.static is not None:
            group = self.group_of[column]
            return type(self.static)(*(part[:, group].unsqueeze(1) for part in self.static))
        if column % self.group_size == 0:
            stop = column + self.group_size
            group_weights = self.weight[:, column:stop]
            if self.config.fresh_groups:
                group_weights = group_weights - errors @ upper[start:column, column:stop]
            self.fitted.append(self.fit(group_weights))
        return self.fitted[-1]

    def result(self, damping: float) -> QuantizedWeight:
        """Everything back in the original order of the columns."""
        back = self.order.argsort()
        if self.static is not None:
            scale, zero_point = self.static
        else:
            scale, zero_point = (torch.cat(parts, 1) for parts in zip(*self.fitted, strict=True))
        scattered = self.config.act_order and self.group_size > 0 and not self.config.static_groups
        return QuantizedWeight(
            weight=self.values[:, back],
            codes=self.codes[:, back],
            scale=scale,
            zero_point=zero_point,
            g_idx=(back // self.group_size) if scattered else None,
            report={"damping": damping},
        )
