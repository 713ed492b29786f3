"""Build the model of a GPTQ checkpoint: codes become plain weights in transformers' own class.

Weights are ``scale * (code - zero)`` in float32, exactly so (a 16-bit scale times an integer below
2^9), then cast to the model's dtype; the kernels of the libraries that write the format differ from
it in the last bits of a sum. Nothing is installed for it, and no code of the checkpoint is run.
Names, merged experts and tied weights are left to transformers, as for any other checkpoint.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbench.errors import QBenchError
from qbench.models.blocks import find_blocks
from qbench.models.checks import check_finite
from qbench.models.files import first_line
from qbench.models.gptq_format import DAMAGED, PARTS, V1, V2, WORD, GPTQFormat
from qbench.record import LayerReport
from qbench.scheme import Scheme

if TYPE_CHECKING:
    from qbench.models.checkpoints import Checkpoint

_MARK = "_qbench_stored_scheme"
"""Attribute of a model whose weights were quantized when they were stored."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes (n, columns), uint8, of int32 words (n * bits / 32, columns).

    Code i occupies bits ``i * bits`` and up of its column's words, the lowest first, and at 3 bits
    goes on in the next word.
    """
    unit = 3 if bits == 3 else 1  # words after which codes begin with a word again
    per_unit = unit * WORD // bits
    mask = 2**bits - 1
    grouped = words.unflatten(0, (-1, unit))
    codes = torch.empty(len(grouped), per_unit, words.shape[1], dtype=torch.uint8)
    for place in range(per_unit):
        word, shift = divmod(place * bits, WORD)
        found = grouped[:, word] >> shift  # the sign is carried down, into what the mask drops
        here = WORD - shift
        if here < bits:
            found = (found & (2**here - 1)) | (grouped[:, word + 1] << here)
        codes[:, place] = found & mask
    return codes.flatten(0, 1)


def zero_points(qzeros: Tensor, fmt: GPTQFormat) -> Tensor:
    """Zero points (groups, out_features), int16, of packed ones (groups, out_features * b / 32)."""
    if fmt.carries:
        ones = sum(1 << place for place in range(0, WORD, fmt.bits))
        qzeros = qzeros + ones  # int32: what leaves the word is lost, as it was when subtracted
    zeros = unpack(qzeros.T, fmt.bits).T.to(torch.int16)
    if fmt.version == V1 and not fmt.carries:
        zeros = (zeros + 1) & (2**fmt.bits - 1)
    return zeros


def damaged_words(qzeros: Tensor, fmt: GPTQFormat) -> int:
    """Words of zero points that look as AutoGPTQ leaves them where one is 0.

    Its packer stores -1 there, which sets all higher bits of the word: the zero points that follow
    in it read as 0 too, whatever they were. Two zero points of 0 look the same.
    """
    if fmt.version != V1 or fmt.carries or fmt.sym:
        return 0
    two = 2 * fmt.bits
    return int(((qzeros >> (WORD - two)) & (2**two - 1) == 2**two - 1).sum())


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Weights (out_features, in_features), float32.

    Args:
        codes: (in_features, out_features).
        zeros: (groups, out_features).
        scales: like ``zeros``.
        groups: group of every input, (in_features,).
    """
    weight = codes.T.contiguous().float()  # turned while a code is a byte
    offset, step = zeros.T.float(), scales.T.float()
    size = len(groups) // len(zeros)
    if torch.equal(groups, torch.arange(len(zeros)).repeat_interleave(size)):
        grouped = weight.unflatten(1, (-1, size))
        grouped.sub_(offset.unsqueeze(-1)).mul_(step.unsqueeze(-1))
        return weight
    return weight.sub_(offset[:, groups]).mul_(step[:, groups])


class _Files:
    """The tensors of a checkpoint's files by name."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name, self.paths, self.stack = name, paths, ExitStack()
        self.where: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        for path in self.paths:
            file = self.stack.enter_context(safe_open(path, framework="pt"))
            self.where |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: Any) -> None:
        self.where.clear()
        self.stack.close()

    def read(self, name: str) -> Tensor:
        """A tensor that is finite, or a QBenchError."""
        tensor: Tensor = self.where[name].get_tensor(name)
        if tensor.is_floating_point():
            check_finite(self.name, name, tensor)
        return tensor

    def groups(self, linear: str, inputs: int, fmt: GPTQFormat) -> Tensor:
        """The group of every input of a linear, (in_features,).

        Raises:
            QBenchError: for groups that are not of the configured size.
        """
        size = fmt.group_size if fmt.group_size > 0 else inputs
        expected = torch.arange(inputs) // size
        if f"{linear}.g_idx" not in self.where:
            return expected
        found = self.read(f"{linear}.g_idx").long()
        if not found.numel():
            return expected
        fits = found.min() >= 0 and found.max() <= expected[-1]
        if not fits or not torch.equal(found.bincount(minlength=1), expected.bincount()):
            raise QBenchError(
                f"{self.name}: {linear}.g_idx does not put {size} inputs into each of "
                f"{expected[-1] + 1} groups; the file is damaged or its group_size wrong"
            )
        return found


def state_dict(checkpoint: Checkpoint, dtype: str) -> tuple[type, dict[str, Tensor]]:
    """The model class, and plain tensors by the names that ordinary checkpoints store.

    Raises:
        QBenchError: for tensors that are damaged or contradict the configuration.
    """
    fmt = _format(checkpoint)
    skeleton = checkpoint._skeleton()
    modules = dict(skeleton.named_modules())
    expected = skeleton.state_dict()
    kind = getattr(torch, dtype)
    state: dict[str, Tensor] = {}
    packed = {f"{linear}.{part}" for linear in fmt.linears for part in PARTS}
    biases = {f"{linear}.bias" for linear in fmt.linears}
    try:
        with _Files(checkpoint.name, checkpoint.weight_files) as files:
            for linear in fmt.linears:
                weight = _weight(files, linear, fmt)
                if isinstance(modules.get(linear), Conv1D):
                    weight = weight.T.contiguous()
                state[f"{linear}.weight"] = weight.to(kind)
            for name in files.where.keys() - packed:
                tensor = files.read(name)
                # early AutoGPTQ gave every linear a bias, zeros where the model has none
                if name in biases and name not in expected and not tensor.any():
                    continue
                state[name] = tensor.to(kind) if tensor.is_floating_point() else tensor
    except (OSError, RuntimeError, SafetensorError) as error:
        raise QBenchError(f"cannot load {checkpoint.name}: {first_line(error)}") from error
    return type(skeleton), state


def _weight(files: _Files, linear: str, fmt: GPTQFormat) -> Tensor:
    codes = unpack(files.read(f"{linear}.qweight"), fmt.bits)
    zeros = zero_points(files.read(f"{linear}.qzeros"), fmt)
    middle = 2 ** (fmt.bits - 1)
    if fmt.sym and (zeros != middle).any():
        odd = int(zeros[zeros != middle][0])
        other = V1 if fmt.version == V2 else V2
        hint = f"checkpoint_format should be {other}" if abs(odd - middle) == 1 else "sym is wrong"
        raise QBenchError(
            f"{files.name}: {linear} has a zero point {odd} where symmetric {fmt.bits}-bit codes "
            f"have {middle}; {hint}, or the file is damaged"
        )
    groups = files.groups(linear, len(codes), fmt)
    return dequantize(codes, zeros, files.read(f"{linear}.scales"), groups)


def layer_reports(checkpoint: Checkpoint, model: nn.Module) -> list[LayerReport]:
    """One report for each matrix: its stored bits, and no error, for what it was is not known."""
    fmt = _format(checkpoint)
    scheme, found = str(fmt.own_scheme.scheme), []
    with _Files(checkpoint.name, checkpoint.weight_files) as files:
        for linear in fmt.linears:
            words, outputs = checkpoint.tensors[f"{linear}.qweight"].shape
            inputs = words * WORD // fmt.bits
            groups = files.groups(linear, inputs, fmt)
            indexed = not torch.equal(groups, groups.sort().values)
            damaged = damaged_words(files.read(f"{linear}.qzeros"), fmt)
            found.append(
                LayerReport(
                    name=linear,
                    shape=(outputs, inputs),
                    scheme=scheme,
                    relative_error=None,
                    stored_bits=fmt.stored_bits(checkpoint.tensors, linear, indexed),
                    extra={DAMAGED: damaged} if damaged else {},
                )
            )
    for prefix, block in find_blocks(model):
        for name, module in block.named_modules():
            full = f"{prefix}.{name}"
            if isinstance(module, nn.Linear) and full not in fmt.linears:
                found.append(_kept(full, module))
    return found


def _kept(name: str, linear: nn.Linear) -> LayerReport:
    """The report of a linear in the blocks that the checkpoint holds in full precision."""
    return LayerReport(
        name=name,
        shape=(linear.out_features, linear.in_features),
        scheme=str(Scheme()),
        relative_error=0.0,
        stored_bits=16.0 * linear.weight.numel(),
    )


def mark_stored_(model: nn.Module, fmt: GPTQFormat) -> None:
    """Note on a model, in place, that its weights were quantized when they were stored."""
    setattr(model, _MARK, str(fmt.own_scheme))


def check_not_stored(model: nn.Module) -> None:
    """Refuse to quantize a model whose weights were quantized when they were stored.

    Raises:
        QBenchError: naming the scheme.
    """
    known = getattr(model, _MARK, None)
    if known is not None:
        raise QBenchError(
            f"the model was loaded from a checkpoint that is quantized already, {known}; give its "
            "full-precision original"
        )


def _format(checkpoint: Checkpoint) -> GPTQFormat:
    if checkpoint.gptq is None:
        raise QBenchError(f"{checkpoint.name} is no GPTQ checkpoint")
    return checkpoint.gptq
