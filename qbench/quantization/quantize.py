"""The loop over decoder blocks, the same for every method.

    for each block, first to last:
        collect transform statistics -> baseline.transform(block)
        for each stage of linears: collect weight statistics -> baseline.quantize_weight(...)
        replay the block: its outputs are the next block's inputs
        attach the activation quantizers

Weight statistics come from inputs that passed through the quantized blocks below, with activation
quantizers off, as in the official GPTQ and QuIP code; a baseline may ask for the full-precision
stream instead (SmoothQuant). Embeddings, the output head and norms are left alone. A streamed
model has one block in memory at a time, and each is on disk before the next begins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbench.baseline import Baseline, TransformContext, resolve_scheme, why_not
from qbench.errors import QBenchError
from qbench.grid import check_group_size
from qbench.models.blocks import Block, find_blocks
from qbench.models.products import fast_products
from qbench.models.streaming import Stream, resident, stream_of
from qbench.quantization.activations import (
    Range,
    check_activations,
    quantize_activations,
    switch_of,
)
from qbench.quantization.observers import Observer, Statistics
from qbench.quantization.outcome import Quantization, check_arguments, mark_
from qbench.quantization.passes import Calibration, Lazy, collect, replay, use_eager_experts_
from qbench.quantization.rounding import Rounder
from qbench.record import LayerReport
from qbench.scheme import Scheme

Progress = Callable[[int, int, str], None]
"""(blocks done, blocks in all, what is next)"""


def quantize_model(
    model: nn.Module,
    baseline: Baseline | str,
    scheme: Scheme | str,
    calibration: Tensor | Calibration | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quantization:
    """Quantize a causal language model in place.

    Args:
        model: any transformers causal language model, on any device, in eval mode; or a streamed
            one, whose quantized blocks go to its work folder.
        baseline: an instance, a registered name, or ``file.py:Class``.
        scheme: or its text form; ``auto`` fields are resolved here.
        calibration: token windows (nsamples, seqlen); needed if the method or static activation
            scales read data. A :class:`~qbench.quantization.passes.Calibration` of a pristine copy
            of the model shares its passes with other calls.
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
    _check_request(model, baseline, scheme, calibration)
    if not needs_calibration(baseline, scheme):
        calibration = None
    mark_(model, result)
    with torch.no_grad(), fast_products(model):
        use_eager_experts_(model)
        baseline.prepare(model, Rounder(baseline, scheme, seed).generator("prepare"))
        shared = _passes(model, baseline, calibration)
        _Loop(model, baseline, seed, shared, result, reads_data=calibration is not None).run(
            progress
        )
    return result


def _check_request(
    model: nn.Module,
    baseline: Baseline,
    scheme: Scheme,
    calibration: Tensor | Calibration | None,
) -> None:
    reason = why_not(baseline, scheme)
    if reason:
        raise QBenchError(f"{type(baseline).__name__} cannot do {scheme.label}: {reason}")
    if needs_calibration(baseline, scheme) and calibration is None:
        raise QBenchError(
            f"{type(baseline).__name__} at {scheme} reads calibration data; "
            "pass token windows (nsamples, seqlen)"
        )
    check_arguments(
        model, calibration.windows if isinstance(calibration, Calibration) else calibration
    )
    if isinstance(calibration, Calibration) and calibration.keep and calibration.model is model:
        raise QBenchError(
            "this calibration is kept for other cells, so its model has to stay as it is; quantize "
            "a copy of the model"
        )
    if _prepares(baseline) and stream_of(model) is not None:
        raise QBenchError(
            f"{type(baseline).__name__} rewrites the whole model before its blocks, which a "
            "streamed model does not hold; --no-stream loads it whole"
        )


def _prepares(baseline: Baseline) -> bool:
    return type(baseline).prepare is not Baseline.prepare


def _passes(
    model: nn.Module, baseline: Baseline, calibration: Tensor | Calibration | None
) -> Calibration:
    """The calibration passes of this call, shared with others where that was asked for."""
    if calibration is None:
        return Calibration(model, trace_windows(model), keep=False)
    if isinstance(calibration, Tensor):
        return Calibration(model, calibration, keep=False)
    if _prepares(baseline):  # what was captured is another model's
        return Calibration(model, calibration.windows, keep=False)
    return calibration


def needs_calibration(baseline: Baseline, scheme: Scheme) -> bool:
    """Whether data changes the result of this baseline at this resolved scheme."""
    if scheme.is_identity:
        return False
    weights = scheme.quantizes_weights and bool(baseline.weight_statistics)
    transforms = rewrites(baseline)
    return (
        weights or transforms or bool(baseline.transform_statistics) or scheme.needs_static_scales
    )


def rewrites(baseline: Baseline) -> bool:
    """Whether a baseline has a transform of its own."""
    return type(baseline).transform is not Baseline.transform


class _Loop:
    """One walk through a model; holds what every step needs."""

    def __init__(
        self,
        model: nn.Module,
        baseline: Baseline,
        seed: int,
        calibration: Calibration,
        result: Quantization,
        reads_data: bool,
    ) -> None:
        self.model, self.baseline, self.calibration = model, baseline, calibration
        self.scheme, self.result, self.reads_data = result.scheme, result, reads_data
        self.rounder = Rounder(baseline, result.scheme, seed)
        self.full_precision = baseline.calibrate_on == "full_precision"
        self.hidden: Sequence[Tensor] = []
        """What enters the block at hand, per batch."""

    def run(self, progress: Progress | None) -> None:
        blocks, stream = find_blocks(self.model), stream_of(self.model)
        met: set[str] = set()
        for number, (name, module) in enumerate(blocks):
            if progress:
                progress(number, len(blocks), name)
            if self.full_precision:
                self.hidden = Lazy(partial(self.calibration.entering, number))
            elif number == 0:
                self.hidden = self.calibration.captured.hidden
            known = stream is not None and self._finished(stream, name)
            with resident(self.model, name):
                block = self.calibration.trace(number, name, module, rewrites(self.baseline))
                block.is_last = number == len(blocks) - 1
                check_block(block, self.scheme)
                self.result.skipped |= {f"{name}.{n}": why for n, why in block.skipped.items()}
                if known and stream is not None:
                    self._restore(number, block, stream)
                else:
                    self._quantize(number, block, stream)
            met |= {f"{name}.{linear}" for linear in block.linears}
        for pattern, _ in self.scheme.overrides:
            if not fnmatch.filter(met, pattern):
                self.result.notes.append(f"override {pattern!r} matches no linear")
        for block in self.result.blocks:
            block.release()
        if progress:
            progress(len(blocks), len(blocks), "done")

    def _quantize(self, number: int, block: Block, stream: Stream | None) -> None:
        """Quantize one block in place; afterwards ``hidden`` is what enters the next one."""
        reports, notes = self.result.layers, self.result.notes
        first_report, first_note = len(reports), len(notes)
        found = self._transform(number, block)
        ranges: dict[str, Tensor] = {}
        for stage in checked_stages(self.baseline, block):
            self._quantize_stage(number, block, stage, ranges)
        for layer in reports[first_report:]:
            layer.extra |= found.get(layer.name.removeprefix(f"{block.name}."), {})
        if stream is not None:
            stream.keep(
                block.name,
                {
                    "layers": [layer.model_dump(mode="json") for layer in reports[first_report:]],
                    "notes": notes[first_note:],
                    "ranges": {name: value.tolist() for name, value in ranges.items()},
                },
            )
        self._finish(block, ranges)

    def _finish(self, block: Block, ranges: dict[str, Tensor]) -> None:
        """Replay a quantized block, then attach its activation quantizers."""
        if not self.full_precision and self.reads_data and not block.is_last:
            self.hidden = replay(self.model, block.run, self.hidden)
        attached = quantize_activations(block, self.scheme, ranges, switch_of(self.model))
        self.result.blocks.append(block)
        self.result.handles += attached.handles
        self.result.notes += attached.notes
        self.result.sees_sequences &= attached.sees_sequences

    def _transform(self, number: int, block: Block) -> dict[str, dict[str, Any]]:
        """Let the method rewrite the block in place; returns what it says of single linears."""
        calibration, own = self.calibration, self.calibration.model is self.model
        if not rewrites(self.baseline):
            if self.full_precision and own and self.reads_data and not block.is_last:
                calibration.leaving(number)  # while the block is what it was
            return {}
        wanted = self.baseline.transform_statistics
        outputs: Sequence[Tensor]
        if self.full_precision:
            stats = calibration.statistics(number, block, wanted)
            outputs = Lazy(partial(calibration.leaving, number))
        else:
            stats, outputs = collect(block, list(block.linears), wanted, self.hidden)
        generator = self.rounder.generator(f"{block.name}.transform")
        context = TransformContext(block, self.scheme, stats, self.hidden, outputs, generator)
        self.baseline.transform(block, context)
        self.result.notes += [f"{block.name}.{norm}: {why}" for norm, why in block.unfoldable]
        return context.report

    def _quantize_stage(
        self, number: int, block: Block, names: list[str], ranges: dict[str, Tensor]
    ) -> None:
        wanted: tuple[str | type[Observer], ...] = ()
        if self.scheme.quantizes_weights:
            wanted += self.baseline.weight_statistics
        if self.scheme.needs_static_scales:
            wanted += (Range,)
        # no quantized block precedes the first one: all methods see it alike
        untouched = number == 0 and len(names) == len(block.linears)
        if wanted and untouched and self.calibration.keep and not rewrites(self.baseline):
            stats = self.calibration.statistics(number, block, wanted, advance=False)
        elif wanted:
            stats, _ = collect(block, names, wanted, self.hidden, needs_outputs=False)
        else:
            stats = {name: Statistics() for name in names}
        for name in names:
            if "range" in stats[name] and stats[name].n_tokens:
                ranges[name] = stats[name]["range"]
        if self.scheme.quantizes_weights:
            self.result.layers += self.rounder.round_(block, names, stats)

    def _finished(self, stream: Stream, name: str) -> bool:
        """Whether an earlier run left this block quantized in the work folder."""
        report = stream.reports.get(name)
        if report is None:
            return False
        online = any(layer["extra"].get("input_transform") for layer in report["layers"])
        if online:  # a function cannot be stored: do the block again
            stream.forget(name)
        return not online

    def _restore(self, number: int, block: Block, stream: Stream) -> None:
        """Take over a block that an earlier run quantized; it is resident as it was finished."""
        report = stream.reports[block.name]
        self.result.layers += [LayerReport(**layer) for layer in report["layers"]]
        self.result.notes += report["notes"]
        device = next(block.module.parameters()).device
        ranges = {n: torch.tensor(v, device=device) for n, v in report["ranges"].items()}
        if self.full_precision and self.reads_data and not block.is_last:
            with stream.original(block.name):
                self.calibration.leaving(number)
        self._finish(block, ranges)


def requantize_activations(model: nn.Module, scheme: Scheme, result: Quantization) -> Quantization:
    """Exchange the activation quantizers of a quantized model in place, its weights untouched.

    Args:
        model: quantized.
        scheme: resolved, with the same weights (:attr:`Scheme.weights_only`) and no static scales.
        result: of the quantization of ``model``; returned anew for the new scheme.
    """
    for block in result.blocks:  # before anything is changed
        check_activations(block, scheme)
    for handle in result.handles:
        handle.remove()
    layers = [
        layer.model_copy(update={"scheme": str(scheme.for_linear(layer.name))})
        for layer in result.layers
    ]
    anew = replace(result, scheme=scheme, layers=layers, handles=[], sees_sequences=True)
    for block in result.blocks:
        attached = quantize_activations(block, scheme, {}, switch_of(model))
        anew.handles += attached.handles
        anew.sees_sequences &= attached.sees_sequences
    mark_(model, anew)
    return anew


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


def trace_windows(model: nn.Module) -> Tensor:
    """A few arbitrary tokens (1, 32), to trace blocks when no method needs data."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = embeddings.num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, 32), generator=generator)
