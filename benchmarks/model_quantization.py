"""A whole model: GPTQ at 4 bits, groups of 128, over a Llama of 12 blocks and 110 M parameters.

Against auto-gptq's classes driven block by block, llm-compressor's ``oneshot`` and gptqmodel. Every
repeat is a process of its own that loads the same checkpoint (float32, random) and the same token
windows; only quantizing is timed, libraries are imported beforehand. One small run of each side
beforehand fills the caches of what is compiled at first use; it does not count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Report, Table, Times
from benchmarks.models import LLAMA_100M, LLAMA_SMALL, make_checkpoint, make_windows

SCHEME = "W4A16g128:grid=asym"
BARS = {"auto-gptq": 2.5, "llm-compressor": 1.0, "gptqmodel": 1.0}
PEERS = Path(__file__).parent / "peers"


def load(checkpoint: str, windows: str) -> tuple[Any, Any]:
    """The model in float32 and the windows (nsamples, seqlen)."""
    from safetensors.torch import load_file

    from qbench import load_checkpoint

    return load_checkpoint(checkpoint)[0], load_file(windows)["windows"]


def run_side(side: str, checkpoint: str, file: str) -> dict[str, Any]:
    """Quantize once, in this process, with qbench or auto-gptq's classes."""
    import torch

    from qbench import quantize_model
    from qbench.quantization.columns import compiled_walk
    from qbench.registry import load_baseline

    model, windows = load(checkpoint, file)
    with torch.no_grad():
        before = model(windows[:1]).logits
    if side == "auto-gptq":
        from benchmarks.environments import import_auto_gptq
        from benchmarks.peers import with_auto_gptq

        classes = import_auto_gptq()
        started = time.perf_counter()
        with_auto_gptq.quantize(model, windows, classes)
    else:
        baseline = load_baseline("gptq").instance
        compiled_walk("cpu")  # imports numba; what it compiled is read by the clock
        started = time.perf_counter()
        quantize_model(model, baseline, SCHEME, windows)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error = float((model(windows[:1]).logits - before).norm() / before.norm())
    return {"seconds": seconds, "peak": common.peak_memory(), "error": error}


def one_repeat(side: str, checkpoint: Path, windows: Path, threads: int) -> dict[str, Any]:
    """One side in a process of its own."""
    from benchmarks.environments import GPTQMODEL, LLM_COMPRESSOR, ensure

    peers = {"llm-compressor": LLM_COMPRESSOR, "gptqmodel": GPTQMODEL}
    arguments = [str(checkpoint), str(windows)]
    if side not in peers:
        asked = ["--child", side, *(f"--with={argument}" for argument in arguments)]
        return common.own_child("model_quantization", asked, threads)
    peer = peers[side]
    ensure(peer)
    script = PEERS / f"with_{side.replace('-', '_')}.py"
    # ninja and the like of the peer's own environment come first
    path = f"{peer.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [str(peer.python), str(script), *arguments]
    with tempfile.TemporaryDirectory() as folder:  # some leave logs where they run
        return common.child(command, threads, {**peer.variables, "PATH": path}, Path(folder))


def measure(options: Any, sides: list[str]) -> dict[str, Any]:
    """All sides in turns; a side that cannot run is named with its reason."""
    fields = LLAMA_SMALL if options.quick else LLAMA_100M
    nsamples, seqlen = (4, 128) if options.quick else (options.nsamples, options.seqlen)
    small = make_checkpoint(options.work, "llama-small", LLAMA_SMALL)
    folder = make_checkpoint(options.work, "llama-100m", fields) if not options.quick else small
    few = make_windows(options.work, LLAMA_SMALL["vocab_size"], 2, 64)
    windows = make_windows(options.work, fields["vocab_size"], nsamples, seqlen)
    found: dict[str, Any] = {side: [] for side in sides}
    absent: dict[str, str] = {}
    for side in sides:
        try:
            one_repeat(side, small, few, options.threads)
        except RuntimeError as problem:
            absent[side] = str(problem)
    turn, wanted = 0, options.repeats
    while turn < wanted:
        for side in sides if turn % 2 == 0 else sides[::-1]:
            if side in absent:
                continue
            try:
                answer = one_repeat(side, folder, windows, options.threads)
            except RuntimeError as problem:
                absent[side] = str(problem)
                continue
            found[side].append(answer)
            print(f"{side}: {answer['seconds']:.1f} s", file=sys.stderr, flush=True)
        turn += 1
        if any(f and f[0]["seconds"] > common.LONG for f in found.values()):
            wanted = min(options.repeats, 3)
    return {"found": found, "absent": absent, "nsamples": nsamples, "seqlen": seqlen}


def table(measured: dict[str, Any]) -> Table:
    """A row for each side."""
    found, absent = measured["found"], measured["absent"]
    ours = Times([answer["seconds"] for answer in found.get("qbench", [])])
    title = f"GPTQ W4 g128, {measured['nsamples']} windows of {measured['seqlen']} tokens"
    columns = ["", "quantizing", "ratio to qbench", "bar", "peak memory", "logits' relative error"]
    made = Table(title, columns)
    for side, answers in found.items():
        if not answers:
            made.rows.append([side, f"not measured: {absent.get(side, 'no run')}", "", "", "", ""])
            continue
        times = Times([answer["seconds"] for answer in answers])
        compared = side != "qbench" and bool(ours.seconds)
        middle, shown = common.ratio(times, ours) if compared else (0.0, "")
        error = answers[0]["error"]
        made.rows.append(
            [
                side,
                str(times),
                shown,
                common.against(middle, BARS[side]) if compared else "",
                f"{max(a['peak'] for a in answers) / 2**30:.2f} GiB",
                "-" if error is None else f"{error:.4f}",
            ]
        )
    made.notes = [
        "Peak memory is that of the whole process, its libraries included. The error is that of "
        "the first window's logits, to see that all did the same work; gptqmodel packs its weights "
        "and packing is in its time."
    ]
    return made


def main() -> None:
    given = common.parser(__doc__ or "")
    given.add_argument("--nsamples", type=int, default=32)
    given.add_argument("--seqlen", type=int, default=512)
    given.add_argument("--sides", default="qbench,auto-gptq,llm-compressor,gptqmodel")
    given.add_argument("--with", dest="given", action="append", help="of a child: its files")
    options = given.parse_args()
    if options.child:
        print(json.dumps(run_side(options.child, *options.given)))
        return
    title = "A whole model: GPTQ over 12 blocks"
    report = Report("model_quantization", title, str(options.threads))
    measured = measure(options, options.sides.split(","))
    report.add(table(measured))
    report.measurements = measured
    report.save(options)


if __name__ == "__main__":
    main()
