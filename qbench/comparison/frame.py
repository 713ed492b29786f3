"""The long table: one row per run, task and metric, with everything that tells two rows apart.

Tables and plots start here, and so can anybody's own analysis. A run without measurements (failed,
not applicable, or not measured yet) has one row without a task. Numbers are as stored: accuracies
between 0 and 1, infinite and NaN kept as such.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qbench.comparison.circumstances import COLUMNS as CIRCUMSTANCES
from qbench.comparison.circumstances import environment_text
from qbench.comparison.headings import chance_level
from qbench.comparison.run_costs import COST_COLUMNS, cost_columns
from qbench.errors import QBenchError
from qbench.record import QuantizationRecord, TaskRecord
from qbench.scheme import Scheme
from qbench.study.store import Run, Store

if TYPE_CHECKING:
    from pandas import DataFrame

RUN_COLUMNS = (
    *("run", "checkpoint", "weights", "scheme", "label", "wbits", "abits", "kvbits", "group_size"),
    *("grid", "agrid", "w_granularity", "a_granularity", "static", "bmm", "overrides"),
    *("baseline", "hyperparameters", "baseline_version", "baseline_source", "seed"),
    *("calibration_source", "calibration_seqlen", "calibration_nsamples", "calibration_seed"),
    *("calibration_tokens", "parameters", "trained", "status", "error", "n_layers", "fallbacks"),
    *("effective_bits", "quantization_dtype", "created", *COST_COLUMNS),
    "quantized_elsewhere",
)
TASK_COLUMNS = (
    *("task", "protocol", "kind", "num_fewshot", "fewshot_seed", "limit", "encoding", "dtype"),
    *("max_length", "definition", "data", "task_version", "task_status", "task_error", "n_items"),
    *("task_created", "chance", *CIRCUMSTANCES, "metric", "value", "stderr"),
)
_INTEGERS = (
    *("abits", "kvbits", "group_size", "baseline_version", "seed", "calibration_seqlen"),
    *("calibration_nsamples", "calibration_seed", "parameters", "n_layers", "fallbacks"),
    *("num_fewshot", "fewshot_seed", "limit", "max_length", "task_version", "n_items"),
)
_FLOATS = (
    *("wbits", "effective_bits", "chance", "value", "stderr", "calibration_overlap"),
    *COST_COLUMNS,
)


def frame(store: Store) -> DataFrame:
    """Every stored number as a long table; empty, with all columns, for an empty store."""
    import pandas

    rows = [row for run in store.runs() for row in _rows(store, run)]
    table = pandas.DataFrame(rows, columns=[*RUN_COLUMNS, *TASK_COLUMNS])
    integers = table[list(_INTEGERS)].astype("Int64")  # nullable: a limit may be missing
    floats = table[list(_FLOATS)].astype("float64")
    return table.assign(**integers, **floats)


def kind_of(metrics: list[str]) -> str:
    """What some metrics measure: ``agreement`` with full precision, ``perplexity``, ``accuracy``.

    Perplexity is a task that only measures how well text is predicted.
    """
    if "kl_divergence" in metrics:
        return "agreement"
    predicts = any("perplexity" in name or name == "bits_per_byte" for name in metrics)
    answers = any(name.startswith("acc") for name in metrics)
    return "perplexity" if predicts and not answers else "accuracy"


def _rows(store: Store, run: Run) -> Iterator[dict[str, Any]]:
    path = run.path.relative_to(store.root).as_posix()
    try:
        of_run = {"run": path, **_run_columns(run.quantization)}
    except QBenchError as error:  # a scheme written by another version
        warnings.warn(f"left out: {run.path}: {error}", stacklevel=2)
        return
    if not run.tasks:
        yield of_run
    for task in run.tasks:
        of_task = _task_columns(task)
        if not task.metrics:
            yield of_run | of_task
        for name, metric in sorted(task.metrics.items()):
            number = {"metric": name, "value": metric.as_float(), "stderr": metric.stderr}
            yield of_run | of_task | number


def _run_columns(record: QuantizationRecord) -> dict[str, Any]:
    key = record.key
    scheme = Scheme.parse(key.scheme)
    columns: dict[str, Any] = {
        "checkpoint": record.checkpoint,
        "weights": key.weights,
        "scheme": key.scheme,
        "label": scheme.label,
        "overrides": ";".join(f"{pattern}={inner}" for pattern, inner in scheme.overrides),
        "baseline": key.baseline.name,
        "hyperparameters": json.dumps(key.baseline.parameters, sort_keys=True),
        "baseline_version": key.baseline.version,
        "baseline_source": key.baseline.source,
        "seed": key.seed,
        "quantization_dtype": key.dtype,  # the one named dtype is the evaluation's
        "n_layers": len(record.layers),
    }
    for name in ("wbits", "abits", "kvbits", "group_size", "grid", "agrid", "w_granularity"):
        columns[name] = getattr(scheme, name)
    for name in ("a_granularity", "static", "bmm"):
        columns[name] = getattr(scheme, name)
    for name in ("parameters", "trained", "status", "error", "fallbacks", "effective_bits"):
        columns[name] = getattr(record, name)
    columns["quantized_elsewhere"] = record.quantized_elsewhere
    if key.calibration:
        for name in ("source", "seqlen", "nsamples", "seed", "tokens"):
            columns[f"calibration_{name}"] = getattr(key.calibration, name)
    return columns | cost_columns(record) | {"created": record.created}


def _task_columns(record: TaskRecord) -> dict[str, Any]:
    key = record.key
    names = ("task", "protocol", "num_fewshot", "limit", "encoding", "dtype", "max_length")
    chance = record.details.get("chance")
    return {name: getattr(key, name) for name in names} | {
        "kind": kind_of(list(record.metrics)) if record.metrics else None,
        "fewshot_seed": key.seed,
        "definition": key.definition,
        "data": key.data,
        "task_version": key.version,
        "task_status": record.status,
        "task_error": record.error,
        "n_items": record.n_items,
        "task_created": record.created,
        "environment": environment_text(record.environment),
        "calibration_overlap": record.details.get("calibration_overlap"),
        "chance": chance if isinstance(chance, int | float) else chance_level(key.task),
    }
