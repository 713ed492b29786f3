"""How cost grows: with parameters, calibration tokens, cells and questions, each doubled twice.

GPTQ at 4 bits on random Llamas, whole sweeps on the bundled model, scoring on the bundled
questions. The exponent is the slope of a line through log(cost) over log(size): 1 is proportional,
less has a fixed part that size does not pay for, more grows faster than size.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Report, Table, Times
from benchmarks.models import llama_fields, random_llama

BUNDLED = "bundled:fp16-2m"
VOCABULARY = 2048


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log(cost) over log(size)."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread


def block_parameters(model: Any) -> int:
    """Parameters of the decoder blocks' matrices."""
    return sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)


def quantizing(width: int, blocks: int, nsamples: int) -> Callable[[], Callable[[], Any]]:
    """GPTQ over a fresh random model of this size."""
    import torch

    from qbench import quantize_model

    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, VOCABULARY, (nsamples, 128), generator=generator)

    def prepare() -> Callable[[], Any]:
        model = random_llama(llama_fields(width, blocks, 3 * width, 4, VOCABULARY))
        return lambda: quantize_model(model, "gptq", "W4A16", windows)

    return prepare


def sweeping(cells: int) -> Callable[[], Callable[[], Any]]:
    """A sweep of GPTQ at so many widths over the bundled model, with a perplexity and a task."""
    from qbench.progress import Reporter
    from qbench.study.commands import run_sweep
    from qbench.study.sweep import CalibrationEntry, Sweep

    def prepare() -> Callable[[], Any]:
        folder = tempfile.TemporaryDirectory()
        sweep = Sweep(
            checkpoints=[BUNDLED],
            baselines=["gptq"],
            schemes=[f"W{bits}A16" for bits in (8, 4, 3, 2)[:cells]],
            tasks=["world", "arc_easy"],
            calibration=CalibrationEntry(source="world", nsamples=16, seqlen=128),
            data=Path("bundled:world"),
            limit=20,
            results=Path(folder.name),
        )

        def work() -> Any:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                run_sweep(sweep, Reporter())
            return folder  # kept until the clock has stopped

        return work

    return prepare


def scoring(items: int) -> Callable[[], Callable[[], Any]]:
    """Scoring so many bundled questions of two tasks, prepared beforehand."""
    from qbench import load_checkpoint
    from qbench.evaluation.evaluate import context_length, prepare_task
    from qbench.evaluation.tasks import EvaluationOptions, TaskSpec

    model, tokenizer = load_checkpoint(BUNDLED)
    options = EvaluationOptions(data_dir=Path("bundled:world"))
    context = context_length(model.config)
    specs = [TaskSpec(name, limit=items) for name in ("arc_easy", "hellaswag")]
    prepared = [prepare_task(spec, tokenizer, context, options) for spec in specs]
    return lambda: lambda: [task.run(model) for task in prepared]


def series(quick: bool) -> dict[str, tuple[list[float], list[Any]]]:
    """What is doubled: sizes, and the work of each."""
    base = 64 if quick else 256
    # widths that double the parameters of a block, in steps that four heads divide
    widths = [base, round(base * 2**0.5 / 32) * 32, base * 2]
    deep, samples = (1, 2, 4), (8, 16, 32) if quick else (16, 32, 64)
    asked = (10, 20, 40) if quick else (50, 100, 200)
    sizes = [block_parameters(random_llama(llama_fields(w, 1, 3 * w, 4, 64))) for w in widths]
    return {
        "parameters, by blocks": (list(deep), [quantizing(base, n, samples[0]) for n in deep]),
        "parameters, by width": (
            [float(n) for n in sizes],
            [quantizing(width, 2, samples[0]) for width in widths],
        ),
        "calibration tokens": (
            [float(n * 128) for n in samples],
            [quantizing(base, 2, n) for n in samples],
        ),
        "cells of a sweep": ([1, 2, 4], [sweeping(n) for n in (1, 2, 4)]),
        "questions of two tasks": ([float(n) for n in asked], [scoring(n) for n in asked]),
    }


def row(name: str, sizes: list[float], times: list[Times]) -> list[str]:
    """Costs by size, and the exponent of the medians."""
    cells = [f"{size:,.0f}: {time}" for size, time in zip(sizes, times, strict=True)]
    return [name, *cells, f"{exponent(sizes, [t.median for t in times]):.2f}"]


def main() -> None:
    given = common.parser(__doc__ or "")
    given.add_argument("--only", help="a word of the rows wanted")
    options = given.parse_args()
    os.environ.update(common.thread_variables(options.threads))  # before torch is imported
    report = Report("growth", "How cost grows", str(options.threads))
    table = Table("Cost by size", ["with", "one", "two", "four", "exponent"])
    for name, (sizes, works) in series(options.quick).items():
        if options.only and options.only not in name:
            continue
        works[0]()()  # what is compiled or read once does not count
        sides = {str(size): work for size, work in zip(sizes, works, strict=True)}
        times, _ = common.take_turns(sides, options.repeats)
        table.rows.append(row(name, sizes, list(times.values())))
        report.measurements[name] = {size: t.seconds for size, t in times.items()}
    table.notes = [
        "Widths go in steps of 32, so that parameters double nearly. A hessian costs tokens times "
        "width squared and its factorization width cubed: exponents 1 and 1.5 in parameters."
    ]
    report.add(table)
    report.save(options)


if __name__ == "__main__":
    main()
