"""What trained low-bit models save: energy and memory of the full-precision twin over their own.

Measured rows have what follows from their dimensions: the energy of the arithmetic of 512 tokens at
7 nm with INT8 additions (:mod:`qbench.comparison.energy`), the bytes of weights and of the keys and
values of as many tokens (:mod:`qbench.comparison.footprint`). Published ones have what their papers
print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qbench.comparison.entries import Entry
from qbench.comparison.panels import Point
from qbench.comparison.scaling import SAME_SIZE
from qbench.comparison.sizes import role

Cost = Callable[[Entry], float | None]


def joules(entry: Entry) -> float | None:
    """Energy of the arithmetic of one forward pass; None where it cannot be told."""
    costs = entry.facts.get("costs", {}) if entry.source == "published" else entry.facts
    energy = costs.get("energy")
    return None if energy is None else float(energy)


def memory(entry: Entry) -> float | None:
    """Bytes of a measured row's weights, keys and values; None where they cannot be told."""
    weights, cache = entry.facts.get("size_bytes"), entry.facts.get("kv_cache_bytes")
    return None if weights is None or cache is None else float(weights) + float(cache)


def savings(entries: Sequence[Entry], cost: Cost, printed: str) -> list[Point]:
    """Each trained model's saving: the cost of the full-precision model of its size over its own.

    Sizes within 5 % are one size. A trained model without such a twin has no point.

    Args:
        entries: rows, measured and published.
        cost: of a row.
        printed: the name under which a published row has the ratio itself.
    """
    points = []
    for entry in entries:
        size = entry.facts["parameters"]
        if role(entry) != "trained" or not size:
            continue
        known = entry.facts.get("costs", {}).get(printed)
        ratio = float(known) if known is not None else _over(entry, entries, cost)
        if ratio is not None:
            points.append(_point(entry, float(size), ratio))
    return sorted(points, key=lambda point: (point.published, point.wbits, point.x))


def _over(entry: Entry, entries: Sequence[Entry], cost: Cost) -> float | None:
    size, own = entry.facts["parameters"], cost(entry)
    apart = {
        abs(math.log(other.facts["parameters"] / size)): cost(other)
        for other in entries
        if role(other) == "full precision"
        and other.source == entry.source
        and other.facts["parameters"]
    }
    nearest = min(apart, default=math.inf)
    theirs = apart.get(nearest)
    if nearest > math.log(SAME_SIZE) or not own or theirs is None:
        return None
    return theirs / own


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
