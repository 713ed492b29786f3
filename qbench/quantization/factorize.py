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

from qbench.models.checks import is_finite


class CannotQuantize(Exception):
    """Raised by a baseline that cannot round one matrix; the harness rounds it to nearest instead.

    The message is the reason, as it stands in the record.
    """


class Factor(NamedTuple):
    """A Cholesky factor and the damping it took."""

    matrix: Tensor
    damping: float
    """Share of the mean diagonal that was added to the diagonal."""


def damped(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """A copy of H, rows and columns in ``order``, plus ``damping`` times its mean diagonal.

    A zero on the diagonal (an input that never fires) counts as 1 there, as in the released code
    of GPTQ and QuIP.
    """
    if order is None:
        result = hessian.clone()
    elif (order.diff() == -1).all():  # reversed: at a fraction of what a gather costs
        result = hessian.flip(0, 1)
    else:
        result = hessian[order.unsqueeze(1), order]
    diagonal = result.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1)
    diagonal.add_(damping * diagonal.mean())
    return result


def lower_cholesky(hessian: Tensor, percdamp: float, order: Tensor | None = None) -> Factor:
    """L with L Lᵀ = H + damping, climbing the ladder from ``percdamp`` until it exists.

    On a CPU one matrix of H's size is held besides it, which becomes the factor.

    Args:
        hessian: (in_features, in_features), symmetric; left untouched.
        percdamp: the damping to begin with, as a share of the mean diagonal.
        order: if given, of H[order][:, order] instead.

    Raises:
        CannotQuantize: if H is not finite, or not even the last rung is positive definite.
    """
    if not is_finite(hessian):
        raise CannotQuantize("the hessian is not finite")
    for damping in ladder(percdamp):
        factor = damped(hessian, damping, order).mT  # column-major, as LAPACK wants it
        if hessian.device.type == "cpu":  # there the factor can take the place of the copy
            info = torch.empty((), dtype=torch.int32)
            torch.linalg.cholesky_ex(factor, out=(factor, info))
        else:
            factor, info = torch.linalg.cholesky_ex(factor)
        if int(info) == 0 and is_finite(factor):
            return Factor(factor, damping)
        del factor
    raise CannotQuantize(f"the hessian is not positive definite even with damping {damping:g}")


def feedback_factor(hessian: Tensor, percdamp: float, order: Tensor | None = None) -> Factor:
    """Unit lower triangular L with L D Lᵀ = H + damping: what :func:`round_columns_` walks along.

    Arguments and errors as :func:`lower_cholesky`.
    """
    factor, damping = lower_cholesky(hessian, percdamp, order)
    factor.div_(factor.diagonal().clone())
    return Factor(factor, damping)


def ladder(percdamp: float) -> list[float]:
    """``percdamp``, then ten times as much each time, the last rung being at least 1."""
    rungs = [percdamp]
    while rungs[-1] < 1:
        rungs.append(max(rungs[-1] * 10, 1e-4))
    return rungs
