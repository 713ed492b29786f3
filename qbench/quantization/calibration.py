"""Capture what enters the decoder blocks, and replay one block at a time.

The model is run once in full precision. The hidden states that enter the first block are kept,
and for every block all other arguments it was called with, whatever the architecture passes
(masks, position embeddings, per-layer mask variants). Equal tensors are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import QBenchError
from qbench.models.blocks import find_blocks, first_tensor
from qbench.models.linear import InputHook, Linear, attach

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, without its hidden states."""


class _Pool:
    """Keeps one copy of equal tensors: a mask that every sequence shares is stored once."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def share(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            for known in self.kept[-16:]:
                if known is value:
                    return known
                same = known.shape == value.shape and known.dtype == value.dtype
                if same and known.device == value.device and torch.equal(known, value):
                    return known
            self.kept.append(value)
            return value
        if type(value) in (tuple, list):  # a named tuple or a cache is handed on as it is
            return type(value)(self.share(v) for v in value)
        if type(value) is dict:
            return {k: self.share(v) for k, v in value.items()}
        return value


@dataclass
class Captured:
    """The calibration set as the decoder blocks saw it."""

    hidden: list[Tensor] = field(default_factory=list)
    """What enters the first block, (sequences, tokens, hidden) per batch."""
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """Per block name and batch, every other argument."""
    last: Tensor | None = None
    """What the block that ran last gave, while capturing."""

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: remember the output."""
        self.last = first_tensor(output)

    def runner(self, name: str, module: nn.Module) -> Callable[[Tensor, int], Tensor]:
        """A function (hidden states, batch index) -> hidden states that replays one block."""

        def run(hidden: Tensor, index: int) -> Tensor:
            args, kwargs = self.calls[name][index]
            version = hidden._version
            output = first_tensor(module(hidden, *args, **kwargs))
            if hidden._version != version:
                raise QBenchError(
                    f"{name} writes into the hidden states it is given; qbench runs a block more "
                    "than once on the same input and cannot have that"
                )
            return output

        return run


def capture(model: nn.Module, windows: Tensor, batch_size: int = 1) -> Captured:
    """Run the model on token windows (nsamples, seqlen) and keep what its blocks are called with.

    Raises:
        QBenchError: if a block is called without hidden states, or more than once per pass, or if
            the model does something to the hidden states between two blocks.
    """
    captured, pool = Captured(), _Pool()
    blocks = find_blocks(model)
    handles = []
    for number, (name, block) in enumerate(blocks):
        captured.calls[name] = []
        hook = _capture_hook(captured, pool, name, first=number == 0)
        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(block.register_forward_hook(captured.leave))
    device = next(model.parameters()).device
    try:
        batches = windows.split(batch_size)
        for batch in batches:
            captured.last = None
            model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    captured.last = None
    for name, calls in captured.calls.items():
        if len(calls) != len(batches):
            raise QBenchError(
                f"{name} was called {len(calls)} times for {len(batches)} batches; qbench needs "
                "blocks that each run once per forward pass"
            )
    return captured


def _capture_hook(captured: Captured, pool: _Pool, name: str, first: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states", None)
        if not isinstance(hidden, Tensor):
            raise QBenchError(f"{name} is not called with hidden states as its first argument")
        if first:
            captured.hidden.append(hidden)
        elif captured.last is not None and not _equal(captured.last, hidden):
            raise QBenchError(
                f"something changes the hidden states before they enter {name}; qbench replays "
                "blocks one after another and needs each to read what the one before it gave"
            )
        captured.calls[name].append((pool.share(args[1:]), pool.share(rest)))

    return hook


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.to(other), other))


@contextmanager
def observing(linears: list[Linear], hook: InputHook) -> Iterator[None]:
    """While active, ``hook(linear, input)`` sees what enters the linears."""
    handles = attach(linears, hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
