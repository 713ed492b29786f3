"""The column walk of :mod:`qbench.quantization.columns`, compiled by numba for the CPU.

Rows of a weight matrix do not depend on each other, so a tile of them is laid out with the rows
along the vector lanes and walked in the first-level cache. Nothing is contracted or reordered (no
``fastmath``): every operation is the one the torch loop does, and rounds as it does.

Threads are plain Python threads over chunks of rows, with the interpreter lock released. numba's
own thread pool is left alone: a second OpenMP runtime beside torch's would spin against it, and
numba's default pool must not be entered from two threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from qbench.quantization.columns import Rounding

TILE = 64
"""Rows walked together: 64 x 128 float32 twice fit the caches next to the core."""
MOST_THREADS = 8
"""Threads are started for every block, and more would cost more than they save."""


def _walk(
    current: Any,
    original: Any,
    factor: Any,
    scale: Any,
    zero_point: Any,
    group: Any,
    low: Any,
    high: Any,
    half_up: bool,
    first: int,
    last: int,
) -> None:
    """Round rows ``first`` to ``last``, as :func:`columns.round_columns_` describes, in place."""
    width = current.shape[1]
    half = np.float32(0.5)
    w = np.zeros((width, TILE), np.float32)
    o = np.zeros((width, TILE), np.float32)
    step = np.ones(TILE, np.float32)
    whole = np.zeros(TILE, np.float32)
    zero = np.zeros(TILE, np.float32)
    part = np.zeros(TILE, np.float32)
    for top in range(first, last, TILE):
        rows = min(TILE, last - top)
        for r in range(rows):
            for c in range(width):
                w[c, r] = current[top + r, c]
                o[c, r] = original[top + r, c]
        known = -1
        for c in range(width - 1, -1, -1):
            if group[c] != known:
                known = group[c]
                for r in range(rows):
                    step[r] = scale[top + r, known]
                    zero[r] = zero_point[top + r, known]
                    whole[r] = np.floor(zero[r])
                    part[r] = zero[r] - whole[r]
            wc = w[c]
            oc = o[c]
            for r in range(TILE):
                x = wc[r] / step[r] + part[r]
                x = np.floor(x + half) if half_up else np.rint(x)
                x = x + whole[r]
                x = low if x < low else x  # so written, a NaN stays one
                x = high if x > high else x
                wc[r] = x
                oc[r] = oc[r] - step[r] * (x - zero[r])
            for k in range(c):
                feedback = factor[c, k]
                wk = w[k]
                for r in range(TILE):
                    wk[r] += oc[r] * feedback
        for r in range(rows):
            for c in range(width):
                current[top + r, c] = w[c, r]
                original[top + r, c] = o[c, r]


@cache
def _compiled() -> Callable[..., None]:
    """The walk in machine code, kept on disk between processes where a folder can be written."""
    matrix, f = "float32[:, :]", "float32"
    signature = (
        f"void({matrix}, {matrix}, float32[:, ::1], {matrix}, {matrix}, int64[::1], "
        f"{f}, {f}, boolean, int64, int64)"
    )
    compiler: Any = partial(numba.njit, signature, nogil=True, error_model="numpy")
    try:
        return compiler(cache=True)(_walk)  # type: ignore[no-any-return]
    except RuntimeError:  # numba found no folder it may write to
        return compiler()(_walk)  # type: ignore[no-any-return]


def walk_(
    current: Tensor,
    original: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    rounding: Rounding,
) -> None:
    """Round in place, over no more threads than torch uses."""
    walk = _compiled()
    arrays = [t.numpy() for t in (current, original, factor.contiguous(), scale, zero_point, group)]
    limits = (np.float32(rounding.low), np.float32(rounding.high), rounding.half_up)
    rows, threads = current.shape[0], min(torch.get_num_threads(), MOST_THREADS)
    if threads == 1 or rows <= TILE:
        walk(*arrays, *limits, 0, rows)
        return
    # more chunks than threads, so that a core busy elsewhere holds nobody up
    chunk = max(TILE, -(-rows // (4 * threads * TILE)) * TILE)
    with ThreadPoolExecutor(threads) as pool:
        for done in [
            pool.submit(walk, *arrays, *limits, first, min(first + chunk, rows))
            for first in range(0, rows, chunk)
        ]:
            done.result()
