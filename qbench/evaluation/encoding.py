"""How text becomes rows of tokens to be scored.

Three ways to join a context and its continuation, because lm-eval had three: apart and stripped
(the b1.58 authors' adaptor of 0.3.0), together without BOS (0.4.0 to 0.4.9.1), together with the
tokenizer's own BOS (since 0.4.9.2, the default here). A score says which one it was taken with.

Left out: chat templates; sequence-to-sequence models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qbench.errors import QBenchError
from qbench.evaluation.corpora import encode
from qbench.evaluation.packing import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Pair:
    """A context and a continuation as tokens; the context is never empty."""

    context: list[int]
    continuation: list[int]
    spanning: bool = False
    """Whether a token lies across the join, so that it is scored with the continuation."""


class Encoder:
    """Encodes texts for one tokenizer in one of ``qbench.evaluation.tasks.ENCODINGS``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: str) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.bos = own_bos(tokenizer) if encoding == "joint+bos" else None
        self._known: dict[tuple[str, bool], list[int]] = {}

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """Encode many contexts and continuations: each text once, and many at a time.

        A call of a tokenizer costs several times what a sentence does.
        """
        texts = {text for request in requests for text in self._texts(*request)}
        for special in (False, True):
            chosen = sorted(text for text, own in texts if own == special)
            for start in range(0, len(chosen), _TEXTS_AT_ONCE):
                part = chosen[start : start + _TEXTS_AT_ONCE]
                found = self.tokenizer(
                    part,
                    add_special_tokens=special,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )
                for text, ids in zip(part, found["input_ids"], strict=True):
                    self._known[text, special] = list(ids)
        try:
            return [self.pair(*request) for request in requests]
        finally:
            self._known = {}

    def _texts(self, context: str, continuation: str) -> list[tuple[str, bool]]:
        """What :meth:`pair` encodes, and whether with special tokens."""
        if self.encoding == "lmeval03":
            return [(context.strip(), True), (continuation.strip(), False)]
        return [(context + continuation, False), (context.rstrip(), False)]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        known = self._known.get((text, special))
        return encode(self.tokenizer, text, special) if known is None else known

    def pair(self, context: str, continuation: str) -> Pair:
        """Encode a context and what follows it."""
        if self.encoding == "lmeval03":
            context = context.strip()
            ids = self._ids(context, special=True) if context else [self._end()]
            return Pair(ids, self._ids(continuation.strip()))
        # blanks at the end of the context belong to the word that follows
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        return self._joint(bare, continuation) if bare else self._without_context(continuation)

    def _without_context(self, continuation: str) -> Pair:
        ids = self._ids(continuation)
        start = prefix_token(self.tokenizer)
        # a continuation that brings its own BOS is not given a second one
        return Pair(ids[:1], ids[1:]) if ids[:1] == [start] else Pair([start], ids)

    def _joint(self, context: str, continuation: str) -> Pair:
        whole, before = self._text(context + continuation), self._text(context)
        split = len(before)
        spanning = split >= len(whole) and whole != before and bool(continuation)
        if spanning:
            # nothing is left behind the join: score from the first token the context alone lacks
            same = (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b)
            split = next(same, len(whole) - 1)
        if split == 0:
            return Pair([prefix_token(self.tokenizer)], whole, spanning)
        return Pair(whole[:split], whole[split:], spanning)

    def _text(self, text: str) -> list[int]:
        ids = self._ids(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise QBenchError(
                "encoding lmeval03 starts an empty context with EOS, which this tokenizer lacks; "
                "use joint or joint+bos"
            )
        return int(self.tokenizer.eos_token_id)


def own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS that the tokenizer itself puts in front of a text (none for GPT-2, BLOOM, Pythia)."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and encode(tokenizer, "a")[:1] == [bos] else None


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text starts from when there is nothing before it: BOS, or EOS where there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise QBenchError(
        "this tokenizer has neither BOS nor EOS, so no text can start from nothing; "
        "set tokenizer.bos_token, or use the gptq protocol"
    )


def pair_rows(pair: Pair, max_length: int) -> list[Row]:
    """The row that scores a continuation; its context loses tokens on the left where it must.

    A continuation longer than the model's context gets as many rows as it needs: its context is
    dropped, and each row starts from the last token of the row before. lm-eval stops with an
    assertion there.
    """
    n = len(pair.continuation)
    if n <= max_length:
        tokens = [*pair.context, *pair.continuation]
        return [Row(tokens[-(max_length + 1) :], n)]
    tokens = [pair.context[-1], *pair.continuation]
    return [
        Row(tokens[start : start + max_length + 1], min(max_length, n - start))
        for start in range(0, n, max_length)
    ]


def rolling_rows(tokens: list[int], prefix: int, max_length: int) -> list[Row]:
    """Rows that score every token of a text once, the first one given ``prefix`` alone.

    lm-eval's rolling windows: consecutive, except that the last one reads back over a full
    context. ``tokens`` come without BOS, or log p(BOS | BOS) would be counted too.
    """
    text = [prefix, *tokens]
    rows = []
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        rows.append(Row(text[max(0, end - max_length) : end + 1], end - start))
    return rows


def text_rows(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[Row]:
    """Rows that score a whole text, whatever the encoding of pairs is."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return rolling_rows(list(ids), prefix_token(tokenizer), max_length)
