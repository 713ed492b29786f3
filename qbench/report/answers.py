"""Questions a quantized model answers otherwise than full precision, with their texts.

Per task: how many answers were lost, won and exchanged, and the questions whose margin between the
right and the best wrong option moved most, up to a number. Texts are read from the data folder and
shared by all runs; one whose document is no longer what was scored is not shown, and the page says
so. Left out: questions without options (LAMBADA), and windows of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry, Measured
from qbench.comparison.pairing import SCORES, NotPaired, Paired, flips, pair
from qbench.errors import QBenchError
from qbench.record import TaskKey
from qbench.report.snapshot import Snapshot, full_precision_of

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 12
"""Questions of one task on one page."""
MOST = 20_000
"""Questions on all pages together: with more runs each page shows fewer."""
_LONGEST = 1200  # characters of a question or an option


@dataclass
class Texts:
    """What questions asked, collected while pages are made and read from the data folder once."""

    data: Path | str | None = None
    """Where they are; None leaves them all out."""
    without: Sequence[str] = ()
    """Tasks whose texts are left out, as shell-style patterns."""
    read: Callable[..., Any] | None = None
    """``qbench.evaluation.texts.item_texts``, imported where it is needed."""
    _wanted: dict[str, tuple[TaskKey, dict[int, str]]] = field(default_factory=dict)

    def ask(self, key: TaskKey, documents: Mapping[int, str]) -> str:
        """Note that questions are shown; returns the name under which their texts will be."""
        name = f"texts-{key.task}-{key.definition[:8]}-{key.data[:8]}"
        self._wanted.setdefault(name, (key, {}))[1].update(documents)
        return name

    def collect(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Read them.

        Returns:
            name -> ``{document number: [question, [options]]}``, and name -> why some or all of
            its texts are missing.
        """
        found: dict[str, dict[str, Any]] = {}
        missing: dict[str, str] = {}
        for name, (key, documents) in self._wanted.items():
            if reason := self._left_out(key.task):
                missing[name] = reason
                continue
            try:
                texts = self._read(key, documents)
            except QBenchError as error:
                missing[name] = f"Texts of {key.task} cannot be read: {error}."
                continue
            found[name] = {
                str(doc): [_cut(text.question), [_cut(option) for option in text.options]]
                for doc, text in texts.texts.items()
            }
            if texts.changed:
                missing[name] = (
                    f"{len(texts.changed)} texts of {key.task} are not shown: in the data folder "
                    "they are no longer what was scored."
                )
        return found, missing

    def _left_out(self, task: str) -> str:
        if any(fnmatchcase(task, pattern) for pattern in self.without):
            return f"Texts of {task} were left out when this page was made."
        if self.data is None:
            return "Texts are not in this page: make it with --data DIR to read them."
        return ""

    def _read(self, key: TaskKey, documents: Mapping[int, str]) -> Any:
        if self.read is None:
            from qbench.evaluation.texts import item_texts  # lm-eval and torch

            self.read = item_texts
        return self.read(key, documents, self.data)


class Answers:
    """What every run answers otherwise than its full-precision row."""

    def __init__(
        self, snapshot: Snapshot, entries: Sequence[Entry], metric: str, texts: Texts
    ) -> None:
        self.snapshot, self.texts = snapshot, texts
        self.metric = metric if metric in SCORES else "acc"
        self._full = full_precision_of(entries)
        compared = sum(len(e.cells) for e in entries if not e.full_precision)
        self.shown = max(2, min(SHOWN, MOST // max(1, compared)))

    def of(self, entry: Entry) -> dict[str, Any]:
        """Per task of one run: counts, the questions shown, and why a task is not compared.

        Returns:
            ``tasks`` (a list; see :meth:`_task`) and ``why``, one sentence where there is nothing
            to compare with.
        """
        full = self._full.get((entry.facts["checkpoint"], entry.facts["weights"]))
        if entry.full_precision:
            return {"tasks": [], "why": "This is the row the others are compared with."}
        if full is None:
            what = "trained model" if entry.trained else "checkpoint"
            why = f"No full-precision row of this {what} is stored, so no answers are compared."
            return {"tasks": [], "why": why}
        tasks = [self._task(entry, full, key[0], cell) for key, cell in entry.cells.items()]
        return {"tasks": [task for task in tasks if task], "why": ""}

    def _task(self, entry: Entry, full: Entry, name: str, cell: Measured) -> dict[str, Any] | None:
        if cell.kind != "accuracy" or cell.value is None:
            return None
        base = next((m for k, m in full.cells.items() if k == (name, "")), None)
        two = self.snapshot.measured(entry.facts["run"], cell)
        one = self.snapshot.measured(full.facts["run"], base) if base is not None else None
        if one is None or two is None:
            return {"task": name, "why": "its items are not stored for both rows"}
        try:
            both = pair(one, two)
            table = flips(both.a, both.b, self.metric)
        except NotPaired as error:
            return {"task": name, "why": str(error)}
        turned = table[table["kind"].str.contains("->")]
        moved = (turned["margin_b"] - turned["margin_a"]).abs()
        order = moved.sort_values(ascending=False, kind="stable").index[: self.shown]
        shown = turned.loc[order]
        documents = dict(zip(shown["doc_id"].tolist(), shown["doc_hash"].tolist(), strict=True))
        kinds = turned["kind"].value_counts().to_dict()
        return {
            "task": name,
            "n": len(table),
            "kinds": {str(kind): int(count) for kind, count in kinds.items()},
            "texts": self.texts.ask(two.task.key, documents) if documents else "",
            "items": _items(shown, both, self.metric),
            "rest": len(turned) - len(shown),
            "notes": list(both.notes),
        }


def _items(shown: DataFrame, both: Paired, metric: str) -> list[list[Any]]:
    """[document, kind, gold, full precision's answer, ours, margins, scores of both].

    The index of ``shown`` is the number of the question, in the order of the items.
    """
    import numpy as np

    per = SCORES[metric]
    starts = [*np.flatnonzero(both.a["option"].to_numpy() == 0).tolist(), len(both.a)]
    scores = []
    for items in (both.a, both.b):
        values = items["loglikelihood"].to_numpy()
        scores.append(values if per is None else values / np.maximum(items[per].to_numpy(), 1))
    columns = [shown[name].tolist() for name in ("doc_id", "kind", "gold", "chosen_a", "chosen_b")]
    margins = zip(shown["margin_a"].tolist(), shown["margin_b"].tolist(), strict=True)
    found = []
    for number, *answer, pair_of in zip(shown.index.tolist(), *columns, margins, strict=True):
        own = slice(starts[number], starts[number + 1])
        options = [[short(score) for score in values[own].tolist()] for values in scores]
        found.append([*answer, [short(margin) for margin in pair_of], options])
    return found


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"
