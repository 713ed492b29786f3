"""How far a quantized model's next-token distribution is from the same checkpoint's in FP16.

Over the first windows of a text, cut as the gptq protocol cuts them, at every predicted position:

``kl_divergence``   mean over positions of KL(full precision || quantized), in nats
``top1_agreement``  share of positions at which both have the same most likely token

with standard errors over windows. Both see what an accuracy hides, where as many answers become
right as become wrong (Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141).

The full-precision side runs once. What leaves its last block is kept, tokens × hidden; what follows
the blocks (norm, output head, scaling, soft caps, whatever the architecture does) runs again on it
beside the quantized model's own logits, part by part, so that windows × vocabulary numbers never
exist at once. Log-probabilities and sums are in float64, whatever the dtype of the logits.

Left out: other divergences; distributions along generated text.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qbench.errors import QBenchError, RunFailed
from qbench.evaluation.corpora import load_corpus
from qbench.evaluation.data import hash_json
from qbench.evaluation.estimates import ratio
from qbench.evaluation.forward import forward_of, logits_of
from qbench.evaluation.packing import Batch, PackedRows
from qbench.evaluation.perplexity import Part, fixed_windows, window_definition
from qbench.evaluation.reading import read_rows
from qbench.evaluation.scoring import default_tokens
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
from qbench.models.blocks import find_blocks, first_tensor
from qbench.models.bypass import Bypass, Stop, blocks_replaced, bypass_of
from qbench.models.side_by_side import double_of, stands_alone
from qbench.models.streaming import resident, stream_of
from qbench.quantization.outcome import batching_of
from qbench.record import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qbench.evaluation.sharing import Sharing

VERSION = 1
"""Raised when the protocol gives other numbers; part of every key."""
WINDOWS = 16
"""How many windows are compared unless a limit says otherwise."""
_IN_CACHE = 1 << 19
"""Logits that become log-probabilities together on a CPU; on a GPU eight times as many."""


@dataclass
class Reference:
    """A model in full precision, as far as a task needs it: its tail, and the states it ends on."""

    model: PreTrainedModel
    """Shares its weights with the model it was made of, and nothing that a hook is put on."""
    how: Bypass | None
    """How to run around the blocks; None where that cannot be and the whole model runs again."""
    batch_tokens: int
    """Budget under which it ran."""
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)
    """Tokens of a window -> what leaves the last block, (tokens, hidden), on the CPU."""

    def logits(self, batch: Batch) -> Iterator[Tensor]:
        """The full-precision logits at ``batch.wanted``, in parts (places, vocabulary)."""
        batch = replace(batch, whole_head=False)
        if self.how is None:
            own = self._own()
            for parts in forward_of(own)(own, [batch]):
                yield from parts
            return
        states = torch.stack([self.states[tuple(row)] for row in batch.ids.tolist()])
        final = states.to(self.model.device)
        model = self._own()
        last = len(find_blocks(model)) - 1
        stands_in = blocks_replaced(
            model,
            self.how.output,
            lambda number, hidden, _: final if number == last else hidden,
        )
        with stands_in:
            for parts in logits_of(model, [batch]):
                yield from parts

    @property
    def for_several(self) -> bool:
        """Whether logits of several batches may be asked for at once."""
        return stream_of(self.model) is None and stands_alone(self.model)

    def _own(self) -> PreTrainedModel:
        """Modules for one batch."""
        return double_of(self.model) if self.for_several else self.model


class AgreementTask(PreparedTask):
    """An agreement with its windows ready; :meth:`against` gives it what to compare with."""

    needs_reference = True

    def __init__(
        self, spec: TaskSpec, protocol: Protocol, part: Part, options: EvaluationOptions
    ) -> None:
        self.spec, self.protocol, self.options = spec, protocol, options
        self.parts = [part]
        self.rows = PackedRows([window.row for window in part.windows])
        self.reference: Reference | None = None
        self.key_fields: dict[str, Any] = {
            "task": part.corpus.name,
            "protocol": str(protocol),
            "definition": hash_json([window_definition(part.corpus)]),
            "data": hash_json([part.corpus.sha256]),
            "version": VERSION,
            "num_fewshot": 0,
            "seed": 0,
            # the protocol's own number said again is the same measurement
            "limit": None if spec.limit == WINDOWS else spec.limit,
            "encoding": "protocol",
            "max_length": protocol.seqlen,
        }

    def refer(self, model: PreTrainedModel) -> Reference:
        """Run the full-precision model over the windows, once.

        Args:
            model: pristine, in eval mode; neither changed nor hooked afterwards.
        """
        budget = self.options.batch_tokens or default_tokens(model)
        how = _bypass(model)
        reference = Reference(_tail(model), how, budget)
        if how is None:
            return reference

        def keep(batch: Batch, parts: Iterable[Tensor]) -> dict[int, None]:
            (states,) = parts
            for ids, own in zip(batch.ids.tolist(), states, strict=True):
                reference.states[tuple(ids)] = own.to("cpu", copy=True)
            return {}

        _, ran = read_rows(model, self.rows, keep, "padded", budget, forward=_ending_states)
        return replace(reference, batch_tokens=ran["batch_tokens"])

    def against(self, reference: Reference) -> AgreementTask:
        """The same task, ready to run on quantized copies of the model that was referred to."""
        bound = copy.copy(self)
        bound.reference = reference
        return bound

    def run(
        self,
        model: PreTrainedModel,
        progress: Progress | None = None,
        batching: str | None = None,
        sharing: Sharing | None = None,
    ) -> TaskResult:
        """Compare every window; windows have nothing to share."""
        if self.reference is None:
            raise QBenchError(
                f"{self.spec} compares with the model in full precision; give it as reference=..."
            )
        policy = batching or batching_of(model)
        policy = "padded" if policy in (None, "shared") else policy
        budget = self.options.batch_tokens or self.reference.batch_tokens
        found, details = read_rows(
            model,
            self.rows,
            self._compare,
            policy,
            budget,
            progress,
            in_turn=not self.reference.for_several,
        )
        (part,) = self.parts
        kl = [found[i][0] for i in range(len(self.rows.rows))]
        items = {
            "window": np.arange(len(kl)),
            "kl": np.array([own.sum() for own in kl]),
            "n_agreeing": np.array([found[i][1].sum() for i in range(len(kl))]),
            "n_tokens": np.array([len(own) for own in kl]),
            "n_bytes": np.array([window.n_bytes for window in part.windows]),
        }
        every = np.concatenate(kl)
        return TaskResult(
            metrics={
                "kl_divergence": Metric.of(*ratio(items["kl"], items["n_tokens"])),
                "top1_agreement": Metric.of(*ratio(items["n_agreeing"], items["n_tokens"])),
            },
            n_items=len(kl),
            details={
                "n_tokens": len(every),
                "sources": {part.corpus.name: part.corpus.source},
                "kl_median": _plain(np.median(every)),
                "kl_p99": _plain(np.quantile(every, 0.99)),
                "kl_max": _plain(every.max()),
                **details,
            },
            items=items,
        )

    def token_rows(self) -> Iterable[Sequence[int]]:
        """The token ids of the windows."""
        return (row.tokens for row in self.rows.rows)

    def _compare(
        self, batch: Batch, parts: Iterable[Tensor]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Row -> KL and agreement at each of its positions."""
        assert self.reference is not None
        own = iter(parts)
        with closing(self.reference.logits(batch)) as other:  # type: ignore[type-var]
            try:
                found = [divergence(*pair) for pair in aligned(other, own)]
            finally:
                if isinstance(own, Generator):  # or its hooks would stay on the model
                    own.close()
        kl = torch.cat([values for values, _ in found]).cpu().numpy()
        agree = torch.cat([first for _, first in found]).cpu().numpy()
        kl, agree = kl[batch.place.numpy()], agree[batch.place.numpy()]
        return {i: (kl[batch.owner == i], agree[batch.owner == i]) for i in batch.rows}


def prepare_agreement(
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    options: EvaluationOptions,
) -> AgreementTask:
    """Load the corpus and cut its first windows.

    Raises:
        QBenchError: for missing data or a text too short for a window.
    """
    if spec.name == B158:
        raise QBenchError(f"the task b158 has no protocol {spec.protocol}; ask it of a corpus")
    asked = Protocol.parse(spec.protocol or "agreement")
    corpus = load_corpus(spec.name, data_dir=options.data_dir)
    limits = (asked.seqlen or DEFAULT_LENGTH, options.max_length, context_length)
    seqlen = min(length for length in limits if length is not None)
    part = fixed_windows(corpus, tokenizer, seqlen, spec.limit or WINDOWS)
    return AgreementTask(spec, Protocol(asked.family, seqlen), part, options)


def divergence(reference: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || quantized) and whether the most likely token is the same, per row of logits.

    Args:
        reference: logits (places, vocabulary), any float dtype.
        quantized: the same shape, on the same or another device.

    Returns:
        float64 (places,), in nats, infinite where the quantized model rules out what the reference
        does not; and bool (places,), False where logits are NaN.
    """
    step = max(1, (8 if reference.is_cuda else 1) * _IN_CACHE // reference.shape[-1])
    values, alike = [], []
    for own, other in zip(reference.split(step), quantized.split(step), strict=True):
        other = other.to(own.device)
        of_own = own.double().log_softmax(dim=-1)
        of_other = other.double().log_softmax(dim=-1)
        share = of_own.exp()
        terms = torch.where(share == 0, 0.0, share * (of_own - of_other))
        values.append(terms.sum(dim=-1).clamp_min(0.0))  # below zero by rounding alone
        same = own.argmax(dim=-1) == other.argmax(dim=-1)
        alike.append(same & ~values[-1].isnan())
    return torch.cat(values), torch.cat(alike)


def aligned(one: Iterable[Tensor], other: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two sequences of parts of equally many rows, cut at the ends of both.

    Raises:
        ValueError: where one has more rows than the other, or other columns.
    """
    rest: list[Tensor | None] = [None, None]
    sources = (iter(one), iter(other))
    while True:
        for n, source in enumerate(sources):
            if rest[n] is None:
                rest[n] = next(source, None)
        a, b = rest
        if a is None and b is None:
            return
        if a is None or b is None or a.shape[1:] != b.shape[1:]:
            raise ValueError("the two models give different numbers of logits")
        step = min(len(a), len(b))
        yield a[:step], b[:step]
        rest = [a[step:] if len(a) > step else None, b[step:] if len(b) > step else None]


def _bypass(model: PreTrainedModel) -> Bypass | None:
    try:
        how = bypass_of(model, lambda name: resident(model, name))
    except QBenchError:  # no list of blocks
        return None
    return None if how.refused else how


def _tail(model: PreTrainedModel) -> PreTrainedModel:
    """A model of modules of its own around the same tensors, so that hooks do not meet.

    A streamed model is left as it is: it belongs to the reference alone.
    """
    if stream_of(model) is not None:
        return model
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _ending_states(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[Iterable[Tensor]]:
    """What leaves the last block, per batch (sequences, tokens, hidden); nothing after it runs."""
    if stream_of(model) is not None:
        from qbench.evaluation.streamed import streamed_states

        yield from ([states] for states in streamed_states(model, batches))
        return
    left: list[Tensor] = []

    def leave(module: Any, args: Any, output: Any) -> None:
        left.append(first_tensor(output))
        raise Stop

    _, last = find_blocks(model)[-1]
    for batch in batches:
        handle = last.register_forward_hook(leave)
        try:
            model(**batch.inputs(model.device, model.dtype), use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()
        if not left:
            raise RunFailed("the last block of the full-precision model did not run")
        yield [left.pop()]


def _plain(value: float) -> float | str:
    """A number for a record, which holds no infinite ones and no NaN but by name."""
    return float(value) if math.isfinite(value) else str(float(value))
