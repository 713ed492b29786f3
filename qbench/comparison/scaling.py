"""The power law of loss against model size: L(N) = a·N^b + c (BitNet, arXiv 2310.11453, eq. 19).

For a given exponent the rest is linear least squares, so the fit is a search along one line
(variable projection, Golub and Pereyra 1973) and needs no starting point. The falling part and the
floor are kept at or above zero: a ≥ 0, b < 0, c ≥ 0. Three coefficients of half a dozen points are
ill-conditioned; very different ones draw nearly the same curve. Compare curves, not coefficients.

Left out on purpose: weights. A loss's standard error is that of its text, and says nothing of how
two models of one size differ by seed and data, which is what scatters about the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qbench.errors import QBenchError

UNIT = 1e9
"""Parameters in one unit of N."""
SAME_SIZE = 1.05
"""Parameter counts within this factor are one size: twins differ by a few norms."""
MINIMUM_SIZES = 4
"""Three coefficients pass through any three points."""

_STEEPEST, _FLATTEST = 6.0, 1e-3  # -b; beyond them the points say nothing about the exponent
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class PowerLaw:
    """A fitted L(N) = a·N^b + c, with N in 10^9 parameters."""

    a: float
    b: float
    c: float
    smallest: float
    """The smallest model it was fitted on, in parameters."""
    largest: float
    n_sizes: int
    worst: float
    """The largest distance of a fitted point from the curve."""

    def __call__(self, parameters: float) -> float:
        """The loss of a model with so many parameters."""
        return self.a * (parameters / UNIT) ** self.b + self.c

    def __str__(self) -> str:
        return f"{self.a:.3g}·N^{self.b:.3f} + {self.c:.3f}".replace("-", "−")


class _Linear(NamedTuple):
    """The best a and c at one exponent."""

    squares: float
    """What is left: the sum of squared residuals."""
    a: float
    c: float


def fit(parameters: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The power law nearest to some models' losses, in least squares.

    Args:
        parameters: the models' sizes.
        losses: one for each, in any unit; the law has the same.

    Raises:
        QBenchError: for fewer than four sizes, numbers that are not finite, or losses that do not
            fall with size or fall in one step.
    """
    sizes, values = np.asarray(parameters, float), np.asarray(losses, float)
    if not (np.isfinite(values).all() and np.isfinite(sizes).all() and (sizes > 0).all()):
        raise QBenchError("a power law needs finite losses of models with at least one parameter")
    n_sizes = count_sizes(parameters)
    if n_sizes < MINIMUM_SIZES:
        raise QBenchError(
            f"a power law of three coefficients needs at least {MINIMUM_SIZES} sizes, not {n_sizes}"
        )
    # sizes relative to their geometric mean keep both columns of the linear problem near one
    middle = math.exp(np.log(sizes).mean())
    steepness = _search(sizes / middle, values)
    found = _linear(sizes / middle, values, steepness)
    if found.a * (sizes.min() / middle) ** -steepness <= 1e-9 * abs(values).max():
        raise QBenchError("the loss does not fall with size, so no power law describes it")
    if not 1.02 * _FLATTEST < steepness < _STEEPEST / 1.02:
        raise QBenchError("the losses leave the exponent of a power law open")
    curve = found.a * (sizes / middle) ** -steepness + found.c
    return PowerLaw(
        a=found.a * (middle / UNIT) ** steepness,
        b=-steepness,
        c=found.c,
        smallest=float(sizes.min()),
        largest=float(sizes.max()),
        n_sizes=n_sizes,
        worst=float(abs(curve - values).max()),
    )


def count_sizes(parameters: Sequence[float]) -> int:
    """How many sizes there are, counts within 5 % of a size's smallest taken as one."""
    starts: list[float] = []
    for size in sorted(parameters):
        if not starts or size > SAME_SIZE * starts[-1]:
            starts.append(size)
    return len(starts)


def _linear(sizes: np.ndarray, losses: np.ndarray, steepness: float) -> _Linear:
    """The best a ≥ 0 and c ≥ 0 of a·sizes^-steepness + c; the corners where a sign is wrong."""
    falling = sizes**-steepness
    centred = falling - falling.mean()
    a = float(centred @ losses / (centred @ centred))
    c = float(losses.mean() - a * falling.mean())
    if a < 0:
        a, c = 0.0, max(float(losses.mean()), 0.0)
    elif c < 0:
        a, c = float(falling @ losses / (falling @ falling)), 0.0
    return _Linear(float(((a * falling + c - losses) ** 2).sum()), a, c)


def _search(sizes: np.ndarray, losses: np.ndarray) -> float:
    """The steepness that leaves least: a grid, as there may be two valleys, then golden section."""
    grid = np.geomspace(_FLATTEST, _STEEPEST, 400)
    left = [_linear(sizes, losses, step).squares for step in grid]
    best = int(np.argmin(left))
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    for _ in range(60):
        inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        nearer = _linear(sizes, losses, math.exp(inner)).squares
        if nearer <= _linear(sizes, losses, math.exp(outer)).squares:
            high = outer
        else:
            low = inner
    return math.exp((low + high) / 2)
