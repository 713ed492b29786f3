"""Log-likelihoods of token rows under a causal language model.

Rows become batches (:mod:`~.packing`), batches logits (:mod:`~.forward`), and logits scores here:
log-probabilities in float32 whatever the model's dtype (bfloat16 turns half of PIQA into ties),
sums in float64. :mod:`~.reading` runs the batches.

Left out: lm-eval's one-token cache, which hands a row the logits of another one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qbench.errors import unknown
from qbench.evaluation.forward import Forward
from qbench.evaluation.packing import Batch, PackedRows, Row, in_pairs, tree_width
from qbench.evaluation.reading import read_rows
from qbench.evaluation.sharing import Sharing, sharing_of
from qbench.evaluation.tasks import BATCHING, Progress
from qbench.quantization.outcome import batching_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_TOKENS = 512
"""Default budget on a CPU: matrices are large enough to run at full speed, and fit its caches."""
GPU_TOKENS = 16_384
"""Default budget on a GPU with memory enough."""
_IN_CACHE = 1 << 19
"""Logits that are worked on together on a CPU: passes over more of them wait for memory."""
WORTH_SHARING = 0.1
"""Share of the tokens that trees have to save: attention under a mask costs about as much."""


@dataclass(frozen=True)
class Score:
    """What a row got."""

    loglikelihood: float
    is_greedy: bool
    """Whether every scored token is the model's first choice."""


@dataclass
class Scored:
    """Scores of rows, in their order, and how they were taken."""

    scores: list[Score]
    details: dict[str, Any] = field(default_factory=dict)
    """``sharing`` (where it was asked for) and what :func:`~.reading.read_rows` says."""


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    batch_tokens: int | None = None,
    batching: str | None = None,
    progress: Progress | None = None,
    forward: Forward | None = None,
) -> list[Score]:
    """Score every row; the result does not depend on how rows are batched."""
    return score(model, PackedRows(rows), batch_tokens, batching, progress, forward=forward).scores


def score(
    model: PreTrainedModel,
    rows: PackedRows,
    batch_tokens: int | None = None,
    batching: str | None = None,
    progress: Progress | None = None,
    sharing: Sharing | None = None,
    forward: Forward | None = None,
) -> Scored:
    """Score rows that may have been packed before.

    Args:
        model: in eval mode, on any device.
        rows: to be scored.
        batch_tokens: budget of a batch, padding included; None takes what suits the device, and
            under "shared" twice the longest row where that is more.
        batching: a key of ``BATCHING``; None is "shared". Where sharing is not exact on this model
            "shared" becomes "padded", and with a ``forward`` "unshared" becomes "one row".
        progress: called with tokens done and tokens in all.
        sharing: what is known of the model; None tests it.
        forward: what runs batches, one after the other; None is the model's own
            (:mod:`~.forward`), which may run them side by side.

    Raises:
        RunFailed: when one row alone does not fit into memory.
    """
    policy = batching or batching_of(model) or "shared"
    if policy not in BATCHING:
        raise unknown("batching", policy, BATCHING)
    budget = batch_tokens or default_tokens(model)
    details: dict[str, Any] = {}
    if policy == "shared":
        with torch.inference_mode():
            sharing = worth_sharing(model, rows, batch_tokens, sharing, forward)
        details["sharing"] = sharing.reason
        shared = sharing.exact
        policy, budget = (
            ("shared", _trees(model, rows, batch_tokens)) if shared else ("padded", budget)
        )
    found, how = read_rows(
        model, rows, _scores_of, policy, budget, progress, forward, in_turn=forward is not None
    )
    scores = [found.get(i, Score(0.0, True)) for i in range(len(rows.rows))]
    return Scored(scores, details | how)


def worth_sharing(
    model: PreTrainedModel,
    rows: PackedRows,
    batch_tokens: int | None = None,
    known: Sharing | None = None,
    forward: Forward | None = None,
) -> Sharing:
    """Whether rows are to share their beginning: if that saves something, and is exact."""
    budget = _trees(model, rows, batch_tokens)
    saved = rows.saved(budget, tree_width(model), in_pairs(model, forward is not None))
    if saved < WORTH_SHARING:
        return Sharing(False, f"off: it would save {max(0, saved):.0%}")
    return sharing_of(model, rows, known, forward, budget)


def _trees(model: PreTrainedModel, rows: PackedRows, batch_tokens: int | None) -> int:
    """Budget of trees: long prompts would have no room to share in the usual one."""
    return batch_tokens or max(default_tokens(model), 2 * rows.longest)


def default_tokens(model: PreTrainedModel) -> int:
    """A budget that suits the device: on a GPU what a quarter of its free memory holds."""
    if model.device.type != "cuda":
        return CPU_TOKENS
    config = model.config.get_text_config()
    free, _ = torch.cuda.mem_get_info(model.device)
    # bytes a token needs in a block: its vectors, and its row of every head's attention
    per_token = 64 * int(getattr(config, "hidden_size", 4096))
    fitting = max(CPU_TOKENS, min(GPU_TOKENS, free // 4 // per_token))
    return 1 << (
        int(fitting).bit_length() - 1
    )  # a little more or less free memory: the same batches


def _scores_of(batch: Batch, parts: Iterable[torch.Tensor]) -> dict[int, Score]:
    return row_scores(batch, *token_scores(batch, parts))


def token_scores(batch: Batch, parts: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each scored token and whether it is the most likely one.

    Returns:
        float64 and bool, (scored tokens of the batch,), in the order of ``batch.owner``.
    """
    values, greedy = [], []
    done = 0
    try:
        for logits in parts:
            stop = done + len(logits)
            own = slice(*np.searchsorted(batch.place.numpy(), (done, stop)))
            place = (batch.place[own] - done).to(logits.device)
            found = _of_tokens(logits, place, batch.target[own].to(logits.device))
            values.append(found[0])
            greedy.append(found[1])
            done = stop
            del logits  # before the next part is made
    finally:
        if isinstance(parts, Generator):  # or its hooks would stay on the model
            parts.close()
    if done != len(batch.wanted):
        raise ValueError(f"the forward gave {done} rows of logits for {len(batch.wanted)} places")
    return torch.cat(values).cpu().double().numpy(), torch.cat(greedy).cpu().numpy()


def _of_tokens(
    logits: torch.Tensor, place: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability in float32 of targets at places, and whether each is the first choice."""
    value = logits[place, target].float()
    step = len(logits) if logits.is_cuda else max(1, _IN_CACHE // logits.shape[-1])
    tops, totals = zip(*(_top_and_total(part) for part in logits.split(step)), strict=True)
    top, total = torch.cat(tops), torch.cat(totals)
    first = value == top[place]
    likely = first.nonzero()[:, 0]  # an argmax over the vocabulary costs more than a maximum
    first[likely] = logits[place[likely]].argmax(dim=-1) == target[likely]
    return value - total[place], first


def _top_and_total(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit and log of the sum of exponentials of each row, in float32."""
    top = logits.amax(dim=-1).float()
    # a difference with a float32 column is float32: no copy of the logits before it
    return top, (logits - top[:, None]).exp_().sum(dim=-1).log_() + top


def row_scores(batch: Batch, values: np.ndarray, greedy: np.ndarray) -> dict[int, Score]:
    """Row -> score, from those of its tokens."""
    order = np.argsort(batch.owner, kind="stable")
    owners, starts = np.unique(batch.owner[order], return_index=True)
    sums = np.add.reduceat(values[order], starts)
    firsts = np.logical_and.reduceat(greedy[order], starts)
    return {
        int(i): Score(float(total), bool(first))
        for i, total, first in zip(owners, sums, firsts, strict=True)
    }


def per_request(scores: Iterable[Score], requests: Iterable[Sequence[Row]]) -> list[Score]:
    """Scores of requests of one or more rows each, from those of the rows."""
    found = iter(scores)
    parts = [[next(found) for _ in rows] for rows in requests]
    return [
        Score(sum(s.loglikelihood for s in part), all(s.is_greedy for s in part)) for part in parts
    ]
