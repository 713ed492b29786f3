"""A store read once for a page that asks for its records many times, and the anchors of its runs.

Left out: texts of questions (:mod:`qbench.evaluation.texts`) and what is said about the numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from qbench.comparison.entries import Entry, Measured
from qbench.comparison.pairing import Measurement
from qbench.errors import QBenchError
from qbench.record import TaskKey, TaskRecord
from qbench.study.store import Run, Store

_KEPT = 64  # measurements whose items are kept in memory
_SAME_NAME = {"fewshot_seed": "seed", "task_version": "version"}


class Snapshot(Store):
    """The records of another store as they were when this was made."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root)
        self._all = list(store.runs())
        self._by_name = {self.name(run): run for run in self._all}
        self.measurement = lru_cache(_KEPT)(self._measurement)
        """Run and digest of a task's key -> the measurement with its items."""

    def runs(self) -> Iterator[Run]:
        """Every run."""
        return iter(self._all)

    def name(self, run: Run) -> str:
        """What the long table calls a run: its folder in the store."""
        return run.path.relative_to(self.root).as_posix()

    def run(self, name: str) -> Run:
        """The run of a row of the long table."""
        return self._by_name[name]

    def record(self, name: str, measured: Measured) -> TaskRecord | None:
        """The measurement behind a number of a table; None for one that was not measured here."""
        if name not in self._by_name or not measured.conditions:
            return None
        wanted = {n: v for n, v in measured.conditions.items() if n != "metric"}
        wanted["task"] = measured.task
        for record in self._by_name[name].tasks:
            if all(_field(record.key, n) == v for n, v in wanted.items()):
                return record
        return None

    def measured(self, name: str, number: Measured) -> Measurement | None:
        """The same with its items; None where none were stored or they cannot be read."""
        record = self.record(name, number)
        if record is None:
            return None
        try:
            return self.measurement(name, record.key.digest())
        except QBenchError:
            return None

    def _measurement(self, name: str, digest: str) -> Measurement:
        run = self._by_name[name]
        record = next(r for r in run.tasks if r.key.digest() == digest)
        return Measurement.read(self, run, record)


def anchors(runs: Iterable[str]) -> dict[str, str]:
    """Run -> the anchor of its page: the name of its folder, with more of the path where shared."""
    names = list(runs)
    last = Counter(name.rpartition("/")[2] for name in names)
    return {name: "run-" + re.sub(r"[^A-Za-z0-9._-]+", "_", _short(name, last)) for name in names}


def full_precision_of(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    """(checkpoint, weights) -> its full-precision row."""
    return {
        (entry.facts["checkpoint"], entry.facts["weights"]): entry
        for entry in entries
        if entry.source == "measured" and entry.full_precision
    }


def _short(name: str, last: Mapping[str, int]) -> str:
    tail = name.rpartition("/")[2]
    return tail if last[tail] == 1 else name


def _field(key: TaskKey, condition: str) -> Any:
    return getattr(key, _SAME_NAME.get(condition, condition))
