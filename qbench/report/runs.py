"""The page of one run as data: settings, what was measured, what every matrix went through.

Numbers have four significant digits and layers are columns, so that a thousand runs stay a few
megabytes. Left out: answers (:mod:`~.answers`), and how it looks (the page's script).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qbench.comparison.entries import TOP_1, Entry, Measured
from qbench.comparison.headings import MISSING, size_text
from qbench.record import LayerReport, QuantizationRecord
from qbench.report.answers import short
from qbench.scheme import Scheme, format_bits
from qbench.study.store import Run
from qbench.tables.sheet import (
    accuracy_text,
    difference_text,
    divergence_text,
    perplexity_text,
)

Pairs = list[tuple[str, str]]


def page_of(
    entry: Entry, run: Run, full: Entry | None, anchors: Mapping[str, str]
) -> dict[str, Any]:
    """Everything of one run but its answers.

    Args:
        entry: its row.
        run: its records.
        full: the full-precision row of its checkpoint, if there is one.
        anchors: run -> anchor.
    """
    record = run.quantization
    facts = entry.facts
    compared = full is not None and full.facts["run"] != facts["run"]
    return {
        "title": f"{entry.method} {facts['label']}",
        "checkpoint": facts["checkpoint"],
        "status": record.status,
        "error": record.error or "",
        "fallbacks": record.fallbacks,
        "notes": record.notes,
        "full": anchors.get(full.facts["run"], "") if full is not None and compared else "",
        "groups": _groups(entry, run),
        "measurements": [
            _measurement(key, number, full if compared else None)
            for key, number in entry.cells.items()
        ],
        "layers": layers(record.layers),
        "skipped": sorted(record.skipped.items()),
    }


def layers(reports: list[LayerReport]) -> dict[str, Any]:
    """Columns over the matrices; a column that no matrix has is left out."""
    columns: dict[str, list[Any]] = {
        "relative error": [_number(report.relative_error) for report in reports],
        "proxy loss": [_number(report.proxy_loss) for report in reports],
        "damping": [_number(report.damping) for report in reports],
        "bits per weight": [
            short(report.stored_bits / (report.shape[0] * report.shape[1])) for report in reports
        ],
        "seconds": [short(report.seconds) for report in reports],
        "fallback": [report.fallback for report in reports],
    }
    found: dict[str, Any] = {
        "name": [report.name for report in reports],
        "shape": [f"{report.shape[0]} × {report.shape[1]}" for report in reports],
    }
    schemes = [report.scheme for report in reports]
    if len(set(schemes)) > 1:
        found["scheme"] = schemes
    found |= {name: c for name, c in columns.items() if any(v is not None for v in c)}
    return found if reports else {}


def _origin(record: QuantizationRecord) -> str:
    if record.trained:
        return "trained"
    return "in the checkpoint" if record.quantized_elsewhere else "applied afterwards"


def _groups(entry: Entry, run: Run) -> list[tuple[str, Pairs]]:
    record, key = run.quantization, run.quantization.key
    scheme = Scheme.parse(key.scheme)
    model: Pairs = [
        ("checkpoint", record.checkpoint),
        ("parameters", size_text(record.parameters)),
        ("weights", key.weights),
        ("widths were", _origin(record)),
    ]
    precision: Pairs = [
        ("scheme", key.scheme),
        ("weights", f"{format_bits(scheme.wbits)} bits, {scheme.w_granularity}, {scheme.grid}"),
        ("activations", _activations(scheme)),
        ("keys and values", f"{scheme.kvbits} bits"),
        ("bits per weight, stored", _bits(record)),
        ("quantized in", key.dtype),
    ]
    method: Pairs = [
        ("name", key.baseline.name),
        ("version", str(key.baseline.version)),
        *((name, str(value)) for name, value in sorted(key.baseline.parameters.items())),
        ("seed", str(key.seed)),
    ]
    method += [("source file", key.baseline.source)] if key.baseline.source else []
    calibration: Pairs = [("text", "none is needed")]
    if key.calibration:
        values = key.calibration.model_dump().items()
        calibration = [(name, str(value)) for name, value in values if value is not None]
    cost: Pairs = [
        ("time to quantize", _seconds(record.wall_seconds)),
        ("peak memory", _memory(record.peak_memory_bytes)),
        ("time to measure", _seconds(sum(t.wall_seconds or 0 for t in run.tasks) or None)),
        ("made", record.created or MISSING),
    ]
    groups = [("Model", model), ("Precision", precision), ("Method", method)]
    groups += [("Calibration", calibration), ("Cost", cost)]
    return [*groups, ("Environment", sorted(record.environment.items()) or [("", MISSING)])]


def _measurement(key: tuple[str, str], number: Measured, full: Entry | None) -> dict[str, Any]:
    base = full.cells.get(key) if full is not None else None
    percent = number.kind in ("accuracy", "agreement")
    shots = number.conditions.get("num_fewshot")
    how = [f"{shots}-shot"] if shots else []
    how += [f"limit={number.conditions['limit']}"] if number.conditions.get("limit") else []
    found: dict[str, Any] = {
        "task": number.task,
        "protocol": key[1].removesuffix(TOP_1) or str(number.conditions.get("protocol") or ""),
        "metric": number.metric,
        "value": "failed",
        "n": number.n_items,
        "how": ", ".join(how),
        "notes": list(number.notes),
        "also": [
            f"{name} {_value(value, error, name)}"
            for name, (value, error) in sorted(number.also.items())
            if name != number.metric
        ],
    }
    if number.value is None:
        return found
    texts = {"perplexity": perplexity_text, "divergence": divergence_text}
    text = texts.get(number.kind, accuracy_text)
    found["value"] = _value(number.value, number.stderr, number.metric)
    if base is not None and base.value is not None:
        found["full"] = text(base.value)
        found["difference"] = difference_text(number.value - base.value, percent=percent)
    return found


def _value(value: float, error: float | None, metric: str) -> str:
    if metric.startswith("acc") or metric == "top1_agreement":
        return accuracy_text(value, error)
    text = perplexity_text if "perplexity" in metric else "{:.4g}".format
    known = error is not None and math.isfinite(value)
    return text(value) + (f" ± {text(error)}" if known and error is not None else "")


def _activations(scheme: Scheme) -> str:
    if scheme.abits >= 16:
        return "16 bits"
    when = "static" if scheme.static else "at run time"
    return f"{scheme.abits} bits, {scheme.a_granularity}, {scheme.agrid}, {when}"


def _bits(record: QuantizationRecord) -> str:
    return f"{record.effective_bits:.3f}" if record.effective_bits else MISSING


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    return short(value) if math.isfinite(value) else str(value)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _memory(size: int | None) -> str:
    return MISSING if size is None else f"{size / 2**30:.2f} GiB"
