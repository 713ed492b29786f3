"""Run a model around its decoder blocks: everything else runs, the blocks only take notes.

What a block is called with beside its hidden states (masks, position embeddings, per-layer
variants of both) does not depend on what the blocks compute. So these arguments are collected in a
pass whose blocks hand their input on, at the cost of the embeddings; and what follows the blocks
(norm, head, scaling) is run on hidden states that were computed one block at a time.

Whether that holds is tried out, not assumed: the first two blocks run once for real, and every
block has to be called as it is without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.blocks import find_blocks, first_tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, without its hidden states."""
BlockForward = Callable[[int, Tensor, Call], Tensor]
"""(number of the block, hidden states, other arguments) -> hidden states"""
_KNOWN = "_qbench_bypass"
"""Attribute of a model that was tried out."""
_STANDS_IN = "_qbench_stands_in"


@dataclass(frozen=True)
class Bypass:
    """How the blocks of one model hand on hidden states."""

    in_tuple: int = 0
    """Length of the tuple that a block returns, hidden states first; 0 for a bare tensor. What
    else is in it (attention weights, router logits) is left out."""
    refused: str = ""
    """Why the blocks cannot be bypassed."""

    def output(self, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the model expects it from a block."""
        return (hidden, *[None] * (self.in_tuple - 1)) if self.in_tuple else hidden


def is_replaced(block: nn.Module) -> bool:
    """Whether something stands in for the block's own forward."""
    return hasattr(block.forward, _STANDS_IN)


class Stop(Exception):
    """Ends a forward pass of which no more is wanted."""


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    """The hidden states a block is called with, and everything else."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    return (hidden if isinstance(hidden, Tensor) else None), (args[1:], rest)


@contextmanager
def blocks_replaced(
    model: nn.Module, output: Callable[[Tensor], Any], forward: BlockForward
) -> Iterator[None]:
    """While active, ``forward`` stands in for the forward of every decoder block.

    ``output`` gives what it returns the form that the model expects (:meth:`Bypass.output`).
    """
    blocks = [module for _, module in find_blocks(model)]
    before = [module.__dict__.get("forward") for module in blocks]

    def stand_in(number: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            if hidden is None:
                raise _NoHiddenStates
            return output(forward(number, hidden, call))

        setattr(run, _STANDS_IN, True)
        return run

    try:
        for number, module in enumerate(blocks):
            module.forward = stand_in(number)  # type: ignore[method-assign]
        yield
    finally:
        for module, own in zip(blocks, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own  # type: ignore[method-assign]


class _NoHiddenStates(Exception):
    pass


def bypass_of(model: nn.Module, resident: Callable[[str], Any]) -> Bypass:
    """Try out, once per model, whether its blocks can be bypassed.

    Args:
        model: in eval mode.
        resident: a context manager per block name within which the block has its weights.
    """
    known = getattr(model, _KNOWN, None)
    if isinstance(known, Bypass):
        return known
    with torch.no_grad():
        found = _try_out(model, resident)
    setattr(model, _KNOWN, found)
    return found


def _try_out(model: nn.Module, resident: Callable[[str], Any]) -> Bypass:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embeddings.num_embeddings, (1, 16), generator=generator)
    inputs = {"input_ids": ids.to(embeddings.weight.device), "use_cache": False}
    names = [name for name, _ in find_blocks(model)][:2]
    outputs: list[Any] = []

    def as_it_comes(hidden: Tensor) -> Any:
        last = outputs[-1]
        return hidden if isinstance(last, Tensor) else (hidden, *last[1:])

    real = _calls(model, inputs, as_it_comes, {name: resident(name) for name in names}, outputs)
    if isinstance(real, str):
        return Bypass(refused=real)
    output = outputs[0]
    how = Bypass(in_tuple=0 if isinstance(output, Tensor) else len(output))
    try:
        idle = _calls(model, inputs, how.output, {}, [])
    except Exception as error:  # whatever a model raises that reads more of a block's output
        return Bypass(refused=f"without its blocks it does not run ({type(error).__name__})")
    if isinstance(idle, str):
        return Bypass(refused=idle)
    if not same(real, idle):
        return Bypass(refused="what its blocks are called with depends on what they compute")
    return how


def _calls(
    model: nn.Module,
    inputs: Mapping[str, Any],
    output: Callable[[Tensor], Any],
    running: Mapping[str, Any],
    outputs: list[Any],
) -> list[Call] | str:
    """What every block is called with while only those ``running`` compute; or why not.

    What the running ones return is appended to ``outputs``.
    """
    calls: list[Call] = []
    blocks = find_blocks(model)
    last: list[Tensor] = []
    own = [module.forward for _, module in blocks]

    def forward(number: int, hidden: Tensor, call: Call) -> Tensor:
        if last and not (hidden is last[-1] or torch.equal(hidden, last[-1])):
            raise Stop("something changes the hidden states between two blocks")
        calls.append(call)
        name = blocks[number][0]
        if name in running:
            with running[name]:
                outputs.append(own[number](hidden, *call[0], **call[1]))
            hidden = first_tensor(outputs[-1])
        elif number == len(blocks) - 1:
            raise Stop
        last.append(hidden)
        return hidden

    try:
        with blocks_replaced(model, output, forward):
            model(**inputs)
    except Stop as reason:
        if str(reason):
            return str(reason)
    except _NoHiddenStates:
        return "its blocks are not called with hidden states"
    if len(calls) != len(blocks):
        return "its blocks do not each run once per forward pass"
    return calls


def same(one: Any, other: Any) -> bool:
    """Whether two structures of arguments are equal, tensors by their values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one is other or bool(one == other)
