"""Batches of an evaluation: side by side, each on half of the threads, against one after the other.

Both sides score the same rows in the same batches in one process and take turns: questions of the
bundled world on the bundled model, which computes on one thread at a time, and random tokens on a
random Llama of 512 channels and 8 blocks, which shares each product among all threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Report, Table
from benchmarks.models import llama_fields, random_llama

BUNDLED = "bundled:fp16-2m"
TASKS = ("hellaswag", "arc_easy", "piqa")


def bundled(items: int) -> Callable[[], Any]:
    """Scores so many questions of three bundled tasks; everything is prepared."""
    from qbench import load_checkpoint
    from qbench.evaluation.evaluate import context_length, prepare_task
    from qbench.evaluation.tasks import EvaluationOptions, TaskSpec

    model, tokenizer = load_checkpoint(BUNDLED)
    context, options = (
        context_length(model.config),
        EvaluationOptions(data_dir=Path("bundled:world")),
    )
    tasks = [prepare_task(TaskSpec(t, limit=items), tokenizer, context, options) for t in TASKS]
    return lambda: [x for task in tasks for x in task.run(model).items["loglikelihood"]]


def random_rows(number: int, vocabulary: int) -> Callable[[], Any]:
    """Scores the last quarter of so many rows of 128 random tokens."""
    import torch

    from qbench.evaluation.packing import PackedRows, Row
    from qbench.evaluation.scoring import score

    model = random_llama(llama_fields(512, 8, 1376, 8, vocabulary))
    ids = torch.randint(3, vocabulary, (number, 128), generator=torch.Generator().manual_seed(0))
    rows = PackedRows([Row(row.tolist(), 32) for row in ids])
    return lambda: [one.loglikelihood for one in score(model, rows, batching="padded").scores]


def in_turn(work: Callable[[], Any]) -> Any:
    """The same work, one batch after the other."""
    from qbench.evaluation import reading

    rule = reading.number_at_once
    reading.number_at_once = lambda model, n_batches: 1  # type: ignore[assignment]
    try:
        return work()
    finally:
        reading.number_at_once = rule


def main() -> None:
    options = common.parser(__doc__ or "").parse_args()
    os.environ.update(common.thread_variables(options.threads))  # before torch is loaded
    report = Report("side_by_side", "Batches side by side", str(options.threads))
    columns = ["scoring", "one after the other", "side by side", "ratio", "by processor time"]
    table = Table("An evaluation's batches", [*columns, "largest difference, nats"])
    size = 8 if options.quick else 100
    works = {
        f"2 M parameters (bundled), {size} questions of three tasks": bundled(size),
        f"29 M parameters, vocabulary 4,096, {2 * size} rows": random_rows(2 * size, 4096),
        f"58 M parameters, vocabulary 32,000, {size} rows": random_rows(size, 32000),
    }
    for name, work in works.items():
        work()  # what is tried or compiled once does not count
        sides: dict[str, Callable[[], Callable[[], Any]]] = {
            "in turn": lambda w=work: lambda: in_turn(w),  # type: ignore[misc]
            "side by side": lambda w=work: w,  # type: ignore[misc]
        }
        times, values = common.take_turns(sides, options.repeats)
        one, other = times["in turn"], times["side by side"]
        pairs = zip(values["in turn"], values["side by side"], strict=True)
        difference = max(abs(float(a) - float(b)) for a, b in pairs)
        shown = [str(one), str(other), common.ratio(one, other)[1], common.cpu_ratio(one, other)]
        table.rows.append([name, *shown, f"{difference:.1e}"])
        report.measurements[name] = {side: t.seconds for side, t in times.items()}
    report.add(table)
    report.save(options)


if __name__ == "__main__":
    main()
