"""Which of a table's differences are more than chance: paired tests on the stored items.

One question, one test: accuracies by McNemar's exact test, sums over windows (losses, divergences)
and means of several tasks by the randomization test, all two-sided, then Holm's correction over
every comparison that was asked for together. A comparison that cannot be made has no p, does not
count in the family, and says why.

Left out: which rows are compared with which, and how it is marked (:mod:`qbench.tables.marks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Measured
from qbench.comparison.pairing import SCORES, Measurement, NotPaired, Paired, pair, right
from qbench.comparison.statistics import (
    LEVEL,
    NOT_FINITE,
    holm,
    mcnemar,
    resamples_for,
    sign_flips,
)
from qbench.errors import QBenchError, RunFailed
from qbench.record import TaskRecord
from qbench.study.store import Run, Store

if TYPE_CHECKING:
    from numpy import ndarray

MCNEMAR = "exact McNemar"
RANDOMIZATION = "randomization test"
_SUMS = {
    **dict.fromkeys(("perplexity", "byte_perplexity", "word_perplexity", "bits_per_byte"), "nll"),
    "kl_divergence": "kl",
    "top1_agreement": "n_agreeing",
}
"""Metric -> what is summed over windows, and divided by something both rows share."""


@dataclass(frozen=True)
class Number:
    """A number of a table with the run it was measured on, or the runs it is the mean of."""

    runs: tuple[str, ...]
    """Folders below the store, as in the long table, one per seed; none for a published row."""
    measured: Measured


@dataclass(frozen=True)
class Verdict:
    """What a test says of one number against its reference."""

    n: int = 0
    """Questions or windows compared."""
    difference: float | None = None
    """The number less its reference, on the items both have; of losses per token, in nats."""
    better: bool | None = None
    """Whether the number is the better of the two; None where they are equal or untested."""
    test: str = ""
    p: float | None = None
    adjusted: float | None = None
    """p after Holm's correction over the family."""
    reason: str = ""
    """Why there is no test."""
    notes: tuple[str, ...] = ()
    """What the two differ in beside the model."""

    @property
    def significant(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.adjusted is not None and self.adjusted < LEVEL


@dataclass
class Tester:
    """Tests numbers of one store against each other; items are read once."""

    store: Store
    seed: int = 0
    """Of the random signs."""
    _runs: dict[str, Run] = field(default_factory=dict)
    _items: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    def family(self, pairs: Sequence[tuple[Number, Number]]) -> list[Verdict]:
        """One verdict per pair (reference, number), corrected for all of them together."""
        n = resamples_for(len(pairs))
        found = [self._verdict(reference, number, n) for reference, number in pairs]
        adjusted = holm([verdict.p for verdict in found])
        return [replace(v, adjusted=p) for v, p in zip(found, adjusted, strict=True)]

    def _verdict(self, reference: Number, number: Number, n: int) -> Verdict:
        try:
            return self._tested(reference, number, n)
        except QBenchError as error:
            return Verdict(reason=str(error))

    def _tested(self, reference: Number, number: Number, n: int) -> Verdict:
        import numpy as np

        parts = [self._part(*both) for both in _parts(reference, number)]
        notes = tuple(dict.fromkeys(n for part in parts for each in part for n in each.notes))
        metric = number.measured.metric
        if len(parts) == len(parts[0]) == 1 and metric in SCORES:
            paired = parts[0][0]
            found = mcnemar(right(paired.a, metric), right(paired.b, metric))
            size, difference, test = found.n, found.difference, MCNEMAR
            p: float | None = found.p
        else:
            names = [part.metric for part in number.measured.parts] or [metric]
            shares = [s for p, name in zip(parts, names, strict=True) for s in _over_seeds(p, name)]
            size, every = sum(map(len, shares)), np.concatenate(shares) / len(shares)
            p, test = sign_flips(every, self.seed, n), RANDOMIZATION
            if p is None:
                return Verdict(n=size, test=test, reason=NOT_FINITE, notes=notes)
            difference = float(every.sum())
        better = None if difference == 0 else (difference < 0) == number.measured.lower_is_better
        return Verdict(size, difference, better, test, p, notes=notes)

    def _part(self, a: Number, b: Number) -> list[Paired]:
        """The paired items of two numbers; of rows of several seeds, each run of both alike often.

        The mean of b's runs less that of a's is the mean over these pairs.
        """
        if a.measured.metric != b.measured.metric:
            other = f"{a.measured.metric} and {b.measured.metric}"
            raise NotPaired(f"measured differently: metric {other}")
        if b.measured.metric not in SCORES and b.measured.metric not in _SUMS:
            raise NotPaired(f"there is no paired test for {b.measured.metric}")
        if not (a.runs and b.runs and a.measured.conditions and b.measured.conditions):
            raise NotPaired("a published number has no items")
        return [
            pair(
                self.measurement(a.runs[turn % len(a.runs)], a.measured),
                self.measurement(b.runs[turn % len(b.runs)], b.measured),
            )
            for turn in range(math.lcm(len(a.runs), len(b.runs)))
        ]

    def measurement(self, run: str, measured: Measured) -> Measurement:
        """The stored items behind a number of a run, read once.

        Raises:
            NotPaired: where they are not in the store any more.
        """
        if not self._runs:
            self._runs = {
                found.path.relative_to(self.store.root).as_posix(): found
                for found in self.store.runs()
            }
        if run not in self._runs:
            raise NotPaired(f"the run {run} is not in {self.store.root}")
        record = _record(self._runs[run], measured)
        key = (run, record.key.digest())
        if key not in self._items:
            try:
                self._items[key] = Measurement.read(self.store, self._runs[run], record)
            except RunFailed:
                raise
            except QBenchError as error:  # one footnote for all of them, without their folders
                raise NotPaired("no items are stored") from error
        return self._items[key]


def _parts(a: Number, b: Number) -> list[tuple[Number, Number]]:
    """The two numbers, or those that two means are over, task by task."""
    ours, theirs = a.measured.parts or (a.measured,), b.measured.parts or (b.measured,)
    if [part.task for part in ours] != [part.task for part in theirs]:
        raise NotPaired("the two are means over other tasks")
    return [
        (Number(one.runs or a.runs, one), Number(two.runs or b.runs, two))
        for one, two in zip(ours, theirs, strict=True)
    ]


def _record(run: Run, measured: Measured) -> TaskRecord:
    """The stored measurement that a number of the table comes from."""
    fields = {"fewshot_seed": "seed", "task_version": "version"}
    for record in run.tasks:
        told: dict[str, Any] = {
            name: getattr(record.key, fields.get(name, name), value)
            for name, value in measured.conditions.items()
        }
        if record.key.task == measured.task and told == measured.conditions:
            return record
    raise NotPaired(f"the measurement of {measured.task} is not in {run.path.name} any more")


def _over_seeds(pairs: Sequence[Paired], metric: str) -> list[ndarray]:
    """What every item adds to the difference, on average over the pairs of runs."""
    found = [list(_shares(paired, metric)) for paired in pairs]
    if len({tuple(map(len, shares)) for shares in found}) > 1:
        raise NotPaired("the seeds were not measured on the same items")
    return [sum(same[1:], start=same[0]) / len(same) for same in zip(*found, strict=True)]


def _shares(paired: Paired, metric: str) -> Iterator[ndarray]:
    """What every item adds to the difference, b less a; for each corpus of a mean its own."""
    if metric in SCORES:
        change = right(paired.b, metric) * 1.0 - right(paired.a, metric)
        yield change / len(change)
        return
    if not paired.of_windows:  # documents scored as a whole (lm-eval's rolling tasks)
        total = paired.a["n_tokens"].sum()
        yield (paired.a["loglikelihood"] - paired.b["loglikelihood"]).to_numpy() / total
        return
    gap = (paired.b[_SUMS[metric]] - paired.a[_SUMS[metric]]).to_numpy(dtype=float)
    tokens = paired.a["n_tokens"].to_numpy(dtype=float)
    if "corpus" not in paired.a:
        yield gap / tokens.sum()
        return
    names = paired.a["corpus"].to_numpy()
    for name in dict.fromkeys(names.tolist()):
        yield gap[names == name] / tokens[names == name].sum()
