"""Damped Cholesky factors of a hessian, with a ladder instead of a crash.

A calibration set smaller than the input dimension, or channels that are copies of each other,
leave H singular to float32. The damping asked for is tried first, then ten times as much, up to
the whole mean diagonal. What was used goes into the layer's record; if nothing works the layer
falls back to rounding to nearest, and says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CannotQuantize(Exception):
    """Raised by a baseline that cannot round one matrix; the harness rounds it to nearest instead.

    The message is the reason, as it stands in the record.
    """


class Factor(NamedTuple):
    """A Cholesky factor and the damping it took."""

    matrix: Tensor
    damping: float
    """Share of the mean diagonal that was added to the diagonal."""


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy of H with ``damping`` times its mean diagonal added to the diagonal."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal.add_(damping * diagonal.mean())
    return result


def lower_cholesky(hessian: Tensor, percdamp: float) -> Factor:
    """L with L Lᵀ = H + damping, climbing the ladder from ``percdamp`` until it exists.

    Raises:
        CannotQuantize: if H is not finite, or not even the last rung is positive definite.
    """
    if not torch.isfinite(hessian).all():
        raise CannotQuantize("the hessian is not finite")
    for damping in ladder(percdamp):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damping))
        if int(info) == 0 and torch.isfinite(factor).all():
            return Factor(factor, damping)
    raise CannotQuantize(f"the hessian is not positive definite even with damping {damping:g}")


def inverse_upper_cholesky(hessian: Tensor, percdamp: float) -> Factor:
    """U, upper triangular, with Uᵀ U = (H + damping)⁻¹: what GPTQ walks along.

    Raises:
        CannotQuantize: as :func:`lower_cholesky`.
    """
    if not torch.isfinite(hessian).all():
        raise CannotQuantize("the hessian is not finite")
    for damping in ladder(percdamp):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damping))
        if int(info):
            continue
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if int(info) == 0 and torch.isfinite(upper).all():
            return Factor(upper, damping)
    raise CannotQuantize(f"the hessian is not positive definite even with damping {damping:g}")


def ladder(percdamp: float) -> list[float]:
    """``percdamp``, then ten times as much each time, the last rung being at least 1."""
    rungs = [percdamp]
    while rungs[-1] < 1:
        rungs.append(max(rungs[-1] * 10, 1e-4))
    return rungs
