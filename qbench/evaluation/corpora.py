"""Texts for perplexity and calibration: which they are, and windows of tokens drawn from them.

The definitions of wikitext2, ptb, ptb-new, c4 and c4-new follow GPTQ's data loading (Frantar et
al., arXiv 2210.17323, appendix A.2.1 and its ``datautils``): which split, what stands between
documents, how calibration windows are drawn (Python's ``random`` seeded with the seed, so the same
windows come out for the same tokens). A path to a text or JSONL file is a corpus too.

Left out: how a perplexity is computed from them (:mod:`qbench.evaluation.perplexity`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, unknown
from qbench.evaluation.data import HubSource, hash_json, load_rows, read_file
from qbench.record import CalibrationSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".jsonl", ".raw", ".text", ".tokens")
_COLUMNS = ("text", "page", "sentence", "content")


@dataclass(frozen=True)
class CorpusDefinition:
    """What a corpus name means."""

    summary: str
    hub: HubSource | None = None
    folder: str | None = None
    """Name of its files, where it shares them with another corpus."""
    evaluation_split: str = "validation"
    calibration_split: str = "train"
    joiner: str = "\n\n"
    """What stands between documents when they are joined."""
    from_one_document: bool = False
    """Whether a window lies within one document (C4) instead of anywhere in the joined text."""
    evaluation_windows: int | None = None
    """Most windows that an evaluation reads (GPTQ's 256 for C4)."""
    evaluation_documents: int | None = None
    """Only the first so many documents are evaluated on."""
    draw_evaluation: bool = False
    """Whether evaluation windows are drawn like calibration windows, with seed 0."""
    packed_by_lines: bool = False
    """Whether the lines of the text, not its documents, are what b158 packs."""
    protocol: str = "gptq"


_C4 = HubSource(
    "allenai/c4",
    arguments={
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        }
    },
)
# the repository's own files are a script, which datasets >= 4 refuses: take the Hub's conversion
_PTB = HubSource(
    "ptb-text-only/ptb_text_only", "penn_treebank", {"revision": "refs/convert/parquet"}
)

CORPORA: dict[str, CorpusDefinition] = {
    "wikitext2": CorpusDefinition(
        "WikiText-2, raw, test split",
        HubSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
        evaluation_split="test",
        packed_by_lines=True,
    ),
    "ptb": CorpusDefinition("Penn Treebank, validation split, as in GPTQ's first code", _PTB),
    "ptb-new": CorpusDefinition(
        "Penn Treebank, test split, as in the published tables",
        _PTB,
        folder="ptb",
        evaluation_split="test",
        joiner=" ",
    ),
    "c4": CorpusDefinition(
        "C4, 256 windows drawn from validation documents; calibration as in GPTQ and QuIP",
        _C4,
        from_one_document=True,
        evaluation_windows=256,
        draw_evaluation=True,
    ),
    "c4-new": CorpusDefinition(
        "C4, the first 256 windows of the first 1100 validation documents (published tables)",
        _C4,
        folder="c4",
        joiner=" ",
        from_one_document=True,
        evaluation_windows=256,
        evaluation_documents=1100,
    ),
    "pile-val": CorpusDefinition(
        "the Pile's validation split, SmoothQuant's calibration text (needs zstandard to be read)",
        HubSource("mit-han-lab/pile-val-backup"),
        calibration_split="validation",
        from_one_document=True,
    ),
    "tinystories": CorpusDefinition(
        "TinyStories, each story by itself",
        HubSource("roneneldan/TinyStories"),
        protocol="documents",
    ),
    "world": CorpusDefinition(
        "the bundled world's held-out documents, each by itself (--data bundled:world)",
        protocol="documents",
    ),
}
_FILE = CorpusDefinition("a text or JSONL file", packed_by_lines=True)
_FOLDER = CorpusDefinition("a folder of the data folder")


@dataclass(frozen=True)
class Corpus:
    """The documents of one split."""

    name: str
    definition: CorpusDefinition
    split: str | None
    documents: Sequence[str]
    source: str
    """Where they came from, for a reader; never part of a key."""

    @property
    def sha256(self) -> str:
        """Hash of the documents, the same whichever file or service they came from."""
        return hash_json(self.documents)


def known_corpora() -> dict[str, str]:
    """Corpus name -> one line."""
    return {name: definition.summary for name, definition in CORPORA.items()}


def is_text_path(name: str) -> bool:
    """Whether a task or corpus name is a path to a text file."""
    return name not in CORPORA and Path(name).suffix in TEXT_SUFFIXES


def load_corpus(
    name: str, purpose: str = "evaluation", data_dir: Path | None = None, split: str | None = None
) -> Corpus:
    """Load a corpus by name or by path.

    Args:
        name: a known corpus, a path to a text or JSONL file, or a folder of the data folder.
        purpose: "evaluation" or "calibration", which have splits of their own.
        data_dir: the user's data folder.
        split: another split than the corpus' own.

    Raises:
        QBenchError: for an unknown name, or when the text is found nowhere.
    """
    if is_text_path(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise QBenchError(f"the text file {name} does not exist; give a path to one that does")
        return Corpus(path.name, _FILE, None, _texts(read_file(path), name), f"file {path.name}")
    definition = CORPORA.get(name)
    if definition is None:
        folders = (
            [Path(data_dir) / kind / name for kind in ("tasks", "corpora")] if data_dir else []
        )
        if not any(folder.is_dir() for folder in folders):
            raise unknown("corpus", name, CORPORA)
        definition = _FOLDER
    if split is None:
        calibration = purpose == "calibration"
        split = definition.calibration_split if calibration else definition.evaluation_split
    found = load_rows(definition.folder or name, split, data_dir, definition.hub)
    return Corpus(name, definition, split, _texts(found.rows, found.source), found.source)


def _texts(rows: Sequence[Any], source: str) -> list[str]:
    if not len(rows):
        raise QBenchError(f"{source} holds no documents")
    column = next((c for c in _COLUMNS if c in rows[0]), None)
    if column is None:
        raise QBenchError(
            f"{source} has the columns {', '.join(rows[0])}; a corpus needs one of "
            + ", ".join(_COLUMNS)
        )
    # a datasets.Dataset gives a whole column at once, far faster than row by row
    table: Any = rows
    texts = table[column] if hasattr(rows, "column_names") else (row[column] for row in rows)
    return [str(text) for text in texts]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, spec: CalibrationSpec, data_dir: Path | None = None
) -> tuple[torch.Tensor, CalibrationSpec]:
    """Draw the token windows a method is calibrated on.

    Returns:
        The ids (nsamples, seqlen), and the spec with the hash of these ids filled in.

    Raises:
        QBenchError: when the corpus is missing or holds no text long enough.
    """
    import numpy as np
    import torch

    if spec.nsamples < 1 or spec.seqlen < 1:
        raise QBenchError(
            f"calibration of {spec.nsamples} samples of {spec.seqlen} tokens is empty; "
            "give at least 1 of each"
        )
    corpus = load_corpus(spec.source, "calibration", data_dir)
    ids = torch.tensor(draw_windows(tokenizer, corpus, spec.nsamples, spec.seqlen, spec.seed))
    digest = hashlib.sha256(ids.numpy().astype(np.int64).tobytes())
    digest.update(str(tuple(ids.shape)).encode())
    if spec.tokens not in (None, digest.hexdigest()):
        raise QBenchError(
            f"the calibration text {spec.source} is not the one of the record: its tokens hash to "
            f"{digest.hexdigest()[:12]}, expected {str(spec.tokens)[:12]}; give the same text"
        )
    return ids, spec.model_copy(update={"tokens": digest.hexdigest()})


def draw_windows(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, nsamples: int, seqlen: int, seed: int
) -> list[list[int]]:
    """Windows at random places, drawn as GPTQ's loaders draw them for the same seed.

    The last possible start is never drawn, as there; so a text needs one token more than a window.
    """
    generator = random.Random(seed)
    if not corpus.definition.from_one_document:
        ids = encode(tokenizer, corpus.definition.joiner.join(corpus.documents))
        if len(ids) <= seqlen:
            raise too_short(corpus, len(ids), seqlen)
        starts = [generator.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
        return [ids[start : start + seqlen] for start in starts]

    encoded: dict[int, list[int] | None] = {}  # None: too short; the order of the draws is kept

    def document(index: int) -> list[int] | None:
        if index not in encoded:
            ids = encode(tokenizer, corpus.documents[index])
            encoded[index] = ids if len(ids) > seqlen else None
            if len(encoded) == len(corpus.documents) and not any(encoded.values()):
                raise too_short(corpus, None, seqlen)
        return encoded[index]

    windows: list[list[int]] = []
    while len(windows) < nsamples:
        chosen = document(generator.randint(0, len(corpus.documents) - 1))
        if chosen is not None:
            start = generator.randint(0, len(chosen) - seqlen - 1)
            windows.append(chosen[start : start + seqlen])
    return windows


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Token ids, with the special tokens the tokenizer adds by default unless told otherwise."""
    # verbose=False: a text longer than the model's context is what we want here, no warning
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def too_short(corpus: Corpus, have: int | None, seqlen: int) -> QBenchError:
    """The error for a text that has no window of the length asked for."""
    what = f"{have} tokens" if have is not None else f"no document of more than {seqlen} tokens"
    return QBenchError(
        f"{corpus.name} ({corpus.source}) has {what}, too few for a window of {seqlen}; "
        "lower seqlen (--max-length, --seqlen) or give a longer text"
    )
