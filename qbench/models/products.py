"""Products with weights, ``F.linear``, on a CPU.

Torch hands float32 products to the BLAS that it was built with: MKL in the wheels for x86, which
reaches 0.6 to 0.9 of what oneDNN does with most shapes on a processor of another maker. oneDNN is
in the same wheels and does torch's bfloat16 products; it compiles a kernel for the processor at
hand, whoever made it (``python -m benchmarks.products`` measures both; processors of Intel were not
at hand). It computes in float32 all the same: only the order of the sums differs. In small models
waking a second thread costs more than the thread spares, so these run on one.

Left out: products that need a gradient, GPT-2's ``Conv1D``, single small products, and other
processors, where torch's own choice stands.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.errors import QBenchError
from qbench.models.blocks import find_blocks

SMALL = 1 << 18
"""Weights in the largest matrix of blocks and head below which a model is small (512 x 512)."""
WORTH_IT = 1 << 24
"""Multiplications from which on a kernel of its own is worth its compilation."""


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """While active, a model on a CPU multiplies as suits its size, in this Python thread.

    Large float32 products run in oneDNN, on x86; small models run on one thread, whatever the
    number of torch's threads, which is the process's and comes back afterwards.
    """
    largest = _largest_matrix(model)
    if largest is None or device_kind(model) != "cpu":
        yield
    elif largest.numel() < SMALL:
        with on_threads(1):
            yield
    elif largest.dtype is torch.float32 and has_onednn():
        with _Products():
            yield
    else:
        yield


def _largest_matrix(model: nn.Module) -> Tensor | None:
    """Of the first block and the output head; None where a model has no blocks."""
    try:
        _, block = find_blocks(model)[0]
    except QBenchError:
        return None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    parts = [block] if head is None else [block, head]
    matrices = [p for part in parts for p in part.parameters() if p.ndim > 1]
    return max(matrices, key=Tensor.numel, default=None)


def device_kind(model: nn.Module) -> str:
    """The kind of device; blocks that are on disk have none of their own."""
    kinds = (p.device.type for p in model.parameters())
    return next((kind for kind in kinds if kind != "meta"), "cpu")


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """While active, torch runs each operation of this Python thread on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN on an x86 CPU, and it multiplies as it should."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(2, 4)
    try:
        return torch.equal(_product(x, weight, None), x @ weight.T)
    except (RuntimeError, TypeError):  # an operator of torch's own, which may change
        return False


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` as :func:`fast_products` has it done in a model that is not small."""
    if has_onednn() and _suits(x, weight):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and weight.ndim == 2
        and x.numel() * weight.shape[0] >= WORTH_IT
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    found: Tensor = product(x.contiguous(), weight, bias, "none", [], "")
    return found


class _Products(TorchFunctionMode):
    """Sends ``F.linear`` to oneDNN."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            return fast_linear(*args)
        return func(*args, **(kwargs or {}))
