"""``qbench demo``: BitNet's Table 3 in small, on the bundled twins, without any download.

A full-precision model of 2 M parameters is quantized as the paper's section 4.1 does it and stands
beside its twins, which were trained at 1 and at 1.58 bits. Perplexity is over unseen texts of the
bundled world, the nine tasks are its questions in the columns of the real data sets. It shows how
the methods fall, not how far they fall on large models, which are hardly hurt by 4 bits and have
outlier channels that these lack.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from qbench.plots.plot import plot
from qbench.progress import Reporter
from qbench.study.commands import run_sweep
from qbench.study.store import Store
from qbench.study.sweep import BaselineEntry, CalibrationEntry, Sweep
from qbench.tables.table import table

QUESTIONS = 20
"""Of every task, unless all are asked for: a few seconds a row."""


def demo_sweep(results: Path, full: bool = False) -> Sweep:
    """BitNet 2310.11453 Table 3, and QuIP at 4 bits, which its section 4.1 announces."""
    w_and_a, weights_only = ["W8A8", "W4A4", "W1A8"], ["W4A16", "W2A16"]
    return Sweep(
        checkpoints=["bundled:fp16-2m", "bundled:b1-2m", "bundled:b158-2m"],
        baselines=[
            "none",
            BaselineEntry(name="absmax", schemes=w_and_a),
            BaselineEntry(name="smoothquant", schemes=w_and_a),
            BaselineEntry(name="gptq", schemes=weights_only),
            BaselineEntry(name="quip", schemes=weights_only),
        ],
        schemes=["W16A16"],
        calibration=CalibrationEntry(source="world", nsamples=64, seqlen=128),
        tasks=["world", *WORLD_TASKS],
        data=Path("bundled:world"),
        limit=None if full else QUESTIONS,
        results=results,
    )


WORLD_TASKS = [
    "wsc273", "winogrande", "hellaswag", "storycloze_2016", "arc_easy", "arc_challenge", "boolq",
    "openbookqa", "piqa",
]  # fmt: skip


def demo(results: Path, full: bool = False) -> int:
    """Run the rows, print the table, draw the figure; returns the exit code."""
    code = run_sweep(demo_sweep(results, full), Reporter())
    store, figure = Store(results), results / "accuracy_vs_bits.png"
    print(table(store, format="terminal", width=shutil.get_terminal_size((110, 24)).columns))
    plot(store, "accuracy-vs-bits", output=figure)
    print(f"figure:   {figure}\nresults:  {results}", file=sys.stdout)
    print(
        "next:     qbench run bundled:fp16-2m --baseline gptq --scheme W3A16g64 "
        f"--calibration world --nsamples 64 --seqlen 128 --data bundled:world --tasks world,piqa "
        f"--results {results}"
    )
    return code
