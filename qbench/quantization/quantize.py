"""The loop over decoder blocks, the same for every method.

    for each block, first to last:
        collect transform statistics -> baseline.transform(block)
        for each stage of linears: collect weight statistics -> baseline.quantize_weight(...)
        replay the block: its outputs are the next block's inputs
        attach the activation quantizers

Weight statistics come from inputs that passed through the quantized blocks below, with activation
quantizers off, as in the official GPTQ and QuIP code; a baseline may ask for the full-precision
stream instead (SmoothQuant). Embeddings, the output head and norms are left alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.baseline import Baseline, TransformContext, resolve_scheme, why_not
from qbench.errors import QBenchError, RunFailed
from qbench.grid import QuantizedWeight, check_group_size, round_to_nearest, stored_bits
from qbench.models.bitnet.trained import check_not_trained
from qbench.models.blocks import Block, find_blocks, trace_block
from qbench.models.linear import Linear, attach
from qbench.quantization.activations import Range, check_activations, quantize_activations
from qbench.quantization.calibration import capture, observing
from qbench.quantization.factorize import CannotQuantize
from qbench.quantization.observers import Observer, Statistics
from qbench.record import LayerReport
from qbench.scheme import Scheme

_MARK = "_qbench_scheme"
"""Attribute of a model that quantize_model has worked on."""
BATCH_TOKENS = 2048
"""Calibration windows shorter than this run through a block together."""
Progress = Callable[[int, int, str], None]
"""(blocks done, blocks in all, what is next)"""


@dataclass
class Quantization:
    """What happened to a model."""

    scheme: Scheme
    """Resolved."""
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Matrices inside decoder blocks that stayed in full precision: name -> why."""
    notes: list[str] = field(default_factory=list)

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight over all matrices of the decoder blocks."""
        total = sum(r.shape[0] * r.shape[1] for r in self.layers)
        return sum(r.stored_bits for r in self.layers) / total if total else 16.0


def quantize_model(
    model: nn.Module,
    baseline: Baseline | str,
    scheme: Scheme | str,
    calibration: Tensor | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quantization:
    """Quantize a causal language model in place.

    Args:
        model: any transformers causal language model, on any device, in eval mode.
        baseline: an instance, a registered name, or ``file.py:Class``.
        scheme: or its text form; ``auto`` fields are resolved here.
        calibration: token windows (nsamples, seqlen); needed if the method or static activation
            scales read data.
        seed: of the method's randomness; every linear gets a generator of its own.
        progress: told about every block.

    Raises:
        QBenchError: an impossible request, before anything is changed.
        RunFailed: a weight that came out non-finite.
    """
    if isinstance(baseline, str):
        from qbench.registry import load_baseline

        baseline = load_baseline(baseline).instance
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    baseline.check()
    scheme = resolve_scheme(scheme, baseline)
    result = Quantization(scheme)
    if scheme.is_identity:
        return result
    reason = why_not(baseline, scheme)
    if reason:
        raise QBenchError(f"{type(baseline).__name__} cannot do {scheme.label}: {reason}")
    if needs_calibration(baseline, scheme) and calibration is None:
        raise QBenchError(
            f"{type(baseline).__name__} at {scheme} reads calibration data; "
            "pass token windows (nsamples, seqlen)"
        )
    check_arguments(model, calibration)
    setattr(model, _MARK, str(scheme))
    with torch.no_grad():
        _Loop(model, baseline, scheme, seed, result).run(calibration, progress)
    return result


def quantized_scheme(model: nn.Module) -> Scheme | None:
    """The resolved scheme a model in memory was quantized at, None for an untouched one."""
    mark = getattr(model, _MARK, None)
    return Scheme.parse(mark) if isinstance(mark, str) else None


def check_arguments(model: nn.Module, calibration: Tensor | None) -> None:
    """Refuse a model in training, trained at low width or quantized, and misshapen calibration.

    Raises:
        QBenchError: naming what was given.
    """
    check_not_trained(model)
    if model.training:
        raise QBenchError("the model is in training mode, where dropout is random; call .eval()")
    if hasattr(model, _MARK):
        raise QBenchError(
            f"the model was quantized before, at {getattr(model, _MARK)}; start from a fresh copy"
        )
    if calibration is not None and (calibration.ndim != 2 or not calibration.numel()):
        raise QBenchError(
            f"calibration of shape {tuple(calibration.shape)} cannot be used; pass token windows "
            "(nsamples, seqlen)"
        )


def needs_calibration(baseline: Baseline, scheme: Scheme) -> bool:
    """Whether data changes the result of this baseline at this resolved scheme."""
    if scheme.is_identity:
        return False
    weights = scheme.quantizes_weights and bool(baseline.weight_statistics)
    rewrites = type(baseline).transform is not Baseline.transform
    return weights or rewrites or bool(baseline.transform_statistics) or scheme.needs_static_scales


class _Loop:
    """One walk through a model; holds what every step needs."""

    def __init__(
        self, model: nn.Module, baseline: Baseline, scheme: Scheme, seed: int, result: Quantization
    ) -> None:
        self.model = model
        self.baseline = baseline
        self.scheme = scheme
        self.seed = seed
        self.result = result

    def run(self, calibration: Tensor | None, progress: Progress | None) -> None:
        use_eager_experts(self.model)
        windows = calibration if calibration is not None else trace_windows(self.model)
        self.baseline.prepare(self.model, self.generator("prepare"))
        captured = capture(self.model, windows, max(1, BATCH_TOKENS // windows.shape[1]))
        hidden = captured.hidden
        blocks = find_blocks(self.model)
        met: set[str] = set()
        for number, (name, module) in enumerate(blocks):
            if progress:
                progress(number, len(blocks), name)
            block = trace_block(name, module, captured.runner(name, module), hidden[0])
            check_block(block, self.scheme)
            self.result.skipped |= {f"{name}.{n}": why for n, why in block.skipped.items()}
            hidden = self.quantize_block(block, hidden, replay=calibration is not None)
            met |= {f"{name}.{linear}" for linear in block.linears}
        for pattern, _ in self.scheme.overrides:
            if not fnmatch.filter(met, pattern):
                self.result.notes.append(f"override {pattern!r} matches no linear")
        if progress:
            progress(len(blocks), len(blocks), "done")

    def generator(self, name: str) -> torch.Generator:
        """A generator that depends on the run's seed and a name, not on what ran before."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def quantize_block(self, block: Block, hidden: list[Tensor], replay: bool) -> list[Tensor]:
        """Quantize one block in place; returns what enters the next one."""
        outputs: list[Tensor] | None = None
        notes: dict[str, dict[str, Any]] = {}
        full_precision = self.baseline.calibrate_on == "full_precision"
        if type(self.baseline).transform is not Baseline.transform:
            wanted = self.baseline.transform_statistics
            stats, outputs = collect(block, list(block.linears), wanted, hidden)
            generator = self.generator(f"{block.name}.transform")
            context = TransformContext(block, self.scheme, stats, hidden, outputs, generator)
            self.baseline.transform(block, context)
            notes = context.report
            self.result.notes += [f"{block.name}.{norm}: {why}" for norm, why in block.unfoldable]
        elif full_precision and replay:
            outputs = [block.run(h, i) for i, h in enumerate(hidden)]

        ranges: dict[str, Tensor] = {}
        first = len(self.result.layers)
        for stage in checked_stages(self.baseline, block):
            self.quantize_stage(block, stage, hidden, ranges)
        for layer in self.result.layers[first:]:
            layer.extra |= notes.get(layer.name.removeprefix(f"{block.name}."), {})
        if not full_precision and replay:
            outputs = [block.run(h, i) for i, h in enumerate(hidden)]
        self.result.notes += quantize_activations(block, self.scheme, ranges)
        # without data only the trace reads these, and any hidden states will do
        return outputs if outputs is not None else hidden

    def quantize_stage(
        self, block: Block, names: list[str], hidden: list[Tensor], ranges: dict[str, Tensor]
    ) -> None:
        wanted: tuple[str | type[Observer], ...] = ()
        if self.scheme.quantizes_weights:
            wanted += self.baseline.weight_statistics
        if self.scheme.needs_static_scales:
            wanted += (Range,)
        stats = {name: Statistics() for name in names}
        if wanted:
            stats, _ = collect(block, names, wanted, hidden)
        for name in names:
            if "range" in stats[name] and stats[name].n_tokens:
                ranges[name] = stats[name]["range"]
            if self.scheme.quantizes_weights:
                self.quantize_linear(block, block.linears[name], stats[name])

    def quantize_linear(self, block: Block, linear: Linear, stats: Statistics) -> None:
        """Quantize one matrix in place and report it; one kept at 16 bits is reported too."""
        started = time.perf_counter()
        full_name = f"{block.name}.{linear.name}"
        scheme = self.scheme.for_linear(full_name)
        weight = linear.weight.float()
        if scheme.wbits >= 16:
            self.result.layers.append(
                LayerReport(
                    name=full_name,
                    shape=linear.shape,
                    scheme=str(scheme),
                    relative_error=0.0,
                    stored_bits=16.0 * weight.numel(),
                )
            )
            return
        quantized, fallback = self.round_weight(full_name, weight, scheme, stats)
        if not torch.isfinite(quantized.weight).all():
            raise RunFailed(
                f"{type(self.baseline).__name__} gave non-finite weights in {full_name} at {scheme}"
            )
        report = dict(quantized.report or {})
        damping = report.pop("damping", None)
        rotated = quantized.input_transform is not None
        if rotated and scheme.needs_static_scales:
            raise QBenchError(
                f"{type(self.baseline).__name__} transforms inputs at run time, where scales fixed "
                "before it mean nothing; drop static from the scheme"
            )
        report |= {"input_transform": True} if rotated else {}
        delta = None if rotated else weight - quantized.weight.float()
        self.result.layers.append(
            LayerReport(
                name=full_name,
                shape=linear.shape,
                scheme=str(scheme),
                relative_error=None if delta is None else _ratio(_square(delta), _square(weight)),
                proxy_loss=None if delta is None else proxy_loss(delta, weight, stats),
                stored_bits=stored_bits(quantized, scheme),
                damping=damping,  # type: ignore[arg-type]
                fallback=fallback,
                seconds=round(time.perf_counter() - started, 4),
                extra=report,
            )
        )
        linear.set_weight_(quantized.weight)
        if quantized.input_transform is not None:
            attach([linear], _InputTransform(quantized.input_transform))

    def round_weight(
        self, name: str, weight: Tensor, scheme: Scheme, stats: Statistics
    ) -> tuple[QuantizedWeight, str | None]:
        """The method's own rounding, or rounding to nearest and the reason for it."""
        try:
            if self.baseline.weight_statistics and not stats.n_tokens:
                raise CannotQuantize("no calibration token reached it")
            generator = self.generator(name)
            quantized = self.baseline.quantize_weight(weight.clone(), scheme, stats, generator)
        except CannotQuantize as reason:
            return round_to_nearest(weight, scheme), str(reason)
        if isinstance(quantized, Tensor):
            quantized = QuantizedWeight(quantized)
        return quantized, None


def checked_stages(baseline: Baseline, block: Block) -> list[list[str]]:
    """The baseline's stages, with every linear in exactly one of them."""
    stages = baseline.stages(block)
    named = [name for stage in stages for name in stage]
    if sorted(named) != sorted(block.linears):
        odd = sorted(set(named) ^ set(block.linears)) or [n for n in named if named.count(n) > 1]
        raise QBenchError(
            f"{type(baseline).__name__}.stages() must name every linear of a block once; "
            f"wrong for {', '.join(odd)} in {block.name}"
        )
    return stages


def check_block(block: Block, scheme: Scheme) -> None:
    """Refuse what a block cannot do before it is changed.

    Raises:
        QBenchError: a group size that does not divide a row, or KV bits it has no place for.
    """
    check_activations(block, scheme)
    for name, linear in block.linears.items():
        own = scheme.for_linear(f"{block.name}.{name}")
        if own.wbits < 16:
            try:
                check_group_size(linear.shape[1], own.group_size)
            except QBenchError as error:
                raise QBenchError(f"{block.name}.{name}: {error}") from None


@dataclass
class _InputTransform:
    """Hook that hands a linear's input to the method's own transform first."""

    transform: Callable[[Tensor], Tensor]

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return self.transform(x)


def collect(
    block: Block,
    names: list[str],
    wanted: tuple[str | type[Observer], ...],
    hidden: list[Tensor],
) -> tuple[dict[str, Statistics], list[Tensor]]:
    """Run the block over all batches and observe what enters the named linears.

    Returns:
        Statistics per name, one object for linears that read the same tensor; and the outputs.
    """
    chosen = set(names)
    stats: dict[str, Statistics] = {}
    leaders: dict[str, Statistics] = {}
    for group in block.input_groups:
        members = [name for name in group if name in chosen]
        if members:
            shared = Statistics(wanted)
            leaders[members[0]] = shared
            stats |= dict.fromkeys(members, shared)
    outputs: list[Tensor] = []

    def see(linear: Linear, x: Tensor) -> None:
        leaders[linear.name].update(x, n_sequences=len(hidden[len(outputs)]))

    with observing([block.linears[name] for name in leaders], see):
        for index, entering in enumerate(hidden):
            outputs.append(block.run(entering, index))
    return stats, outputs


def proxy_loss(delta: Tensor, weight: Tensor, stats: Statistics) -> float | None:
    """tr(ΔHΔᵀ) / tr(WHWᵀ) in the original basis, undamped; None without a hessian."""
    if "hessian" not in stats or stats.hessian is None:
        return None
    hessian = stats.hessian.to(weight.device)
    return _ratio(((delta @ hessian) * delta).sum(), ((weight @ hessian) * weight).sum())


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None


def trace_windows(model: nn.Module) -> Tensor:
    """A few arbitrary tokens (1, 16), to trace blocks when no method needs data."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = embeddings.num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, 16), generator=generator)


def use_eager_experts(model: nn.Module) -> None:
    """Switch fused experts, if any, to one product per expert, where each input can be seen."""
    fused = any(p.ndim == 3 for _, block in find_blocks(model) for p in block.parameters())
    switch: Any = getattr(model, "set_experts_implementation", None)
    if fused and switch is not None:
        switch("eager")
