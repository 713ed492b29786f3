"""What every stored run costs beside what it scores: bits, bytes, energy, cache.

Decode latency is not measured yet; its column keeps the place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qbench.comparison.entries import Entry
from qbench.comparison.footprint import size_text
from qbench.comparison.run_costs import TOKENS
from qbench.tables.columns import method_column, scheme_column, text_column
from qbench.tables.sheet import MISSING, Column

TITLE = "Costs beside accuracy"
_LATENCY = "Latency: not measured; decoding with real low-bit kernels is not part of this yet."
_BITS = (
    "Bits/weight: stored bits (codes, scales, zero points, group indices) over the quantized "
    "matrices; and over all parameters, of which the others count 16 bits. Size: all of it in "
    "bytes; ternary codes count log2 3 bits, in files that pack four to a byte they take 2."
)
_ENERGY = (
    f"Energy: arithmetic only, of {TOKENS} tokens at 7 nm as BitNet (arXiv 2310.11453) counts it, "
    "without memory access, embeddings and output head; additions of integer products in INT8, as "
    "in the paper, and in INT32, as kernels accumulate. Weight-only schemes compute in FP16; what "
    "a method does to its inputs at run time is left out."
)
_CACHE = f"KV cache: keys and values of one sequence of {TOKENS} tokens."
_OLD = (
    "No energy and no cache: recorded without the model's dimensions; `qbench costs` takes the "
    "checkpoint ({})."
)


def cost_columns(rows: Sequence[Entry]) -> list[Column]:
    """What names the rows, and what each of them costs."""
    return [
        text_column("Checkpoint", rows, lambda entry: str(entry.facts["checkpoint"])),
        text_column("W/A", rows, lambda entry: str(entry.facts["label"])),
        method_column("Method", rows),
        scheme_column(rows),
        _fact(("Bits/weight", "quantized"), rows, "effective_bits", lambda v: f"{v:.2f}"),
        _fact(("Bits/weight", "whole model"), rows, "model_bits", lambda v: f"{v:.2f}"),
        _fact(("Size",), rows, "size_bytes", size_text),
        _fact(("Energy", "INT8 acc."), rows, "energy", joules_text),
        _fact(("Energy", "INT32 acc."), rows, "energy_int32", joules_text),
        _fact(("KV cache", f"{TOKENS} tokens"), rows, "kv_cache_bytes", size_text),
        text_column("Latency", rows, lambda _: MISSING, numeric=True),
    ]


def cost_remarks(rows: Sequence[Entry]) -> list[str]:
    """What the columns count, and which rows lack some."""
    old = sorted({str(row.facts["checkpoint"]) for row in rows if _is_old(row)})
    return [_BITS, _ENERGY, _CACHE, _LATENCY, *([_OLD.format(", ".join(old))] if old else [])]


def joules_text(joules: float) -> str:
    """Three digits: "1.68 J", "24.2 mJ", "7.13 µJ"."""
    for unit, name in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")):
        scaled = joules / unit
        if scaled >= 0.9995 or name == "µJ":
            digits = 2 - math.floor(math.log10(max(scaled, 1.0005)) + 2e-4)
            return f"{scaled:.{max(digits, 0)}f} {name}"
    raise AssertionError("unreachable")


def _fact(
    heading: tuple[str, ...], rows: Sequence[Entry], name: str, write: Callable[[float], str]
) -> Column:
    def text(entry: Entry) -> str:
        value = entry.facts.get(name)
        if value is None and name == "effective_bits" and entry.full_precision:
            value = 16.0
        return MISSING if value is None else write(value)

    column = text_column("", rows, text, numeric=True)
    return Column(heading, column.cells)


def _is_old(entry: Entry) -> bool:
    facts = entry.facts
    measured = entry.source == "measured" and facts.get("status") == "ok"
    return measured and facts.get("energy") is None
