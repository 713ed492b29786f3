"""A store of made-up results, shaped like the real thing, and readers of tables made of it."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

from qbench.record import (
    BaselineSpec,
    CalibrationSpec,
    LayerReport,
    Metric,
    QuantizationKey,
    QuantizationRecord,
    TaskKey,
    TaskRecord,
)
from qbench.study.store import Store

BITNET_TASKS = ("wsc285", "winogrande", "hellaswag", "storycloze_2016")


def quantization(
    checkpoint: str = "opt-6.7b",
    baseline: str = "none",
    scheme: str = "W16A16",
    *,
    fallbacks: int = 0,
    **fields: Any,
) -> QuantizationRecord:
    """A record; hyperparameters (``parameters_of``), calibration, seed and dtype make its key."""
    key = QuantizationKey(
        weights=fields.pop("weights", f"weights of {checkpoint}"),
        baseline=BaselineSpec(name=baseline, parameters=fields.pop("parameters_of", {})),
        scheme=scheme,
        calibration=fields.pop("calibration", None),
        seed=fields.pop("seed", 0),
        dtype=fields.pop("dtype", "float32"),
    )
    layers = [
        LayerReport(
            name=f"layers.{index}.fc1",
            shape=(8, 4),
            scheme=scheme,
            relative_error=0.01,
            stored_bits=128,
            fallback="not positive definite" if index < fallbacks else None,
        )
        for index in range(4 if baseline != "none" else 0)
    ]
    known = {"parameters": 6_700_000_000, "layers": layers, "created": "2026-01-01T00:00:00"}
    return QuantizationRecord(key=key, checkpoint=checkpoint, **(known | fields))


def task(
    of: QuantizationRecord,
    name: str = "piqa",
    metrics: dict[str, float] | None = None,
    *,
    n_items: int = 1000,
    status: str = "ok",
    error: str | None = None,
    details: dict[str, Any] | None = None,
    **key: Any,
) -> TaskRecord:
    """A measurement; an accuracy gets its binomial standard error."""
    fields: dict[str, Any] = {
        "protocol": "lm-eval",
        "definition": f"definition of {name}",
        "data": f"data of {name}",
        "encoding": "joint",
        "max_length": 2048,
    }
    return TaskRecord(
        key=TaskKey(quantization=of.key.digest(), task=name, **(fields | key)),
        status=status,  # type: ignore[arg-type]
        error=error,
        metrics={n: Metric.of(v, _stderr(n, v, n_items)) for n, v in (metrics or {}).items()},
        n_items=n_items,
        details=details or {},
        created="2026-01-01T00:00:00",
    )


def add(
    store: Store,
    record: QuantizationRecord,
    scores: dict[str, float] | None = None,
    perplexity: dict[str, float] | None = None,
    **key: Any,
) -> QuantizationRecord:
    """Save a run with accuracies (task -> acc) and perplexities ("text@protocol" -> value)."""
    store.save_quantization(record)
    for name, value in (scores or {}).items():
        measured = task(record, name, {"acc": value, "acc_norm": value + 0.01}, **key)
        store.save_task(record.checkpoint, record.key, measured)
    for name, value in (perplexity or {}).items():
        text, protocol = name.split("@")
        measured = task(record, text, {"perplexity": value}, protocol=protocol, n_items=128)
        store.save_task(record.checkpoint, record.key, measured)
    return record


def bitnet_store(root: Path) -> Store:
    """BitNet Table 3 as if it had been measured (its numbers, our task names)."""
    store = Store(root)
    c4 = CalibrationSpec(source="c4", nsamples=128, seqlen=2048, seed=0)
    rows = [
        ("none", "W16A16", 15.19, 66.7, 54.3, 42.9, 67.4),
        ("absmax", "W8A8:grid=restricted,agrid=restricted", 21.43, 60.4, 52.0, 38.3, 62.7),
        ("smoothquant", "W8A8:grid=restricted,agrid=restricted", 15.67, 65.3, 53.1, 40.9, 67.6),
        ("gptq", "W4A16:w=channel,grid=asym", 16.05, 57.2, 51.2, 39.9, 63.4),
        ("absmax", "W4A4:grid=restricted,agrid=restricted", 4.8e4, 55.8, 50.9, 25.0, 53.1),
        ("smoothquant", "W4A4:grid=restricted,agrid=restricted", 1.6e6, 53.7, 48.3, 24.8, 53.6),
        ("gptq", "W2A16:w=channel,grid=asym", 1032, 51.6, 50.1, 25.8, 53.4),
        ("quip", "W2A16:w=channel,grid=rms", 70.43, 56.1, 51.2, 30.3, 58.4),
        ("absmax", "W1A8:grid=bitnet,agrid=bitnet", math.inf, 49.8, 50.0, 24.8, 53.6),
        ("smoothquant", "W1A8:grid=bitnet,agrid=bitnet", math.nan, 50.5, 49.5, 24.6, 53.1),
    ]
    for baseline, scheme, perplexity, *scores in rows:
        record = quantization(
            baseline=baseline,
            scheme=scheme,
            calibration=c4 if baseline in ("gptq", "quip", "smoothquant") else None,
            fallbacks=3 if (baseline, scheme[:2]) == ("gptq", "W2") else 0,
            effective_bits=None if baseline == "none" else float(scheme[1]) + 0.02,
        )
        percent = {n: v / 100 for n, v in zip(BITNET_TASKS, scores, strict=True)}
        add(store, record, percent, {"wikitext2@gptq-2048": perplexity})
    trained = quantization("BitNet-6.7B", scheme="W1A8:grid=sign,agrid=bitnet", trained=True)
    scores = {n: v / 100 for n, v in zip(BITNET_TASKS, (66.3, 51.4, 38.9, 66.9), strict=True)}
    add(store, trained, scores, {"wikitext2@gptq-2048": 17.07})
    return store


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by heading, without footnote marks of the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    heading = [re.sub(r" \[\d+\]", "", name) for name in rows[0]]
    return [dict(zip(heading, row, strict=True)) for row in rows[2:]]


def numbers(text: str) -> list[dict[str, str]]:
    """The lines of a CSV by heading."""
    return list(csv.DictReader(io.StringIO(text)))


def _stderr(name: str, value: float, n: int) -> float | None:
    return math.sqrt(value * (1 - value) / n) if name.startswith("acc") else None
