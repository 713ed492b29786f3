"""Documents to windows of tokens, and the order in which a training sees them.

Every document begins with the tokenizer's first token; documents stand behind each other and are
cut into windows of equal length, so that no token is padding. The last, shorter window is left out.
Attention reaches across documents in a window, as in the papers. The order is drawn from the seed,
anew for each pass, and is a function of the position only: twins see the same, and a training that
continues sees what it would have seen.

Left out: text that does not fit into memory; a token takes four bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qbench.errors import QBenchError
from qbench.evaluation.corpora import is_text_path, load_corpus
from qbench.progress import Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2000  # documents that are tokenized at once


def read_documents(name: str, purpose: str, data_dir: Path | None = None) -> list[str]:
    """The documents of a corpus or a file, empty ones left out.

    Args:
        name: a corpus that qbench knows, or a path; a line of a text file is a document, and a line
            of JSONL is an object with the document as its ``text``.
        purpose: "calibration" for the corpus' training split, "evaluation" for the held-out one.
        data_dir: the user's data folder.

    Raises:
        QBenchError: for an unknown corpus, or a file that cannot be read or holds no document.
    """
    documents: Sequence[str] = load_corpus(name, purpose, data_dir).documents
    if is_text_path(name) and Path(name).suffix != ".jsonl":
        documents = documents[0].split("\n")
    found = [document for document in documents if document.strip()]
    if not found:
        raise QBenchError(f"the corpus {name} holds no document")
    return found


def pack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    progress: Update = lambda done, total: None,
) -> Tensor:
    """Windows of tokens, (number of windows, seqlen), int32.

    Args:
        documents: texts.
        tokenizer: its ``bos_token`` goes before each document.
        seqlen: tokens in a window.
        progress: told how many documents are done.

    Raises:
        QBenchError: for a tokenizer without a first token, or a text shorter than one window.
    """
    first = tokenizer.bos_token_id
    if first is None:
        raise QBenchError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no bos_token, which goes before each "
            "document; name one in its tokenizer_config.json"
        )
    parts = []
    stream = iter(documents)
    done = 0
    while chunk := list(islice(stream, _CHUNK)):
        rows = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(np.fromiter(_joined(rows, first), dtype=np.int32))
        done += len(chunk)
        progress(done, len(documents))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    windows = len(tokens) // seqlen
    if windows == 0:
        raise QBenchError(
            f"the corpus has {len(tokens)} tokens, less than one window of {seqlen}; "
            "give more text or a smaller seqlen"
        )
    return torch.from_numpy(tokens[: windows * seqlen]).view(windows, seqlen)


def _joined(rows: Sequence[Sequence[int]], first: int) -> Iterator[int]:
    for row in rows:
        yield first
        yield from row


def fingerprint(windows: Tensor) -> str:
    """SHA-256 of the tokens and their shape."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.contiguous().numpy().data)
    return digest.hexdigest()


class Windows(Dataset):
    """Windows in the order in which they are trained on, pass after pass.

    Position ``i`` is window ``order[i]`` of the pass that ``i`` falls into; each pass has a
    permutation of its own, drawn from the seed and its number.
    """

    def __init__(self, windows: Tensor, length: int | None = None, seed: int | None = None) -> None:
        """``length`` positions (default: one pass); without a seed, in the order of the text."""
        self.windows = windows
        self.length = len(windows) if length is None else length
        self.seed = seed
        self._pass = -1
        self._order = torch.arange(len(windows))

    def __len__(self) -> int:
        return self.length

    def window_at(self, position: int) -> int:
        """Which window stands at a position."""
        number, place = divmod(position, len(self.windows))
        if self.seed is not None and number != self._pass:
            generator = torch.Generator().manual_seed((self.seed << 20) + number)
            self._order = torch.randperm(len(self.windows), generator=generator)
            self._pass = number
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return collate(self.__getitems__([position]))

    def __getitems__(self, positions: Sequence[int]) -> Tensor:
        """A whole batch at once, (len(positions), seqlen), int64."""
        return self.windows[[self.window_at(position) for position in positions]].long()


def collate(batch: Tensor) -> dict[str, Tensor]:
    """A batch as a causal language model takes it; it shifts the labels itself."""
    return {"input_ids": batch, "labels": batch}
