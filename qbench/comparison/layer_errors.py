"""How much each weight matrix lost: the errors of one checkpoint and width, by block and method.

The errors are the records' own: ``relative_error`` is ‖W-Ŵ‖²/‖W‖² of the weights as quantized (for
a method that rescales them first, of the rescaled ones), ``proxy_loss`` is tr(ΔHΔᵀ)/tr(WHWᵀ), what
GPTQ (arXiv 2210.17323) and QuIP (2307.13304, eq. 1) minimize, where a method collected a hessian.

Left out on purpose: activations. These are errors of weights, and a run's accuracy has both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qbench.comparison.entries import Entry
from qbench.errors import QBenchError
from qbench.record import LayerReport, QuantizationRecord

ERRORS = ("relative_error", "proxy_loss")
"""What can be shown of a matrix."""

Place = tuple[str, int]
"""A kind of matrix (``self_attn.q_proj``) and the block it stands in."""


@dataclass(frozen=True)
class Spread:
    """One matrix under one method: mean, least and most over the runs (seeds) and experts."""

    mean: float
    low: float
    high: float
    fallback: bool = False
    """Whether it was rounded to nearest in place of the method's own rounding."""


@dataclass(frozen=True)
class Profile:
    """The errors of one checkpoint and width."""

    checkpoint: str
    label: str
    metric: str
    methods: dict[str, dict[Place, Spread]]
    """Method -> matrix -> error."""
    n_runs: dict[str, int]
    without: list[str] = field(default_factory=list)
    """Methods whose runs have no such number."""
    others: list[str] = field(default_factory=list)
    """What else is stored and not shown: "fp16-2m W4A16"."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of matrices, in the order of the model."""
        every = (kind for found in self.methods.values() for kind, _ in found)
        return list(dict.fromkeys(every))

    def short_names(self) -> dict[str, str]:
        """Kind -> the end of its name that tells it from the others: ``q_proj``."""
        kinds = self.kinds
        ends = [kind.rpartition(".")[2] for kind in kinds]
        return {
            kind: end if ends.count(end) == 1 else kind
            for kind, end in zip(kinds, ends, strict=True)
        }


def place(name: str) -> Place:
    """Where a matrix stands, from its name; experts (further numbers) become one kind.

    >>> place("model.layers.3.mlp.experts.5.w1")
    ('mlp.experts.*.w1', 3)
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return name, 0
    inside = ["*" if part.isdigit() else part for part in parts[first + 1 :]]
    return ".".join(inside), int(parts[first])


def profile(
    entries: Sequence[Entry], records: dict[str, QuantizationRecord], metric: str
) -> Profile:
    """The errors of the checkpoint and width that most methods have.

    Args:
        entries: measured rows.
        records: run -> its record; a row that stands for several seeds names them in ``runs``.
        metric: one of ``ERRORS``.

    Raises:
        QBenchError: if no row has such errors.
    """
    groups: dict[tuple[str, str], dict[str, list[QuantizationRecord]]] = defaultdict(dict)
    rank: dict[tuple[str, str], tuple[float, ...]] = {}
    for entry in entries:
        runs = [records[run] for run in entry.facts.get("runs") or [entry.facts["run"]]]
        runs = [record for record in runs if record.status == "ok" and record.layers]
        if entry.ptq and runs:
            where = entry.facts["checkpoint"], entry.facts["label"]
            name = _unused(entry, groups[where])
            groups[where][name] = runs
            facts = entry.facts  # of equals: the largest, weights alone, the fewest bits
            rank[where] = facts["parameters"] or 0, facts["abits"], -facts["wbits"]
    if not groups:
        raise QBenchError(
            "no stored run has errors of matrices; quantize something, or drop a filter"
        )
    chosen = max(groups, key=lambda where: (len(groups[where]), rank[where]))
    others = [" ".join(where) for where in groups if where != chosen]
    methods = {name: _spreads(runs, metric) for name, runs in groups[chosen].items()}
    without = [name for name, found in methods.items() if not found]
    methods = {name: methods[name] for name in sorted(methods) if methods[name]}
    if not methods:
        raise QBenchError(
            f"no run of {' '.join(chosen)} has a {metric}; it takes a method that collects a "
            "hessian, or --metric relative_error"
        )
    n_runs = {name: len(groups[chosen][name]) for name in methods}
    return Profile(*chosen, metric, methods, n_runs, sorted(without), sorted(others))


def _unused(entry: Entry, taken: Iterable[str]) -> str:
    """The method's name, with its grid where two rows of one width share it."""
    return f"{entry.series} {entry.scheme_text}" if entry.series in taken else entry.series


def _spreads(records: Sequence[QuantizationRecord], metric: str) -> dict[Place, Spread]:
    found: dict[Place, list[tuple[float, LayerReport]]] = defaultdict(list)
    for record in records:
        for layer in record.layers:
            value = getattr(layer, metric)
            if value is not None:
                found[place(layer.name)].append((value, layer))
    spreads = {}
    for where, pairs in found.items():
        values = [value for value, _ in pairs]
        fallback = any(layer.fallback is not None for _, layer in pairs)
        spreads[where] = Spread(sum(values) / len(values), min(values), max(values), fallback)
    return spreads
