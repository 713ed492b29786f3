"""Batches side by side on a CPU, each on its part of torch's threads.

Two threads that share every operation of one batch wait for each other at its end, and what is
between the products keeps hardly one of them busy; two batches of half as many threads each do not
wait. Results come in the order of the batches and do not depend on which was done first. They may
depend in their last bits on the number of threads, so whatever is to be equal runs side by side
everywhere or nowhere.

Each batch needs modules of its own, because hooks and stand-ins are put on them: a double. Left
out: GPUs, which one batch fills.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

from qbench.models.products import device_kind, on_threads, products_of_this_thread

ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")
U = TypeVar("U")

AT_ONCE = 2
"""Batches at a time: each needs its activations, and more would wait for the interpreter."""


def double_of(model: ModuleT) -> ModuleT:
    """Modules of its own with the parameters, buffers and hooks that the model has now.

    What is put on or taken off one of them afterwards (hooks, parameters, buffers, submodules) is
    not on or off the other; what is written into a tensor is in both.
    """
    doubles: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        doubles[module] = double = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, (dict, set)):
                vars(double)[name] = copy.copy(value)
    for double in doubles.values():
        for name, child in double._modules.items():
            double._modules[name] = None if child is None else doubles[child]
    found = doubles[model]
    assert isinstance(found, type(model))
    return found


def number_at_once(model: nn.Module, n_batches: int) -> int:
    """How many of so many batches of a model run side by side."""
    enough = n_batches >= AT_ONCE and torch.get_num_threads() >= AT_ONCE
    return AT_ONCE if enough and device_kind(model) == "cpu" and _can_be_doubled(model) else 1


def _can_be_doubled(model: nn.Module) -> bool:
    """Whether a double would stand alone.

    It would not where a module knows others, or itself, by more than its list of submodules, as
    where something has been put in place of a ``forward``: the double would call the first one's
    modules, with what hooks are on those.
    """
    return not any(
        name == "forward" or _is_of_module(value)
        for module in model.modules()
        for name, value in vars(module).items()
    )


def _is_of_module(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_of_module(part) for part in value)
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


def threads_shared(at_once: int) -> AbstractContextManager[None]:
    """While active, torch's threads are shared out among so many batches."""
    return nullcontext() if at_once == 1 else on_threads(torch.get_num_threads() // at_once)


def side_by_side(
    module: ModuleT,
    items: Sequence[T],
    do: Callable[[ModuleT, T], U],
    at_once: int,
) -> Iterator[U]:
    """``do(module or a double, item)`` for every item, results in the order of the items.

    Args:
        module: not to be changed until the last result is there.
        items: at most one more than are worked on is finished before it is asked for.
        do: called from other threads where ``at_once`` is more than one; of this one's modes they
            know whether gradients are wanted and how products are done.
        at_once: of which :func:`threads_shared` is active.
    """
    if at_once == 1 or len(items) == 1:
        for item in items:
            yield do(module, item)
        return
    idle: SimpleQueue[ModuleT] = SimpleQueue()
    for _ in range(at_once - 1):
        idle.put(double_of(module))
    idle.put(module)
    threads, products = torch.get_num_threads(), products_of_this_thread()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def work(item: T) -> U:
        own = idle.get()
        try:
            with (
                on_threads(threads),
                torch.inference_mode(inference),
                torch.set_grad_enabled(gradients),
                products(),
            ):
                return do(own, item)
        finally:
            idle.put(own)

    left, begun = iter(items), deque[Future[U]]()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in left:
                begun.append(pool.submit(work, item))
                if len(begun) > at_once:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
