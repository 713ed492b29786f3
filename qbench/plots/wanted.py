"""What a figure was asked to show, and the rows behind it.

Figures that need more than one reading of the store (zero-shot and few-shot panels), or more of it
than rows (the error of every matrix), take this instead of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qbench.comparison import reference
from qbench.comparison.entries import Entry
from qbench.comparison.frame import frame
from qbench.record import QuantizationRecord
from qbench.study.store import Store
from qbench.tables.table import METRICS, asked_for, stored_entries


@dataclass(frozen=True)
class Wanted:
    """The arguments of :func:`qbench.plots.plot.plot`, without the file."""

    store: Store
    kind: str
    metric: str = "acc"
    against: str | None = None
    width_in: float | None = None
    checkpoints: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    schemes: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    num_fewshot: int | None = None
    x: str = ""
    """The axis, for kinds that have a choice of their own."""

    def filters(self) -> dict[str, Any]:
        """What narrows the rows, as :func:`qbench.tables.table.stored_entries` takes it."""
        names = ("checkpoints", "baselines", "schemes", "tasks", "num_fewshot")
        return {name: getattr(self, name) for name in names}

    def shots(self) -> list[int]:
        """How many examples stand in the prompts of the stored questions, fewest first."""
        if self.empty():
            return []
        kinds = frame(self.store)[["kind", "num_fewshot"]].dropna()
        shots = sorted({int(n) for n in kinds[kinds["kind"] == "accuracy"]["num_fewshot"]})
        return [n for n in shots if self.num_fewshot in (None, n)]

    def records(self) -> dict[str, QuantizationRecord]:
        """Every stored run, by the name that rows call it: dimensions and errors of matrices."""
        root = self.store.root
        return {r.path.relative_to(root).as_posix(): r.quantization for r in self.store.runs()}

    def measured(self, **changed: Any) -> list[Entry]:
        """The rows; none where nothing is stored and published numbers can stand alone."""
        return [] if self.against is not None and self.empty() else self.entries(**changed)

    def published(self, num_fewshot: int = 0) -> list[Entry]:
        """The rows of the published table, each called by its method.

        Raises:
            QBenchError: for a table that is not there.
        """
        if self.against is None:
            return []
        found = reference.entries(self.against, [], num_fewshot)
        return [replace(entry, series=str(entry.facts["baseline"])) for entry in found]

    def empty(self) -> bool:
        """Whether nothing is stored, so that only published numbers can be drawn."""
        return next(self.store.runs(), None) is None

    def entries(self, **changed: Any) -> list[Entry]:
        """The rows, all filters applied; ``changed`` replaces some of them.

        Raises:
            QBenchError: for an empty store, an unknown name or filters that leave nothing.
        """
        metric = self.metric if self.metric in METRICS else METRICS[0]
        return stored_entries(self.store, metric, **(self.filters() | changed))

    def asked(self, **changed: Any) -> frozenset[str]:
        """The runs that filters on method and scheme name; none without such filters."""
        return asked_for(self.store, **(self.filters() | changed))
