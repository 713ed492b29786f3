"""Capture what enters the decoder blocks, and replay one block at a time.

The model is run around its blocks (:mod:`qbench.models.bypass`): the hidden states that enter the
first block are kept, and for every block all other arguments it is called with, whatever the
architecture passes. Equal tensors are kept once. A model whose blocks cannot be bypassed runs
whole, once. Either way this depends on the full-precision model and the text alone, so one capture
serves every cell of a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import QBenchError
from qbench.models.blocks import find_blocks, first_tensor
from qbench.models.bypass import Bypass, Call, Stop, blocks_replaced, bypass_of, split_call
from qbench.models.linear import InputHook, Linear, attach
from qbench.models.streaming import resident


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
    """Forward passes as the decoder blocks saw them."""

    hidden: list[Tensor] = field(default_factory=list)
    """What enters the first block, (sequences, tokens, hidden) per batch."""
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """Per block name and batch, every other argument."""

    def runner(self, name: str, module: nn.Module) -> Callable[[Tensor, int], Tensor]:
        """A function (hidden states, batch index) -> hidden states that replays one block."""

        def run(hidden: Tensor, index: int) -> Tensor:
            args, kwargs = self.calls[name][index]
            version = hidden._version if not hidden.is_inference() else 0
            output = first_tensor(module(hidden, *args, **kwargs))
            if not hidden.is_inference() and hidden._version != version:
                raise QBenchError(
                    f"{name} writes into the hidden states it is given; qbench runs a block more "
                    "than once on the same input and cannot have that"
                )
            return output

        return run


def capture(model: nn.Module, windows: Tensor, batch_size: int = 1) -> Captured:
    """Capture token windows (nsamples, seqlen), ``batch_size`` of them at a time.

    Raises:
        QBenchError: if a block is called without hidden states, or more than once per pass, or if
            the model does something to the hidden states between two blocks.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    batches = windows.split(batch_size)
    return capture_calls(model, [{"input_ids": batch.to(device)} for batch in batches])


def capture_calls(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Captured:
    """Capture forward passes given as keyword arguments of the model.

    Raises:
        QBenchError: as :func:`capture`.
    """
    names = [name for name, _ in find_blocks(model)]
    captured, pool = Captured(calls={name: [] for name in names}), _Pool()
    how = bypass_of(model, lambda name: resident(model, name))
    for batch in batches:
        if how.refused:
            with _noting(model, captured, pool):
                model(**batch, use_cache=False)
        else:
            _note_alone(model, how, batch, captured, pool)
    for name, calls in captured.calls.items():
        if len(calls) != len(batches):
            raise QBenchError(
                f"{name} was called {len(calls)} times for {len(batches)} batches; qbench needs "
                "blocks that each run once per forward pass"
            )
    return captured


def _note_alone(
    model: nn.Module, how: Bypass, batch: Mapping[str, Any], captured: Captured, pool: _Pool
) -> None:
    """Run all but the blocks, up to the last of them."""
    names = list(captured.calls)

    def note(number: int, hidden: Tensor, call: Call) -> Tensor:
        if number == 0:
            captured.hidden.append(hidden)
        captured.calls[names[number]].append(pool.share(call))
        if number == len(names) - 1:
            raise Stop
        return hidden

    try:
        with blocks_replaced(model, how.output, note):
            model(**batch, use_cache=False)
    except Stop:
        pass


@contextmanager
def _noting(model: nn.Module, captured: Captured, pool: _Pool) -> Iterator[None]:
    """Take notes of a pass in which the blocks run too."""
    handles, last = [], list[Tensor]()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = split_call(args, kwargs)
            if hidden is None:
                raise QBenchError(f"{name} is not called with hidden states as its first argument")
            if not last:
                captured.hidden.append(hidden)
            elif not _equal(last[-1], hidden):
                raise QBenchError(
                    f"something changes the hidden states before they enter {name}; qbench replays "
                    "blocks one after another and needs each to read what the one before it gave"
                )
            captured.calls[name].append(pool.share(call))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [first_tensor(output)]

    for name, block in find_blocks(model):
        handles.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
