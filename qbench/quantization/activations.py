"""Activation quantizers: hooks that round what enters linears and the attention product.

They are the same for every baseline and never write into the tensor they are given. Scales are
taken from each token or from the whole input at run time, or are fixed per tensor at calibration
(SmoothQuant 2211.10438 Table 2: O1 per token, O2 per tensor, O3 static).

Keys and values are rounded per token and head where attention reads them, so after rotary
embeddings, as a quantized cache would hand them out; on the activations' grid, or on the default
one of their width where that grid does not offer it. ``bmm`` rounds the outputs of the query, key
and value projections instead, as SmoothQuant's code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbench.errors import QBenchError
from qbench.grid import RANGE_GRIDS, Affine, Grid, default_activation_grid, get_grid
from qbench.models.blocks import Block
from qbench.models.linear import Handle, Linear, OpenModes, attach
from qbench.quantization.observers import Observer
from qbench.scheme import Scheme


class Range(Observer):
    """Smallest and largest value of the whole input, (2,)."""

    name = "range"

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, x: Tensor, n_sequences: int) -> None:
        """Widen the range."""
        seen = torch.stack([x.min(), x.max()])
        if self.value is not None:
            seen = torch.stack(
                [torch.minimum(self.value[0], seen[0]), torch.maximum(self.value[1], seen[1])]
            )
        self.value = seen

    def result(self) -> Tensor | None:
        """(smallest, largest) so far."""
        return self.value


@dataclass
class ActivationQuantizer:
    """Rounds a tensor (..., channels) to a named grid."""

    bits: int
    grid: str
    granularity: str
    """token (last dimension) or tensor"""
    static: Affine | None = None
    """Fixed scale and zero point, (1, 1) each."""

    @classmethod
    def of(cls, scheme: Scheme, observed: Tensor | None = None) -> ActivationQuantizer:
        """The quantizer of a resolved scheme; static ones need the observed (min, max)."""
        static = None
        if scheme.static:
            if observed is None:
                raise QBenchError(f"scheme {scheme}: static scales need calibration data")
            static = get_grid(scheme.agrid).fit(observed.reshape(1, -1), scheme.abits)
        return cls(scheme.abits, scheme.agrid, scheme.a_granularity, static)

    def __call__(self, x: Tensor) -> Tensor:
        """A rounded copy of ``x`` in its own dtype.

        A scale "per tensor" is taken over all of ``x``, or over the sequences that
        :func:`scales_of_sequences` tells of.
        """
        grid, sequences = get_grid(self.grid), _SEQUENCES.get()
        rows = x.float() if x.dtype.itemsize < 4 else x
        if self.static is not None:
            affine = Affine(*(part.to(x.device) for part in self.static))
        elif self.granularity == "tensor" and sequences is not None:
            affine, rows = self._of_sequences(rows, sequences), rows.flatten(1)
        else:
            rows = rows.reshape(1, -1) if self.granularity == "tensor" else rows
            affine = grid.fit(rows, self.bits)
        return _round(rows, grid, affine, self.bits).reshape(x.shape).to(x.dtype)

    def is_like(self, other: ActivationQuantizer) -> bool:
        """Whether the other one makes the same of the same tensor."""
        if (self.bits, self.grid, self.granularity) != (other.bits, other.grid, other.granularity):
            return False
        if self.static is None or other.static is None:
            return self.static is other.static
        return all(map(torch.equal, self.static, other.static))

    def _of_sequences(self, x: Tensor, sequences: _Sequences) -> Affine:
        """Scale and zero point of each sequence of (sequences, tokens, channels), (sequences, 1).

        Raises:
            QBenchError: for anything else than that many sequences.
        """
        grid, inside = get_grid(self.grid), sequences.inside(x)
        if self.grid not in RANGE_GRIDS:
            own = zip(x, sequences.lengths, strict=True)
            fitted = [grid.fit(one[:n].reshape(1, -1), self.bits) for one, n in own]
            return Affine(*(torch.cat(parts) for parts in zip(*fitted, strict=True)))
        # filling repeats the first token, which is no filling
        low, high = (ends.where(inside, ends[:, :1]) for ends in (x.amin(-1), x.amax(-1)))
        return grid.fit(torch.stack([low.amin(-1), high.amax(-1)], dim=-1), self.bits)


def _round(rows: Tensor, grid: Grid, affine: Affine, bits: float) -> Tensor:
    """Rows (..., n) as a grid with a scale and a zero point per row rounds them."""
    low, high = grid.codes(bits)
    if low < 0:  # signed codes have the zero point 0: half of the work is to add it
        return (rows / affine.scale).round_().clamp_(low, high).mul_(affine.scale)
    return grid.decode(grid.encode(rows, affine, bits), affine)


@dataclass
class Switch:
    """What all activation quantizers of one model obey."""

    on: bool = True


_SWITCH = "_qbench_activations"
"""Attribute of a model whose activations are quantized."""


def switch_of(model: nn.Module) -> Switch:
    """The switch of a model's activation quantizers, made where there is none yet."""
    if not hasattr(model, _SWITCH):
        setattr(model, _SWITCH, Switch())
    found: Switch = getattr(model, _SWITCH)
    return found


@contextmanager
def activations_off(model: nn.Module) -> Iterator[None]:
    """While active, the model computes with quantized weights and untouched activations."""
    switch = switch_of(model)
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before


@dataclass
class _Sequences:
    """Sequences that are filled up to one length."""

    lengths: Sequence[int]
    _inside: Tensor | None = None

    def inside(self, x: Tensor) -> Tensor:
        """Which tokens of (sequences, tokens, channels) are not filling, (sequences, tokens)."""
        if x.ndim != 3 or len(x) != len(self.lengths) or x.shape[1] != max(self.lengths):
            raise QBenchError(
                f"{len(self.lengths)} sequences of {max(self.lengths)} tokens were to have scales "
                f"of their own, but a linear reads {tuple(x.shape)}; evaluate with "
                "batching='one row'"
            )
        known = self._inside
        if known is None or known.device != x.device or known.shape != x.shape[:2]:
            places = torch.arange(x.shape[1], device=x.device)
            ends = torch.tensor(self.lengths, device=x.device)
            known = self._inside = places < ends[:, None]
        return known


_SEQUENCES: ContextVar[_Sequences | None] = ContextVar("sequences of a batch", default=None)


@contextmanager
def scales_of_sequences(lengths: Sequence[int] | None) -> Iterator[None]:
    """While active in this thread, scales "per tensor" are taken over each sequence alone.

    Sequences can then share a batch and get what each would get alone.

    Args:
        lengths: of each sequence in every (sequences, tokens, channels) that a linear reads; the
            tokens behind are filling. None takes scales over the whole input.
    """
    token = _SEQUENCES.set(None if lengths is None else _Sequences(lengths))
    try:
        yield
    finally:
        _SEQUENCES.reset(token)


class _InputHook:
    """Rounds what linears read; a tensor that several read alike, one after another, once.

    Nobody may write into that tensor, or into what came of it, in between.
    """

    def __init__(
        self,
        quantizers: dict[str, ActivationQuantizer],
        switch: Switch,
        block: Block,
    ) -> None:
        """The quantizers of a block's linears, by name; others of its linears have none."""
        self.quantizers, self.switch = quantizers, switch
        self.next: dict[str, str] = {}
        """Linear -> the one that is going to read the same and round it alike."""
        groups = {name: number for number, group in enumerate(block.input_groups) for name in group}
        for name, following in pairwise(block.linears):  # in the order they run
            if {name, following} <= quantizers.keys() and groups[name] == groups[following]:
                if quantizers[name].is_like(quantizers[following]):
                    self.next[name] = following
        self.held: dict[int, tuple[str, Tensor, Tensor]] = {}
        """Per thread: who is to read again what was rounded last, that, and what came of it."""

    def __call__(self, linear: Linear, x: Tensor) -> Tensor | None:
        if not self.switch.on:
            return None
        reader, known, rounded = self.held.pop(get_ident(), ("", x, x))
        if reader != linear.name or known is not x:
            rounded = self.quantizers[linear.name](x)
        if linear.name in self.next:
            self.held[get_ident()] = self.next[linear.name], x, rounded
        return rounded

    def release(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let go of what would have been read again, had the block run to its end."""
        self.held.pop(get_ident(), None)


@dataclass
class _OutputHook:
    quantizer: ActivationQuantizer
    switch: Switch

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self.quantizer(output) if self.switch.on else None


class _RoundKeysAndValues(TorchFunctionMode):
    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            kwargs = named | {k: self.quantizer(named[k]) for k in ("key", "value")}
            args = args[3:]
            return func(*(kwargs.pop(k) for k in ("query", "key", "value")), *args, **kwargs)
        return func(*args, **kwargs)


class _AttentionHook:
    """Hooks that keep a mode active while an attention module runs."""

    def __init__(self, quantizer: ActivationQuantizer, switch: Switch) -> None:
        self.quantizer, self.switch = quantizer, switch
        self.modes = OpenModes()

    def before(self, module: nn.Module, args: Any) -> None:
        if self.switch.on:
            self.modes.enter(_RoundKeysAndValues(self.quantizer))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.modes.leave()


def check_activations(block: Block, scheme: Scheme) -> None:
    """Refuse what a traced block cannot do, before anything is changed.

    Raises:
        QBenchError: KV bits in an architecture whose attention product is not torch's SDPA, or bmm
            where no attention product was seen.
    """
    if scheme.bmm and not block.attention_inputs:
        raise QBenchError(f"bmm: no linear of {block.name} was seen to feed an attention product")
    if scheme.kvbits < 16 and (block.attention is None or not block.uses_sdpa):
        raise QBenchError(
            f"KV{scheme.kvbits}: the attention of {block.name} does not go through "
            "torch's scaled_dot_product_attention, where keys and values are rounded; "
            "use kvbits 16 for this architecture"
        )


@dataclass
class Attached:
    """The activation quantizers of one block."""

    notes: list[str] = field(default_factory=list)
    """For the record."""
    handles: list[Handle] = field(default_factory=list)
    """Each undoes one hook."""
    sees_sequences: bool = True
    """Whether every quantized input is (sequences, tokens, channels)."""


def quantize_activations(
    block: Block, scheme: Scheme, ranges: dict[str, Tensor], switch: Switch
) -> Attached:
    """Attach the activation quantizers of one block; nothing else is changed.

    Args:
        block: traced and checked.
        scheme: resolved, of the whole model (overrides are looked up per linear).
        ranges: for static scales, the observed (min, max) per linear name. One that is missing
            (an expert that no calibration token reached) leaves scales per token.
        switch: of the model (:func:`switch_of`).
    """
    attached, quantizers = Attached(), {}
    for name, linear in block.linears.items():
        own = scheme.for_linear(f"{block.name}.{name}")
        if own.needs_static_scales and name not in ranges:
            own = replace(own, static=False, a_granularity="token")
            attached.notes.append(
                f"{block.name}.{name}: no calibration token reached it, scales per token"
            )
        if own.abits < 16:
            quantizers[name] = ActivationQuantizer.of(own, ranges.get(name))
            attached.sees_sequences &= linear.sees_sequences
    if quantizers:
        hook = _InputHook(quantizers, switch, block)
        attached.handles += attach([block.linears[name] for name in quantizers], hook)
        attached.handles.append(block.module.register_forward_hook(hook.release, always_call=True))
    if scheme.bmm:
        dynamic = ActivationQuantizer(
            scheme.abits, scheme.agrid, "tensor" if scheme.static else scheme.a_granularity
        )
        for linear in (block.linears[name] for name in block.attention_inputs):
            attached.sees_sequences &= linear.sees_sequences
            handle = linear.module.register_forward_hook(_OutputHook(dynamic, switch))
            attached.handles.append(handle)
    if scheme.kvbits < 16 and block.attention is not None:
        offered = get_grid(scheme.agrid).offers(scheme.kvbits)
        agrid = scheme.agrid if offered else default_activation_grid(scheme.kvbits)
        pair = _AttentionHook(ActivationQuantizer(scheme.kvbits, agrid, "token"), switch)
        attention = block.attention
        attached.handles.append(attention.register_forward_pre_hook(pair.before))
        attached.handles.append(attention.register_forward_hook(pair.after, always_call=True))
    return attached
