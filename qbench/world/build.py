"""Making the bundled world's files: corpora, tokenizer and the rows of nine tasks.

What lies in ``qbench/world/data`` is what :func:`write_world` writes, with the start of the
training corpus only: a test holds the two together. The whole of it (60,000 documents, 12 MB) is
written anew wherever it is needed. Everything follows from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import RunFailed
from qbench.world.facts import World
from qbench.world.prose import documents
from qbench.world.questions import TASKS, items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
SEED = 0
VOCABULARY = 1024
TRAINING_DOCUMENTS = 60_000
CALIBRATION_DOCUMENTS = 2_000
"""The first of the training corpus, shipped for calibration."""
HELD_OUT_DOCUMENTS = 600
QUESTIONS = 200
"""Of every task."""


@cache
def training_corpus() -> tuple[str, ...]:
    """The documents the bundled twins were trained on."""
    return tuple(documents(World(SEED), "train", TRAINING_DOCUMENTS))


def held_out_corpus() -> list[str]:
    """Documents of the same kinds, none of which is in the training corpus."""
    seen = set(training_corpus())
    found: list[str] = []
    for text in documents(World(SEED), "held out", 2 * HELD_OUT_DOCUMENTS):
        if text not in seen and len(found) < HELD_OUT_DOCUMENTS:
            found.append(text)
    return found


def write_world(folder: Path, training_documents: int = TRAINING_DOCUMENTS) -> None:
    """Write ``tasks/``, ``corpora/`` and ``tokenizer/`` into a data folder."""
    training = training_corpus()
    _write(folder / "corpora/world/train.jsonl", _texts(training[:training_documents]))
    _write(folder / "corpora/world/validation.jsonl", _texts(held_out_corpus()))
    for task, (split, _) in TASKS.items():
        _write(folder / "tasks" / task / f"{split}.jsonl", items(World(SEED), task, QUESTIONS))
    train_tokenizer(training).save_pretrained(folder / "tokenizer")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``<s>`` in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # a name is one token wherever it stands, also at the start of a text
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def _texts(documents: Iterable[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in documents]


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise RunFailed(f"cannot write {path} ({reason}); name another folder") from error
