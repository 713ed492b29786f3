"""Decoder blocks of any causal language model: found, run and traced, never looked up by name.

Which linears a block has, which of them read the same input, which norm feeds which, and what
enters the attention product are seen by running the block once on real activations. There is no
table of architectures, and no symbolic tracing that a new forward signature could break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbench.errors import QBenchError
from qbench.models.linear import Linear, ProductMode
from qbench.models.norms import NormFold, find_folds

BlockRunner = Callable[[Tensor, int], Tensor]
"""(hidden states, batch index) -> hidden states; the index picks the captured arguments."""


@dataclass(eq=False)
class Block:
    """One decoder block with what tracing found in it."""

    name: str
    """Full name in the model, as in ``model.layers.0``."""
    module: nn.Module
    runner: BlockRunner
    linears: dict[str, Linear] = field(default_factory=dict)
    """Every matrix to quantize, by its name relative to the block, in order of execution."""
    input_groups: list[list[str]] = field(default_factory=list)
    """Names of linears that read the same tensor, in order of execution."""
    folds: list[NormFold] = field(default_factory=list)
    """Norms whose per-channel scale can move into the linears they feed; only baselines with a
    ``transform`` find them here."""
    unfoldable: list[tuple[str, str]] = field(default_factory=list)
    """Norms that feed linears but cannot take a scale: (name, why)."""
    attention_inputs: list[str] = field(default_factory=list)
    """Linears whose outputs become queries, keys or values."""
    attention: nn.Module | None = None
    """The module that holds the attention product."""
    uses_sdpa: bool = False
    """Whether that product is torch's scaled_dot_product_attention."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Matrices that stay in full precision: name -> why."""
    is_last: bool = False
    """Whether no block reads what this one gives."""

    def run(self, hidden: Tensor, index: int) -> Tensor:
        """The block's output for hidden states (sequences, tokens, hidden) of a captured batch."""
        return self.runner(hidden, index)

    def release(self) -> None:
        """Let go of the captured arguments: the block is not going to be replayed any more."""
        self.runner = _released


def _released(hidden: Tensor, index: int) -> Tensor:
    raise RuntimeError("this block was released and cannot be replayed")


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names, first to last.

    They are the members of the outermost ``nn.ModuleList`` that holds the most parameters.

    Raises:
        QBenchError: if the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o + ".") for o in outer):
            continue
        outer.append(name)
        size = sum(p.numel() for p in module.parameters())
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise QBenchError(
            f"{type(model).__name__} has no list of decoder blocks; qbench needs a causal language "
            "model built from a torch.nn.ModuleList of blocks"
        )
    _, name, blocks = best
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a block output: a tensor, or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


class _Recorder:
    """Everything one run of a block shows: products, norm outputs, where attention happens."""

    def __init__(self, block: nn.Module, linears: Iterable[Linear], leading: torch.Size) -> None:
        self.leading = leading
        """(sequences, tokens) that the block runs on."""
        self.names = {module: name for name, module in block.named_modules()}
        self.by_module = {linear.module: linear for linear in linears}
        self.stack: list[str] = []
        self.products: list[tuple[Linear, Tensor, str]] = []
        """(matrix, its input, name of the innermost running module), in order of execution."""
        self.norms: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        """Modules with a per-channel weight: name -> (module, input, output)."""
        self.attention: str | None = None
        self.before_attention = 0
        """How many products had been seen when the attention product came."""
        self.sdpa = False

    def product(self, linear: Linear, x: Tensor, transposed: bool) -> None:
        linear.transposed = transposed
        again = any(linear is known for known, _, _ in self.products)
        linear.sees_sequences = x.ndim == 3 and x.shape[:2] == self.leading and not again
        self.products.append((linear, x, self.stack[-1] if self.stack else ""))

    def saw_attention(self, sdpa: bool) -> None:
        if self.attention is None:
            self.attention = self.stack[-1] if self.stack else ""
            self.before_attention = len(self.products)
            self.sdpa = sdpa

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append(self.names[module])
        if module in self.by_module:
            linear = self.by_module[module]
            self.product(linear, args[0], linear.transposed)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.stack.pop()
        weight: Any = getattr(module, "weight", None)
        is_vector = isinstance(weight, nn.Parameter) and weight.ndim == 1
        alone = len(args) == 1 and not kwargs  # a gated norm reads more than its input
        if alone and is_vector and isinstance(output, Tensor):
            if output.shape[-1:] == weight.shape:
                self.norms[self.names[module]] = (module, args[0], output)


class _TraceMode(ProductMode):
    """A ProductMode that also notices the attention product."""

    def __init__(self, linears: Iterable[Linear], recorder: _Recorder) -> None:
        super().__init__(linears, recorder.product)
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.recorder.saw_attention(sdpa=True)
        elif func in (F.softmax, torch.softmax, Tensor.softmax) and args[0].ndim == 4:
            self.recorder.saw_attention(sdpa=False)
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def _recording(
    block: nn.Module, linears: Iterable[Linear], loose: Iterable[Linear], leading: torch.Size
) -> Iterator[_Recorder]:
    recorder = _Recorder(block, linears, leading)
    handles = []
    for module in block.modules():
        if module is not block:
            handles.append(module.register_forward_pre_hook(recorder.before))
            handles.append(
                module.register_forward_hook(recorder.after, with_kwargs=True, always_call=True)
            )
    try:
        with _TraceMode(loose, recorder):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def trace_block(
    name: str, module: nn.Module, runner: BlockRunner, hidden: Tensor, folds: bool = True
) -> tuple[Block, Tensor]:
    """Run a block once on ``hidden`` (sequences, tokens, hidden): what was seen, and its output.

    Without ``folds`` no norm is tried out: that takes further runs, and is for transforms alone.
    """
    owned, loose = _owned_matrices(module), _loose_matrices(module)
    with _recording(module, owned, loose, hidden.shape[:2]) as seen:
        reference = runner(hidden, 0)
    block = Block(name, module, runner)
    _sort_matrices(block, owned, loose, [linear for linear, _, _ in seen.products])
    _group_by_input(block, seen)
    if seen.attention is not None:
        prefix = f"{seen.attention}." if seen.attention else ""
        block.attention = module.get_submodule(seen.attention)
        block.uses_sdpa = seen.sdpa
        block.attention_inputs = [
            linear.name
            for linear, _, inside in seen.products[: seen.before_attention]
            if linear.name in block.linears and f"{inside}.".startswith(prefix)
        ]
    if folds:
        readers = [(linear, x) for linear, x, _ in seen.products]
        reached = {linear.name for linear, x in readers if x.numel()}
        unseen = [linear for linear in (*owned, *loose) if linear.name not in reached]
        block.folds, block.unfoldable = find_folds(
            seen.norms, readers, unseen, lambda: runner(hidden, 0), reference
        )
    return block, reference


def _owned_matrices(block: nn.Module) -> list[Linear]:
    """Matrices with a module of their own."""
    return [
        Linear(name, module, transposed=isinstance(module, Conv1D))
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def _loose_matrices(block: nn.Module) -> list[Linear]:
    """Matrices that are parameters of some other module: routers, and experts in one tensor."""
    found = []
    for prefix, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}".lstrip(".")
            if parameter.ndim == 2:
                found.append(Linear(name, module, key))
            elif parameter.ndim == 3:
                experts = range(parameter.shape[0])
                found += [Linear(f"{name}.{e}", module, key, expert=e) for e in experts]
    return found


def _sort_matrices(
    block: Block, owned: list[Linear], loose: list[Linear], seen: list[Linear]
) -> None:
    """Put every matrix under ``linears`` (in order of execution) or ``skipped``."""
    fused = {(x.module, x.parameter): x.transposed for x in seen if x.expert is not None}
    wanted = {
        linear.name: linear for linear in seen if linear.has_module or linear.expert is not None
    }
    for linear in owned:
        wanted.setdefault(linear.name, linear)  # an expert that this sample did not reach
    for linear in loose:
        if (linear.module, linear.parameter) in fused:
            linear.transposed = fused[linear.module, linear.parameter]
            wanted.setdefault(linear.name, linear)
        elif linear.expert is not None:
            parameter = linear.name.rpartition(".")[0]
            block.skipped[parameter] = "three-dimensional parameter that no known product reads"
        else:
            block.skipped[linear.name] = "not an nn.Linear (a router, for instance)"
    block.linears = wanted


def _group_by_input(block: Block, seen: _Recorder) -> None:
    """Linears that read one tensor form a group.

    One that was not reached, met no token or read several tensors stands alone.
    """
    reads: dict[str, set[tuple[int, int, int]]] = {}
    for linear, x, _ in seen.products:
        if linear.name in block.linears:
            reads.setdefault(linear.name, set()).add((x.data_ptr(), x.numel(), x.shape[-1]))
    groups: dict[object, list[str]] = {}
    for name in [*reads, *(name for name in block.linears if name not in reads)]:
        keys = reads.get(name, set())
        shared = len(keys) == 1 and all(numel for _, numel, _ in keys)
        groups.setdefault(next(iter(keys)) if shared else name, []).append(name)
    block.input_groups = list(groups.values())
