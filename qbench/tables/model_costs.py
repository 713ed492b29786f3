"""What one model would cost at some schemes: ``qbench costs``, for models nobody needs to run.

A model is a stored run, a checkpoint of which the configuration is enough, or a shape of the papers
(:mod:`qbench.comparison.shapes`). Loads torch only where a checkpoint's shape has to be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.comparison import shapes
from qbench.comparison.energy import (
    ACCUMULATORS,
    NODES,
    Energy,
    Products,
    arithmetic_of,
    model_energy,
    products_at,
    products_of,
)
from qbench.comparison.finding import find_run
from qbench.comparison.footprint import (
    Footprint,
    activation_bytes,
    footprint_at,
    footprint_of,
    kv_cache_bytes,
    size_text,
)
from qbench.comparison.headings import size_text as count_text
from qbench.errors import QBenchError, unknown
from qbench.record import Dimensions, QuantizationRecord
from qbench.scheme import Scheme
from qbench.tables.costs_table import joules_text
from qbench.tables.sheet import MISSING, Cell, Column, Sheet

_REMARKS = (
    "Energy: arithmetic only (BitNet, arXiv 2310.11453, eqs. 16 to 18), without memory access, "
    "embeddings and output head; attention products in FP16, every pair of tokens counted.",
    "INT8 additions are how the papers count; kernels accumulate in INT32. Weights or activations "
    "at 16 bits compute in FP16, so weight-only schemes save memory alone.",
    "Memory: weights with codes in whole bits, KV cache and the activations of one block; no "
    "allocator, no workspaces.",
    "Latency: not measured; decoding with real low-bit kernels is not part of this yet.",
)


@dataclass(frozen=True)
class Model:
    """A model whose costs are asked for."""

    name: str
    dimensions: Dimensions
    parameters: int | None = None
    own_scheme: str | None = None
    """What it was trained at, or is stored at."""
    record: QuantizationRecord | None = None
    """The run it is, where it is one."""


@dataclass(frozen=True)
class Use:
    """How it would be used."""

    seqlen: int = 512
    batch: int = 1


@dataclass(frozen=True)
class _Variant:
    """A model at one scheme: a column."""

    heading: str
    footprint: Footprint
    packed: Footprint | None
    kvbits: int
    products: Callable[[str], Products]
    """Linears by accumulator."""


def find_model(name: str, results: Path) -> Model:
    """The model that a shape's name, a run, or a checkpoint's folder or id means.

    Raises:
        QBenchError: if it is none of them, or a run that was recorded without dimensions.
    """
    if name.lower() in map(str.lower, shapes.names()):
        own = "W1A8" if name.lower().startswith("bitnet") else "W1.58A8"
        return Model(name, shapes.shape(name), own_scheme=own)
    record = _stored(name, results)
    if record is not None:
        if record.dimensions is None:
            raise QBenchError(
                f"the run {name} was recorded without its model's dimensions; name the checkpoint "
                f"{record.checkpoint} and --scheme {record.key.scheme}"
            )
        return Model(record.checkpoint, record.dimensions, record.parameters, record=record)
    if name.lower().startswith(("bitnet-", "b158-")) and not Path(name).expanduser().is_dir():
        raise unknown("shape", name, shapes.names())  # the Hub is not asked for these
    from qbench.models.dimensions import find_dimensions

    try:
        dimensions, parameters, scheme = find_dimensions(name)
    except QBenchError as error:
        raise QBenchError(
            f"{error}; it is no run in {results} either, and no shape such as bitnet-6.7B"
        ) from error
    short = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    return Model(short.removeprefix("bundled:"), dimensions, parameters, scheme)


def _stored(name: str, results: Path) -> QuantizationRecord | None:
    """The record of a run; None where the name is a checkpoint's folder, or no run's.

    Raises:
        QBenchError: if it is the beginning of several runs' names.
    """
    if name.startswith("bundled:") or (Path(name).expanduser() / "config.json").is_file():
        return None
    try:
        return find_run(results, name).run.quantization
    except QBenchError as error:
        if str(error).startswith(("unknown run", "no results")):
            return None
        raise  # several runs are meant


def model_sheet(model: Model, schemes: Sequence[str], use: Use) -> Sheet:
    """One line per cost, one column per scheme, full precision first.

    Args:
        model: whose costs are asked for.
        schemes: beside full precision; none takes that of the run, the paper or the training.
        use: tokens and sequences.

    Raises:
        QBenchError: for a scheme that cannot be read or has per-layer overrides, or no tokens.
    """
    variants = _variants(model, schemes)
    lines = [*_storage(model, variants), *_memory(model, variants, use)]
    for node in NODES:
        lines += _energy(model, variants, use, node)
    columns = [Column(("",), [Cell(name) for name, _ in lines], numeric=False)]
    for index, variant in enumerate(variants):
        columns.append(Column((variant.heading,), [Cell(texts[index]) for _, texts in lines]))
    first = ("KV cache", "multiplications")
    rules = {i for i, (name, _) in enumerate(lines) if name.endswith(first)}
    sequences = "one sequence" if use.batch == 1 else f"{use.batch} sequences"
    title = f"Costs of {model.name} for {sequences} of {use.seqlen} tokens"
    facts = [{"checkpoint": model.name, "method": name} for name, _ in lines]
    return Sheet(title, columns, facts, frozenset(rules), list(_REMARKS))


Line = tuple[str, list[str]]


def _variants(model: Model, schemes: Sequence[str]) -> list[_Variant]:
    asked = list(schemes) or ([model.own_scheme] if model.own_scheme else [])
    found = [_at(model, Scheme())]
    if model.record is not None and not schemes:
        own = footprint_of(model.record)
        scheme, record = Scheme.parse(model.record.key.scheme), model.record
        if own is not None and not scheme.is_identity:
            by = "trained" if record.trained else record.key.baseline.name
            heading = f"{scheme.label} {by}"
            found.append(
                _Variant(heading, own, None, scheme.kvbits, lambda acc: products_of(record, acc))
            )
    return found + [_at(model, Scheme.parse(text)) for text in asked]


def _at(model: Model, scheme: Scheme) -> _Variant:
    def products(accumulator: str) -> Products:
        arithmetic = arithmetic_of(scheme.wbits, scheme.abits, accumulator)
        return products_at(model.dimensions, arithmetic, scheme.group_size)

    plain = footprint_at(model.dimensions, scheme, model.parameters)
    packed = footprint_at(model.dimensions, scheme, model.parameters, packed=True)
    return _Variant(scheme.label, plain, packed, scheme.kvbits, products)


def _storage(model: Model, variants: list[_Variant]) -> list[Line]:
    found = [
        ("Parameters", [count_text(v.footprint.parameters) for v in variants]),
        (
            "Bits per weight, matrices of the blocks",
            [f"{v.footprint.bits_per_quantized_weight:.3f}" for v in variants],
        ),
        (
            "Bits per weight, whole model",
            [f"{v.footprint.bits_per_weight:.3f}" for v in variants],
        ),
        ("Size", [size_text(v.footprint.bytes) for v in variants]),
    ]
    if any(v.packed and v.packed.bytes != v.footprint.bytes for v in variants):
        sizes = [size_text(v.packed.bytes) if v.packed else MISSING for v in variants]
        found.append(("Size with codes in whole bits", sizes))
    stored = model.dimensions.stored_bytes
    if stored is not None:
        found.append(("Files of the checkpoint", [size_text(stored)] * len(variants)))
    return found


def _memory(model: Model, variants: list[_Variant], use: Use) -> list[Line]:
    shape = model.dimensions
    caches = [kv_cache_bytes(shape, use.seqlen, use.batch, v.kvbits) for v in variants]
    inside = activation_bytes(shape, use.seqlen, use.batch)
    pairs = zip(variants, caches, strict=True)
    totals = [(v.packed or v.footprint).bytes + cache + inside for v, cache in pairs]
    return [
        ("KV cache", [size_text(cache) for cache in caches]),
        ("Activations", [size_text(inside)] * len(variants)),
        ("Memory", _with_ratios(totals, size_text)),
    ]


def _energy(model: Model, variants: list[_Variant], use: Use, node: str) -> list[Line]:
    def of(variant: _Variant, accumulator: str) -> Energy:
        products = variant.products(accumulator)
        return model_energy(model.dimensions, products, use.seqlen, batch=use.batch, node=node)

    as_printed = [of(variant, ACCUMULATORS[0]) for variant in variants]
    name = f"Energy (arithmetic only), {node.removesuffix('nm')} nm"
    found = [
        (f"{name}: multiplications", [joules_text(e.multiplications) for e in as_printed]),
        (f"{name}: additions, integers in INT8", [joules_text(e.additions) for e in as_printed]),
        (f"{name}: both, INT8", _with_ratios([e.total for e in as_printed], joules_text)),
    ]
    wide = [of(variant, ACCUMULATORS[1]) for variant in variants]
    if any(a != b for a, b in zip(wide, as_printed, strict=True)):
        found += [
            (f"{name}: additions, integers in INT32", [joules_text(e.additions) for e in wide]),
            (f"{name}: both, INT32", _with_ratios([e.total for e in wide], joules_text)),
        ]
    return found


def _with_ratios(values: list[float], write: Callable[[float], str]) -> list[str]:
    """Each number, and by how much the first, full precision, is larger."""
    first, *rest = values
    texts = [write(first)]
    for value in rest:
        times = f"{first / value:.1f}"
        texts.append(f"{write(value)} ({'as much' if times == '1.0' else f'{times}x less'})")
    return texts
