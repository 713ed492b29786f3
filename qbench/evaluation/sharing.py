"""Whether a model scores rows that share their beginning as it scores them alone.

A tree of rows needs attention that takes a mask of two dimensions as it is and positions from
outside. Local attention (GPT-Neo, sliding windows shorter than the row), ALiBi by column (MPT) and
some kernels take the mask and give other numbers without a word; BLOOM and Mamba raise. So every
model is asked: the widest tree that the rows at hand make is run, and some of its rows one by one,
with activation quantizers off, because those turn noise of the last bit into whole steps.

What may differ is measured, not guessed: rows padded to one batch differ from single rows too, in
bfloat16 by some hundredths of a nat per token. Left out: models that are right for the rows tested
and wrong for others of a tree no wider.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbench.errors import QBenchError
from qbench.evaluation.forward import Forward, forward_of, lacks_memory
from qbench.evaluation.packing import WIDTH, Batch, PackedRows, Row, in_pairs, tree_width
from qbench.evaluation.reading import read_batches
from qbench.quantization.activations import activations_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERDICTS = "_qbench_sharing"
"""Attribute of a model: attention implementation -> verdicts. Copies of the model inherit it."""
_SAMPLED = 2
"""Rows of each kind that are compared."""
_FLOOR = 2e-4
"""Nats that a row, or a token of it, may always differ by."""
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
    widest: int | None = None
    """Columns of the widest tree it was found on; None holds for any."""

    def holds_for(self, longest: int, widest: int) -> bool:
        """Whether this says something of rows and trees of these sizes.

        What is exact is so below what was tested: attention windows begin to matter at some size.
        What is not exact is so above.
        """
        pairs = ((self.longest, longest), (self.widest, widest))
        if self.exact:
            return all(tested is None or tested >= asked for tested, asked in pairs)
        return all(tested is None or tested <= asked for tested, asked in pairs)


def keep_verdicts_(model: PreTrainedModel, verdicts: dict[str, list[Sharing]]) -> None:
    """Let a model, in place, know and add to what was found on others of its checkpoint."""
    model.__dict__[_VERDICTS] = verdicts


def sharing_of(
    model: PreTrainedModel,
    rows: PackedRows,
    known: Sharing | None = None,
    forward: Forward | None = None,
    budget: int = WIDTH,
) -> Sharing:
    """The verdict on a model: the one given, one found before, or a new test.

    Args:
        model: in eval mode, on any device.
        rows: of a task.
        known: believed as far as it goes.
        forward: what runs batches; None is the model's own.
        budget: of the batches that are going to be run.
    """
    pairs = in_pairs(model, forward is not None)
    plan = rows.batches("shared", budget, width=tree_width(model), pairs=pairs)
    trees = [batch for batch in plan if batch.ends is not None]
    if not trees:
        return Sharing(True, "nothing to share", 0, 0)
    widest = max(trees, key=lambda batch: batch.ids.shape[1])
    kind = str(getattr(model.config, "_attn_implementation", None))
    verdicts = model.__dict__.setdefault(_VERDICTS, {}).setdefault(kind, [])
    for verdict in [*([known] if known else []), *verdicts]:
        if verdict.holds_for(rows.longest, widest.ids.shape[1]):
            found: Sharing = verdict
            return found
    found = _test(model, rows, widest, forward)
    if found is not _UNTESTED:
        verdicts.append(found)
    return found


def test_sharing(
    model: PreTrainedModel, rows: PackedRows | Sequence[Row], forward: Forward | None = None
) -> Sharing:
    """A new test: the widest tree that these rows make, against some of its rows one by one."""
    packed = rows if isinstance(rows, PackedRows) else PackedRows(rows)
    model.__dict__.pop(_VERDICTS, None)
    return sharing_of(model, packed, forward=forward)


test_sharing.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's


def _test(model: PreTrainedModel, packed: PackedRows, tree: Batch, run: Forward | None) -> Sharing:
    sizes = packed.longest, tree.ids.shape[1]
    sample = PackedRows([packed.rows[i] for i in _sample(packed, tree)])
    chosen = dict(zip(_sample(packed, tree), sample.wanted, strict=True))
    with torch.inference_mode(), activations_off(model):
        try:
            whole = _values(model, [tree], run)
        except Exception as error:  # noqa: BLE001 - what a model raises that takes no such mask
            if isinstance(error, (OSError, QBenchError)):
                raise
            if lacks_memory(error):
                return _UNTESTED
            return Sharing(False, f"off: {type(error).__name__} with a mask of its own")
        shared = {own: whole[row] for row, own in chosen.items()}
        try:
            padded = _values(model, sample.batches("padded", 2 * sample.longest), run)
            if _largest(shared, padded) <= _FLOOR:
                return Sharing(True, "exact", *sizes)
            single = _values(model, sample.batches("padded", 1), run)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            return _UNTESTED
    return _verdict(shared, padded, single, model, sizes)


_UNTESTED = Sharing(False, "off: no memory to test it")
"""Not kept: there may be more memory next time."""


def _sample(packed: PackedRows, tree: Batch) -> list[int]:
    """Rows of a tree in which local attention would show: it goes by column, not by depth.

    Those farthest along, those with most columns between them and the question they continue, and
    the longest.
    """
    assert tree.ends is not None and tree.positions is not None
    ends, depths = tree.ends.numpy(), tree.positions.numpy()
    width = ends.shape[1]
    places = tree.wanted.numpy()[tree.place.numpy()]
    far: dict[int, int] = {}
    gap: dict[int, int] = {}
    for row in tree.rows:
        sequence, column = divmod(int(places[tree.owner == row].max()), width)
        branch = np.flatnonzero(ends[sequence, : column + 1] > column)
        steps = np.diff(branch)[1:]  # the first one is from the beginning that all rows have
        far[row] = column - int(depths[sequence, column])
        gap[row] = int(steps.max()) if len(steps) else 0
    kinds = (far.get, gap.get, lambda row: len(packed.rows[row].tokens))
    chosen: set[int] = set()
    for kind in kinds:
        chosen |= set(sorted(tree.rows, key=lambda row: (-kind(row), row))[:_SAMPLED])  # type: ignore[operator] # noqa: B023
    return sorted(chosen)


_Values = dict[int, np.ndarray]
"""Row -> log-probabilities of its scored tokens."""


def _values(model: PreTrainedModel, batches: Sequence[Batch], run: Forward | None) -> _Values:
    from qbench.evaluation.scoring import token_scores

    def read(batch: Batch, parts: Iterable[torch.Tensor]) -> _Values:
        values, _ = token_scores(batch, parts)
        return {row: values[batch.owner == row] for row in batch.rows}

    found: _Values = {}
    forward = run or forward_of(model)
    for values in read_batches(model, batches, read, forward, in_turn=run is not None):
        found |= values
    return found


def _largest(a: _Values, b: _Values) -> float:
    """Largest difference of a row's sum or of one of its tokens; infinite for what is no number."""
    differences = (a[i] - b[i] for i in a)
    sizes = (max(abs(float(d.sum())), float(np.abs(d).max())) for d in differences)
    return max(np.inf if np.isnan(size) else size for size in sizes)


def _verdict(
    shared: _Values, padded: _Values, single: _Values, model: Any, sizes: tuple[int, int]
) -> Sharing:
    """Compare with what padding alone does; noise of a row grows with the root of its length."""
    noise = np.concatenate([padded[i] - single[i] for i in single])
    spread = max(float(np.sqrt(np.mean(noise**2))), float(torch.finfo(model.dtype).eps))
    worst = 0.0
    for i, values in single.items():
        error = _largest({i: shared[i]}, {i: values})
        limit = min(_FLOOR + _SPREADS * spread * len(values) ** 0.5, _CEILING)
        if not error <= limit:
            reason = f"off: a row differs by {error:.2g} nats, by {limit:.2g} at most"
            return Sharing(False, reason, *sizes)
        worst = max(worst, error)
    return Sharing(True, f"exact within the noise of {model.dtype} ({worst:.1g} nats)", *sizes)
