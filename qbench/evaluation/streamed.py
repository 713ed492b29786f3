"""Running batches through a model whose decoder blocks are on disk.

All batches go through a block before the next one is read, so the checkpoint is read once for as
many batches as activations may be held of. The numbers are those of the model in memory to the
last bit: the same modules are called on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qbench.evaluation.forward import logits_of
from qbench.models.blocks import find_blocks
from qbench.models.bypass import Call, blocks_replaced, bypass_of
from qbench.models.products import fast_products
from qbench.models.side_by_side import number_at_once, side_by_side, threads_shared
from qbench.models.streaming import resident
from qbench.quantization.activations import scales_of_sequences
from qbench.quantization.calibration import capture_calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.evaluation.packing import Batch

LEAST_HELD = 1 << 28
"""Bytes of activations and masks that are held at a time; two blocks' worth where that is more."""


def streamed_logits(
    model: PreTrainedModel, batches: Iterable[Batch]
) -> Iterator[Iterable[torch.Tensor]]:
    """The logits that are wanted of every batch, as :data:`qbench.evaluation.forward.Forward`."""
    batches = list(batches)
    at_once = number_at_once(model, len(batches))
    with threads_shared(at_once), fast_products(model):  # for the head too: as in memory
        how = bypass_of(model, lambda name: resident(model, name))
        if how.refused:  # every block comes for every batch: slow, and right
            yield from logits_of(model, batches)
            return
        n_blocks = len(find_blocks(model))
        for group in _groups(batches, model):
            finals = _through_all_blocks(model, group, at_once)
            for batch in group:
                final = finals.pop(0)
                with blocks_replaced(model, how.output, _giving(final, n_blocks)):
                    yield from logits_of(model, [batch])


def streamed_states(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
    """What leaves the last block of every batch, (sequences, tokens, hidden).

    The blocks of the model must be ones that can be run around (:mod:`qbench.models.bypass`).
    """
    batches = list(batches)
    at_once = number_at_once(model, len(batches))
    with threads_shared(at_once), fast_products(model):
        for group in _groups(batches, model):
            yield from _through_all_blocks(model, group, at_once)


def _through_all_blocks(
    model: PreTrainedModel, group: list[Batch], at_once: int
) -> list[torch.Tensor]:
    """What leaves the last block, per batch."""
    captured = capture_calls(model, [batch.inputs(model.device, model.dtype) for batch in group])
    hidden = captured.hidden
    for name, module in find_blocks(model):

        def run(own: nn.Module, index: int, name: str = name) -> torch.Tensor:
            with fast_products(model), scales_of_sequences(group[index].lengths):
                return captured.runner(name, own)(hidden[index], index)

        with resident(model, name):
            found = side_by_side(module, range(len(hidden)), run, at_once)
            for index, leaving in enumerate(found):
                hidden[index] = leaving
        captured.calls[name].clear()
    return hidden


def _giving(
    final: torch.Tensor, n_blocks: int
) -> Callable[[int, torch.Tensor, Call], torch.Tensor]:
    """Stands in for the blocks: the last one gives what was worked out before."""
    return lambda number, hidden, _: final if number == n_blocks - 1 else hidden


def _groups(batches: Iterable[Batch], model: PreTrainedModel) -> Iterator[list[Batch]]:
    """As many batches as may be held, in their order."""
    _, block = find_blocks(model)[0]
    width = model.dtype.itemsize
    limit = max(LEAST_HELD, 2 * width * sum(p.numel() for p in block.parameters()))
    embeddings: Any = model.get_input_embeddings()
    channels = embeddings.weight.shape[-1]
    group: list[Batch] = []
    held = 0
    for batch in batches:
        sequences, tokens = batch.ids.shape
        masks = 0 if batch.ends is None else sequences * tokens * tokens
        size = width * (sequences * tokens * channels + masks)
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
