"""Published costs, cell by cell: as printed, as computed here, and what lies between them.

Energies and their ratios follow from shapes alone (:mod:`qbench.comparison.energy`). Memory was
measured by its authors as what a GPU had allocated, so what is computed here (weights, cache) is a
part of it, and the rest is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbench.comparison import reference
from qbench.comparison.energy import (
    FP16,
    FP32,
    Energy,
    arithmetic_of,
    model_energy,
    products_at,
    ratio_of_one,
)
from qbench.comparison.footprint import footprint_at, kv_cache_bytes, max_batch, memory_of
from qbench.comparison.shapes import shape
from qbench.errors import QBenchError
from qbench.scheme import Scheme
from qbench.tables.sheet import MISSING, Cell, Column, Sheet

CACHED = 2048
"""Tokens in the cache where a table of memory does not say how many."""
_GPUS = 160e9
"""Bytes of the two A100 of b1.58's Table 3."""
_DRAWN = 0.0025
"""How exactly numbers are known that were read from a drawing."""
_AS_BITNET = {"3B": "2.7B", "7B": "6.7B"}
"""What Fig. 3 of b1.58 calls BitNet's sizes."""
_ENERGY_REMARKS = (
    "Arithmetic only: linears and attention products of one pass, without memory access, "
    "embeddings and output head.",
    "Computed: eqs. 16 to 18 of BitNet (arXiv 2310.11453), integers added in INT8 as there; INT32: "
    "added in INT32, as kernels accumulate.",
)
_MEMORY_REMARKS = (
    "Printed: memory of a GPU while decoding, FasterTransformer for LLaMA, a 2-bit Ladder kernel "
    "for b1.58.",
    "Weights: ternary codes in 2 bits, embeddings and output head in 16. The paper does not say "
    "how many tokens are cached.",
    "Left over: what a runtime allocates besides (context, workspaces, activations), and whatever "
    "the assumed length gets wrong.",
)
_BATCH_REMARKS = (
    "Computed: (160 GB - weights) / cache of a sequence of 512 tokens, nothing reserved; shape of "
    "Llama 2 70B.",
    "LLaMA's 16 is what fits beside a cache of all 64 heads in 16 bits. b1.58's 176 lies between "
    "caches of 16 and of 8 bits: it does not follow from the text.",
)

_Line = dict[str, Any]


def published_sheet(name: str, tokens: int | None = None) -> Sheet:
    """A published table of costs beside what is computed.

    Args:
        name: of a table with energies, energy ratios, memory or batch sizes.
        tokens: in the cache, for memory; None is 2048.

    Raises:
        QBenchError: for an unknown table, or one that has none of these.
    """
    lines: list[_Line] = [
        {str(key): value for key, value in line.items()}
        for line in reference.load(name).to_dict("records")
    ]
    for metrics, build in (
        (("energy", "energy_ratio"), _energy_sheet),
        (("max_batch",), _batch_sheet),
        (("memory", "memory_ratio"), _memory_sheet),
    ):
        chosen = [line for line in lines if line["metric"] in metrics]
        if chosen:
            return build(chosen, tokens)
    known = ", ".join(sorted(comparable()))
    raise QBenchError(f"{name} has no costs that follow from shapes; take one of {known}")


def comparable() -> list[str]:
    """The published tables that can be computed."""
    wanted = {"energy", "energy_ratio", "memory", "memory_ratio", "max_batch"}
    return [
        name
        for name in reference.names()
        if name.startswith(("bitnet-", "b158-")) and name != "bitnet-2b4t"
        and wanted & set(reference.load(name)["metric"])
    ]  # fmt: skip


def _energy_sheet(lines: Sequence[_Line], tokens: int | None) -> Sheet:
    computed = [_computed(line, "int8") for line in lines]
    wide = [_computed(line, "int32") for line in lines]
    same = [a == b for a, b in zip(computed, wide, strict=True)]
    agree = [_as_printed(line, value) for line, value in zip(lines, computed, strict=True)]
    columns = [
        _text("Model", [line["model"] for line in lines]),
        _text("W/A", [line["label"] for line in lines]),
        _text("Node", [line["protocol"] for line in lines]),
        _text("Quantity", [_quantity(line) for line in lines]),
        _numbers("Printed", [str(line["printed"]) for line in lines]),
        _numbers("Computed", [_digits(line, value) for line, value in _pairs(lines, computed)]),
        _numbers("Difference", [_gap(line, value) for line, value in _pairs(lines, computed)]),
        Column(("Agrees",), [_verdict(*pair) for pair in zip(lines, agree, strict=True)], False),
        _numbers(
            "INT32",
            [
                MISSING if equal else _digits(line, value)
                for (line, value), equal in zip(_pairs(lines, wide), same, strict=True)
            ],
        ),
    ]
    groups = [line["model"] for line in lines]
    if any(line["metric"] == "energy_ratio" for line in lines):
        groups = [""] * len(lines)
    drawn = any(line["origin"] == "drawing" for line in lines)
    how = f"to {100 * _DRAWN:g} % (they were read from a drawing)" if drawn else "to the last digit"
    counted = f"{sum(agree)} of {len(agree)} numbers come out as printed, {how}."
    return _sheet(lines, columns, groups, [counted, *_ENERGY_REMARKS])


def _computed(line: _Line, accumulator: str) -> float:
    """Joules of a line's cell, or how many times less than FP16."""
    if line["task"] == "multiply-add":
        return ratio_of_one(line["protocol"], accumulator)
    if line["metric"] == "energy_ratio":
        whole = _energy(line, 16, accumulator).total
        return whole / _energy(line, float(line["wbits"]), accumulator).total
    found = _energy(line, float(line["wbits"]), accumulator)
    return float(getattr(found, line["task"], found.total))


def _energy(line: _Line, wbits: float, accumulator: str) -> Energy:
    dimensions = shape(_energy_shape(line))
    kind = FP32 if wbits == 32 else FP16
    if wbits < 16:
        kind = arithmetic_of(wbits, 8, accumulator)
    products = products_at(dimensions, kind)
    tokens, node = int(line["seqlen"]), str(line["protocol"])
    return model_energy(dimensions, products, tokens, node=node, attention=kind.attention)


def _energy_shape(line: _Line) -> str:
    size = _size(line)
    return f"bitnet-{_AS_BITNET.get(size, size)}"


def _size(line: _Line) -> str:
    return str(line["model"]).split()[-1]


def _quantity(line: _Line) -> str:
    if line["metric"] == "energy_ratio":
        what = "one multiply-add" if line["task"] == "multiply-add" else "FP16 over this"
        return f"{what} (x)"
    task = "both" if line["task"] == "arithmetic" else line["task"]
    return f"{task} ({line['unit']})"


def _decimals(line: _Line) -> int:
    return len(str(line["printed"]).partition(".")[2])


def _as_printed(line: _Line, value: float) -> bool:
    if line["origin"] == "drawing":
        return abs(value / float(line["value"]) - 1) <= _DRAWN
    return f"{value:.{_decimals(line)}f}" == f"{float(line['value']):.{_decimals(line)}f}"


def _digits(line: _Line, value: float) -> str:
    return f"{value:.{_decimals(line) + 2}f}"


def _gap(line: _Line, value: float) -> str:
    gap = value - float(line["value"])
    return f"{gap:+.{_decimals(line) + 2}f}".replace("-", "−")


def _verdict(line: _Line, agrees: bool) -> Cell:
    notes = []
    if not agrees:
        notes.append(line["printed_error"] or "not what eqs. 16 to 18 give with appendix A's shape")
    if line["metric"] == "energy_ratio" and _size(line) == "3B":
        own = shape("b158-3B")
        whole = model_energy(own, products_at(own, FP16), 512).total
        low = model_energy(own, products_at(own, arithmetic_of(1.58, 8)), 512).total
        notes.append(
            f"printed with the shape of BitNet's 2.7B; the 3B model's own gives {whole / low:.1f}"
        )
    return Cell("✓" if agrees else "✗", tuple(notes))


def _memory_sheet(lines: Sequence[_Line], tokens: int | None) -> Sheet:
    cached = CACHED if tokens is None else tokens
    if cached < 1:
        raise QBenchError(f"a cache of {cached} tokens is none; give at least one")
    models = list(dict.fromkeys((line["row"], line["model"], line["label"]) for line in lines))
    printed = {(line["row"], line["metric"]): line for line in lines}
    rows = [_Row(name, label, cached) for _, name, label in models]
    gigabytes = [printed.get((row, "memory")) for row, _, _ in models]
    ratios = [printed.get((row, "memory_ratio")) for row, _, _ in models]
    columns = [
        _text("Model", [row.name for row in rows]),
        _text("W/A", [row.label for row in rows]),
        *(
            [_numbers("Printed (GB)", [_printed(line) for line in gigabytes])]
            if any(gigabytes)
            else []
        ),
        _numbers("Weights (GB)", [f"{row.weights / 1e9:.2f}" for row in rows]),
        Column(("KV cache", f"{cached} tokens"), [Cell(f"{row.cache / 1e9:.2f}") for row in rows]),
        _numbers("Together", [f"{row.total / 1e9:.2f}" for row in rows]),
    ]
    if any(gigabytes):
        left = [
            MISSING if line is None else f"{float(line['value']) - row.total / 1e9:+.2f}"
            for line, row in zip(gigabytes, rows, strict=True)
        ]
        columns.append(_numbers("Left over", [text.replace("-", "−") for text in left]))
    columns += [
        _numbers("Ratio, printed", [_printed(line) for line in ratios]),
        _numbers("Ratio, computed", [f"{row.ratio:.2f}" for row in rows]),
    ]
    groups = [_size_of(row.name) for row in rows]
    remarks = _MEMORY_REMARKS if any(gigabytes) else _MEMORY_REMARKS[:-1]
    return _sheet(lines, columns, groups, list(remarks))


class _Row:
    """A model of b1.58's tables in memory, one sequence."""

    def __init__(self, name: str, label: str, cached: int) -> None:
        self.name, self.label = name, label
        own = shape(f"b158-{_size_of(name)}")
        whole = shape("b158-3B") if _size_of(name) == "3.9B" else own  # as the paper divides
        packed = footprint_at(own, Scheme.parse(label), packed=True)
        memory = memory_of(own, packed, cached)
        self.weights, self.cache, self.total = memory.weights, memory.kv_cache, memory.total
        self.ratio = memory_of(whole, footprint_at(whole, Scheme()), cached).total / self.total


def _batch_sheet(lines: Sequence[_Line], tokens: int | None) -> Sheet:
    own = shape("b158-70B")
    every_head = own.model_copy(update={"n_kv_heads": own.n_heads})
    caches = (
        (f"{own.n_heads} heads, 16 bits", every_head, 16),
        (f"{own.n_heads} heads, 8 bits", every_head, 8),
        (f"{own.n_kv_heads} heads, 16 bits", own, 16),
    )
    columns = [
        _text("Model", [line["model"] for line in lines]),
        _text("W/A", [line["label"] for line in lines]),
        _numbers("Printed batch", [str(line["printed"]) for line in lines]),
    ]
    footprints = [footprint_at(own, Scheme.parse(line["label"]), packed=True) for line in lines]
    columns.append(_numbers("Weights (GB)", [f"{f.bytes / 1e9:.1f}" for f in footprints]))
    for heading, dimensions, kvbits in caches:
        found = [max_batch(dimensions, f, _GPUS, 512, kvbits) for f in footprints]
        columns.append(Column(("Cache of", heading), [Cell(str(batch)) for batch in found]))
    each = kv_cache_bytes(every_head, 512) / 1e9
    remark = f"One sequence caches {each:.2f} GB with all heads in 16 bits."
    return _sheet(lines, columns, [""] * len(lines), [*_BATCH_REMARKS, remark])


def _sheet(
    lines: Sequence[_Line], columns: list[Column], groups: Sequence[str], remarks: list[str]
) -> Sheet:
    first = lines[0]
    tables = ", ".join(dict.fromkeys(str(line["table"]) for line in lines))
    starts = frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])
    rules = starts if 2 * len(starts) < len(groups) else frozenset()
    title = f"Costs in {first['paper']} (arXiv {first['arxiv']}), {tables}: printed and computed"
    facts = [{"checkpoint": cell.text} for cell in columns[0].cells]
    return Sheet(title, columns, facts, rules, remarks)


def _pairs(lines: Sequence[_Line], values: Sequence[float]) -> list[tuple[_Line, float]]:
    return list(zip(lines, values, strict=True))


def _printed(line: _Line | None) -> str:
    return MISSING if line is None else str(line["printed"])


def _size_of(name: str) -> str:
    return name.split()[-1]


def _text(heading: str, texts: Sequence[Any]) -> Column:
    return Column((heading,), [Cell(str(text)) for text in texts], numeric=False)


def _numbers(heading: str, texts: Sequence[str]) -> Column:
    return Column((heading,), [Cell(text) for text in texts])
