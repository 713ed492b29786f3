"""A whole table: thirteen rows through qbench's sweep against a plain script, cell by cell.

The rows are those of ``qbench demo`` on one model (full precision, Absmax and SmoothQuant at W8A8,
W4A4 and W1A8, GPTQ and QuIP at W4 and W2) and rounding to nearest at W4 and W2. Columns: perplexity
and the task sets. qbench's side is ``run_sweep`` in one process; the other is
benchmarks/peers/plain_sweep.py, one process too. Wall time counts from the start of each process to
its end.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, questions
from benchmarks.common import Report, Table, Times
from benchmarks.models import LLAMA_100M, make_checkpoint

BAR = 4.0
ROWS = (
    ("none", 16, 16),
    *(
        (method, *widths)
        for method in ("absmax", "smoothquant")
        for widths in ((8, 8), (4, 4), (1, 8))
    ),
    *((method, bits, 16) for method in ("gptq", "quip", "rtn") for bits in (4, 2)),
)
BUNDLED = "bundled:fp16-2m"
WORLD_TASKS = (*questions.TASK_SPLITS, "storycloze_2016")
TEXTS = {"calibration": "corpora/wikitext-2/wiki.valid.raw", "test": "tasks/wikitext2/test.jsonl"}


def job(options: Any, folder: Path) -> dict[str, Any]:
    """What both sides are asked, in files and numbers."""
    from qbench.models.files import bundled_checkpoint, data_folder

    bundled = options.model == BUNDLED
    data = data_folder("bundled:world") if bundled else options.data
    assert data is not None
    tasks = list(WORLD_TASKS if bundled else questions.TASK_SPLITS)
    if bundled:
        checkpoint = bundled_checkpoint(BUNDLED)
        world = data / "corpora" / "world"
        text, test = world / "train.jsonl", world / "validation.jsonl"
    else:
        checkpoint = make_checkpoint(options.work, "llama-100m", LLAMA_100M, options.data)
        text, test = (data / TEXTS[name] for name in ("calibration", "test"))
    return {
        "checkpoint": str(checkpoint),
        "name": options.model,
        "bundled": bundled,
        "data": "bundled:world" if bundled else str(data),
        "definitions": str(questions.lm_eval_definitions(data, folder / "definitions", tasks)),
        "tasks": tasks,
        "cells": [{"method": m, "wbits": w, "abits": a} for m, w, a in options.rows],
        "calibration": str(text),
        "perplexity": str(test),
        "joined": not bundled,
        "nsamples": options.nsamples,
        "seqlen": options.seqlen,
        "window": options.max_length,
        "max_length": options.max_length,
        "limit": options.limit,
        "batch": options.batch,
    }


def run_qbench(asked: dict[str, Any], results: Path) -> dict[str, Any]:
    """The sweep as ``qbench sweep`` starts it, and what its records say about time."""
    from qbench.study.imports import import_models

    import_models()
    from qbench.progress import Reporter
    from qbench.study.commands import run_sweep
    from qbench.study.sweep import BaselineEntry, CalibrationEntry, Sweep

    methods: dict[str, list[str]] = {}
    for cell in asked["cells"]:
        scheme = f"W{cell['wbits']}A{cell['abits']}"
        methods.setdefault(cell["method"], []).append(scheme)
    source = "world" if asked["bundled"] else asked["calibration"]
    sweep = Sweep(
        checkpoints=[asked["name"] if asked["bundled"] else asked["checkpoint"]],
        baselines=[
            name if name == "none" else BaselineEntry(name=name, schemes=schemes)
            for name, schemes in methods.items()
        ],
        schemes=["W16A16"],
        calibration=CalibrationEntry(
            source=source, nsamples=asked["nsamples"], seqlen=asked["seqlen"]
        ),
        tasks=["world" if asked["bundled"] else "wikitext2", *asked["tasks"]],
        data=Path(asked["data"]),
        limit=asked["limit"],
        max_length=asked["max_length"],
        results=results,
    )
    started = time.perf_counter()
    code = run_sweep(sweep, Reporter())
    return {"code": code, "seconds": time.perf_counter() - started, "cells": read_cells(results)}


def read_cells(results: Path) -> list[dict[str, Any]]:
    """Scheme, seconds and numbers of every cell on disk."""
    cells = []
    for path in sorted(results.rglob("quantization.json")):
        record = json.loads(path.read_text())
        measured = [json.loads(p.read_text()) for p in path.parent.glob("*.json") if p != path]
        tasks = [m for m in measured if "perplexity" not in m["metrics"]]
        texts = [m for m in measured if "perplexity" in m["metrics"]]
        value = texts[0]["metrics"]["perplexity"]["value"] if texts else None
        cells.append(
            {
                "method": record["key"]["baseline"]["name"],
                "scheme": record["key"]["scheme"].partition(":")[0],
                "seconds": {
                    "quantize": record["wall_seconds"] or 0.0,
                    "tasks": sum(m["wall_seconds"] or 0.0 for m in tasks),
                    "perplexity": sum(m["wall_seconds"] or 0.0 for m in texts),
                },
                "accuracy": {
                    m["key"]["task"]: m["metrics"]["acc"]["value"]
                    for m in tasks
                    if "acc" in m["metrics"]
                },
                "value": float("inf") if value is None else value,
            }
        )
    return cells


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """Both sides in turns; the last answers with all wall times."""
    asked = job(options, folder)
    file = folder / "job.json"
    file.write_text(json.dumps(asked))
    times: dict[str, Times] = {"qbench": Times(), "plain": Times()}
    answers: dict[str, Any] = {}
    turn, wanted = 0, options.repeats
    while turn < wanted:
        for side in list(times)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            if side == "qbench":
                results = folder / f"results-{turn}"
                arguments = ["--child", str(file), "--output", str(results)]
                answers[side] = common.own_child("sweep", arguments, options.threads)
            else:
                module = "peers.plain_sweep"
                answers[side] = common.own_child(module, [str(file)], options.threads)
            times[side].seconds.append(time.perf_counter() - started)
            print(f"{side}: {times[side].seconds[-1]:.0f} s", file=sys.stderr, flush=True)
        turn += 1
        if times["plain"].seconds[0] > common.LONG:
            wanted = min(options.repeats, 3)
    return {"seconds": {side: t.seconds for side, t in times.items()}, "answers": answers}


def wall_table(measured: dict[str, Any], title: str) -> Table:
    """Wall time, and where it goes."""
    times = {side: Times(seconds) for side, seconds in measured["seconds"].items()}
    middle, shown = common.ratio(times["plain"], times["qbench"])
    columns = ["", "wall", "ratio", "bar", "load", "quantize", "tasks", "perplexity", "the rest"]
    made = Table(title, columns)
    for side, name in (("plain", "plain script"), ("qbench", "qbench sweep")):
        cells = measured["answers"][side]["cells"]
        parts = {
            part: sum(cell["seconds"].get(part, 0.0) for cell in cells)
            for part in ("load", "quantize", "tasks", "perplexity")
        }
        rest = times[side].seconds[-1] - sum(parts.values())
        ratio = [shown, common.against(middle, BAR)] if side == "plain" else ["", ""]
        spent = [f"{value:.1f} s" for value in (*parts.values(), rest)]
        made.rows.append([name, str(times[side]), *ratio, *spent])
    made.notes = [
        "Parts are of the last repeat. qbench loads the checkpoint and builds the questions once, "
        "which is in the rest, as are imports on both sides. HFLM runs in batches of 8 "
        "(``--batch``), and of 1 on Absmax rows, whose scales over the whole input would depend "
        "on the batch."
    ]
    return made


def number_table(measured: dict[str, Any]) -> Table:
    """Both sides' numbers, row by row: the same cells, other rotations and calibration draws."""
    plain, ours = (measured["answers"][side]["cells"] for side in ("plain", "qbench"))
    found = {(c["method"], c["scheme"]): c for c in ours}
    columns = ["row", "plain: quantize", "tasks", "perplexity", "plain: value", "qbench: value"]
    made = Table("Row by row", [*columns, "mean accuracy, plain", "qbench"])
    for cell in plain:
        own = found[cell["method"], f"W{cell['wbits']}A{cell['abits']}"]
        seconds = [f"{cell['seconds'][p]:.1f} s" for p in ("quantize", "tasks", "perplexity")]
        values = [f"{c['value']:.4g}" for c in (cell, own)]
        means = [f"{sum(a.values()) / len(a):.4f}" for a in (cell["accuracy"], own["accuracy"])]
        name = f"{cell['method']} W{cell['wbits']}A{cell['abits']}"
        made.rows.append([name, *seconds, *values, *means])
    made.notes = ["value: perplexity of the text."]
    return made


def main() -> None:
    given = common.parser(__doc__ or "", repeats=3)
    given.add_argument("--model", help=f"random (100 M parameters; needs data) or {BUNDLED}")
    given.add_argument("--limit", type=int, default=20, help="questions of each task, windows")
    given.add_argument("--nsamples", type=int, default=32)
    given.add_argument("--seqlen", type=int, default=512)
    given.add_argument("--max-length", type=int, default=512)
    given.add_argument("--batch", type=int, default=8, help="of HFLM")
    options = given.parse_args()
    if options.child:
        print(json.dumps(run_qbench(json.loads(Path(options.child).read_text()), options.output)))
        return
    options.model = options.model or ("random" if options.data and not options.quick else BUNDLED)
    options.rows = ROWS
    if options.quick:
        options.limit, options.nsamples, options.seqlen, options.repeats = 4, 8, 128, 1
    if options.model == BUNDLED:
        options.seqlen, options.max_length = min(options.seqlen, 128), min(options.max_length, 256)
    wanted = [*TEXTS.values(), *questions.task_files(questions.TASK_SPLITS)]
    absent = common.missing(options, wanted, "sweep on a random Llama")
    if options.model != BUNDLED and absent:
        sys.exit(f"{absent}; or pass --model {BUNDLED}")
    report = Report("sweep", "A sweep of thirteen rows", str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    kind = "2 M parameters (bundled)" if options.model == BUNDLED else "110 M random parameters"
    report.add(wall_table(measured, f"Thirteen rows on {kind}, limit {options.limit}"))
    report.add(number_table(measured))
    report.measurements = measured
    report.save(options)


if __name__ == "__main__":
    main()
