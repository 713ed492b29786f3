"""The column walk of :mod:`qbench.quantization.columns` as a Triton kernel.

One program holds a tile of rows with all columns of the block in registers, so a block costs one
launch instead of a dozen per column. Divisions are IEEE and products are not fused into sums: codes
are those of the torch loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbench.quantization import columns
from qbench.quantization.columns import Rounding

TILE = 16
"""Rows of one program."""
WIDEST = 512
"""Columns that a program's registers hold; wider blocks take the torch loop."""


@triton.jit
def _walk(  # type: ignore[no-untyped-def]  # Triton would look annotations up
    current,
    original,
    factor,
    scale,
    zero_point,
    group,
    low,
    high,
    n_rows,
    width,
    current_row,
    current_column,
    original_row,
    original_column,
    scale_row,
    scale_column,
    zero_row,
    zero_column,
    HALF_UP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < n_rows
    both = there[:, None] & (column < width)[None, :]
    places = current + row[:, None] * current_row + column[None, :] * current_column
    w = tl.load(places, mask=both, other=0.0)
    for i in range(width):
        c = width - 1 - i
        g = tl.load(group + c)
        step = tl.load(scale + row * scale_row + g * scale_column, mask=there, other=1.0)
        zero = tl.load(zero_point + row * zero_row + g * zero_column, mask=there, other=0.0)
        whole = tl.floor(zero)
        chosen = (column == c)[None, :]
        x = tl.div_rn(tl.sum(tl.where(chosen, w, 0.0), axis=1), step) + (zero - whole)
        if HALF_UP:
            x = tl.floor(x + 0.5)
        else:  # 1.5 * 2^23: its unit in the last place is 1, and sums round half to even
            x = tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
        x = x + whole
        x = tl.where(x < low, low, x)  # so written, a NaN stays one
        x = tl.where(x > high, high, x)
        place = original + row * original_row + c * original_column
        error = tl.load(place, mask=there, other=0.0) - step * (x - zero)
        tl.store(place, error, mask=there)
        feedback = tl.load(factor + c * width + column, mask=column < c, other=0.0)
        pushed = w + error[:, None] * feedback[None, :]
        w = tl.where(chosen, x[:, None], tl.where((column < c)[None, :], pushed, w))
    tl.store(places, w, mask=both)


def walk_(
    current: Tensor,
    original: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    rounding: Rounding,
) -> None:
    """Round in place, one launch."""
    rows, width = current.shape
    if width > WIDEST:
        return columns.walk_(current, original, factor, scale, zero_point, group, rounding)
    strides = [n for t in (current, original, scale, zero_point) for n in t.stride()]
    grid = (triton.cdiv(rows, TILE),)
    parts = (current, original, factor.contiguous(), scale, zero_point, group)
    limits = (float(rounding.low), float(rounding.high))
    with torch.cuda.device_of(current):
        _walk[grid](
            *parts,
            *limits,
            rows,
            width,
            *strides,
            HALF_UP=rounding.half_up,
            ROWS=TILE,
            COLUMNS=triton.next_power_of_2(width),
            enable_fp_fusion=False,
        )
