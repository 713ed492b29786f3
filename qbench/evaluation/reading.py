"""Running batches, and reading something off the logits of each.

On a CPU two batches run side by side (:mod:`qbench.models.side_by_side`). Where memory is lacking
the budget is halved and the batch repeated.

Left out: which rows make a batch (:mod:`~.packing`), and what is read (:mod:`~.scoring`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from qbench.errors import RunFailed
from qbench.evaluation.forward import Forward, forward_of, lacks_memory
from qbench.evaluation.packing import Batch, PackedRows, in_pairs, tree_width
from qbench.evaluation.tasks import Progress
from qbench.models.products import fast_products
from qbench.models.side_by_side import AT_ONCE, number_at_once, side_by_side, threads_shared
from qbench.models.streaming import stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Read = Callable[[Batch, Iterable[torch.Tensor]], dict[int, T]]
"""Given a batch and its logits in parts, gives something for each of its rows."""


def read_rows(
    model: PreTrainedModel,
    rows: PackedRows,
    read: Read[T],
    policy: str,
    budget: int,
    progress: Progress | None = None,
    forward: Forward | None = None,
    in_turn: bool = False,
) -> tuple[dict[int, T], dict[str, Any]]:
    """What ``read`` makes of every batch's logits; where memory is lacking, of smaller batches.

    Args:
        model: in eval mode, on any device.
        rows: to be run.
        read: called from other threads where batches run side by side.
        policy: a key of ``BATCHING``.
        budget: tokens in a batch.
        progress: called with tokens done and tokens in all.
        forward: what runs batches; None is the model's own. Another one knows nothing of scales
            over each row alone: "unshared" becomes "one row".
        in_turn: whether it, or ``read``, must not work on two batches at once.

    Returns:
        Row -> what was read, and ``batching``, ``batch_tokens`` (the last budget),
        ``batches_at_once`` and ``oom_halvings``.

    Raises:
        RunFailed: when one row alone does not fit into memory.
    """
    if policy == "unshared" and forward is not None:
        policy = "one row"
    with torch.inference_mode():
        reader = _Reader(model, rows, read, forward or forward_of(model), in_turn)
        reader.run(policy, budget, progress)
    how = {"batching": policy, "batch_tokens": reader.budget}
    how |= {"batches_at_once": reader.at_once, "oom_halvings": reader.halvings}
    return reader.found, how


class _Reader(Generic[T]):
    """One call of :func:`read_rows`: what was found, and what it took."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: PackedRows,
        read: Read[T],
        forward: Forward,
        in_turn: bool,
    ) -> None:
        self.model, self.rows = model, rows
        self.results = partial(read_batches, model, read=read, forward=forward, in_turn=in_turn)
        self.most_at_once = 1 if in_turn and stream_of(model) is None else AT_ONCE
        pairs = in_pairs(model, in_turn)
        self.batches = partial(rows.batches, width=tree_width(model), pairs=pairs)
        self.found: dict[int, T] = {}
        self.budget = self.halvings = 0
        self.at_once = 1
        """Most batches that ran side by side."""

    def run(self, policy: str, budget: int, progress: Progress | None) -> None:
        """Read every row, in smaller and smaller batches if it must be."""
        self.budget = budget
        left, later = self.batches(policy, budget), list[Batch]()
        total = sum(len(self.rows.rows[i].tokens) for i in self.rows.wanted)
        done = 0
        while left or later:
            if not left:
                left, later = later, []
            at_once = min(self.most_at_once, number_at_once(self.model, len(left)))
            self.at_once = max(self.at_once, at_once)
            finished = 0
            try:
                # closed: a generator that is given up keeps torch's threads shared out
                with closing(self.results(left)) as results:
                    for batch, found in zip(left, results, strict=True):
                        self.found |= found
                        finished += 1
                        done += sum(len(self.rows.rows[i].tokens) for i in batch.rows)
                        if progress is not None:
                            progress(done, total)
                left = []
                continue
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                failed = left[finished]
                if failed.is_one_row and len(left) == 1:
                    raise _too_large(failed, self.model) from None
            # outside the handler: the traceback keeps the tensors of the failed batch
            _free()
            if failed.is_one_row:  # by itself: others run beside it, or before it is given
                left, later = [failed], [*left[finished + 1 :], *later]
                continue
            self.halvings += 1
            self.budget = max(1, min(self.budget, failed.ids.numel()) // 2)
            unscored = [i for batch in (*left[finished:], *later) for i in batch.rows]
            left, later = self.batches(policy, self.budget, unscored), []


def read_batches(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    read: Callable[[Batch, Iterable[torch.Tensor]], T],
    forward: Forward,
    in_turn: bool = False,
) -> Generator[T, None, None]:
    """What ``read`` makes of each batch and its logits, in their order.

    A streamed model's forward gets all batches, and shares torch's threads out by itself; one that
    works ``in_turn`` gets them all too, and has all threads.
    """
    if stream_of(model):
        yield from _in_turn(batches, read, forward(model, iter(batches)))
        return
    at_once = 1 if in_turn else number_at_once(model, len(batches))
    if at_once == 1:
        with fast_products(model):
            yield from _in_turn(batches, read, forward(model, iter(batches)))
        return

    def run(own: PreTrainedModel, batch: Batch) -> T:
        with fast_products(model):
            (found,) = _in_turn([batch], read, forward(own, [batch]))
        return found

    with threads_shared(at_once):
        yield from side_by_side(model, batches, run, at_once)


def _in_turn(
    batches: Sequence[Batch],
    read: Callable[[Batch, Iterable[torch.Tensor]], T],
    logits: Iterator[Iterable[torch.Tensor]],
) -> Iterator[T]:
    for batch, parts in zip(batches, logits, strict=True):
        yield read(batch, parts)


def _free() -> None:
    gc.collect(1)  # what has just failed is young
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _too_large(batch: Batch, model: PreTrainedModel) -> RunFailed:
    return RunFailed(
        f"one row of {batch.ids.shape[1]} tokens does not fit into the memory of {model.device}; "
        "lower --max-length, or use a smaller dtype or a larger device"
    )
