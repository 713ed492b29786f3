"""Norms whose per-channel scale can move into the linears they feed.

If a norm's output y is read by matrices W only, then dividing the norm's weight (and bias) by s
and multiplying the columns of W by s leaves the block's function as it was. This is what
SmoothQuant folds its scales into (2211.10438 eq. 3-4). Whether y has readers the trace cannot see
(a residual that branches off after the norm) is settled by trying: fold random scales, run the
block, compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.linear import Linear


@dataclass(eq=False)
class NormFold:
    """A norm and all matrices that read its output."""

    name: str
    """Of the norm, relative to the block."""
    norm: Any  # whatever the architecture calls its norm: weight, perhaps bias
    offset: float
    """The norm multiplies by ``weight + offset``: 1 for Gemma's norms, else 0."""
    readers: list[Linear] = field(default_factory=list)

    def fold_(self, scale: Tensor) -> None:
        """Divide the norm by ``scale`` (channels,) and multiply the readers' columns, in place."""
        norm = self.norm
        divided = (norm.weight.data.float() + self.offset) / scale - self.offset
        norm.weight.data.copy_(divided)
        if getattr(norm, "bias", None) is not None:
            norm.bias.data.copy_(norm.bias.data.float() / scale)
        for linear in self.readers:
            linear.set_weight_(linear.weight.float() * scale)


def find_folds(
    norms: dict[str, tuple[nn.Module, Tensor, Tensor]],
    products: Sequence[tuple[Linear, Tensor]],
    unseen: Sequence[Linear],
    rerun: Callable[[], Tensor],
    reference: Tensor,
) -> tuple[list[NormFold], list[tuple[str, str]]]:
    """The folds that were tried and keep the block's function; and the norms that have none.

    Args:
        norms: name -> (module, its input, its output) as traced.
        products: (matrix, its input) as traced.
        unseen: matrices that this run did not reach; if one expert reads a norm, all do.
        rerun: runs the block on the traced input.
        reference: what it gave.
    """
    folds, unfoldable = [], []
    for name, (norm, x, y) in norms.items():
        readers = _readers(y, products, unseen)
        offset = _weight_offset(norm, x)
        if not readers:
            continue
        if offset is None:
            unfoldable.append((name, "its output is not proportional to its weight"))
            continue
        fold = NormFold(name, norm, offset, readers)
        if _keeps_function(fold, rerun, reference):
            folds.append(fold)
        else:
            unfoldable.append((name, "something besides linears reads its output"))
    return folds, unfoldable


def _readers(
    y: Tensor, products: Sequence[tuple[Linear, Tensor]], unseen: Sequence[Linear]
) -> list[Linear]:
    rows: set[bytes] | None = None
    readers: dict[str, Linear] = {}
    for linear, x in products:
        if x.shape[-1] != y.shape[-1] or not x.numel():
            continue
        if x.data_ptr() != y.data_ptr() or x.numel() != y.numel():
            # a mixture's experts read a selection of the rows
            rows = rows if rows is not None else set(_row_bytes(y))
            if not rows.issuperset(_row_bytes(x)):
                continue
        readers[linear.name] = linear
    families = {_family(linear) for linear in readers.values()}
    readers |= {linear.name: linear for linear in unseen if _family(linear) in families}
    return list(readers.values())


def _family(linear: Linear) -> tuple[str, ...]:
    """What the matrices of all experts have in common: the name without its index."""
    return tuple("*" if part.isdigit() else part for part in linear.name.split("."))


def _row_bytes(x: Tensor) -> list[bytes]:
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous().view(torch.uint8).cpu().numpy()
    return [row.tobytes() for row in flat]


def _weight_offset(norm: Any, x: Tensor) -> float | None:
    """0 if the norm's output is proportional to its weight, 1 if to weight + 1, None if neither."""
    weight, bias = norm.weight.data, getattr(norm, "bias", None)
    saved = weight.clone(), bias.data.clone() if bias is not None else None
    try:
        if bias is not None:
            bias.data.zero_()
        weight.zero_()
        at_zero = norm(x).float()
        weight.fill_(1)
        at_one = norm(x).float()
    finally:
        weight.copy_(saved[0])
        if bias is not None and saved[1] is not None:
            bias.data.copy_(saved[1])
    unit = at_one - at_zero
    if not unit.any():
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * unit, rtol=1e-2, atol=1e-3 * float(unit.abs().max())):
            return offset
    return None


def _keeps_function(fold: NormFold, rerun: Callable[[], Tensor], reference: Tensor) -> bool:
    """Fold random scales, run the block, put everything back, and compare.

    Powers of two, so that the products keep every bit and even a faint reader stands out from
    rounding; a norm with an offset has to round its weight all the same.
    """
    norm = fold.norm
    parameters = [p for p in (norm.weight, getattr(norm, "bias", None)) if p is not None]
    parameters += {getattr(r.module, r.parameter) for r in fold.readers}
    saved = [p.data.clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(0, 2, (norm.weight.numel(),), generator=generator) * 2.0 - 1)
    try:
        fold.fold_(scale.to(norm.weight.device))
        folded = rerun()
    finally:
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.data.copy_(value)
    coarse = 5e-3 if fold.offset else 1e-3
    tolerance = 1e-5 if reference.dtype == torch.float32 else coarse
    error = (folded.float() - reference.float()).norm()
    return bool(error <= tolerance * reference.float().norm())
