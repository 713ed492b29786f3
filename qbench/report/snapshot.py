"""A store read once for a page that asks for its records many times, and the anchors of its runs.

Left out: texts of questions (:mod:`qbench.evaluation.texts`) and what is said about the numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from qbench.comparison.entries import Entry, Measured
from qbench.comparison.pairing import Measurement
from qbench.errors import QBenchError
from qbench.record import TaskKey, TaskRecord
from qbench.study.store import Run, Store

if TYPE_CHECKING:
    from pandas import DataFrame

_KEPT = 1024  # measurements whose items are kept in memory: tables, sentences and pages want them
_SAME_NAME = {"fewshot_seed": "seed", "task_version": "version"}


class Snapshot(Store):
    """The records of another store as they were when this was made."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root)
        self._all = list(store.runs())
        self._by_name = {self.name(run): run for run in self._all}
        self._items = lru_cache(_KEPT)(self._read_items)

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
        wanted = {_SAME_NAME.get(n, n): value for n, value in measured.conditions.items()}
        wanted = {n: value for n, value in wanted.items() if n in TaskKey.model_fields}
        wanted["task"] = measured.task
        for record in self._by_name[name].tasks:
            if all(getattr(record.key, n) == value for n, value in wanted.items()):
                return record
        return None

    def measured(self, name: str, number: Measured) -> Measurement | None:
        """The same with its items; None where none were stored or they cannot be read."""
        record = self.record(name, number)
        if record is None:
            return None
        try:
            return Measurement.read(self, self._by_name[name], record)
        except QBenchError:
            return None

    def items(self, run: Run, task: TaskRecord) -> DataFrame:
        """The items of one measurement, read once."""
        return self._items(self.name(run), task.key.digest())

    def _read_items(self, name: str, digest: str) -> DataFrame:
        run = self._by_name[name]
        task = next(task for task in run.tasks if task.key.digest() == digest)
        return super().items(run, task)


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
