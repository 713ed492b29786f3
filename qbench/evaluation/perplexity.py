"""Perplexity protocols: how a corpus becomes windows, and windows a number.

``gptq-<seqlen>``       Frantar et al. (arXiv 2210.17323, A.2.1): the split joined, tokenized once,
                        non-overlapping windows, the incomplete tail dropped; a window predicts
                        seqlen-1 tokens; exp of the mean over windows.
``documents-<seqlen>``  each document alone from BOS, cut at seqlen tokens; mean over tokens.
``b158-<seqlen>``       1bitLLM's ``eval_ppl``: lines (WikiText2) or documents (C4) with EOS, those
                        longer than seqlen left out, packed in order behind one BOS while they fit;
                        mean over tokens. The task ``b158`` is the mean of both perplexities.
``lm-eval-<seqlen>``    each document rolled through the context from BOS, given once; per word and
                        per byte.

A window longer than the model's context is never run; the length is part of the id. Bytes are
UTF-8 bytes of the tokens that are scored. Left out: strided (overlapping) windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.errors import QBenchError
from qbench.evaluation.corpora import Corpus, draw_windows, encode, load_corpus, too_short
from qbench.evaluation.data import hash_json
from qbench.evaluation.encoding import prefix_token, rolling_rows
from qbench.evaluation.estimates import exponential, ratio
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.scoring import score
from qbench.evaluation.tasks import (
    B158,
    DEFAULT_LENGTH,
    EvaluationOptions,
    PreparedTask,
    Progress,
    Protocol,
    TaskResult,
    TaskSpec,
)
from qbench.quantization.outcome import batching_of
from qbench.record import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qbench.evaluation.sharing import Sharing

VERSION = 1
"""Raised when a protocol gives other numbers; part of every key."""


@dataclass(frozen=True)
class Window:
    """A row and the bytes of text its scored tokens stand for."""

    row: Row
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """The windows of one corpus."""

    corpus: Corpus
    windows: list[Window]
    n_words: int = 0
    """Words of the documents, where the protocol counts per word."""


class PerplexityTask(PreparedTask):
    """A perplexity with its windows ready."""

    def __init__(
        self,
        spec: TaskSpec,
        protocol: Protocol,
        parts: list[Part],
        options: EvaluationOptions,
    ) -> None:
        self.spec = spec
        self.protocol = protocol
        self.parts = parts
        self.rows = PackedRows([window.row for part in parts for window in part.windows])
        self.options = options
        self.key_fields: dict[str, Any] = {
            "task": parts[0].corpus.name if len(parts) == 1 else spec.name,
            "protocol": str(protocol),
            "definition": hash_json([window_definition(part.corpus) for part in parts]),
            "data": hash_json([part.corpus.sha256 for part in parts]),
            "version": VERSION,
            "num_fewshot": 0,
            "seed": 0,
            "limit": spec.limit,
            "encoding": "protocol",
            "max_length": protocol.seqlen,
        }

    def run(
        self,
        model: PreTrainedModel,
        progress: Progress | None = None,
        batching: str | None = None,
        sharing: Sharing | None = None,
    ) -> TaskResult:
        """Score every window of every part; windows have nothing to share."""
        windows = [window for part in self.parts for window in part.windows]
        batching = batching or batching_of(model)
        batching = "padded" if batching in (None, "shared") else batching
        scored = score(model, self.rows, self.options.batch_tokens, batching, progress)
        items = {
            "window": np.concatenate([np.arange(len(part.windows)) for part in self.parts]),
            "nll": np.array([-own.loglikelihood for own in scored.scores]),
            "n_tokens": np.array([window.row.n_scored for window in windows]),
            "n_bytes": np.array([window.n_bytes for window in windows]),
        }
        bounds = np.cumsum([len(part.windows) for part in self.parts])[:-1]
        columns = {name: np.split(column, bounds) for name, column in items.items()}
        results = [
            _metrics(self.protocol.family, part, *(columns[c][i] for c in list(items)[1:]))
            for i, part in enumerate(self.parts)
        ]
        if len(self.parts) > 1:
            items["corpus"] = np.repeat(
                [part.corpus.name for part in self.parts], [len(p.windows) for p in self.parts]
            )
        return TaskResult(
            metrics=self._combined(results),
            n_items=len(windows),
            details={
                "n_tokens": int(items["n_tokens"].sum()),
                "n_bytes": int(items["n_bytes"].sum()),
                "sources": {part.corpus.name: part.corpus.source for part in self.parts},
                **scored.details,
            },
            items=items,
        )

    def token_rows(self) -> Iterable[Sequence[int]]:
        """The token ids of the windows."""
        return (row.tokens for row in self.rows.rows)

    def _combined(self, results: list[dict[str, Metric]]) -> dict[str, Metric]:
        if len(results) == 1:
            return results[0]
        metrics = {}
        for name in results[0]:
            values = [r[name].as_float() for r in results]
            errors = [r[name].stderr for r in results]
            spread = [e for e in errors if e is not None]
            stderr = math.hypot(*spread) / len(results) if len(spread) == len(results) else None
            metrics[name] = Metric.of(sum(values) / len(values), stderr)
        for part, result in zip(self.parts, results, strict=True):
            metrics |= {f"{part.corpus.name}_{name}": m for name, m in result.items()}
        return metrics


def prepare_perplexity(
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    options: EvaluationOptions,
) -> PerplexityTask:
    """Load the corpus and cut it into windows."""
    names = ("c4", "wikitext2") if spec.name == B158 else (spec.name,)
    corpora = [load_corpus(name, data_dir=options.data_dir) for name in names]
    default = B158 if spec.name == B158 else corpora[0].definition.protocol
    asked = Protocol.parse(spec.protocol or default)
    if spec.name == B158 and asked.family != B158:
        raise QBenchError(f"the task b158 has no protocol {asked}; ask it of a corpus instead")
    limits = (asked.seqlen or DEFAULT_LENGTH, options.max_length, context_length)
    seqlen = min(length for length in limits if length is not None)
    build = _BUILDERS[asked.family]
    parts = [build(corpus, tokenizer, seqlen, spec.limit) for corpus in corpora]
    return PerplexityTask(spec, Protocol(asked.family, seqlen), parts, options)


def window_definition(corpus: Corpus) -> dict[str, Any]:
    """What of a corpus' definition changes its windows."""
    fields = asdict(corpus.definition)
    for name in ("summary", "hub", "folder", "calibration_split", "protocol"):
        fields.pop(name)
    return fields | {"split": corpus.split}


def fixed_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None
) -> Part:
    """The windows of the gptq protocol: all of one length, none overlapping another."""
    definition = corpus.definition
    most = min(n for n in (limit, definition.evaluation_windows, 1 << 62) if n is not None)
    if definition.draw_evaluation:
        drawn = draw_windows(tokenizer, corpus, most, seqlen, seed=0)
        return Part(
            corpus, [Window(Row(ids, seqlen - 1), _decoded(tokenizer, ids)) for ids in drawn]
        )
    text = definition.joiner.join(corpus.documents[: definition.evaluation_documents])
    ids, ends = _with_byte_ends(tokenizer, text, special=True)
    if len(ids) < seqlen:
        raise too_short(corpus, len(ids), seqlen)
    starts = range(0, min(len(ids) // seqlen, most) * seqlen, seqlen)
    return Part(
        corpus,
        [
            Window(Row(ids[s : s + seqlen], seqlen - 1), int(ends[s + seqlen - 1] - ends[s]))
            for s in starts
        ],
    )


def _documents(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None
) -> Part:
    bos = prefix_token(tokenizer)
    windows = []
    for text in _filled(corpus)[:limit]:
        ids, ends = _with_byte_ends(tokenizer, text, special=False)
        kept = ids[: seqlen - 1]
        if kept:
            windows.append(Window(Row([bos, *kept], len(kept)), int(ends[len(kept) - 1])))
    return Part(corpus, _some(corpus, windows))


def _packed(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None
) -> Part:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise QBenchError("the b158 protocol packs between BOS and EOS; this tokenizer lacks one")
    by_lines = corpus.definition.packed_by_lines
    texts: Iterable[str] = "".join(corpus.documents).split("\n") if by_lines else corpus.documents
    windows: list[Window] = []
    tokens, size = [bos], 0

    def close() -> None:
        if len(tokens) > 1:
            windows.append(Window(Row(tokens, len(tokens) - 1), size))

    for text in texts:
        if text == "":
            continue
        ids = [*encode(tokenizer, text, special=False), eos]
        if len(ids) > seqlen:
            continue
        if len(tokens) + len(ids) > seqlen:
            close()
            tokens, size = [bos], 0
            if len(windows) == limit:
                break
        tokens, size = tokens + ids, size + _size(text)
    # an item of exactly seqlen tokens leaves a last pack of seqlen + 1, which the authors drop
    if len(tokens) <= seqlen:
        close()
    return Part(corpus, _some(corpus, windows[:limit]))


def _rolled(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None
) -> Part:
    bos = prefix_token(tokenizer)
    texts = _filled(corpus)[:limit]
    windows = []
    for text in texts:
        ids, ends = _with_byte_ends(tokenizer, text, special=False)
        done = 0
        for row in rolling_rows(ids, bos, seqlen):
            before, done = done, done + row.n_scored
            windows.append(Window(row, int(ends[done - 1] - (ends[before - 1] if before else 0))))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    return Part(corpus, _some(corpus, windows), words)


_BUILDERS: dict[str, Callable[..., Part]] = {
    "gptq": fixed_windows,
    "documents": _documents,
    "b158": _packed,
    "lm-eval": _rolled,
}


def _filled(corpus: Corpus) -> list[str]:
    return [text for text in corpus.documents if text.strip()]


def _some(corpus: Corpus, windows: list[Window]) -> list[Window]:
    if not windows:
        raise QBenchError(f"{corpus.name} ({corpus.source}) has no text that fits a window")
    return windows


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Bytes of the text that a drawn window's scored tokens stand for."""
    return _size(str(tokenizer.decode(ids[1:], skip_special_tokens=True)))


def _with_byte_ends(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool
) -> tuple[list[int], np.ndarray]:
    """Token ids, and for each how many bytes of the text end with it.

    A tokenizer without character offsets (slow ones) shares the bytes out evenly.
    """
    if not tokenizer.is_fast:
        ids = encode(tokenizer, text, special)
        return ids, np.linspace(0, _size(text), len(ids) + 1)[1:].round()
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
    # special tokens have the offsets (0, 0), at the end of a text too
    return list(found["input_ids"]), bytes_before[np.maximum.accumulate(ends)]


def _metrics(
    family: str, part: Part, nll: np.ndarray, n_tokens: np.ndarray, n_bytes: np.ndarray
) -> dict[str, Metric]:
    bits, bits_error = ratio(nll / math.log(2), n_bytes)
    metrics = {
        "perplexity": exponential(*ratio(nll, n_tokens)),
        "bits_per_byte": Metric.of(bits, bits_error),
    }
    if family == "lm-eval":
        metrics["word_perplexity"] = exponential(float(nll.sum()) / part.n_words, None)
        metrics["byte_perplexity"] = exponential(*ratio(nll, n_bytes))
    return metrics
