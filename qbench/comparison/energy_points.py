"""Energy of rows, as points: how much less a trained low-bit model takes than its twin in FP16.

Measured rows are computed from their dimensions (:mod:`qbench.comparison.energy`), published ones
are what their papers print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qbench.comparison.energy import energy_of
from qbench.comparison.entries import Entry
from qbench.comparison.panels import Point
from qbench.comparison.scaling import SAME_SIZE
from qbench.comparison.sizes import role
from qbench.record import QuantizationRecord

TOKENS = 512
"""Of one sequence, as in BitNet's Table 1."""


def joules(
    entry: Entry, records: Mapping[str, QuantizationRecord], accumulator: str = "int8"
) -> float | None:
    """Energy of one forward pass over 512 tokens at 7 nm; None where it cannot be told."""
    if entry.source == "published":
        energy = entry.facts.get("costs", {}).get("energy")
        return None if energy is None else float(energy)
    record = records.get(entry.facts["run"])
    return None if record is None else energy_of(record, TOKENS, accumulator=accumulator)


def energy_ratios(
    entries: Sequence[Entry],
    records: Mapping[str, QuantizationRecord],
    accumulator: str = "int8",
) -> list[Point]:
    """Each trained model's saving: energy of the full-precision model of its size over its own.

    Sizes within 5 % are one size. A trained model without such a twin has no point.
    """
    whole = [entry for entry in entries if role(entry) == "full precision"]
    points = []
    for entry in entries:
        size = entry.facts["parameters"]
        if role(entry) != "trained" or not size:
            continue
        printed = entry.facts.get("costs", {}).get("energy_ratio")
        ratio = float(printed) if printed is not None else _over(entry, whole, records, accumulator)
        if ratio is not None:
            points.append(_point(entry, float(size), ratio))
    return sorted(points, key=lambda point: point.x)


def _over(
    entry: Entry,
    whole: Sequence[Entry],
    records: Mapping[str, QuantizationRecord],
    accumulator: str,
) -> float | None:
    size, own = entry.facts["parameters"], joules(entry, records, accumulator)
    twins = [
        (abs(math.log(other.facts["parameters"] / size)), other)
        for other in whole
        if other.facts["parameters"]
        and 1 / SAME_SIZE <= other.facts["parameters"] / size <= SAME_SIZE
        and other.source == entry.source
    ]
    if not twins or not own:
        return None
    theirs = joules(min(twins, key=lambda twin: twin[0])[1], records, accumulator)
    return None if theirs is None else theirs / own


def _point(entry: Entry, x: float, y: float) -> Point:
    facts = entry.facts
    return Point(
        x=x,
        y=y,
        stderr=None,
        role="trained",
        series=f"trained at {facts['label']}",
        wbits=facts["wbits"],
        abits=facts["abits"],
        name=facts["checkpoint"],
        published=entry.source == "published",
        run=facts.get("run") or "",
    )
