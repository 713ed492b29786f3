"""Tiny BitNet checkpoints in the storage layout of every public one, and transformers' forward.

The writers know nothing of qbench's readers: names, bytes and config entries follow papers.md
section 2.6 and transformers 5.23 (models/bitnet, integrations/bitnet.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qbench.testing import tiny_model, tiny_tokenizer

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(5))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
N_LINEARS = 2 * len(PROJECTIONS)
N_CODES = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
"""Weights in the linears of the blocks."""


def is_projection(name: str) -> bool:
    """Whether a tensor is the matrix of a block's linear, and not its bias."""
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS


def random_bitnet(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """transformers' BitNetForCausalLM with random latent weights and uneven norms."""
    config = AutoConfig.for_model("bitnet", **{**SHAPE, "tie_word_embeddings": True, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and mean |W| of a latent matrix (BitNet b1.58, section 2)."""
    scale = weight.float().abs().mean().clamp(min=1e-5)
    return (weight.float() / scale).round().clamp(-1, 1), scale.view(1)


def pack_rows(codes: Tensor) -> Tensor:
    """Four codes a byte along the rows, written here from the layout's description."""
    quarter = codes.shape[0] // 4
    shifted = codes.int() + 1
    total = sum(shifted[i * quarter : (i + 1) * quarter] * 4**i for i in range(4))
    return total.to(torch.uint8)


def quantization_config(**entries: Any) -> dict[str, Any]:
    return {"quant_method": "bitnet", **entries}


ONLINE = quantization_config(linear_class="autobitlinear", quantization_mode="online")
OFFLINE = quantization_config(linear_class="autobitlinear", quantization_mode="offline")
FALCON = quantization_config(modules_to_not_convert=["lm_head"])
HF_LLAMA = quantization_config(modules_to_not_convert=None)


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint stores: the output head only where it is not tied."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def packed_state(
    state: dict[str, Tensor], divides: bool = False, exact: bool = True
) -> dict[str, Tensor]:
    """Projections as packed codes with the scale of the named convention.

    ``exact`` rounds scales to powers of two. It is then the same to the last bit whether weights or
    their products are scaled, and no 8-bit activation downstream falls to the other side of a tie.
    """
    packed = {}
    for name, tensor in state.items():
        if not is_projection(name):
            packed[name] = tensor
            continue
        codes, scale = ternary(tensor)
        scale = 2 ** scale.log2().round() if exact else scale
        packed[name] = pack_rows(codes)
        packed[f"{name}_scale"] = (1 / scale if divides else scale).to(tensor.dtype)
    return packed


def write(
    folder: Path,
    state: dict[str, Tensor],
    config: dict[str, Any],
    shards: int = 1,
) -> Path:
    """A checkpoint folder with these tensors and this config.json, and the tiny tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tiny_tokenizer().save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(state), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def config_of(model: PreTrainedModel, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model as the public checkpoints have it."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config.pop("dtype", None)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    return config | ({} if quantization is None else {"quantization_config": quantization})


def microsoft(folder: Path, packed: bool, dtype: torch.dtype = torch.bfloat16, **kind: Any) -> Path:
    """microsoft/bitnet-b1.58-2B-4T (packed) and -bf16: tied, relu2, remote code that is absent."""
    shards = kind.pop("shards", 1)
    model = random_bitnet(**kind).to(dtype)
    state = state_of(model)
    config = config_of(model, OFFLINE if packed else ONLINE)
    config["auto_map"] = {
        "AutoConfig": "configuration_bitnet.BitNetConfig",
        "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM",
    }
    return write(folder, packed_state(state) if packed else state, config, shards)


def one_bit_llm(folder: Path, **kind: Any) -> Path:
    """1bitLLM/bitnet_b1_58-*: calls itself llama, latent float32, norms under other names."""
    model = random_bitnet(hidden_act="silu", num_key_value_heads=4, **kind)
    state = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): t
        for name, t in state_of(model).items()
    }
    config = {
        "architectures": ["BitnetForCausalLM"],
        "model_type": "llama",
        **{**SHAPE, "num_key_value_heads": 4},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "float32",
        "weight_bits": 1,
        "input_bits": 8,
    }
    return write(folder, state, config)


def hf_llama(
    folder: Path,
    quantization: dict[str, Any] = HF_LLAMA,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
) -> Path:
    """HF1BitLLM/Llama3-8B-1.58 and Falcon3-1.58bit: a Llama, packed, divided by weight_scale."""
    model = tiny_model("llama", tie_word_embeddings=tied).to(dtype)
    state = packed_state(state_of(model), divides=quantization.get("linear_class") is None)
    return write(folder, state, config_of(model, quantization))


def b1(folder: Path, seed: int = 3) -> Path:
    """What qbench trains as b1: latent weights, and the quantizers' options."""
    from qbench.models.bitnet.architecture import new_model

    shape = {k: v for k, v in SHAPE.items() if k != "pad_token_id"}
    model = new_model("b1", seed=seed, initializer_range=0.3, **shape)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return write(folder, state_of(model), config)


@contextmanager
def no_compiler() -> Iterator[None]:
    """Let transformers' quantizers run as written: torch.compile wants a C++ compiler."""
    import torch._dynamo

    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    try:
        yield
    finally:
        torch._dynamo.config.disable = before


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What transformers' own loader makes of a checkpoint."""
    with no_compiler():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


def transformers_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """What transformers' own loader and forward make of a checkpoint, float32."""
    model = transformers_model(folder, dtype)
    with no_compiler(), torch.no_grad():
        return model(IDS).logits.float()


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of the ids every comparison uses."""
    with torch.no_grad():
        return model(IDS).logits.float()


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest logit."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
