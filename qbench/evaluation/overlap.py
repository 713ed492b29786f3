"""Whether a model is measured on text that its method was calibrated on.

A method that has seen the test text looks better than it is (GPTQModel#1483: WikiText2 calibration
and WikiText2 perplexity). What counts is a run of 50 tokens that stands in both, the length at
which Lee et al. (arXiv 2107.06499) call a text a duplicate; shorter ones are phrases. Runs are
compared by 64-bit hashes, all of them in a fraction of a second.

Left out: texts shorter than that (most questions of PIQA or ARC), and text that was reworded or
tokenized differently at its edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

RUN = 50
"""Tokens in a row that make an overlap; all of a calibration window that is shorter."""
LEAST = 25
"""Windows of fewer tokens are phrases, and not looked at."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes modulo 2^64


def overlap(calibration: Any, rows: Iterable[Sequence[int]]) -> float | None:
    """The share of the evaluated tokens that stand in the calibration text too.

    Args:
        calibration: windows of token ids, (nsamples, seqlen), an array or a tensor.
        rows: token ids of what is evaluated.

    Returns:
        A share with four decimals; None where the windows, or all rows, are too short to tell.
    """
    run, texts = min([RUN, *map(len, calibration)]), list(rows)
    if run < LEAST or run > max(map(len, texts), default=0):
        return None
    shared, total = shared_tokens(calibration, texts, run)
    return round(shared / total, 4)


def shared_tokens(
    calibration: Any, rows: Iterable[Sequence[int]], run: int = RUN
) -> tuple[int, int]:
    """How many tokens of the evaluated rows stand in the calibration text too.

    Args:
        calibration: windows of token ids, (nsamples, seqlen), an array or a tensor.
        rows: token ids of what is evaluated; a row shorter than ``run`` shares nothing.
        run: tokens in a row, in one window, that make an overlap.

    Returns:
        Tokens within such a run, and all tokens.
    """
    seen, _ = _runs([np.asarray(window) for window in calibration], run)
    texts = [np.asarray(row) for row in rows]
    hashes, starts = _runs(texts, run)
    total = sum(map(len, texts))
    begins = starts[np.isin(hashes, seen)]
    edges = np.zeros(total + 1, dtype=np.int64)  # +1 where a shared run begins, -1 past its end
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + run, -1)
    return int((np.cumsum(edges) > 0).sum()), total


def _runs(texts: Sequence[np.ndarray], run: int) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every run that lies within one text, and where it begins in all of them."""
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    hashes = _hashes(np.concatenate([np.zeros(0, dtype=np.int64), *texts]), run)
    left = np.repeat(np.cumsum(sizes), sizes) - np.arange(sizes.sum())  # tokens to the text's end
    starts = np.flatnonzero(left[: len(hashes)] >= run)
    return hashes[starts], starts


def _hashes(ids: np.ndarray, run: int) -> np.ndarray:
    """A 64-bit hash of every run of ``run`` ids: a polynomial in an odd factor."""
    count = len(ids) - run + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(run, _FACTOR, dtype=np.uint64))
        # each id is spread over all bits first: sums of small ids would meet
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * _FACTOR
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        found = np.zeros(count, dtype=np.uint64)
        for place in range(run):
            found += mixed[place : place + count] * powers[place]
    return found
