"""What the calibration text does in the full-precision model, worked out once for all cells.

A :class:`Calibration` is bound to one pristine model. It keeps the capture of its blocks, and for
methods that calibrate on full precision the statistics of every block; what would be too large to
keep for every block (activations, hessians) is replayed from the pristine model when a later cell
asks for it. The hessians of the first block, which no quantized block precedes, are kept for every
method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from qbench.models.blocks import Block, find_blocks, trace_block
from qbench.models.bypass import Stop
from qbench.models.linear import Linear
from qbench.models.streaming import resident, stream_of
from qbench.quantization.calibration import Captured, capture, observing
from qbench.quantization.observers import Observer, Statistics

BATCH_TOKENS = 2048
"""Calibration windows shorter than this run through a block together."""
TRACE_TOKENS = 128
"""Tokens that a block is traced on: enough to reach experts, few beside a calibration text."""
Wanted = tuple[str | type[Observer], ...]


class Calibration:
    """Token windows in one full-precision model.

    Args:
        model: pristine, and left so where ``keep`` is set; in eval mode.
        windows: (nsamples, seqlen).
        keep: whether other cells are to come, so that statistics are worth keeping.
    """

    def __init__(self, model: nn.Module, windows: Tensor, keep: bool = True) -> None:
        self.model, self.windows, self.keep = model, windows, keep
        self._kept: dict[tuple[int, Wanted], dict[str, Statistics]] = {}
        self._traced: Tensor | None = None
        self._number = 0
        self._entering: list[Tensor] | None = None
        self._leaving: list[Tensor] | None = None

    @cached_property
    def captured(self) -> Captured:
        """What enters the first block, and every other argument of every block."""
        with torch.no_grad(), eager_experts(self.model):
            found = capture(self.model, self.windows, max(1, BATCH_TOKENS // self.windows.shape[1]))
        if stream := stream_of(self.model):
            found.hidden = [stream.spill(hidden) for hidden in found.hidden]
        return found

    @cached_property
    def _trace_capture(self) -> Captured:
        tokens = self.windows[:1, :TRACE_TOKENS]
        half = tokens.shape[1] // 2
        if half:  # two rows, so that an input which has lost them shows
            tokens = tokens[:, : 2 * half].reshape(2, half)
        with torch.no_grad(), eager_experts(self.model):
            return capture(self.model, tokens, len(tokens))

    def trace(self, number: int, name: str, module: nn.Module, folds: bool) -> Block:
        """Trace a block of this model or of a copy, before anything changes it.

        Blocks come in order, first to last: each is traced on what the one before it gave.
        ``folds`` as for :func:`~qbench.models.blocks.trace_block`.
        """
        entering = self._trace_capture.hidden[0] if number == 0 else self._traced
        assert entering is not None
        run = self._trace_capture.runner(name, module)
        block, self._traced = trace_block(name, module, run, entering, folds)
        block.runner = self.captured.runner(name, module)
        return block

    def entering(self, number: int) -> list[Tensor]:
        """What enters a block, per batch."""
        if self._entering is None or number < self._number:
            self._number, self._entering = 0, self.captured.hidden
            self._leaving = None
        while self._number < number:
            if self._leaving is None:
                self._leaving = self._replay(self._number, self._entering)
            self._number, self._entering, self._leaving = self._number + 1, self._leaving, None
        return self._entering

    def leaving(self, number: int) -> list[Tensor]:
        """What leaves a block, per batch."""
        entering = self.entering(number)
        if self._leaving is None:
            self._leaving = self._replay(number, entering)
        return self._leaving

    def statistics(
        self, number: int, block: Block, wanted: Wanted, advance: bool = True
    ) -> dict[str, Statistics]:
        """Statistics of every linear of a block that nothing has changed yet.

        Args:
            number: of the block.
            block: traced, with its weights as they were loaded.
            wanted: names or classes of observers.
            advance: whether what leaves the block is going to be asked for.
        """
        known = self._kept.get((number, wanted))
        if known is not None:
            return _anew(known)
        entering = self.entering(number)
        stats, leaving = collect(block, list(block.linears), wanted, entering, advance)
        self._leaving = leaving if advance else None
        if self.keep and (number == 0 or _are_vectors(stats, wanted)):
            self._kept[number, wanted] = stats
            return _anew(stats)
        return stats

    def _replay(self, number: int, entering: list[Tensor]) -> list[Tensor]:
        name, module = find_blocks(self.model)[number]
        run = self.captured.runner(name, module)
        with torch.no_grad(), eager_experts(self.model), resident(self.model, name):
            return replay(self.model, run, entering)


def replay(
    model: nn.Module, run: Callable[[Tensor, int], Tensor], entering: Sequence[Tensor]
) -> list[Tensor]:
    """What a block makes of every batch; a streamed model's activations go to disk if large."""
    stream = stream_of(model)
    outputs = (run(hidden, index) for index, hidden in enumerate(entering))
    return [output if stream is None else stream.spill(output) for output in outputs]


class Lazy(Sequence[Tensor]):
    """A list of batches that is worked out when it is first looked into."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self._make = make

    @cached_property
    def _batches(self) -> Sequence[Tensor]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __len__(self) -> int:
        return len(self._batches)


def collect(
    block: Block,
    names: list[str],
    wanted: Wanted,
    hidden: Sequence[Tensor],
    needs_outputs: bool = True,
) -> tuple[dict[str, Statistics], list[Tensor]]:
    """Run the block over all batches and observe what enters the named linears.

    Returns:
        Statistics per name, one object for linears that read the same tensor; and the outputs,
        none where they are not needed: then each run ends at the last linear to be observed.
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
    last = None if needs_outputs else _last_to_run(block, leaders)
    outputs: list[Tensor] = []
    sequences = 0

    def see(linear: Linear, x: Tensor) -> None:
        leaders[linear.name].update(x, n_sequences=sequences)
        if linear.name == last:
            raise Stop

    with observing([block.linears[name] for name in leaders], see), _energies(block, stats):
        for index, entering in enumerate(hidden):
            sequences = len(entering)
            try:
                outputs.append(block.run(entering, index))
            except Stop:
                continue
    return stats, outputs if needs_outputs else []


@contextmanager
def _energies(block: Block, stats: Mapping[str, Statistics]) -> Iterator[None]:
    """Add up |W x|² of linears whose hessian is collected: it is tr(WHWᵀ), for the asking."""
    handles = []

    def adding(linear: Linear, seen: Statistics) -> Callable[..., None]:
        name = f"{block.name}.{linear.name}"

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            if bias is not None and output.dtype != torch.float32:
                return  # what the bias rounded off is more than the product may be
            product = output if bias is None else output - bias
            energy = torch.linalg.vector_norm(product, dtype=torch.float32).square()
            seen.energies[name] = seen.energies.get(name, 0.0) + energy

        return hook

    for name, seen in stats.items():
        linear = block.linears[name]
        if "hessian" in seen and linear.has_module:
            hook = adding(linear, seen)
            handles.append(linear.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_to_run(block: Block, names: Iterable[str]) -> str | None:
    """Which of the linears runs last; None where that may differ from batch to batch."""
    if not all(linear.sees_sequences for linear in block.linears.values()):  # experts are routed
        return None
    order = list(block.linears)
    return max(names, key=order.index, default=None)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """While active, fused experts run one product each, where each input can be seen."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    use_eager_experts_(model)
    try:
        yield
    finally:
        if getattr(config, "_experts_implementation", None) != before:
            model.set_experts_implementation(before)  # type: ignore[operator]


def use_eager_experts_(model: nn.Module) -> None:
    """Switch fused experts, if any, in place, to one product per expert."""
    fused = any(p.ndim == 3 for _, block in find_blocks(model) for p in block.parameters())
    switch: Any = getattr(model, "set_experts_implementation", None)
    if fused and switch is not None:
        switch("eager")


def _anew(stats: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The same for another cell: what a method caches beside them is its own."""
    others = {id(one): one.anew() for one in stats.values()}
    return {name: others[id(one)] for name, one in stats.items()}


def _are_vectors(stats: dict[str, Statistics], wanted: Wanted) -> bool:
    results = (one[_name(kind)] for one in stats.values() for kind in wanted)
    return all(value is None or value.ndim <= 1 for value in results)


def _name(kind: str | type[Observer]) -> str:
    return kind if isinstance(kind, str) else kind.name
