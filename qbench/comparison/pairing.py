"""Two stored measurements, item by item: which questions or windows both were measured on.

Items are joined on the question's number and the hash of its text, or on the number of the window.
What makes two numbers two different measurements (protocol, definition, data, shots, encoding,
context) is refused with the reason; another limit leaves the items that both have, and says so.
What a reader must know but may accept (software, device, calibration) comes back as notes.

Left out: tests (:mod:`qbench.comparison.statistics`), and the texts, which are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, unknown
from qbench.record import QuantizationRecord, TaskKey, TaskRecord
from qbench.study.store import Run, Store

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame

SCORES: Mapping[str, str | None] = {
    "acc": None,
    "acc_norm": "n_characters",
    "acc_token": "n_tokens",
}
"""Accuracy -> what an option's log-probability is divided by."""
ENVIRONMENT = ("qbench", "torch", "transformers", "lm_eval", "tokenizers", "device", "gpu")
"""What of the environment may move a number; threads and processors may in the last bit only."""
_WORDS = {
    "num_fewshot": "number of examples",
    "seed": "few-shot seed",
    "max_length": "context",
    "definition": "task definition",
    "data": "data",
    "version": "version of the scoring",
}
_MUST_AGREE = (
    *("task", "protocol", "definition", "data", "version", "num_fewshot", "seed", "encoding"),
    "max_length",
)
_HASHES = ("definition", "data")
_QUESTION = ["doc_id", "doc_hash"]


class NotPaired(QBenchError):
    """Two measurements whose items do not belong together; the message says why, in a line."""


@dataclass(frozen=True)
class Measurement:
    """One stored measurement with the model it was made on."""

    quantization: QuantizationRecord
    task: TaskRecord
    items: DataFrame
    """One row per option of a question, or per window."""

    @classmethod
    def read(cls, store: Store, run: Run, task: TaskRecord) -> Measurement:
        """Read the items from the store.

        Raises:
            QBenchError: if none were stored.
        """
        return cls(run.quantization, task, store.items(run, task))

    @property
    def of_windows(self) -> bool:
        """Whether the items are windows of a text rather than questions."""
        return "window" in self.items

    @cached_property
    def follows(self) -> bool:
        """Whether the stored accuracies are those of :func:`right`; a task may define its own.

        TruthfulQA's mc2 calls a share of probability ``acc``. True of windows.
        """
        if self.of_windows:
            return True
        items = _in_order(self.items)
        for name, stored in self.task.metrics.items():
            value = stored.as_float()
            if name in SCORES and math.isfinite(value):
                try:
                    own = float(right(items, name).mean())
                except NotPaired:  # NaN: said where it matters
                    continue
                if abs(own - value) > 1e-9:
                    return False
        return True


@dataclass(frozen=True)
class Paired:
    """The items of two measurements, in one order."""

    a: DataFrame
    b: DataFrame
    notes: tuple[str, ...] = ()
    """What the two differ in beside the model: to be told beside every number made of them."""

    @property
    def of_windows(self) -> bool:
        """Whether the items are windows of a text rather than questions."""
        return "window" in self.a


def pair(a: Measurement, b: Measurement) -> Paired:
    """The items both measurements have.

    Raises:
        NotPaired: with the reason, where the two did not measure the same thing.
    """
    for measured in (a, b):
        if measured.task.status != "ok":
            raise NotPaired(f"{measured.task.key.task} failed on one of the two")
        if not measured.follows:
            raise NotPaired("the accuracy does not follow from the stored items")
    reasons = list(_conflicts(a.task.key, b.task.key))
    if reasons:
        raise NotPaired("measured differently: " + "; ".join(reasons))
    if a.of_windows != b.of_windows:
        raise NotPaired("one of the two has questions, the other has windows")
    notes = list(_limits(a, b))
    first, second = _windows(a, b) if a.of_windows else _questions(a, b)
    if not len(first):
        raise NotPaired("the two have no item in common")
    return Paired(first, second, (*notes, *differences(a, b)))


def differences(a: Measurement, b: Measurement) -> Iterator[str]:
    """What may move a number beside the method itself: calibration, software, device, dtype.

    A method that needs no calibration text has none; that is no difference.
    """
    one, two = a.quantization.key, b.quantization.key
    if one.calibration and two.calibration and one.calibration != two.calibration:
        told = [
            f"{name} {getattr(one.calibration, name)} and {getattr(two.calibration, name)}"
            for name in ("source", "nsamples", "seqlen", "seed")
            if getattr(one.calibration, name) != getattr(two.calibration, name)
        ]
        yield "other calibration: " + (", ".join(told) or "another text of that name")
    if one.dtype != two.dtype:
        yield f"quantized in {one.dtype} and {two.dtype}"
    if a.task.key.dtype != b.task.key.dtype:
        yield f"evaluated in {a.task.key.dtype} and {b.task.key.dtype}"
    first, second = a.task.environment, b.task.environment
    told = [
        f"{name} {first.get(name, 'none')} and {second.get(name, 'none')}"
        for name in ENVIRONMENT
        if first and second and first.get(name) != second.get(name)
    ]
    if told:
        yield "other environment: " + ", ".join(told)


def right(items: DataFrame, metric: str = "acc") -> ndarray:
    """Whether each question is answered right, (questions,), by one of the accuracies.

    The option with the largest score is the answer, the first of them where two share it. A
    question without options to choose from (LAMBADA) is right where the text is the greedy one.

    Raises:
        NotPaired: where a log-probability is NaN, so that there is no answer.
    """
    if _greedy(items):
        return items["is_greedy"].to_numpy(dtype=bool)
    return items["gold"].to_numpy(dtype=bool)[_chosen(items, metric)]


def flips(a: DataFrame, b: DataFrame, metric: str = "acc") -> DataFrame:
    """Every question with what the two models answered, in the order of the items.

    Args:
        a: options of paired questions.
        b: the same questions of the other model.
        metric: the accuracy that decides.

    Returns:
        ``doc_id``, ``doc_hash``; ``chosen_a``, ``chosen_b`` (number of the option); ``gold`` (a
        tuple of numbers); ``kind`` ("right", "wrong" where nothing changed, else "right->wrong",
        "wrong->right", "wrong->other wrong", "right->other right"); ``margin_a``, ``margin_b``:
        score of the best right option less that of the best wrong one, in nats (per character or
        token where the accuracy is).

    Raises:
        NotPaired: where a log-probability is NaN, or the task has no options.
    """
    import numpy as np
    import pandas

    if _greedy(a) or _greedy(b):
        raise NotPaired("questions without options have no chosen option to compare")
    starts = _starts(a)
    bounds = [*starts.tolist(), len(a)]
    gold = a["gold"].to_numpy(dtype=bool)
    rows: dict[str, Any] = {name: a[name].to_numpy()[starts] for name in _QUESTION}
    answers = {}
    for name, items in (("a", a), ("b", b)):
        place = _chosen(items, metric)
        answers[name] = gold[place]
        rows[f"chosen_{name}"] = items["option"].to_numpy()[place]
        rows[f"margin_{name}"] = _margins(_scores(items, metric), gold, starts)
    options = a["option"].to_numpy()
    rows["gold"] = [
        tuple(options[low:high][gold[low:high]].tolist())
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    same = rows["chosen_a"] == rows["chosen_b"]
    words = np.where(answers["a"], "right", "wrong")
    after = np.where(answers["b"], "right", "wrong")
    other = np.where(answers["a"] == answers["b"], "->other ", "->").astype(object)
    rows["kind"] = np.where(same, words.astype(object), words.astype(object) + other + after)
    order = ("chosen_a", "chosen_b", "gold", "kind", "margin_a", "margin_b")
    return pandas.DataFrame({name: rows[name] for name in (*_QUESTION, *order)})


def _conflicts(a: TaskKey, b: TaskKey) -> Iterator[str]:
    for name in _MUST_AGREE:
        one, two = getattr(a, name), getattr(b, name)
        if one != two:
            word = _WORDS.get(name, name)
            yield f"another {word}" if name in _HASHES else f"{word} {one} and {two}"


def _limits(a: Measurement, b: Measurement) -> Iterator[str]:
    one, two = a.task.key.limit, b.task.key.limit
    if one != two:
        names = ["all items" if limit is None else f"limit={limit}" for limit in (one, two)]
        yield f"{names[0]} and {names[1]}: compared on the items both have"


def _questions(a: Measurement, b: Measurement) -> tuple[DataFrame, DataFrame]:
    keys = [*_QUESTION, "option"]
    first, second = _common(a.items, b.items, keys, _QUESTION)
    if (first["gold"].to_numpy() != second["gold"].to_numpy()).any():
        raise NotPaired("the right answers of some questions differ")
    return first, second


def _windows(a: Measurement, b: Measurement) -> tuple[DataFrame, DataFrame]:
    keys = ["corpus", "window"] if "corpus" in a.items else ["window"]
    first, second = _common(a.items, b.items, keys, keys)
    for name in ("n_tokens", "n_bytes"):
        if (first[name].to_numpy() != second[name].to_numpy()).any():
            raise NotPaired("the windows hold other text: the checkpoints have other tokenizers")
    return first, second


def _common(
    a: DataFrame, b: DataFrame, keys: list[str], item: list[str]
) -> tuple[DataFrame, DataFrame]:
    """The rows of the items that both have, in a's order.

    Args:
        a: rows of one measurement.
        b: rows of the other.
        keys: what names a row.
        item: what names the item it belongs to.

    Raises:
        NotPaired: where an item has other rows (options) in the two.
    """
    if len(a) == len(b) and all((a[k].to_numpy() == b[k].to_numpy()).all() for k in keys):
        return a.reset_index(drop=True), b.reset_index(drop=True)
    shared = a[item].drop_duplicates().merge(b[item].drop_duplicates(), on=item)
    first, second = a.merge(shared, on=item), b.merge(shared, on=item)
    both = first[keys].merge(second, on=keys)
    same = len(first) == len(second) == len(both)
    if not (same and all((first[k].to_numpy() == both[k].to_numpy()).all() for k in keys)):
        raise NotPaired("some questions have other options in the two")
    return first, both


def _greedy(items: DataFrame) -> bool:
    """Whether the questions have no options: none of them has a right one."""
    return not items["gold"].to_numpy(dtype=bool).any()


def _in_order(items: DataFrame) -> DataFrame:
    """The rows with the options of each question together, from 0 on."""
    options = items["option"].to_numpy()
    if (
        len(options)
        and options[0] == 0
        and ((options[1:] - options[:-1] == 1) | (options[1:] == 0)).all()
    ):
        return items
    return items.sort_values([*_QUESTION, "option"], ignore_index=True)


def _starts(items: DataFrame) -> ndarray:
    """Where each question's options begin."""
    import numpy as np

    return np.flatnonzero(items["option"].to_numpy() == 0)


def _scores(items: DataFrame, metric: str) -> ndarray:
    import numpy as np

    if metric not in SCORES:
        raise unknown("metric", metric, SCORES)
    per = SCORES[metric]
    scores = items["loglikelihood"].to_numpy(dtype=np.float64)
    if np.isnan(scores).any():
        raise NotPaired("some log-probabilities are NaN, so there is no answer")
    return scores if per is None else scores / np.maximum(items[per].to_numpy(), 1)


def _chosen(items: DataFrame, metric: str) -> ndarray:
    """The row of each question's answer: its largest score, the first where two are equal."""
    import numpy as np

    scores, starts = _scores(items, metric), _starts(items)
    sizes = np.diff([*starts, len(scores)])
    best = np.flatnonzero(scores == np.repeat(np.maximum.reduceat(scores, starts), sizes))
    question = np.repeat(np.arange(len(starts)), sizes)[best]
    return best[np.unique(question, return_index=True)[1]]


def _margins(scores: ndarray, gold: ndarray, starts: ndarray) -> ndarray:
    import numpy as np

    right, wrong = (
        np.maximum.reduceat(np.where(which, scores, -np.inf), starts) for which in (gold, ~gold)
    )
    with np.errstate(invalid="ignore"):
        # two impossible options are as good as each other, not NaN apart
        return np.where(right == wrong, 0.0, right - wrong)
