"""Whether a model scores rows that share their beginning as it scores them alone.

A tree of rows needs attention that takes a mask of two dimensions as it is and positions from
outside. Local attention (GPT-Neo, sliding windows shorter than the row), ALiBi by column (MPT) and
some kernels take the mask and give other numbers without a word; BLOOM and Mamba raise. So every
model is asked: a few of the rows at hand are scored in a tree and one by one, with activation
quantizers off, because those turn noise of the last bit into whole steps of rounding.

What may differ is measured, not guessed: rows padded to one batch differ from single rows too, in
bfloat16 by some hundredths of a nat per token. Left out: models that are right for the rows tested
and wrong for others no longer than them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbench.evaluation.forward import Forward, forward_of, lacks_memory
from qbench.evaluation.packing import Batch, PackedRows, Row
from qbench.quantization.activations import activations_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERDICT = "_qbench_sharing"
"""Attribute of a model: attention implementation -> verdict. Copies of the model inherit it."""
_FIRST_ROWS = 4
_FLOOR = 1e-3
"""Nats that a row may always differ by."""
_CEILING = 0.5
"""Nats that no row may differ by, however noisy the model is."""
_SPREADS = 5
"""Standard deviations of the model's own noise that a row may differ by."""


@dataclass(frozen=True)
class Sharing:
    """Whether rows may share their beginning on a model."""

    exact: bool
    reason: str
    """One line for the record."""
    longest: int | None = None
    """Tokens of the longest row this was found on; None holds for rows of any length."""


def sharing_of(
    model: PreTrainedModel,
    rows: PackedRows,
    known: Sharing | None = None,
    forward: Forward | None = None,
) -> Sharing:
    """The verdict on a model: the one given, the one found before, or a new test.

    What was found exact on shorter rows is tested again: attention windows begin to matter at some
    length.
    """
    kind = str(getattr(model.config, "_attn_implementation", None))
    verdicts: dict[str, Sharing] = model.__dict__.setdefault(_VERDICT, {})
    for verdict in (known, verdicts.get(kind)):
        if verdict is None:
            continue
        if not verdict.exact or verdict.longest is None or verdict.longest >= rows.longest:
            return verdict
    verdicts[kind] = test_sharing(model, rows, forward)
    return verdicts[kind]


def test_sharing(
    model: PreTrainedModel, rows: PackedRows | Sequence[Row], forward: Forward | None = None
) -> Sharing:
    """Score some of the rows in a tree and one by one: the first ones and the longest.

    Args:
        model: in eval mode, on any device.
        rows: of one or more tasks.
        forward: what runs batches; None is the model's own.
    """
    packed = rows if isinstance(rows, PackedRows) else PackedRows(rows)
    sample = PackedRows([packed.rows[i] for i in _sample(packed)])
    run = forward or forward_of(model)
    whole = sum(len(row.tokens) for row in sample.rows)
    (tree,) = sample.batches("shared", whole, sample.wanted, width=whole) or (None,)
    if tree is None or tree.ends is None:
        return Sharing(True, "nothing to share", 0)
    with torch.inference_mode(), activations_off(model):
        try:
            shared = _values(model, [tree], run)
        except Exception as error:  # noqa: BLE001 - whatever a model raises, it cannot share
            kind = type(error).__name__
            return Sharing(False, f"off: {kind} with a mask of its own", packed.longest)
        try:
            padded = _values(model, sample.batches("padded", 2 * sample.longest), run)
            if _largest(shared, padded) <= _FLOOR:
                return Sharing(True, "exact", packed.longest)
            single = _values(model, sample.batches("padded", 1), run)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            return Sharing(False, "off: no memory to test it", packed.longest)
    return _verdict(shared, padded, single, model, packed.longest)


test_sharing.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's


def _sample(packed: PackedRows) -> list[int]:
    """The first rows and the longest one, which then branches off from rows unlike it."""
    longest = sorted(packed.wanted, key=lambda i: -len(packed.rows[i].tokens))[:1]
    return sorted({*packed.wanted[:_FIRST_ROWS], *longest})


_Values = dict[int, np.ndarray]
"""Row -> log-probabilities of its scored tokens."""


def _values(model: PreTrainedModel, batches: Sequence[Batch], run: Forward) -> _Values:
    from qbench.evaluation.scoring import token_scores

    found: _Values = {}
    for batch, parts in zip(batches, run(model, iter(batches)), strict=True):
        values, _ = token_scores(batch, parts)
        found |= {row: values[batch.owner == row] for row in batch.rows}
    return found


def _largest(a: _Values, b: _Values) -> float:
    """Largest difference of a row's sum; infinite where one of both is no number."""
    return max(float(np.nan_to_num(abs(a[i].sum() - b[i].sum()), nan=np.inf)) for i in a)


def _verdict(
    shared: _Values, padded: _Values, single: _Values, model: Any, longest: int
) -> Sharing:
    """Compare with what padding alone does; noise of a row grows with the root of its length."""
    noise = np.concatenate([padded[i] - single[i] for i in single])
    spread = max(float(np.sqrt(np.mean(noise**2))), float(torch.finfo(model.dtype).eps))
    worst, allowed = 0.0, 0.0
    for i, values in single.items():
        error = abs(float(shared[i].sum() - values.sum()))
        limit = min(_FLOOR + _SPREADS * spread * len(values) ** 0.5, _CEILING)
        if not error <= limit:
            return Sharing(
                False, f"off: a row differs by {error:.2g} nats, by {limit:.2g} at most", longest
            )
        worst, allowed = max(worst, error), max(allowed, limit)
    return Sharing(True, f"exact within the noise of {model.dtype} ({worst:.1g} nats)", longest)
