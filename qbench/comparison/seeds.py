"""Rows that differ in their seed alone become one row: mean, standard deviation, how many seeds.

A seed draws the calibration text and the method's own random numbers, so what varies between such
rows is chance. A number of the merged row is the mean over the seeds; :attr:`Measured.draws` keeps
the single ones. Its standard error stays that over items (the mean of the seeds' own: they answer
the same items, so a mean over seeds does not make it smaller).

Left out: seeds of few-shot examples, which are a condition of the measurement.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qbench.comparison.circumstances import overlap_notes
from qbench.comparison.entries import Entry, Key, Measured, common, deviations, named

_SAME = (
    *("checkpoint", "weights", "scheme", "baseline", "hyperparameters", "baseline_version"),
    *("baseline_source", "calibration_source", "calibration_seqlen", "calibration_nsamples"),
    *("quantization_dtype", "trained"),
)
"""What rows must share to be draws of one thing."""
_SEEDS = ("seed", "calibration_seed")


def merged(entries: Sequence[Entry]) -> list[Entry]:
    """The same rows, those that differ in their seed alone as one, at the place of the first.

    Facts of a merged row: ``runs`` (the folder of every seed's run, in the order of the seeds),
    ``run`` (the first of them) and ``seeds``; what differs between seeds is None.
    """
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for number, entry in enumerate(entries):
        alone = entry.source != "measured" or entry.facts["status"] == "not_applicable"
        groups[number if alone else tuple(entry.facts[name] for name in _SAME)].append(entry)
    found = [row for group in groups.values() for row in _rows(group)]
    unnamed = [
        replace(row, method=str(row.facts["baseline"])) if row.source == "measured" else row
        for row in found
    ]
    return named(unnamed)


def spread(measured: Measured) -> float | None:
    """Standard deviation over seeds (n - 1); None for one seed, or where one is not finite."""
    draws = measured.draws
    known = len(draws) > 1 and all(map(math.isfinite, draws))
    return statistics.stdev(draws) if known else None


def n_seeds(entry: Entry) -> int:
    """How many seeds a row is the mean of."""
    return len(entry.facts.get("runs", ())) or 1


def _rows(group: list[Entry]) -> list[Entry]:
    seeds = [tuple(entry.facts[name] for name in _SEEDS) for entry in group]
    if len(group) == 1 or len(set(seeds)) < len(group):  # the same seed twice: another text
        return group
    return [_merge([entry for _, entry in sorted(zip(seeds, group, strict=True), key=_by_seed)])]


def _by_seed(pair: tuple[tuple[int | None, ...], Entry]) -> tuple[int, ...]:
    return tuple(-1 if seed is None else seed for seed in pair[0])


def _merge(group: list[Entry]) -> Entry:
    well = [entry for entry in group if entry.facts["status"] == "ok"] or group
    bits = [b for entry in well if (b := entry.facts.get("effective_bits")) is not None]
    notes = [
        f"seed {_seed(entry)} of {entry.facts['baseline']} {entry.facts['label']} on "
        f"{entry.facts['checkpoint']} failed: {_reason(entry)}"
        for entry in group
        if entry.facts["status"] != "ok" and well is not group
    ]
    facts = well[0].facts | {
        "runs": tuple(entry.facts["run"] for entry in well),
        "seeds": tuple(_seed(entry) for entry in well),
        "fallbacks": sum(entry.facts["fallbacks"] or 0 for entry in well),
        "n_layers": sum(entry.facts["n_layers"] or 0 for entry in well),
        "effective_bits": sum(bits) / len(bits) if bits else None,
        "notes": (*well[0].facts.get("notes", ()), *notes),
        **dict.fromkeys((*_SEEDS, "calibration_tokens")),
    }
    keys = dict.fromkeys(key for entry in well for key in entry.cells)
    return replace(well[0], facts=facts, cells={key: _number(well, key) for key in keys})


def _reason(entry: Entry) -> str:
    return str(entry.facts.get("error") or "no reason was stored").splitlines()[0]


def _seed(entry: Entry) -> int:
    own, of_text = (entry.facts[name] for name in _SEEDS)
    return int(own if of_text is None else of_text)


def _number(group: list[Entry], key: Key) -> Measured:
    """The mean over the seeds that have the number, all measured alike."""
    found = [(entry, entry.cells[key]) for entry in group if key in entry.cells]
    good = [(entry, number) for entry, number in found if number.value is not None]
    if not good:
        return found[0][1]
    usual = common(number for _, number in good)
    alike = [(entry, number) for entry, number in good if not deviations(number, usual)]
    alike = alike or good[:1]
    numbers = [number for _, number in alike]
    shown = {id(entry) for entry, _ in alike}
    missing = [str(_seed(entry)) for entry in group if id(entry) not in shown]
    notes = [note for number in numbers for note in number.notes]
    if missing:
        notes.append(
            f"{numbers[0].task}: over {len(numbers)} of {len(group)} seeds; missing, failed or "
            f"measured differently: {', '.join(missing)}"
        )
    most = max(numbers, key=lambda number: number.conditions.get("calibration_overlap") or 0.0)
    lesser = {note for number in numbers if number is not most for note in overlap_notes(number)}
    lesser -= set(overlap_notes(most))
    names = [name for name in numbers[0].also if all(name in n.also for n in numbers)]
    return replace(
        numbers[0],
        value=_mean([number.value for number in numbers]),
        stderr=_mean([number.stderr for number in numbers]),
        also={name: _both([number.also[name] for number in numbers]) for name in names},
        draws=tuple(float(number.value or 0.0) for number in numbers) if len(numbers) > 1 else (),
        runs=tuple(entry.facts["run"] for entry, _ in alike),
        conditions=most.conditions,
        notes=tuple(dict.fromkeys(note for note in notes if note not in lesser)),
    )


def _both(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    values, errors = zip(*pairs, strict=True)
    return sum(values) / len(values), _mean(errors)


def _mean(values: Sequence[float | None]) -> float | None:
    """The plain mean, None where one is not known; infinite and NaN as sums make them."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
