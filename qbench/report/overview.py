"""What was compared, and what a reader must know before believing it.

Warnings name what failed, fell back to rounding to nearest, diverged, was measured in part or in
another environment. Left out: what the numbers say (:mod:`~.findings`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from qbench.comparison.entries import TOP_1, Entry, common, deviations, say
from qbench.comparison.headings import size_text, task_order
from qbench.comparison.pairing import ENVIRONMENT
from qbench.report.findings import Link, Sentence
from qbench.study.store import Run

_MOST = 12
"""Runs named in one warning."""


def compared(entries: Sequence[Entry], runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Heading -> lines: checkpoints, methods, widths, tasks, calibration, environment, dates."""
    found = {
        "Checkpoints": [_checkpoint(name, entries) for name in _in_order(entries, "checkpoint")],
        "Methods": sorted({e.series for e in entries if e.ptq})
        + sorted({"trained at low width" for e in entries if e.trained}),
        "Widths": _in_order(sorted(entries, key=_width), "label"),
        "Tasks": _tasks(entries),
        "Calibration": _calibrations(runs),
        "Made with": _environments(runs),
        "Measured": _dates(runs),
    }
    return [(heading, lines) for heading, lines in found.items() if lines]


def warnings(
    entries: Sequence[Entry], anchors: Mapping[str, str], unread: Iterable[str] = ()
) -> list[Sentence]:
    """One sentence per kind of trouble, each naming its runs.

    Args:
        entries: the rows.
        anchors: run -> anchor of its page.
        unread: what the store said of records it could not read.
    """
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        for text in _troubles(entry):
            groups[text].append(entry)
    told: list[Sentence] = []
    for text, rows in groups.items():
        links: list[str | Link] = []
        for index, entry in enumerate(rows[:_MOST]):
            anchor = anchors.get(entry.facts["run"], "")
            name = f"{entry.name} on {entry.facts['checkpoint']}"
            links += [", "] if index else []
            links.append(Link(name, anchor))
        more = f" and {len(rows) - _MOST} more" if len(rows) > _MOST else ""
        told.append((f"{text}: ", *links, f"{more}."))
    told += _uneven(entries)
    return [*told, *((f"A record could not be read: {text}.",) for text in unread)]


def _troubles(entry: Entry) -> Iterable[str]:
    facts = entry.facts
    reason = (facts.get("error") or "no reason was stored").splitlines()[0].rstrip(".")
    if facts["status"] == "failed":
        yield f"Failed ({reason})"
    elif facts["status"] == "not_applicable":
        yield f"Not applicable ({reason})"
    if facts["fallbacks"]:
        yield "Some matrices were rounded to nearest, because the method could not run on them"
    failed = sorted({m.task for m in entry.cells.values() if m.value is None})
    if failed:
        yield f"A measurement failed ({', '.join(failed)})"
    diverged = [
        m.task for m in entry.cells.values() if m.value is not None and not math.isfinite(m.value)
    ]
    if diverged:
        yield f"Diverged: no finite number ({', '.join(sorted(diverged))})"


def _uneven(entries: Sequence[Entry]) -> list[Sentence]:
    """What was measured in part, or not alike in all rows."""
    told: list[Sentence] = []
    limits: dict[int, set[str]] = defaultdict(set)
    differently: dict[str, set[str]] = defaultdict(set)
    keys = {key for entry in entries for key in entry.cells}
    for key in keys:
        numbers = [entry.cells[key] for entry in entries if key in entry.cells]
        usual = common(numbers)
        if usual.get("limit"):
            limits[usual["limit"]].add(key[0])
        for number in numbers:
            if how := deviations(number, usual):
                differently[how].add(key[0])
    for limit, tasks in sorted(limits.items()):
        names = ", ".join(sorted(tasks, key=task_order))
        told.append((f"Only the first {limit} items were measured of {names}.",))
    for how, tasks in differently.items():
        names = ", ".join(sorted(tasks, key=task_order))
        told.append((f"Some rows were measured differently ({how}) on {names}.",))
    return told


def _checkpoint(name: str, entries: Sequence[Entry]) -> str:
    rows = [entry for entry in entries if entry.facts["checkpoint"] == name]
    facts = rows[0].facts
    trained = f", trained at {facts['label']}" if all(row.trained for row in rows) else ""
    return f"{name} ({size_text(facts['parameters'])} parameters{trained})"


def _tasks(entries: Sequence[Entry]) -> list[str]:
    lines = []
    keys = sorted({key for entry in entries for key in entry.cells}, key=lambda k: task_order(k[0]))
    for key in keys:
        numbers = [e.cells[key] for e in entries if key in e.cells and e.cells[key].conditions]
        usual = common(numbers)
        if not usual:
            continue
        items = Counter(number.n_items for number in numbers).most_common(1)[0][0]
        protocol = key[1].removesuffix(TOP_1)
        kind = f"{numbers[0].kind}, {protocol}" if key[1] else str(usual["metric"])
        how = [kind, f"{items:,} {'windows' if key[1] else 'questions'}" if items else ""]
        how += [say("num_fewshot", usual["num_fewshot"])] if not key[1] else []
        lines.append(f"{key[0]}: {', '.join(part for part in how if part)}")
    return lines


def _calibrations(runs: Sequence[Run]) -> list[str]:
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        spec = run.quantization.key.calibration
        if spec is not None:
            seeds[f"{spec.nsamples} × {spec.seqlen} tokens of {spec.source}"].add(spec.seed)
    return [f"{text}, seed {', '.join(map(str, sorted(own)))}" for text, own in seeds.items()]


def _environments(runs: Sequence[Run]) -> list[str]:
    known = [run.quantization.environment for run in runs]
    known += [task.environment for run in runs for task in run.tasks]
    found = Counter(
        ", ".join(f"{name} {own[name]}" for name in ENVIRONMENT if name in own) for own in known
    )
    return [text for text, _ in found.most_common(4) if text]


def _dates(runs: Sequence[Run]) -> list[str]:
    days = sorted(r.created[:10] for run in runs for r in run.tasks if r.created)
    if not days:
        return []
    return [days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"]


def _in_order(entries: Sequence[Entry], fact: str) -> list[str]:
    return list(dict.fromkeys(str(entry.facts[fact]) for entry in entries))


def _width(entry: Entry) -> tuple[float, int]:
    return -entry.facts["wbits"], -entry.facts["abits"]
