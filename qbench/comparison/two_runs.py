"""Two runs side by side: what differs in their settings, in their numbers, and in their answers.

Measurements of the same task are paired where they were made alike, else the two that differ
least, and their difference is tested on the common items.

Left out: how a run is named (:mod:`qbench.comparison.finding`), how all this is printed
(:mod:`qbench.tables.two_runs`), and the texts of the questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.circumstances import OVERLAP
from qbench.comparison.entries import say
from qbench.comparison.pairing import SCORES, Measurement, Paired, flips, pair, right
from qbench.comparison.significance import MCNEMAR, RANDOMIZATION
from qbench.comparison.statistics import (
    Unpaired,
    holm,
    mcnemar,
    paired_bootstrap,
    sign_flips,
    unpaired_z,
)
from qbench.errors import QBenchError, unknown
from qbench.record import Metric, TaskRecord
from qbench.scheme import Scheme
from qbench.study.store import Run, Store

if TYPE_CHECKING:
    from pandas import DataFrame

ABSENT = "–"
_TOLD = {name: name for name in ("num_fewshot", "limit", "encoding", "dtype", "max_length")}
_TOLD |= {"seed": "fewshot_seed", "version": "task_version"}
"""Field of a task's key -> the condition it is."""
_RATIO = ("perplexity",)
"""Metrics that are compared by their quotient: exponentials of a mean loss."""
_DISTANCES = ("kl_divergence", "top1_agreement")
"""Metrics that full precision has by definition."""


@dataclass(frozen=True)
class Side:
    """One of the two runs, with the store that has its items."""

    store: Store
    run: Run


@dataclass(frozen=True)
class Setting:
    """One setting that differs, or that both share."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class Change:
    """One metric of one task in both runs."""

    task: str
    protocol: str
    metric: str
    a: Metric
    b: Metric
    of: str = ""
    """Digest of the key of a's measurement."""
    told: str = ""
    """What tells it from the task's other measurements: "4-shot"; "" where there is one."""
    n: int = 0
    """Items both have."""
    difference: float | None = None
    """B less A on these items; of a perplexity the quotient B/A less one."""
    low: float | None = None
    high: float | None = None
    """Ends of the paired bootstrap interval of the difference."""
    test: str = ""
    p: float | None = None
    adjusted: float | None = None
    """p after Holm's correction over the metrics shown."""
    unpaired: Unpaired | None = None
    """What the test that forgets the pairing says, of accuracies on all their items."""
    reason: str = ""
    """Why there is no test."""
    notes: tuple[str, ...] = ()

    @property
    def relative(self) -> bool:
        """Whether the difference is a quotient less one."""
        return self.metric in _RATIO


@dataclass(frozen=True)
class Flips:
    """The questions of one task whose answer changed."""

    task: TaskRecord
    metric: str
    n: int
    counts: dict[str, int]
    """Kind of change -> how many."""
    items: DataFrame
    """Those that changed, the largest change of margin first (:func:`pairing.flips`)."""
    told: str = ""
    """What tells it from the task's other measurements."""


@dataclass(frozen=True)
class TwoRuns:
    """Everything ``qbench compare`` says."""

    a: Side
    b: Side
    settings: list[Setting]
    changes: list[Change]
    flips: list[Flips]
    only_a: list[str]
    only_b: list[str]


def compare(
    a: Side, b: Side, metric: str = "acc", tasks: Sequence[str] = (), seed: int = 0
) -> TwoRuns:
    """Compare two stored runs.

    Args:
        a: the reference.
        b: the other: differences are b less a.
        metric: the accuracy that is tested and that decides what flipped.
        tasks: keep these only.
        seed: of resamples and random signs.

    Raises:
        QBenchError: for an unknown metric, a task none of the two has, or no run twice.
    """
    if metric not in SCORES:
        raise unknown("metric", metric, SCORES)
    if a.run.path == b.run.path:
        raise QBenchError(f"{a.run.path.name} was named twice; a comparison takes two runs")
    known = {task.key.task for side in (a, b) for task in side.run.tasks}
    for name in tasks:
        if name not in known:
            raise unknown("task", name, known)
    first, second = (
        [t for t in side.run.tasks if not tasks or t.key.task in tasks] for side in (a, b)
    )
    couples = _couples(first, second)
    changes: list[Change] = []
    changed: list[Flips] = []
    for one, two in couples:
        own, flipped = _measured((a, one), (b, two), metric, seed)
        changes += own
        changed += [flipped] if flipped else []
    told = _told(first, second)
    changes = [replace(change, told=told[change.of]) for change in changes]
    changed = [replace(flipped, told=told[flipped.task.key.digest()]) for flipped in changed]
    adjusted = holm([change.p for change in changes])
    return TwoRuns(
        a,
        b,
        _settings(a.run, b.run, couples, told),
        [replace(change, adjusted=p) for change, p in zip(changes, adjusted, strict=True)],
        changed,
        [_called(t, told) for t in first if all(t is not one for one, _ in couples)],
        [_called(t, told) for t in second if all(t is not two for _, two in couples)],
    )


def _couples(
    first: Sequence[TaskRecord], second: Sequence[TaskRecord]
) -> list[tuple[TaskRecord, TaskRecord]]:
    """Which measurement of b belongs to which of a: those that differ least, each once."""
    costs = sorted(
        (
            (_differing(one, two), i, j)
            for i, one in enumerate(first)
            for j, two in enumerate(second)
            if one.key.task == two.key.task and one.key.protocol == two.key.protocol
        ),
    )
    taken: dict[int, int] = {}
    for _, i, j in costs:
        if i not in taken and j not in taken.values():
            taken[i] = j
    return [(first[i], second[taken[i]]) for i in sorted(taken)]


def _differing(one: TaskRecord, two: TaskRecord) -> int:
    a, b = one.key.model_dump(), two.key.model_dump()
    return sum(a[name] != b[name] for name in a if name != "quantization")


def _measured(
    a: tuple[Side, TaskRecord],
    b: tuple[Side, TaskRecord],
    metric: str,
    seed: int,
) -> tuple[list[Change], Flips | None]:
    """The metrics of one task, the wanted one tested, and the questions that flipped."""
    one, two = a[1], b[1]
    names = [name for name in one.metrics if name in two.metrics] or [""]
    wanted = [name for name in (metric, "acc", "perplexity", "kl_divergence") if name in names]
    shown = wanted[:1] or names[:1]
    if "top1_agreement" in names:
        shown.append("top1_agreement")
    missing = Metric(value=None)
    plain = [
        Change(
            *(one.key.task, one.key.protocol, name),
            one.metrics.get(name, missing),
            two.metrics.get(name, missing),
            of=one.key.digest(),
        )
        for name in shown
    ]
    try:
        paired = pair(*(Measurement.read(side.store, side.run, task) for side, task in (a, b)))
        notes = (*paired.notes, *_seen(one, two))
        paired = replace(paired, notes=notes)
        whole = [Scheme.parse(side.run.quantization.key.scheme).is_identity for side, _ in (a, b)]
        tested = [
            replace(change, reason="it is a distance from full precision already", notes=notes)
            if any(whole) and change.metric in _DISTANCES
            else _tested(change, paired, seed)
            for change in plain
        ]
        if shown[0] in SCORES and not paired.of_windows:
            return tested, _flipped(paired, one, shown[0])
        return tested, None
    except QBenchError as error:
        return [replace(change, reason=str(error)) for change in plain], None


def _seen(one: TaskRecord, two: TaskRecord) -> Iterator[str]:
    """Which of the two was calibrated on the text it is tested on."""
    for name, task in (("A", one), ("B", two)):
        share = task.details.get("calibration_overlap") or 0.0
        if share >= OVERLAP:
            yield f"{share:.0%} of the tested text stands in the calibration text of {name}"


def _tested(change: Change, paired: Paired, seed: int) -> Change:
    notes, name = paired.notes, change.metric
    if name in SCORES and not paired.of_windows:
        a, b = right(paired.a, name), right(paired.b, name)
        found, spread = mcnemar(a, b), paired_bootstrap(a, b, seed=seed)
        z = unpaired_z(
            *(change.a.as_float(), change.a.stderr, change.b.as_float(), change.b.stderr)
        )
        return replace(
            change,
            n=found.n,
            difference=found.difference,
            low=spread.low,
            high=spread.high,
            test=MCNEMAR,
            p=found.p,
            unpaired=z,
            notes=notes,
        )
    column = {"perplexity": "nll", "kl_divergence": "kl", "top1_agreement": "n_agreeing"}.get(name)
    if column is None or column not in paired.a or "corpus" in paired.a:
        return replace(change, reason=f"there is no paired test for {name or 'it'}", notes=notes)
    a, b = (items[column].to_numpy(dtype=float) for items in (paired.a, paired.b))
    spread = paired_bootstrap(a, b, paired.a["n_tokens"].to_numpy(dtype=float), seed=seed)
    p = sign_flips(b - a, seed) if spread.p is not None else None
    if p is None:
        return replace(change, n=spread.n, reason=spread.reason, notes=notes)
    ends = [spread.difference, spread.low, spread.high]
    if change.relative:  # beyond e^709 is infinite
        ends = [None if end is None else math.expm1(min(end, 709.0)) for end in ends]
    return replace(
        change,
        n=spread.n,
        difference=ends[0],
        low=ends[1],
        high=ends[2],
        test=RANDOMIZATION,
        p=p,
        notes=notes,
    )


def _flipped(paired: Paired, task: TaskRecord, metric: str) -> Flips | None:
    try:
        every = flips(paired.a, paired.b, metric)
    except QBenchError:  # no options, so no other answer to tell
        return None
    changed = every[every["kind"].str.contains("->")]
    moved = (changed["margin_b"] - changed["margin_a"]).abs()
    changed = changed.loc[moved.sort_values(ascending=False, kind="stable").index]
    counts = changed["kind"].value_counts().to_dict()
    return Flips(task, metric, len(every), {str(k): int(v) for k, v in counts.items()}, changed)


def _settings(
    a: Run,
    b: Run,
    couples: Sequence[tuple[TaskRecord, TaskRecord]],
    told: Mapping[str, str],
) -> list[Setting]:
    """Whatever was chosen differently, or differed where the runs were made."""
    one, two = _of_run(a), _of_run(b)
    for first, second in couples[:1]:
        one |= {f"environment.{name}": v for name, v in first.environment.items()}
        two |= {f"environment.{name}": v for name, v in second.environment.items()}
    for first, second in couples:
        for name in type(first.key).model_fields:
            if name not in ("quantization", "task"):
                called = f"{_called(first, told)}.{name}"
                one[called] = _text(getattr(first.key, name))
                two[called] = _text(getattr(second.key, name))
    return [
        Setting(name, one.get(name, ABSENT), two.get(name, ABSENT))
        for name in dict.fromkeys([*one, *two])
        if one.get(name, ABSENT) != two.get(name, ABSENT)
    ]


def _of_run(run: Run) -> dict[str, str]:
    record, key = run.quantization, run.quantization.key
    found = {
        "checkpoint": record.checkpoint,
        "weights": key.weights[:12],
        "scheme": key.scheme,
        "trained": _text(record.trained),
        "baseline": key.baseline.name,
        "baseline.version": _text(key.baseline.version),
        "baseline.source": _text(key.baseline.source),
        **{f"baseline.{name}": _text(v) for name, v in key.baseline.parameters.items()},
        "seed": _text(key.seed),
        "dtype": key.dtype,
        "status": record.status,
        "effective bits": _text(record.effective_bits and round(record.effective_bits, 3)),
        "layers that fell back": _text(record.fallbacks),
    }
    if key.calibration:
        fields = key.calibration.model_dump()
        found |= {f"calibration.{name}": _text(value) for name, value in fields.items()}
    return found


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text  # a hash


def _name(task: TaskRecord) -> str:
    accuracy = task.key.protocol == "lm-eval"
    return task.key.task if accuracy else f"{task.key.task}@{task.key.protocol}"


def _called(task: TaskRecord, told: Mapping[str, str]) -> str:
    own = told[task.key.digest()]
    return f"{_name(task)} ({own})" if own else _name(task)


def _told(*sides: Sequence[TaskRecord]) -> dict[str, str]:
    """Digest of every measurement -> what tells it from the others that its run has of the task."""
    found: dict[str, str] = {}
    for name in {_name(task) for side in sides for task in side}:
        own = [[task for task in side if _name(task) == name] for side in sides]
        several = max(map(len, own)) > 1
        tasks = [task for side in own for task in side]
        varying: list[str] = []
        for field in _TOLD if several else ():
            if len({getattr(task.key, field) for task in tasks}) > 1:
                varying.append(field)
            values = [{tuple(getattr(t.key, f) for f in varying) for t in side} for side in own]
            if list(map(len, values)) == list(map(len, own)):  # enough is said
                break
        for task in tasks:
            words = [say(_TOLD[field], getattr(task.key, field)) for field in varying]
            found[task.key.digest()] = ", ".join(words)
    return found
