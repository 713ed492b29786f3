"""The plain script: every cell by itself, from the checkpoint to the numbers, in one process.

    python -m benchmarks.peers.plain_sweep JOB.json

Each cell loads the checkpoint, draws calibration windows, quantizes (auto-gptq's inner classes for
GPTQ, the published loops for the rest), and measures with lm-eval's ``simple_evaluate`` on HFLM
and a loop for the perplexity. What it spares is what anyone would spare: lm-eval reads only the
definitions asked for and not its whole catalogue. Prints a line of JSON.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environments import import_auto_gptq
from benchmarks.peers import with_auto_gptq
from benchmarks.solvers import published_ldlq_codes


def linears_of(model: Any) -> list[nn.Linear]:
    """Every linear of the decoder blocks."""
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def absmax(x: Tensor, bits: int, rows: bool) -> Tensor:
    """Round symmetrically by the largest magnitude of each row, or of the tensor."""
    limit = max(2 ** (bits - 1) - 1, 1)
    largest = x.abs().amax(-1, keepdim=True) if rows else x.abs().max()
    scale = largest.clamp(min=1e-5) / limit
    return (x / scale).round().clamp(-limit, limit) * scale


def round_activations(model: Any, bits: int, rows: bool) -> None:
    """Round what enters every linear, from now on."""
    for linear in linears_of(model):
        linear.register_forward_pre_hook(lambda _, args: (absmax(args[0], bits, rows),))


def nearest(model: Any, bits: int) -> None:
    """Round to nearest, per row, asymmetric."""
    levels = 2**bits - 1
    for linear in linears_of(model):
        weight = linear.weight.data
        low = weight.amin(1, keepdim=True).clamp(max=0)
        scale = (weight.amax(1, keepdim=True).clamp(min=0) - low) / levels
        zero = (-low / scale).round()
        linear.weight.data = scale * ((weight / scale).round() + zero).clamp(0, levels).sub(zero)


@torch.no_grad()
def smooth(model: Any, windows: Tensor, alpha: float = 0.5) -> None:
    """SmoothQuant on a Llama: activation maxima first, then norms and linears are rescaled."""
    maxima: dict[nn.Linear, Tensor] = {}

    def see(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        seen = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)
        maxima[linear] = torch.maximum(maxima[linear], seen) if linear in maxima else seen

    handles = [linear.register_forward_pre_hook(see) for linear in linears_of(model)]
    for window in windows:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        smoothed = (
            (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        )
        for norm, readers in smoothed:
            weights = torch.stack([r.weight.abs().amax(0) for r in readers]).amax(0)
            scale = maxima[readers[0]] ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
            scale = scale.clamp(min=1e-5)
            norm.weight.data /= scale
            for reader in readers:
                reader.weight.data *= scale


class PlainQuIP:
    """QuIP on one linear as published: dense rotations, then the loop over columns."""

    def __init__(self, linear: nn.Linear, bits: int, generator: torch.Generator) -> None:
        self.linear, self.bits, self.generator = linear, bits, generator
        n = linear.in_features
        self.hessian, self.seen = torch.zeros(n, n, dtype=torch.float64), 0

    def add_batch(self, inputs: Tensor, output: Tensor) -> None:
        """Add to the hessian, in double precision as released."""
        flat = inputs.reshape(-1, inputs.shape[-1]).double()
        self.hessian += flat.T @ flat
        self.seen += len(inputs)

    def rotation(self, n: int) -> Tensor:
        """A Kronecker product of two random orthogonal matrices, permuted, dense (n, n)."""
        p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
        parts = [
            torch.linalg.qr(torch.randn(size, size, generator=self.generator))[0]
            for size in (p, n // p)
        ]
        return torch.kron(*parts)[torch.randperm(n, generator=self.generator)]

    def finish(self) -> None:
        """Rescale, rotate, round, and undo."""
        weight, hessian = self.linear.weight.data, (self.hessian / self.seen).float()
        hessian = hessian / hessian.abs().max()
        mass = weight.square().sum(0).clamp(min=1e-8)
        scale = (hessian.diagonal().clamp(min=1e-8) / mass) ** 0.25
        left, right = self.rotation(weight.shape[0]), self.rotation(weight.shape[1])
        rotated = left @ (weight * scale) @ right.T
        hessian = hessian / scale / scale[:, None]
        hessian = hessian * (len(hessian) / hessian.trace())
        hessian.diagonal().add_(1e-2)
        hessian = right @ hessian @ right.T
        levels = 2**self.bits - 1
        spread = 2.4 * rotated.square().mean().sqrt()
        target = ((rotated / spread + 1) / 2 * levels).clamp(0, levels)
        codes = published_ldlq_codes(target, hessian, levels)
        rounded = (codes / levels * 2 - 1) * spread
        self.linear.weight.data = left.T @ rounded @ right / scale


def quantize(model: Any, cell: dict[str, Any], windows: Callable[[], Tensor]) -> None:
    """One cell's method at its widths."""
    method, wbits, abits = cell["method"], cell["wbits"], cell["abits"]
    if method == "gptq":
        with_auto_gptq.quantize(model, windows(), import_auto_gptq(), wbits, -1)
    elif method == "quip":
        generator = torch.Generator().manual_seed(0)
        with_auto_gptq.walk(model, windows(), lambda x: PlainQuIP(x, wbits, generator))
    elif method == "rtn":
        nearest(model, wbits)
    elif method != "none":
        if method == "smoothquant":
            smooth(model, windows())
        for linear in linears_of(model):
            linear.weight.data = absmax(linear.weight.data, wbits, method == "smoothquant")
    if abits < 16:
        round_activations(model, abits, method == "smoothquant")


def draw_windows(tokenizer: Any, job: dict[str, Any]) -> Tensor:
    """Windows at random places of the calibration text."""
    file = job["calibration"]
    is_rows = Path(file).suffix == ".jsonl"
    text = "\n\n".join(texts(file)) if is_rows else Path(file).read_text()
    ids = tokenizer(text, verbose=False)["input_ids"]
    drawn, size = random.Random(0), job["seqlen"]
    starts = [drawn.randint(0, len(ids) - size - 1) for _ in range(job["nsamples"])]
    return torch.tensor([ids[start : start + size] for start in starts])


def texts(file: str) -> list[str]:
    """The documents of a JSONL file."""
    rows = [json.loads(x) for x in Path(file).read_text().split("\n") if x.strip()]
    return [next(row[c] for c in ("text", "page") if c in row) for row in rows]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, job: dict[str, Any]) -> float:
    """GPTQ's windows over the joined text, or each document by itself."""
    documents, size = texts(job["perplexity"]), job["window"]
    if job["joined"]:
        ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
        rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    else:
        rows = [tokenizer(d, verbose=False)["input_ids"][:size] for d in documents]
    loss, tokens = 0.0, 0
    for row in rows[: job["limit"]]:
        logits = model(torch.tensor([row]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row[1:])
        loss += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
    return math.exp(loss / tokens) if loss / tokens < 700 else math.inf


def tasks(model: Any, tokenizer: Any, job: dict[str, Any], batch: int) -> dict[str, float]:
    """Accuracies by lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=job["max_length"])
    manager = TaskManager(include_path=job["definitions"], include_defaults=False)
    found: Any = lm_eval.simple_evaluate(
        model=lm, tasks=job["tasks"], task_manager=manager, limit=job["limit"]
    )
    return {task: result["acc,none"] for task, result in found["results"].items()}


def run_cell(job: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """One row of the table and where its time went."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks = [time.perf_counter()]
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"])
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32).eval()
    marks.append(time.perf_counter())
    quantize(model, cell, lambda: draw_windows(tokenizer, job))
    marks.append(time.perf_counter())
    # a scale over the whole tensor makes a result depend on its batch: one row at a time
    batch = 1 if cell["method"] == "absmax" else job["batch"]
    accuracy = tasks(model, tokenizer, job, batch)
    marks.append(time.perf_counter())
    value = perplexity(model, tokenizer, job)
    marks.append(time.perf_counter())
    names = ("load", "quantize", "tasks", "perplexity")
    seconds = {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}
    return {**cell, "seconds": seconds, "accuracy": accuracy, "value": value}


def main(file: str) -> None:
    """Run the job, cell by cell."""
    job = json.loads(Path(file).read_text())
    cells = []
    for cell in job["cells"]:
        cells.append(run_cell(job, cell))
        print(f"{cell['method']} W{cell['wbits']}A{cell['abits']}", file=sys.stderr, flush=True)
    print(json.dumps({"cells": cells}))


if __name__ == "__main__":
    main(sys.argv[1])
