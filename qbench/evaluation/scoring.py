"""Log-likelihoods of token rows under a causal language model, in deterministic batches.

The one place where an evaluation runs a model. Rows are sorted by length, filled into batches under
a token budget and padded on the right, which no causal model sees; log-probabilities are taken in
float32 whatever the model's dtype (bfloat16 turns half of PIQA into ties), sums in float64.

Left out: reuse of a shared context between rows, and lm-eval's one-token cache, which hands a row
the logits of another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qbench.evaluation.tasks import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS_AT_ONCE = 1 << 24
"""Most logits turned into float32 at a time (64 MiB)."""


@dataclass(frozen=True)
class Row:
    """Tokens of which the last ``n_scored`` are scored, each given all before it."""

    tokens: Sequence[int]
    n_scored: int


@dataclass(frozen=True)
class Score:
    """What a row got."""

    loglikelihood: float
    is_greedy: bool
    """Whether every scored token is the model's first choice."""


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    batch_tokens: int = 2048,
    one_row_at_a_time: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Score every row; the result does not depend on how rows are batched.

    With ``one_row_at_a_time`` each row is a batch, and the output head sees every position of it:
    for models whose activation scales are taken over all the head or a linear is given.
    """
    scores = [Score(0.0, True)] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.n_scored > 0]
    total = sum(len(rows[i].tokens) for i in wanted)
    done = 0
    with torch.inference_mode():
        for batch in _batches(rows, wanted, 1 if one_row_at_a_time else batch_tokens):
            chosen = [rows[i] for i in batch]
            for i, score in zip(batch, _score_batch(model, chosen, one_row_at_a_time), strict=True):
                scores[i] = score
            done += sum(len(row.tokens) for row in chosen)
            if progress is not None:
                progress(done, total)
    return scores


def _batches(rows: Sequence[Row], wanted: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest rows first, as many at a time as the budget holds but at least one."""
    order = sorted(wanted, key=lambda i: (-len(rows[i].tokens), i))
    start = 0
    while start < len(order):
        width = len(rows[order[start]].tokens) - 1
        size = max(1, batch_tokens // max(1, width))
        yield order[start : start + size]
        start += size


def _score_batch(model: PreTrainedModel, rows: list[Row], whole_head: bool) -> list[Score]:
    width = len(rows[0].tokens) - 1
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    places, targets = [], []
    for i, row in enumerate(rows):
        n = len(row.tokens) - 1
        ids[i, :n] = torch.tensor(row.tokens[:-1])
        places.append(torch.arange(n - row.n_scored, n) + i * width)
        targets.append(torch.tensor(row.tokens[n + 1 - row.n_scored :]))
    device = model.device
    position = torch.cat(places).to(device)
    target = torch.cat(targets).to(device)
    with _only(model, position, skip=whole_head) as selected:
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    vocabulary = logits.shape[-1]
    logits = logits.reshape(-1, vocabulary)
    if not selected:
        logits = logits[position.to(logits.device)]
    loglikelihood, greedy = _log_probabilities(logits, target.to(logits.device))
    sizes = [row.n_scored for row in rows]
    return [
        Score(float(part.double().sum()), bool(first.all()))
        for part, first in zip(loglikelihood.split(sizes), greedy.split(sizes), strict=True)
    ]


def _log_probabilities(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and whether it is the most likely token, on the CPU."""
    step = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    values, greedy = [], []
    for part, wanted in zip(logits.split(step), target.split(step), strict=True):
        log_probability = torch.log_softmax(part.float(), dim=-1)
        values.append(log_probability.gather(1, wanted[:, None])[:, 0])
        greedy.append(part.argmax(dim=-1) == wanted)
    return torch.cat(values).cpu(), torch.cat(greedy).cpu()


@contextmanager
def _only(model: PreTrainedModel, position: torch.Tensor, skip: bool) -> Iterator[list[bool]]:
    """Give the output head only the scored positions; the list yielded is empty if that failed.

    Between a third and none of the work of a small model is its head. Whatever the model does to
    logits afterwards (scaling, soft caps) works on any shape.
    """
    head: Any = model.get_output_embeddings()
    selected: list[bool] = []
    if skip or head is None:
        yield selected
        return

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden = inputs[0]
        selected.append(True)
        return hidden.reshape(-1, hidden.shape[-1])[position.to(hidden.device)][None]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield selected
    finally:
        handle.remove()
