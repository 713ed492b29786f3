"""The vocabulary of an evaluation: which tasks there are, how one is asked for, what comes back.

Torch-free and lm-eval-free, so that a sweep can be planned and tasks listed in a moment. Left out:
running anything (:mod:`qbench.evaluation.evaluate`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError
from qbench.evaluation.corpora import CORPORA, is_text_path, known_corpora
from qbench.evaluation.definitions import pinned_tasks, read_definition
from qbench.models.files import data_folder
from qbench.record import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.evaluation.sharing import Sharing

ENCODINGS = {
    "joint+bos": "context and continuation encoded together, the tokenizer's own BOS in front",
    "joint": "context and continuation encoded together, no BOS (lm-eval 0.4.0 to 0.4.9.1)",
    "lmeval03": "stripped and encoded apart (the b1.58 authors' adaptor of lm-eval 0.3.0)",
}
BATCHING = {
    "shared": "rows that begin alike run as one tree, where that is exact; else padded",
    "padded": "rows of similar length together, filled up on the right",
    "unshared": "padded, and no row shares its start; scales per tensor see one row each",
    "one row": "every row by itself, the output head on all of it",
}
"""How rows share a batch; the first one is the default."""
PROTOCOLS = {
    "gptq": "documents joined, non-overlapping windows, mean over windows (GPTQ, QuIP)",
    "documents": "each document alone from BOS, cut at the window, mean over tokens",
    "b158": "lines or documents with EOS packed behind one BOS, mean over tokens (BitNet b1.58)",
    "lm-eval": "each document rolled through the context; per word and per byte",
    "agreement": "the first windows of gptq: next-token distributions against FP16 (KL, top-1)",
}
AGREEMENT = "agreement"
"""The protocol that compares with the same checkpoint in full precision."""
B158 = "b158"
"""The task that is the mean of the C4 and WikiText2 perplexities."""
DEFAULT_LENGTH = 2048
"""Window length of the papers, and the context assumed of a model that names none."""
Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""


@dataclass(frozen=True)
class Protocol:
    """How a perplexity is taken: a family and a window length (None: the default)."""

    family: str
    seqlen: int | None = None

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """Read ``gptq`` or ``gptq-1024``."""
        match = re.fullmatch(rf"({'|'.join(PROTOCOLS)})(?:-(\d+))?", text)
        if not match:
            raise QBenchError(
                f"unknown protocol {text!r}; write one of {', '.join(PROTOCOLS)}, "
                "with a window length if you like (gptq-1024)"
            )
        seqlen = int(match[2]) if match[2] else None
        if seqlen is not None and seqlen < 2:
            raise QBenchError(f"protocol {text!r}: a window needs at least 2 tokens")
        return cls(match[1], seqlen)

    def __str__(self) -> str:
        """The id, as stored and printed."""
        return self.family if self.seqlen is None else f"{self.family}-{self.seqlen}"


@dataclass(frozen=True)
class TaskSpec:
    """One task as asked for."""

    name: str
    """A corpus, a pinned or any other lm-eval task, or a path to a text or YAML file."""
    num_fewshot: int = 0
    limit: int | None = None
    """Only the first so many questions, windows or documents."""
    protocol: str | None = None
    """Perplexity only; None is the corpus' own."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.num_fewshot < 0:
            raise QBenchError(f"{self.num_fewshot} few-shot examples cannot be; give 0 or more")
        if self.limit is not None and self.limit < 1:
            raise QBenchError(f"limit {self.limit} leaves nothing to measure; give at least 1")
        if self.protocol is not None:
            Protocol.parse(self.protocol)
        if self.protocol is not None and not self.is_perplexity:
            raise QBenchError(
                f"task {self.name!r} is not a corpus, so it has no protocol {self.protocol!r}; "
                f"corpora are {', '.join(CORPORA)} and paths to text files"
            )
        if self.num_fewshot and self.is_perplexity:
            raise QBenchError(f"{self.name} is a perplexity; it takes no few-shot examples")

    @classmethod
    def parse(cls, text: str) -> TaskSpec:
        """Read ``piqa``, ``wikitext2@documents`` or ``my.txt@gptq-512``."""
        name, at, protocol = text.strip().rpartition("@")
        if not at or "/" in protocol or "." in protocol:  # an @ inside a path
            return cls(text.strip())
        return cls(name, protocol=protocol)

    @property
    def is_perplexity(self) -> bool:
        """Whether this is a perplexity rather than a set of questions."""
        return self.name in CORPORA or self.name == B158 or is_text_path(self.name)

    @property
    def is_agreement(self) -> bool:
        """Whether this compares a model with the same checkpoint in full precision."""
        return self.protocol is not None and Protocol.parse(self.protocol).family == AGREEMENT

    def __str__(self) -> str:
        """The form that :meth:`parse` reads."""
        return f"{self.name}@{self.protocol}" if self.protocol else self.name


@dataclass(frozen=True)
class EvaluationOptions:
    """What holds for every task of a run."""

    data_dir: Path | None = None
    """Folder with ``tasks/<task>/<split>.jsonl`` and ``corpora/``, looked at before the Hub, or
    ``bundled:world``."""
    max_length: int | None = None
    """Context in tokens; None is the model's own. Questions may go past it, windows never do."""
    encoding: str = "joint+bos"
    """How a context and its continuation become tokens; a key of ``ENCODINGS``."""
    batch_tokens: int | None = None
    """Most tokens in a batch, padding included; None takes what suits the device."""
    seed: int = 1234
    """Draws the few-shot examples (lm-eval's own default)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, and say where the bundled data are."""
        object.__setattr__(self, "data_dir", data_folder(self.data_dir))
        if self.encoding not in ENCODINGS:
            raise QBenchError(
                f"unknown encoding {self.encoding!r}; choose one of {', '.join(ENCODINGS)}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise QBenchError(f"max_length {self.max_length} is too short; give at least 2 tokens")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise QBenchError(f"a batch of {self.batch_tokens} tokens is empty; give at least 1")


@dataclass(frozen=True)
class TaskResult:
    """What a measurement gives."""

    metrics: dict[str, Metric]
    n_items: int
    """Questions, windows or documents scored."""
    details: dict[str, Any] = field(default_factory=dict)
    items: dict[str, Any] = field(default_factory=dict, repr=False)
    """Columns of the per-item table (equally long lists or arrays); never texts."""


class PreparedTask(ABC):
    """A task with its data loaded and tokenized: independent of the weights, run on many models."""

    spec: TaskSpec
    key_fields: dict[str, Any]
    """The fields of :class:`qbench.record.TaskKey` except quantization and dtype."""
    needs_reference: bool = False
    """Whether it compares with the same checkpoint in full precision (:meth:`against`)."""

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        progress: Progress | None = None,
        batching: str | None = None,
        sharing: Sharing | None = None,
    ) -> TaskResult:
        """Measure a model.

        Args:
            model: on any device, in eval mode.
            progress: called with tokens done and tokens in all.
            batching: a key of ``BATCHING``; models whose activation scales depend on what else is
                in the batch need another one than None (:func:`qbench.evaluation.evaluate`).
            sharing: what :meth:`test_sharing` found on the same checkpoint; None tests.
        """

    def refer(self, model: PreTrainedModel) -> Any:
        """What :meth:`against` takes, from a full-precision model; worked out once for a sweep."""
        return None

    def against(self, reference: Any) -> PreparedTask:
        """This task, comparing with what :meth:`refer` gave."""
        return self

    def token_rows(self) -> Iterable[Sequence[int]]:
        """The token ids of everything that is scored; empty where nobody looks at them."""
        return ()

    def test_sharing(self, model: PreTrainedModel) -> Sharing | None:
        """Whether rows of this task may share their beginning on a model.

        The verdict is kept with the model, and copies inherit it: a sweep asks once per checkpoint,
        before it makes copies. None where nothing is shared.
        """
        return None


def known_tasks() -> dict[str, str]:
    """Task name -> one line, perplexities first."""
    tasks = {B158: "mean perplexity of C4 and WikiText-2, packed as the BitNet b1.58 authors do"}
    tasks = known_corpora() | tasks
    for name, path in pinned_tasks().items():
        tasks[name] = read_definition(path)["metadata"]["summary"]
    return tasks
