"""What a sweep would do: its cells, what is stored, what cannot be and why, memory and disk.

Estimates come from tensor shapes in file headers; no weight is read. Memory is what the process
holds at its peak: the model twice (pristine and the copy being quantized), the calibration
activations of one block boundary (in and out), the largest hessian with its factors, and one
layer's working copies. Disk is what ``--save`` would write per cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qbench.study.cells import CellPlan
from qbench.study.runner import Workbench

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LIBRARIES = 0.7 * 2**30
"""What torch, transformers and lm-eval take before anything is loaded."""


def plan_lines(plans: Sequence[tuple[Workbench, CellPlan]]) -> Iterator[str]:
    """The plan as text, a line per cell and a summary."""
    counts = {"to run": 0, "stored": 0, "failed before": 0, "not applicable": 0}
    measurements = 0
    checkpoint = None
    for bench, plan in plans:
        if bench.checkpoint is not checkpoint:
            checkpoint = bench.checkpoint
            yield from _checkpoint_lines(bench)
        state, detail = _state(plan)
        counts[state] += 1
        measurements += len(plan.pending) if state == "to run" else 0
        yield f"  {state:15} {plan.cell}{detail}"
    parts = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    yield f"{len(plans)} cells: {parts}; {measurements} measurements to make"


def _state(plan: CellPlan) -> tuple[str, str]:
    if plan.not_applicable:
        return "not applicable", f": {plan.not_applicable}"
    if plan.failed is not None:
        return "failed before", f": {plan.failed} (repeat with --retry-failed)"
    if plan.is_done:
        return "stored", ""
    return "to run", f": {', '.join(str(spec) for spec in plan.pending) or 'quantization'}"


def _checkpoint_lines(bench: Workbench) -> Iterator[str]:
    checkpoint = bench.checkpoint
    mark = f"fingerprint {checkpoint.fingerprint[:12]}"
    if checkpoint.pickled:
        yield f"{checkpoint.name}: {mark}"
        yield "  memory and disk unknown: sizes are read from safetensors headers alone"
        return
    yield f"{checkpoint.name}: {checkpoint.parameters / 1e6:.2f} M parameters, {mark}"
    yield from (f"    {line}" for line in checkpoint.load_report)
    memory, disk = estimate(bench)
    yield f"  memory about {_size(memory)} at the peak; --save writes about {_size(disk)} per cell"


def estimate(bench: Workbench) -> tuple[float, float]:
    """Peak memory of a cell and size of its saved model, in bytes."""
    width = _BYTES[bench.settings.dtype]
    parameters = bench.checkpoint.parameters
    stored = bench.checkpoint.tensors.values()
    matrices = [tensor.shape for tensor in stored if len(tensor.shape) == 2]
    largest_input = max((min(shape[1], 65536) for shape in matrices), default=0)
    largest_matrix = max((shape[0] * shape[1] for shape in matrices), default=0)
    hidden = bench.checkpoint.config.get("hidden_size") or bench.checkpoint.config.get("n_embd", 0)
    calibration = bench.settings.calibration
    seqlen = min(calibration.seqlen, bench.context or calibration.seqlen)
    activations = 2 * calibration.nsamples * seqlen * int(hidden) * width
    working = 4 * (3 * largest_input**2 + 5 * largest_matrix)
    return _LIBRARIES + 2 * parameters * width + activations + working, float(parameters * width)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
