"""Measurements with their items: questions that are answered as told, windows with given losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from study_fixtures import task

from qbench.record import Metric, QuantizationRecord, TaskRecord
from qbench.study.store import Store

Items = dict[str, np.ndarray]


def questions(answers: Sequence[int], n_options: int = 4, gold: int = 0, first: int = 0) -> Items:
    """Options of questions number ``first`` on; ``answers`` are the options chosen."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("doc_id", "doc_hash", "option", "loglikelihood")
        + ("n_tokens", "n_characters", "is_greedy", "gold")
    }
    for number, answer in enumerate(answers, start=first):
        for option in range(n_options):
            row = (number, f"hash {number}", option, -1.0 if option == answer else -3.0 - option)
            for name, value in zip(columns, (*row, 1, 4, False, option == gold), strict=True):
                columns[name].append(value)
    return {name: np.array(values) for name, values in columns.items()}


def answers_of(n: int, wrong: Iterable[int], n_options: int = 4) -> Items:
    """``n`` questions answered right but for those numbered in ``wrong``."""
    lost = set(wrong)
    return questions([int(number in lost) for number in range(n)], n_options)


def windows(nll: Sequence[float], n_tokens: int = 31, n_bytes: int = 100) -> Items:
    """Windows of a text with these losses."""
    return {
        "window": np.arange(len(nll)),
        "nll": np.array(nll, dtype=np.float64),
        "n_tokens": np.full(len(nll), n_tokens),
        "n_bytes": np.full(len(nll), n_bytes),
    }


def measured(
    of: QuantizationRecord, name: str, items: Mapping[str, np.ndarray], **fields: Any
) -> TaskRecord:
    """A record whose metrics are those of the items."""
    if "window" in items:
        fields = {"protocol": "documents-32", "encoding": "protocol"} | fields
        loss = float(items["nll"].sum() / items["n_tokens"].sum())
        found = {"perplexity": float(np.exp(loss))}
        count = len(items["nll"])
    else:
        place = np.flatnonzero(items["option"] == 0)
        scores = np.split(items["loglikelihood"], place[1:])
        gold = np.split(items["gold"], place[1:])
        right = [g[np.argmax(s)] for s, g in zip(scores, gold, strict=True)]
        found = {name: float(np.mean(right)) for name in ("acc", "acc_norm", "acc_token")}
        count = len(place)
    record = task(of, name, found, n_items=count, **fields)
    if np.isnan(items.get("loglikelihood", np.zeros(1))).any():
        record.metrics = {name: Metric.of(float("nan")) for name in found}
    return record


def save(
    store: Store, of: QuantizationRecord, tasks: Mapping[str, Mapping[str, np.ndarray]], **key: Any
) -> QuantizationRecord:
    """Save a run with the items of its tasks."""
    store.save_quantization(of)
    for name, items in tasks.items():
        store.save_task(of.checkpoint, of.key, measured(of, name, items, **key), items)
    return of
