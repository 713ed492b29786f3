"""One weight matrix of a decoder block, wherever the architecture keeps it.

Three homes are known: ``nn.Linear`` (out, in), GPT-2's ``Conv1D`` (in, out), and one slice of a
three-dimensional parameter that holds all experts of a mixture. The first two have a module whose
input a hook can see; an expert slice is only an argument of a function call inside its owner's
forward, so that call is intercepted while the owner runs.

The model keeps its own modules: weights are rewritten where they are, activations are quantized
by hooks. So tied weights stay tied, and what is saved is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


@dataclass(eq=False)
class Linear:
    """A matrix (out_features, in_features) that multiplies activations in a block."""

    name: str
    """Relative to the block, as in ``self_attn.q_proj`` or ``mlp.experts.down_proj.3``."""
    module: nn.Module
    """The module that owns the parameter."""
    parameter: str = "weight"
    expert: int | None = None
    """Index into a three-dimensional parameter, None for an ordinary matrix."""
    transposed: bool = False
    """Whether the parameter is stored (in_features, out_features)."""
    sees_sequences: bool = False
    """Whether its input was seen as (sequences, tokens, in_features), and once in a pass."""

    @property
    def has_module(self) -> bool:
        """Whether the module's input is this matrix's input."""
        return self.expert is None and isinstance(self.module, (nn.Linear, Conv1D))

    def _stored(self) -> Tensor:
        parameter = getattr(self.module, self.parameter).data
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def weight(self) -> Tensor:
        """The matrix as a view (out_features, in_features)."""
        stored = self._stored()
        return stored.T if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def set_weight_(self, weight: Tensor) -> None:
        """Overwrite the parameter with a matrix (out_features, in_features), cast to its dtype.

        An nn.Linear's gets new memory: pages of a file that are mapped would be copied one by one
        before they are overwritten.
        """
        parameter = getattr(self.module, self.parameter)
        if self.expert is not None or self.transposed or weight.shape != parameter.shape:
            self.weight.copy_(weight)
            return
        with torch.inference_mode(False):  # or the parameter could never be trained again
            anew = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        parameter.data = anew.copy_(weight)


InputHook = Callable[[Linear, Tensor], Tensor | None]
"""Sees a linear's input; returns what the linear shall read instead, or None to leave it."""


class Handle(Protocol):
    """Anything that undoes a hook."""

    def remove(self) -> None:
        """Undo it."""


@dataclass
class _ModuleHook:
    """Pre-hook of an nn.Linear or Conv1D."""

    linear: Linear
    hook: InputHook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = self.hook(self.linear, args[0])
        return None if replaced is None else (replaced, *args[1:])


class ProductMode(TorchFunctionMode):
    """Sees every matrix product with one of the given parameters while it is active.

    ``on_product(linear, x, transposed)`` gets the activation that meets the matrix, and whether
    the parameter is stored (in, out); what it returns replaces the activation.
    """

    def __init__(
        self,
        linears: Iterable[Linear],
        on_product: Callable[[Linear, Tensor, bool], Tensor | None],
    ) -> None:
        super().__init__()
        self.by_address = {linear.weight.data_ptr(): linear for linear in linears}
        self.on_product = on_product

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        position = _PRODUCTS.get(func)
        if position is not None and len(args) > position + 1:
            x, weight = args[position], args[position + 1]
            linear = self.by_address.get(weight.data_ptr()) if weight.ndim == 2 else None
            if linear is not None:
                transposed = (func is F.linear) != weight.is_contiguous()
                replaced = self.on_product(linear, x, transposed)
                if replaced is not None:
                    args = (*args[:position], replaced, *args[position + 1 :])
        return func(*args, **(kwargs or {}))


# where the activation stands among the arguments; the weight follows it
_PRODUCTS: dict[Any, int] = {
    F.linear: 0,
    torch.matmul: 0,
    torch.mm: 0,
    Tensor.matmul: 0,
    Tensor.__matmul__: 0,
    Tensor.mm: 0,
    torch.addmm: 1,
}


class OpenModes:
    """Modes that hooks have entered and not left yet, of each thread: two may run one module."""

    def __init__(self) -> None:
        self._of_threads: dict[int, list[TorchFunctionMode]] = {}

    def enter(self, mode: TorchFunctionMode) -> None:
        """Make a mode active in this thread."""
        mode.__enter__()
        self._of_threads.setdefault(get_ident(), []).append(mode)

    def leave(self) -> None:
        """End what this thread entered last, if anything."""
        entered = self._of_threads.get(get_ident(), [])
        if entered:
            entered.pop().__exit__(None, None, None)
        if not entered:
            self._of_threads.pop(get_ident(), None)


class _FusedHook:
    """Pair of hooks on a module that owns fused experts: a ProductMode lives while it runs."""

    def __init__(self, linears: Sequence[Linear], hook: InputHook) -> None:
        self.linears = list(linears)
        self.hook = hook
        self.modes = OpenModes()

    def before(self, module: nn.Module, args: Any) -> None:
        self.modes.enter(ProductMode(self.linears, lambda linear, x, _: self.hook(linear, x)))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.modes.leave()


def attach(linears: Iterable[Linear], hook: InputHook) -> list[Handle]:
    """Call ``hook(linear, input)`` whenever one of the linears is about to multiply its input.

    Returns:
        Handles whose ``remove()`` undoes it.
    """
    handles: list[Handle] = []
    fused: dict[nn.Module, list[Linear]] = {}
    for linear in linears:
        if linear.has_module:
            handles.append(linear.module.register_forward_pre_hook(_ModuleHook(linear, hook)))
        else:
            fused.setdefault(linear.module, []).append(linear)
    for owner, members in fused.items():
        pair = _FusedHook(members, hook)
        handles.append(owner.register_forward_pre_hook(pair.before))
        handles.append(owner.register_forward_hook(pair.after, always_call=True))
    return handles
