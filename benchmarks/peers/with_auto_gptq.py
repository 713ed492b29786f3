"""GPTQ over a whole Llama with auto-gptq's inner classes, block by block, as a plain script would.

The order is that of the reference's ``llama.py`` without options: every linear of a block collects
its own hessian in one pass over the calibration windows, all are rounded, and a second pass gives
the next block's inputs.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass once the first block's inputs are seen."""


class _Catcher(nn.Module):
    """Stands in front of the first block and keeps what it is called with."""

    def __init__(self, block: nn.Module, seen: list[Tensor], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.seen, self.arguments = block, seen, arguments

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        """Keep the input and stop."""
        self.seen.append(hidden)
        self.arguments.update(arguments)
        raise _Stop


def first_inputs(model: Any, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What enters the first block for each window, and the arguments all windows share."""
    layers = model.model.layers
    seen: list[Tensor] = []
    arguments: dict[str, Any] = {}
    layers[0] = _Catcher(layers[0], seen, arguments)
    for window in windows:
        with contextlib.suppress(_Stop):
            model(window[None], use_cache=False)
    layers[0] = layers[0].block
    return seen, arguments


@torch.no_grad()
def walk(model: Any, windows: Tensor, make: Callable[[nn.Linear], Any]) -> None:
    """Round every linear of the decoder blocks in place, block by block.

    Args:
        model: a Llama of transformers in eval mode.
        windows: token ids (nsamples, seqlen).
        make: a solver for one linear, with ``add_batch(input, output)`` and ``finish()``.
    """
    inputs, arguments = first_inputs(model, windows)
    for block in model.model.layers:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        solvers = [make(linear) for linear in linears]
        hooks = [_adder(solver) for solver in solvers]
        pairs = zip(linears, hooks, strict=True)
        handles = [linear.register_forward_hook(hook) for linear, hook in pairs]
        for hidden in inputs:
            block(hidden, **arguments)
        for handle in handles:
            handle.remove()
        for solver in solvers:
            solver.finish()
        inputs = [_tensor(block(hidden, **arguments)) for hidden in inputs]


class Solver:
    """auto-gptq's GPTQ on one linear."""

    def __init__(
        self, linear: nn.Linear, classes: tuple[Any, Any], bits: int, group_size: int
    ) -> None:
        solver_class, quantizer_class = classes
        self.own, self.group_size = solver_class(linear), group_size
        self.own.quantizer = quantizer_class()
        self.own.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
        self.add_batch = self.own.add_batch

    def finish(self) -> None:
        """Round the weight in place."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.own.fasterquant(percdamp=0.01, group_size=self.group_size)
        self.own.free()


def quantize(
    model: Any, windows: Tensor, classes: tuple[Any, Any], bits: int = 4, group_size: int = 128
) -> None:
    """GPTQ over a whole model (:func:`walk`), asymmetric; a group of -1 is the whole row."""
    walk(model, windows, lambda linear: Solver(linear, classes, bits, group_size))


def _adder(solver: Any) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        solver.add_batch(args[0].data, output.data)

    return hook


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
