"""What ``qbench compare`` prints: settings that differ, tested numbers, answers that flipped.

Texts of questions are read from the data folder when it is named; none are stored. Left out: other
formats than plain text, and more than two runs (``qbench table --significance``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.comparison.finding import find_run
from qbench.comparison.statistics import LEVEL
from qbench.comparison.two_runs import Change, Flips, Side, TwoRuns, compare
from qbench.errors import QBenchError
from qbench.record import Metric
from qbench.tables.render import terminal
from qbench.tables.sheet import (
    MISSING,
    Cell,
    Column,
    Sheet,
    accuracy_text,
    difference_text,
    perplexity_text,
)

if TYPE_CHECKING:
    from qbench.evaluation.texts import ItemTexts

Texts = Mapping[str, "ItemTexts | str"]
"""Digest of a task's key -> the texts of its flipped questions, or why there are none."""
_ALTERNATIVES = ("right->wrong", "wrong->right", "wrong->other wrong", "right->other right")


def compare_text(
    results: Path | str,
    a: str,
    b: str,
    *,
    metric: str = "acc",
    tasks: Sequence[str] = (),
    items: int = 10,
    data: Path | str | None = None,
    width: int = 100,
) -> str:
    """Compare two stored runs, as plain text.

    Args:
        results: the store; a run named by its folder may lie in another one.
        a: the reference: a folder, ``checkpoint/scheme/baseline``, or a beginning of a name.
        b: the other run.
        metric: ``acc``, ``acc_norm`` or ``acc_token``.
        tasks: keep these only.
        items: flipped questions shown per task.
        data: a data folder, whose texts of these questions are shown; None shows none.
        width: characters in a line.

    Raises:
        QBenchError: for a run, task or metric nobody knows, or texts that are not there.
    """
    found = compare(find_run(results, a), find_run(results, b), metric, tasks)
    texts = None if data is None else _texts(found, items, data)
    return text_of(found, items, texts, width)


def text_of(found: TwoRuns, items: int = 10, texts: Texts | None = None, width: int = 100) -> str:
    """The whole comparison as plain text.

    Args:
        found: the comparison.
        items: flipped questions shown per task.
        texts: of these questions, where they were asked for.
        width: characters in a line.
    """
    parts = [f"A  {_run(found.a)}", f"B  {_run(found.b)}", ""]
    parts += [_settings(found, width), _numbers(found, width)]
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            parts.append(f"Only {name} was measured on: {', '.join(only)}.\n")
    for changed in found.flips:
        own = (texts or {}).get(changed.task.key.digest())
        parts.append(_flips(changed, items, own, width))
    return "\n".join(parts).rstrip() + "\n"


def _texts(found: TwoRuns, items: int, data: Path | str) -> Texts:
    """The texts of the questions to be shown; of a task that has none, why.

    Raises:
        QBenchError: where not one of the tasks has them.
    """
    from qbench.evaluation.texts import item_texts

    texts: dict[str, ItemTexts | str] = {}
    for changed in found.flips:
        shown = changed.items.head(items)
        documents = dict(zip(shown["doc_id"].tolist(), shown["doc_hash"], strict=True))
        if documents:
            key = changed.task.key
            try:
                texts[key.digest()] = item_texts(key, documents, data)
            except QBenchError as error:
                texts[key.digest()] = str(error)
    reasons = [reason for reason in texts.values() if isinstance(reason, str)]
    if reasons and len(reasons) == len(texts):
        raise QBenchError(reasons[0])
    return texts


def _run(side: Side) -> str:
    record, folder = side.run.quantization, side.run.path.name
    return f"{record.checkpoint}  {record.key.scheme}  {record.key.baseline.name}  ({folder})"


def _settings(found: TwoRuns, width: int) -> str:
    rows = found.settings
    if not rows:
        return "Every setting is the same.\n"
    columns = [
        Column((name,), [Cell(getattr(row, field)) for row in rows], numeric=False, detail=detail)
        for name, field, detail in (
            ("Setting", "name", False),
            ("A", "a", True),
            ("B", "b", True),
        )
    ]
    return terminal(Sheet("Settings that differ", columns, [{} for _ in rows]), width)


def _numbers(found: TwoRuns, width: int) -> str:
    rows = found.changes
    if not rows:
        return "The two runs have no task in common.\n"

    def column(heading: str, text: Any, numeric: bool = True) -> Column:
        return Column((heading,), [Cell(text(row)) for row in rows], numeric)

    columns = [
        Column(("Task",), [Cell(_task(row), _notes(row)) for row in rows], False),
        column("Metric", lambda row: row.metric or MISSING, False),
        column("A", lambda row: _value(row, row.a)),
        column("B", lambda row: _value(row, row.b)),
        column("Items", lambda row: str(row.n) if row.n else MISSING),
        column("B − A", lambda row: _difference(row, row.difference)),
        column(f"{1 - LEVEL:.0%} interval", _interval),
        column("p", lambda row: _p(row.p)),
    ]
    if sum(row.p is not None for row in rows) > 1:
        columns.append(column("p (Holm)", lambda row: _p(row.adjusted)))
    return terminal(Sheet("Metrics", columns, [{} for _ in rows], remarks=_remarks(rows)), width)


def _remarks(rows: list[Change]) -> list[str]:
    found = []
    tested = [row for row in rows if row.p is not None]
    if tested:
        found.append(
            "B − A on the items both have: points of accuracy, percent of perplexity; interval: "
            "paired bootstrap (BCa); p: paired and two-sided, McNemar's exact test for accuracies, "
            "the randomization test over windows for the rest."
        )
    doubtful = [row for row in tested if (row.p or 0.0) > LEVEL]
    if any((row.low or 0.0) * (row.high or 0.0) > 0 for row in doubtful):
        found.append("An interval that leaves out 0 where p does not is too short: believe p.")
    if len(tested) > 1:
        found.append(f"Holm: corrected for these {len(tested)} tests.")
    return found


def _notes(row: Change) -> tuple[str, ...]:
    reason = (f"not tested: {row.reason}",) if row.reason else ()
    return (*reason, *row.notes)


def _task(row: Change) -> str:
    name = row.task if row.protocol == "lm-eval" else f"{row.task}@{row.protocol}"
    return f"{name} ({row.told})" if row.told else name


def _value(row: Change, number: Metric) -> str:
    if number.value is None and number.non_finite is None:
        return "failed"
    value = number.as_float()
    if row.metric.startswith("acc") or row.metric == "top1_agreement":
        return accuracy_text(value, number.stderr)
    return perplexity_text(value) if "perplexity" in row.metric else f"{value:.4g}"


def _difference(row: Change, value: float | None) -> str:
    if value is None:
        return MISSING
    if row.relative:
        return (f"{100 * value:+.2f} %" if value < 10 else f"×{1 + value:.3g}").replace("-", "−")
    if row.metric.startswith("acc") or row.metric == "top1_agreement":
        return difference_text(value, percent=True)
    return f"{value:+.3g}".replace("-", "−")


def _interval(row: Change) -> str:
    if row.low is None or row.high is None:
        return MISSING
    return f"[{_difference(row, row.low)}, {_difference(row, row.high)}]"


def _p(p: float | None) -> str:
    if p is None:
        return MISSING
    return f"{p:.2g}" if p < 0.095 else f"{p:.2f}"


def _flips(changed: Flips, limit: int, texts: ItemTexts | str | None, width: int) -> str:
    counts = [f"{changed.counts[k]} {_arrow(k)}" for k in _ALTERNATIVES if changed.counts.get(k)]
    told = f" ({changed.told})" if changed.told else ""
    title = f"{changed.task.key.task}{told}: of {changed.n} questions "
    title += ", ".join(counts) if counts else "none is answered differently"
    shown = changed.items.head(limit).to_dict("records")
    if not shown:
        return f"{title}.\n"
    columns = [
        Column((heading,), [Cell(text(row)) for row in shown], numeric)
        for heading, text, numeric in (
            ("Question", lambda row: str(row["doc_id"]), True),
            ("Hash", lambda row: str(row["doc_hash"])[:8], False),
            ("Answer", lambda row: _arrow(row["kind"]), False),
            ("A", lambda row: str(row["chosen_a"]), True),
            ("B", lambda row: str(row["chosen_b"]), True),
            ("Gold", lambda row: ", ".join(map(str, row["gold"])), True),
            ("Margin A", lambda row: _margin(row["margin_a"]), True),
            ("Margin B", lambda row: _margin(row["margin_b"]), True),
        )
    ]
    left = len(changed.items) - len(shown)
    remarks = [f"{left} more: --items {len(changed.items)} shows them."] if left else []
    remarks.append(f"Margin: {changed.metric} score of the right option less the best wrong one's.")
    table = terminal(Sheet(title, columns, [{} for _ in shown], remarks=remarks), width)
    if texts is None or isinstance(texts, str):
        return table + (f"\nNo texts: {texts}\n" if texts else "")
    return table + "".join(_question(row, texts) for row in shown)


def _question(row: Mapping[Any, Any], texts: ItemTexts) -> str:
    found = texts.texts.get(int(row["doc_id"]))
    if found is None:
        return f"\n{row['doc_id']}: its text has changed since it was scored, or is gone.\n"
    lines = [f"\n{row['doc_id']}: {found.question}".rstrip()]
    for number, option in enumerate(found.options):
        who = [
            name
            for name, is_it in (
                ("gold", number in row["gold"]),
                ("A", number == row["chosen_a"]),
                ("B", number == row["chosen_b"]),
            )
            if is_it
        ]
        lines.append(f"   {number} {option.strip()}" + (f"   <- {', '.join(who)}" if who else ""))
    return "\n".join(lines) + "\n"


def _arrow(kind: str) -> str:
    return kind.replace("->", " → ")


def _margin(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
