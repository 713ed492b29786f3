"""lm-eval's view of a model: HFLM with its scoring replaced.

The requests are lm-eval's; tokens and log-likelihoods are qbench's own (:mod:`~.encoding`,
:mod:`~.scoring`), which mends what HFLM 0.4.13 does: log-softmax and sums in the model's dtype,
logits handed to the wrong row by the one-token cache, a second BOS in rolling perplexities, and
assertions on long continuations and on tokens that span the join. Generation is HFLM's.

``lm_eval.simple_evaluate(QBenchLM(model, tokenizer), ...)`` works too. Left out: several processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from qbench.evaluation.encoding import Encoder, Pair, pair_rows, text_rows
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.prompts import quiet
from qbench.evaluation.scoring import Score, per_request, score
from qbench.evaluation.tasks import Progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class QBenchLM(HFLM):
    """A causal language model in memory, scored by qbench."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        encoding: str = "joint+bos",
        batch_tokens: int | None = None,
        batching: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        # HFLM gives a tokenizer without a padding token one: work on a copy then
        own = tokenizer if tokenizer.pad_token_id is not None else copy.deepcopy(tokenizer)
        with quiet(), _never_tied(model):
            super().__init__(
                pretrained=model,  # type: ignore[arg-type]
                tokenizer=own,
                backend="causal",
                max_length=max_length,
                batch_size=1,
                logits_cache=False,
                softmax_dtype="float32",
                add_bos_token=encoding == "joint+bos",
            )
        self.encoder = Encoder(own, encoding)
        self.batch_tokens = batch_tokens
        self.batching = batching
        self.progress = progress

    def score(self, requests: Sequence[Sequence[Row]]) -> list[Score]:
        """Score requests of one or more rows each."""
        packed = PackedRows([row for rows in requests for row in rows])
        scored = score(self.model, packed, self.batch_tokens, self.batching, self.progress)
        return per_request(scored.scores, requests)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = self.encoder.pair(context, continuation)
        return pair.context, pair.continuation

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of every (context, continuation)."""
        pairs = self.encoder.pairs([request.args for request in requests])
        return [
            (own.loglikelihood, own.is_greedy)
            for own in self.score([pair_rows(pair, self.max_length) for pair in pairs])
        ]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        rows = [pair_rows(Pair(ctx, cont), self.max_length) for _, ctx, cont in requests]
        return [(score.loglikelihood, score.is_greedy) for score in self.score(rows)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of every text, from BOS given once."""
        rows = [self.rolling(request.args[0]) for request in requests]
        return [score.loglikelihood for score in self.score(rows)]

    def rolling(self, text: str) -> list[Row]:
        """The rows of a rolling log-likelihood."""
        return text_rows(self.tokenizer, text, self.max_length)


@contextmanager
def _never_tied(model: Any) -> Iterator[None]:
    """Stop HFLM from tying weights, which would undo a quantized output head."""
    model.tie_weights = lambda *args, **kwargs: None  # shadows the method on this instance
    try:
        yield
    finally:
        del model.tie_weights
