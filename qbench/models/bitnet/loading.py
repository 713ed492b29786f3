"""Build the model of a BitNet checkpoint: transformers' own classes, with qbench's BitLinear.

transformers' loader is not used: it needs a compiler for packed weights, unpacks them in every
forward pass, runs a checkpoint without its ``quantization_config`` unrounded and drops norms that a
class does not know. Here the class is built without weights, its linears become BitLinear, and the
files are read tensor by tensor, so that no more than one tensor is held twice. What a checkpoint
was trained to compute is computed; remote code is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qbench.errors import QBenchError
from qbench.models.bitnet.formats import CODES_PER_BYTE, SCALE, BitNetFormat, is_kept
from qbench.models.bitnet.latent import unquantized_
from qbench.models.bitnet.layers import B158, BitLinear, bitlinears
from qbench.models.bitnet.quantizers import WeightCodes
from qbench.models.bitnet.saving import unpack
from qbench.models.blocks import find_blocks
from qbench.models.checks import check_finite, check_tensors, quiet
from qbench.models.files import first_line

if TYPE_CHECKING:
    from qbench.models.checkpoints import Checkpoint

Weights = Literal["frozen", "online", "latent"]
"""What the linears hold: the quantized weights; latent ones, quantized in every forward pass; or
latent ones that are not quantized at all, in ordinary linears."""


class NormedBitLinear(BitLinear):
    """A BitLinear behind an RMS norm with weights (transformers' ``use_rms_norm``)."""

    rms_norm: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        return super().forward(self.rms_norm(input))


def load(
    checkpoint: Checkpoint, weights: Weights = "frozen", dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """The model of a BitNet checkpoint in eval mode, every tensor accounted for.

    Args:
        checkpoint: one whose ``bitnet`` is a format.
        weights: what its linears hold; "online" leaves gradients on, for training.
        dtype: of weights and activations. Weights are quantized in the precision they are stored
            in, at least float32.
        device: where the model is to be.

    Raises:
        QBenchError: for tensors that are missing, unknown, misshapen or not finite, codes that are
            not ternary, and latent weights asked of a checkpoint that has none.
    """
    fmt = _format(checkpoint)
    if weights != "frozen" and not fmt.is_latent:
        raise QBenchError(
            f"{checkpoint.name} holds ternary codes and no latent weights; give the checkpoint it "
            "was made from, or drop --latent"
        )
    model = _build(checkpoint, fmt, dtype)
    try:
        with _Files(checkpoint, fmt) as files, torch.no_grad():
            _fill_(model, files, weights == "frozen", getattr(torch, dtype), torch.device(device))
    except (OSError, RuntimeError) as error:
        raise QBenchError(f"cannot load {checkpoint.name}: {first_line(error)}") from error
    if weights == "latent":
        unquantized_(model)
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return placed.eval().requires_grad_(weights == "online")


def skeleton(checkpoint: Checkpoint, weights: Weights) -> PreTrainedModel:
    """The model without weights: its modules are those of :func:`load`, their tensors on meta.

    Raises:
        QBenchError: as :func:`load`, for what the configuration alone shows.
    """
    model = _build(checkpoint, _format(checkpoint), "float32")
    return unquantized_(model) if weights == "latent" else model


def _format(checkpoint: Checkpoint) -> BitNetFormat:
    if checkpoint.bitnet is None:
        raise QBenchError(f"{checkpoint.name} is no BitNet checkpoint")
    return checkpoint.bitnet


def _build(checkpoint: Checkpoint, fmt: BitNetFormat, dtype: str) -> PreTrainedModel:
    """The class that computes what the checkpoint was trained for, its parameters on meta."""
    config = checkpoint.load_config()
    for entry in ("quantization_config", "auto_map"):
        config.__dict__.pop(entry, None)
    if fmt.layout == "1bitLLM":
        config = as_bitnet_config(config)
    try:
        # buffers (rotary frequencies) are computed, parameters are only named
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]), quiet():
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=False
            )
            if fmt.layout != "qbench b1":
                _replace_linears_(checkpoint.name, model, fmt)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:  # no model is made of it
        raise QBenchError(f"cannot load {checkpoint.name}: {first_line(error)}") from error
    return model


def as_bitnet_config(config: PretrainedConfig) -> BitNetConfig:
    """A configuration of 1bitLLM's, which says llama, as that of transformers' BitNet.

    The two classes differ in their defaults (rotary base, activation function, ε), so every field
    they share is taken over as the first one understands it.
    """
    given, known = config.to_dict(), BitNetConfig().to_dict()
    own = ("model_type", "architectures", "transformers_version")
    return BitNetConfig(**{k: v for k, v in given.items() if k in known and k not in own})


def _replace_linears_(name: str, model: PreTrainedModel, fmt: BitNetFormat) -> None:
    """Make a BitLinear of every linear that the checkpoint quantizes, in place."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    owned = {f"{n}.weight" for n in linears}
    for block_name, block in find_blocks(model):
        for key, parameter in block.named_parameters():
            if parameter.ndim > 1 and f"{block_name}.{key}" not in owned:
                raise QBenchError(
                    f"{name} is a {type(model).__name__}, where {block_name}.{key} is no linear; "
                    "qbench runs BitNet models whose blocks consist of linears"
                )
    head = model.get_output_embeddings()
    for linear_name, linear in linears.items():
        if (linear is head) if fmt.keep is None else is_kept(linear_name, fmt.keep):
            continue
        kind = BitLinear if fmt.norm_eps is None else NormedBitLinear
        layer = kind.from_linear(linear, B158)
        if fmt.norm_eps is not None:
            layer.rms_norm = LlamaRMSNorm(linear.in_features, eps=fmt.norm_eps)
        model.set_submodule(linear_name, layer)


class _Files:
    """The tensors of a checkpoint by the names they have in the model, read one at a time."""

    def __init__(self, checkpoint: Checkpoint, fmt: BitNetFormat) -> None:
        self.name, self.fmt, self.paths = checkpoint.name, fmt, checkpoint.weight_files
        self.stack = ExitStack()
        self.readers: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> _Files:
        for path in self.paths:
            file = self.stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():
                name = self.renamed(key)
                self.readers[name] = partial(file.get_tensor, key)
                self.shapes[name] = tuple(file.get_slice(key).get_shape())
        return self

    def add_ones(self, names: Iterable[str], sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Stand in for weights that are not stored because they are ones."""
        for name in names:
            self.readers[name] = partial(torch.ones, sizes[name])
            self.shapes[name] = sizes[name]

    def __exit__(self, *error: Any) -> None:
        self.readers.clear()
        self.stack.close()

    def renamed(self, key: str) -> str:
        for old, new in self.fmt.renames:
            key = key.replace(f".{old}.", f".{new}.")
        return key

    def read(self, name: str) -> Tensor:
        """A tensor that is finite, or a QBenchError."""
        tensor = self.readers[name]()
        if tensor.is_floating_point():
            check_finite(self.name, name, tensor)
        return tensor

    def codes(self, name: str, layer: BitLinear) -> WeightCodes:
        """The codes of a linear that is stored quantized.

        Raises:
            QBenchError: for codes that are not ternary or a scale that is no positive number.
        """
        stored = self.read(f"{name}.weight")
        if self.fmt.storage == "packed":
            try:
                codes = unpack(stored)
            except QBenchError as error:
                raise QBenchError(f"{self.name}: {name}.weight: {error}") from None
        else:
            codes = stored.float()
            odd = codes[(codes != codes.round()) | (codes.abs() > 1)]
            if odd.numel():
                raise QBenchError(
                    f"{self.name}: {name}.weight holds {odd[0].item():g} where codes are -1, 0 "
                    "and 1; latent weights are quantization_mode online"
                )
        scale = self.read(f"{name}.{SCALE}").float()
        if scale.numel() != 1 or not scale.item() > 0:
            shown = f"{scale.item():g}" if scale.numel() == 1 else f"{scale.numel()} numbers"
            raise QBenchError(
                f"{self.name}: {name}.{SCALE} is {shown} where one positive number belongs; fetch "
                "or convert the checkpoint again"
            )
        scale = scale.view(1)
        return WeightCodes(codes.float(), 1.0 / scale if self.fmt.divides else scale)


def _fill_(
    model: PreTrainedModel, files: _Files, freeze: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the stored tensors into the model; raises for those that do not fit."""
    layers = {f"{name}.weight": (name, layer) for name, layer in bitlinears(model)}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not files.fmt.norm_weights:
        files.add_ones((n for n in expected if n.endswith(".rms_norm.weight")), expected)
    stored = dict(files.shapes)
    tied = _tied_head(model, files)
    if not files.fmt.is_latent:
        for weight_name, (name, layer) in layers.items():
            if stored.pop(f"{name}.{SCALE}", None) is None:
                check_tensors(files.name, missing=[f"{name}.{SCALE}"])
            if files.fmt.storage == "packed" and weight_name in stored:
                _check_rows(files, name, layer)
                stored[weight_name] = expected[weight_name]
    check_tensors(
        files.name,
        missing=expected.keys() - stored.keys() - tied,
        mismatched=(n for n in expected.keys() & stored.keys() if expected[n] != stored[n]),
        unexpected=stored.keys() - expected.keys(),
    )
    scaled_first = files.fmt.is_latent or files.fmt.divides
    biases = {} if scaled_first else {f"{name}.bias": layer for name, layer in layers.values()}
    for weight_name in (name for name in expected if name not in tied):
        if weight_name in layers and not files.fmt.is_latent:
            name, layer = layers[weight_name]
            codes = files.codes(name, layer)
            _put_(model, weight_name, codes.codes.to(device, dtype))
            layer.freeze_(codes)
            continue
        tensor = files.read(weight_name).to(device)
        biased = biases.get(weight_name)
        if biased is not None:  # transformers adds the bias before it multiplies by the scale
            tensor = tensor.float() * biased.weight_codes().scale
        if weight_name in layers and layers[weight_name][1].options.weights == "ternary":
            _check_latent(files.name, weight_name, tensor)
        _put_(model, weight_name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if freeze and weight_name in layers:
            layer = layers[weight_name][1]
            layer.freeze_(layer.options.weight_codes(tensor))
    if tied:
        model.tie_weights()


def _check_latent(checkpoint: str, name: str, tensor: Tensor) -> None:
    """Refuse ternary weights where latent ones belong: their mean |W| is not their scale."""
    magnitude = tensor.abs()
    largest = magnitude.max()
    if largest > 0 and ((magnitude == 0) | (magnitude == largest)).all():
        raise QBenchError(
            f"{checkpoint}: {name} is no latent weight but ternary already (-1, 0, 1 times "
            f"{largest.item():g}); say quantization_mode offline and linear_class autobitlinear, "
            f"and store codes with their {SCALE}"
        )


def _tied_head(model: PreTrainedModel, files: _Files) -> set[str]:
    """Name of the output head's weight where it is the embedding matrix, else nothing."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not files.fmt.tied or head is None:
        return set()
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    own, other = names[head], names[embedding]
    if own in files.readers and other in files.readers:
        if not torch.equal(files.read(own), files.read(other)):
            raise QBenchError(
                f"{files.name} ties its output head to the embeddings, but {own} differs from "
                f"{other}; correct tie_word_embeddings in config.json"
            )
    return {own}


def _check_rows(files: _Files, name: str, layer: BitLinear) -> None:
    """Refuse packed codes of another number of rows or columns than the linear has."""
    if layer.out_features % CODES_PER_BYTE:
        raise QBenchError(
            f"{files.name}: {name} has {layer.out_features} outputs, which is no multiple of "
            f"{CODES_PER_BYTE}, so its codes cannot be packed {CODES_PER_BYTE} rows a byte"
        )
    rows, shape = layer.out_features // CODES_PER_BYTE, files.shapes[f"{name}.weight"]
    if shape != (rows, layer.in_features):
        raise QBenchError(
            f"{files.name}: {name}.weight is packed as {list(shape)} where {layer.out_features} x "
            f"{layer.in_features} codes are [{rows}, {layer.in_features}]; its config.json is of "
            "another model, or the packing of another layout"
        )


def _put_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, leaf, tensor)
