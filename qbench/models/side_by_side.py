"""Batches side by side on a CPU, each on its part of torch's threads.

Two threads that share every operation of one batch wait for each other at its end, and what is
between the products keeps hardly one of them busy; two batches of half as many threads each do not
wait. Results come in the order of the batches, and which was done first makes no difference. They
may depend in their last bits on the number of threads, so whatever is to be equal runs side by side
everywhere or nowhere.

Each batch needs modules of its own, because hooks and stand-ins are put on them: a double. Left
out: GPUs, which one batch fills.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qbench.models.products import device_kind, on_threads

ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")
U = TypeVar("U")

_TRIED = "_qbench_stands_alone"
"""Attribute of a model: what came of trying its double. Copies of the model inherit it."""
_NO_MODULE = {type(None), bool, int, float, str, set, dict, OrderedDict}
"""What most attributes of modules are, so that they need no look; submodules are in a dict."""
AT_ONCE = 2
"""Batches at a time: each needs its activations, and more would wait for the interpreter."""


def double_of(model: ModuleT) -> ModuleT:
    """Modules of its own with the parameters, buffers and hooks that the model has now.

    What is put on or taken off one of them afterwards (hooks, parameters, buffers, submodules) is
    not on or off the other; what is written into a tensor is in both.
    """
    doubles: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        doubles[module] = double = _shallow(module)
        for name, value in vars(module).items():
            if type(value) is OrderedDict:  # hooks, of which copy.copy makes hard work
                vars(double)[name] = value.copy()
            elif isinstance(value, (dict, set)):
                vars(double)[name] = copy.copy(value)
    for double in doubles.values():
        for name, child in double._modules.items():
            double._modules[name] = None if child is None else doubles[child]
    found = doubles[model]
    assert isinstance(found, type(model))
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """``copy.copy``, without its detour where a class has no way of its own to be copied."""
    kind = type(module)
    if hasattr(kind, "__copy__") or kind.__setstate__ is not nn.Module.__setstate__:
        return copy.copy(module)
    found: nn.Module = object.__new__(kind)
    vars(found).update(vars(module))
    return found


def number_at_once(model: nn.Module, n_batches: int) -> int:
    """How many of so many batches of a model run side by side: one or ``AT_ONCE``.

    To be asked before torch's threads are shared out or a small model has put them aside.
    """
    enough = n_batches >= AT_ONCE and torch.get_num_threads() >= AT_ONCE
    return AT_ONCE if enough and device_kind(model) == "cpu" and stands_alone(model) else 1


def stands_alone(model: nn.Module) -> bool:
    """Whether a double of a model would run by itself.

    It would not where a module is known by more than its place among the submodules: the double
    would call the first one's, with what hooks are on those. What can be seen is looked for (a
    module in an attribute, something in place of a ``forward``, compiled modules), and a model in
    memory is tried out once: no module of the first may run when the double does.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return False
        for name, value in vars(module).items():
            if type(value) in _NO_MODULE:
                continue
            if name in ("forward", "_compiled_call_impl") or _is_of_module(value):
                return False
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        return True  # blocks on disk, each of which is doubled while it is here
    if _TRIED not in vars(model):
        vars(model)[_TRIED] = _try_out(model)
    return bool(vars(model)[_TRIED])


def _is_of_module(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_of_module(part) for part in value)
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


def _try_out(model: nn.Module) -> bool:
    ran: list[nn.Module] = []
    handles: list[RemovableHandle] = []
    try:
        double = double_of(model)
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(lambda m, _: ran.append(m)))
        with torch.no_grad():
            double(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False)
    except Exception:  # noqa: BLE001 - whatever a model raises that is called in another way
        return False
    finally:
        for handle in handles:
            handle.remove()
    return not ran


def threads_shared(at_once: int) -> AbstractContextManager[None]:
    """While active, torch's threads are shared out among so many batches."""
    return nullcontext() if at_once == 1 else on_threads(torch.get_num_threads() // at_once)


def side_by_side(
    module: ModuleT, items: Sequence[T], do: Callable[[ModuleT, T], U], at_once: int
) -> Iterator[U]:
    """``do(module or a double, item)`` for every item, results in the order of the items.

    Which of them gets an item depends on its number alone. Few results wait to be asked for. An
    interruption is raised once the items under way have ended.

    Args:
        module: not to be changed until the last result is there.
        items: numbered from 0.
        do: called from other threads where ``at_once`` is more than one; of this one's modes those
            know only whether gradients are wanted.
        at_once: of which :func:`threads_shared` is active.
    """
    if at_once == 1 or len(items) == 1:
        for item in items:
            yield do(module, item)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    gradients = torch.is_grad_enabled()

    def work(own: ModuleT, item: T) -> U:
        with on_threads(threads), torch.inference_mode(inference):
            with torch.set_grad_enabled(gradients):
                return do(own, item)

    workers = [(module, ThreadPoolExecutor(1))]
    workers += [(double_of(module), ThreadPoolExecutor(1)) for _ in range(at_once - 1)]
    begun: deque[Future[U]] = deque()
    try:
        for item, (own, worker) in zip(items, itertools.cycle(workers), strict=False):
            begun.append(worker.submit(work, own, item))
            if len(begun) > at_once:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        for _, worker in workers:
            worker.shutdown()
