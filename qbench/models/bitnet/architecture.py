"""The models that qbench trains: a full-precision Llama, BitNet b1 and BitNet b1.58, as twins.

``fp16``  LlamaForCausalLM.
``b1``    :class:`BitNetB1ForCausalLM`, a Llama whose block linears are BitLinear with a norm of
          their own (SubLN, 2310.11453 eq. 11). So the blocks' RMSNorms before attention and MLP are
          gone, as the authors' training tips ask ("remove RMSNorm before attention and SwiGLU
          because BitLinear has its own"): a quantized linear sees its input normalized once. The
          final norm before the output head stays.
``b158``  transformers' BitNetForCausalLM (Llama with one norm more before o_proj and down_proj, as
          the released checkpoints have it) whose block linears are BitLinear.

Embeddings and output head keep their precision in all three. One seed gives tensors of one name the
same values in each. The gated MLP and rotary positions are Llama's also in b1, whose paper had
neither: a twin differs from its sibling in the linears alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from qbench.errors import QBenchError, unknown
from qbench.models.bitnet.layers import B1, B158, BitLinearOptions, replace_linears_

KINDS = ("fp16", "b1", "b158")
B1_MODEL_TYPE = "qbench_bitnet_b1"
"""Unknown to plain transformers, which so refuses the checkpoint: run as a Llama it would lie."""
B158_QUANTIZATION: dict[str, Any] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head"],
}
"""What makes transformers quantize the latent weights of a b158 model that it loads."""


class BitNetB1Config(LlamaConfig):
    """A Llama configuration with the options of the b1 model's linears."""

    model_type = B1_MODEL_TYPE

    bitlinear: dict[str, Any] | None = None
    """Fields of :class:`BitLinearOptions`; None stands for the preset ``B1``."""

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.bitlinear
        options = B1 if given is None else BitLinearOptions.from_dict(given)
        if options.weights != "binary" or options.norm == "none":
            raise QBenchError(
                f"a b1 model has binary weights and its norms in its linears, not weights="
                f"{options.weights!r} and norm={options.norm!r}; give binary, and layer or rms"
            )
        self.bitlinear = options.to_dict()
        super().__post_init__(**kwargs)

    @property
    def bitlinear_options(self) -> BitLinearOptions:
        """``bitlinear`` as options."""
        return BitLinearOptions.from_dict(self.bitlinear or {})


class BitNetB1ForCausalLM(LlamaForCausalLM):
    """A Llama whose block linears are BitLinear with a norm inside; its blocks have no other."""

    config_class = BitNetB1Config

    def __init__(self, config: BitNetB1Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.input_layernorm = torch.nn.Identity()
            layer.post_attention_layernorm = torch.nn.Identity()
            replace_linears_(layer, config.bitlinear_options, keep=())


def register() -> None:
    """Make transformers' Auto classes know the b1 model; again does nothing."""
    AutoConfig.register(B1_MODEL_TYPE, BitNetB1Config, exist_ok=True)
    AutoModelForCausalLM.register(BitNetB1Config, BitNetB1ForCausalLM, exist_ok=True)


def b158_config(**fields: Any) -> BitNetConfig:
    """Configuration of a b1.58 model with latent weights, as transformers reads it from disk.

    ``hidden_act`` is "silu" unless given (the class's own default, relu2, is the 2B-4T model's).
    """
    fields = {"hidden_act": "silu", "quantization_config": dict(B158_QUANTIZATION), **fields}
    return BitNetConfig(**fields)


def new_model(
    kind: str,
    *,
    seed: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    vocab_size: int,
    max_position_embeddings: int,
    tie_word_embeddings: bool = True,
    hidden_act: str = "silu",
    bos_token_id: int | None,
    eos_token_id: int | None,
    bitlinear: BitLinearOptions | None = None,
    initializer_range: float = 0.02,
) -> PreTrainedModel:
    """A seeded, untrained model in float32 and training mode.

    ``kind`` is "fp16", "b1" or "b158". Every matrix is drawn from ``seed`` and its own name with
    standard deviation ``initializer_range``, so that the kinds start with equal tensors where they
    have them in common; norms are ones. ``bitlinear`` replaces the preset of "b1"; "fp16" has no
    such layers, and a "b158" model is what transformers runs, with the released code's quantizers.
    The other arguments are fields of the transformers configuration.

    Raises:
        QBenchError: for an unknown kind, options that do not fit it, or an impossible shape.
    """
    _check_kind(kind, bitlinear)
    heads = num_key_value_heads or num_attention_heads
    _check_heads(hidden_size, num_attention_heads, heads)
    if hidden_act not in ACT2FN:
        raise unknown("activation function", hidden_act, ACT2FN)
    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "hidden_act": hidden_act,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "initializer_range": initializer_range,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    with torch.random.fork_rng(devices=[]):
        model = _build(kind, fields, bitlinear)
    _draw_(model, seed, initializer_range)
    return model.train()


def _check_kind(kind: str, bitlinear: BitLinearOptions | None) -> None:
    if kind not in KINDS:
        raise unknown("kind of model", kind, KINDS)
    if kind == "fp16" and bitlinear is not None:
        raise QBenchError("an fp16 model has no BitLinear; leave bitlinear out, or choose b1")
    if kind == "b158" and bitlinear not in (None, B158):
        raise QBenchError(
            "a b158 checkpoint is run by transformers, with the released code's quantizers and no "
            "others; leave bitlinear out, or choose b1"
        )


def _check_heads(hidden_size: int, heads: int, key_value_heads: int) -> None:
    if hidden_size % heads:
        raise QBenchError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={heads}; "
            "choose a divisor"
        )
    if hidden_size // heads % 2:
        raise QBenchError(
            f"heads of {hidden_size // heads} features cannot be rotated in pairs; choose "
            f"hidden_size={hidden_size} or num_attention_heads={heads} otherwise"
        )
    if heads % key_value_heads:
        raise QBenchError(
            f"num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={key_value_heads}; choose a divisor"
        )


def _build(
    kind: str, fields: dict[str, Any], bitlinear: BitLinearOptions | None
) -> PreTrainedModel:
    if kind == "fp16":
        return LlamaForCausalLM(LlamaConfig(**fields))
    if kind == "b1":
        register()
        options = bitlinear.to_dict() if bitlinear else None
        return BitNetB1ForCausalLM(BitNetB1Config(bitlinear=options, **fields))
    model = BitNetForCausalLM(b158_config(**fields))
    replace_linears_(model, B158)
    return model


def _draw_(model: PreTrainedModel, seed: int, std: float) -> None:
    """Give every matrix values that depend on the seed and its name alone, in place.

    Vectors (norms, biases) keep the ones and zeros of the constructor.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)
