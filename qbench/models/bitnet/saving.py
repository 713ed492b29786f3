"""Write a BitNet model: its latent weights, or its ternary codes at two bits each.

Both forms of a b1.58 model are those of transformers' ``BitNetQuantConfig`` (autobitlinear, online
and offline), so plain ``AutoModelForCausalLM.from_pretrained`` runs them. A b1 model is saved in
qbench's own form, latent alone: transformers has no class for binary weights. A folder appears only
when it is complete.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.errors import QBenchError
from qbench.models.bitnet.formats import CODES_PER_BYTE, SCALE
from qbench.models.bitnet.layers import B158, BitLinear, bitlinears
from qbench.models.saving import write_record, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qbench.models.checkpoints import Checkpoint
    from qbench.record import QuantizationRecord


def pack(codes: Tensor) -> Tensor:
    """Ternary codes (out_features, in_features) as uint8 (out_features / 4, in_features).

    Byte (r, c) holds the codes of rows r, r + n, r + 2n and r + 3n, n = out_features / 4, plus one,
    the first in its lowest bits: transformers' layout.

    Raises:
        QBenchError: for rows that are no multiple of four, or codes other than -1, 0, 1.
    """
    rows = codes.shape[0]
    if rows % CODES_PER_BYTE:
        raise QBenchError(
            f"{rows} rows cannot be packed {CODES_PER_BYTE} a byte; choose a multiple of "
            f"{CODES_PER_BYTE}"
        )
    if not ((codes == -1) | (codes == 0) | (codes == 1)).all():
        raise QBenchError("codes to pack are -1, 0 and 1; these hold another value")
    packed = torch.zeros(rows // CODES_PER_BYTE, *codes.shape[1:], dtype=torch.uint8)
    for place, part in enumerate(codes.to("cpu", torch.int8).chunk(CODES_PER_BYTE)):
        packed |= (part + 1).to(torch.uint8) << (2 * place)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The codes (out_features, in_features), int8, of :func:`pack`'s bytes.

    Raises:
        QBenchError: for bytes with a fourth code, which ternary weights do not have.
    """
    if ((packed & (packed >> 1)) & 0b01010101).any():
        raise QBenchError(
            "a packed byte holds code 3 where 0, 1 and 2 stand for -1, 0 and 1; it is damaged or "
            "packed in another layout"
        )
    parts = [(packed >> (2 * place)) & 3 for place in range(CODES_PER_BYTE)]
    return torch.cat(parts).to(torch.int8) - 1


def save_latent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
    record: QuantizationRecord | None = None,
) -> None:
    """Save the latent weights of a model of BitLinear layers, to be quantized when it is loaded.

    Args:
        model: b1 or b1.58, not frozen; left as it is.
        tokenizer: saved beside it.
        folder: made, or empty.
        dtype: of the stored tensors; None keeps theirs.
        record: written beside the weights.

    Raises:
        QBenchError: for a frozen model, or quantizers that the stored form does not say.
        RunFailed: if it cannot be written.
    """
    layers = _layers(model)
    frozen = next((name for name, layer in layers.items() if layer.frozen), None)
    if frozen is not None:
        raise QBenchError(
            f"{frozen} is frozen, its latent weight is gone; save before freezing, or save it "
            "packed"
        )
    state = {n: t.detach() for n, t in model.state_dict().items() if n not in _tied(model)}
    quantization = None
    if not _is_binary(layers):
        quantization = _quantization_config(model, layers, "online")
        state |= _norm_weights(layers)
    _write(model, tokenizer, folder, state, quantization, dtype, record)


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
    record: QuantizationRecord | None = None,
) -> None:
    """Save the ternary codes of a b1.58 model, four in a byte, with a scale for each matrix.

    Args:
        model: frozen or latent; left as it is.
        tokenizer: saved beside it.
        folder: made, or empty.
        dtype: of scales, norms, embeddings and output head; None keeps theirs.
        record: written beside the weights.

    Raises:
        QBenchError: for weights that are not ternary, quantizers that the stored form does not say,
            or matrices that cannot be packed.
        RunFailed: if it cannot be written.
    """
    layers = _layers(model)
    if _is_binary(layers):
        raise QBenchError(
            "transformers has no class for binary weights, so they cannot be packed; save the "
            "latent weights of a b1 model"
        )
    quantization = _quantization_config(model, layers, "offline")
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if name in _tied(model) or leaf == "frozen_scale":
            continue
        if owner in layers and leaf == "bias":  # transformers scales it with the product
            state[name] = tensor.detach() / layers[owner].weight_codes().scale.to(tensor)
            continue
        if owner not in layers or leaf != "weight":
            state[name] = tensor.detach()
            continue
        found = layers[owner].weight_codes()
        try:
            state[name] = pack(found.codes)
        except QBenchError as error:
            raise QBenchError(f"{owner}: {error}") from None
        state[f"{owner}.{SCALE}"] = found.scale.to("cpu", tensor.dtype)
    state |= _norm_weights(layers)
    _write(model, tokenizer, folder, state, quantization, dtype, record)


def save_trained(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: QuantizationRecord | None = None,
) -> None:
    """Save a BitNet as it runs: packed, or latent again where transformers has no class for it.

    Args:
        checkpoint: where ``model`` came from; a b1 model's latent weights are read again.
        model: frozen.
        tokenizer: saved beside it.
        folder: made, or empty.
        record: written beside the weights.

    Raises:
        QBenchError: see :func:`save_packed`.
        RunFailed: if it cannot be written.
    """
    if not _is_binary(_layers(model)):
        save_packed(model, tokenizer, folder, record=record)
        return
    from qbench.models.bitnet.loading import load

    dtype = str(model.dtype).removeprefix("torch.")
    save_latent(load(checkpoint, "online", dtype), tokenizer, folder, record=record)


def _layers(model: PreTrainedModel) -> dict[str, BitLinear]:
    found = dict(bitlinears(model))
    if not found:
        raise QBenchError(f"{type(model).__name__} has no BitLinear; save it as it is")
    return found


def _is_binary(layers: dict[str, BitLinear]) -> bool:
    return any(layer.options.weights == "binary" for layer in layers.values())


def _quantization_config(
    model: PreTrainedModel, layers: dict[str, BitLinear], mode: str
) -> dict[str, Any]:
    """What makes transformers compute what these layers compute.

    Raises:
        QBenchError: for options that transformers does not have.
    """
    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in layers
    ]
    eps = None
    for name, layer in layers.items():
        o, affine = layer.options, getattr(layer, "rms_norm", None)
        own = o.to_dict() | {"norm": "none", "norm_eps": B158.norm_eps}
        if own != B158.to_dict() or o.norm == "layer":
            raise QBenchError(
                f"{name} has quantizers that transformers does not have; it runs those of the "
                "released b1.58 code"
            )
        if affine is not None or o.norm == "rms":
            eps = o.norm_eps if affine is None else affine.variance_epsilon
    config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
        "modules_to_not_convert": kept,
    }
    return config | ({} if eps is None else {"use_rms_norm": True, "rms_norm_eps": eps})


def _norm_weights(layers: dict[str, BitLinear]) -> dict[str, Tensor]:
    """Ones for RMS norms without weights inside the linears: transformers' have weights."""
    return {
        f"{name}.rms_norm.weight": torch.ones(layer.in_features, dtype=layer.weight.dtype)
        for name, layer in layers.items()
        if layer.options.norm == "rms"
    }


def _tied(model: PreTrainedModel) -> set[str]:
    """The output head's weight where it is the embedding matrix: stored once."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:  # type: ignore[union-attr]
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype | None,
    record: QuantizationRecord | None,
) -> None:
    from safetensors.torch import save_file

    stored = {
        name: tensor.to("cpu", dtype or tensor.dtype).contiguous()
        if tensor.is_floating_point()
        else tensor.cpu()
        for name, tensor in state.items()
    }
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype or model.dtype
    config.__dict__.pop("quantization_config", None)
    if quantization is not None:
        config.quantization_config = quantization
    with writing(folder) as partial:
        save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if record is not None:
            write_record(record, partial)
