"""What a BitNet checkpoint is said to be, from config.json and file headers alone (no torch)."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from qbench.errors import QBenchError
from qbench.models.bitnet.formats import BitNetFormat, Stored, detect, is_kept
from qbench.models.bitnet.report import LoadReport

PROJECTIONS = {
    **{f"self_attn.{p}_proj": (8, 8) for p in "qkvo"},
    **{"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)},
}
BITNET = {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ONE_BIT = {
    **{"model_type": "llama", "architectures": ["BitnetForCausalLM"]},
    **{"weight_bits": 1, "input_bits": 8, "tie_word_embeddings": True},
}
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def bitnet(**quantization: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "bitnet", **quantization}}


ONLINE = bitnet(linear_class="autobitlinear", quantization_mode="online")
OFFLINE = bitnet(linear_class="autobitlinear", quantization_mode="offline")


def stored(packed: bool = False, scales: bool | None = None, norms: tuple[str, ...] = ()):
    """Two blocks; ``scales`` where they are packed, unless said otherwise."""
    found = {"model.embed_tokens.weight": Stored((16, 8), "BF16")}
    for block in range(2):
        prefix = f"model.layers.{block}."
        found[f"{prefix}input_layernorm.weight"] = Stored((8,), "BF16")
        found |= {f"{prefix}{norm}.weight": Stored((8,), "BF16") for norm in norms}
        for name, (rows, columns) in PROJECTIONS.items():
            shape = (rows // 4, columns) if packed else (rows, columns)
            found[f"{prefix}{name}.weight"] = Stored(shape, "U8" if packed else "BF16")
            if packed if scales is None else scales:
                found[f"{prefix}{name}.weight_scale"] = Stored((1,), "BF16")
    return found


def found(config: dict[str, Any], tensors: dict[str, Stored]) -> BitNetFormat:
    fmt = detect("ckpt", config, tensors)
    assert fmt is not None
    return fmt


def refused(config: dict[str, Any], tensors: dict[str, Stored]) -> str:
    with pytest.raises(QBenchError) as caught:
        detect("ckpt", config, tensors)
    message = str(caught.value)
    assert "ckpt" in message and "\n" not in message
    return message


def test_nothing_here_imports_torch():
    code = (
        "import sys, qbench.models.bitnet.formats, qbench.models.bitnet.report, qbench.models.files"
        "\nassert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "opt"},
        LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        BITNET | {"qbench_latent_weights": True},
    ],
    ids=["llama", "opt", "gptq", "latent weights that were quantized"],
)
def test_other_checkpoints_are_none_of_these(config):
    assert detect("ckpt", config, stored()) is None


# the public checkpoints of papers.md section 2.6: config, storage, scale, norms
def test_microsoft_2b_4t_is_packed_and_its_scale_multiplies():
    norms = ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
    fmt = found(BITNET | OFFLINE | {"hidden_act": "relu2"}, stored(True, norms=norms))
    assert (fmt.storage, fmt.divides, fmt.keep) == ("packed", False, None)
    assert (fmt.hidden_act, fmt.sub_norms) == ("relu2", ("attn_sub_norm", "ffn_sub_norm"))
    assert not fmt.mended


def test_microsoft_bf16_is_latent():
    fmt = found(BITNET | ONLINE, stored())
    assert (fmt.storage, fmt.hidden_act, fmt.mended) == ("latent", "relu2", ())


def test_a_bitnet_without_quantization_config_is_mended_to_latent_and_says_so():
    fmt = found(BITNET, stored())
    assert fmt.storage == "latent"
    assert "would run these latent weights unrounded" in fmt.mended[0]


def test_hf1bitllm_llama_is_packed_and_its_scale_divides():
    fmt = found(LLAMA | bitnet(modules_to_not_convert=None), stored(True))
    assert (fmt.storage, fmt.divides, fmt.keep) == ("packed", True, None)
    assert fmt.sub_norms == ()


def test_falcon3_keeps_what_it_names():
    fmt = found(LLAMA | bitnet(modules_to_not_convert=["lm_head"]), stored(True))
    assert (fmt.divides, fmt.keep) == (True, ("lm_head",))


def test_1bitllm_calls_itself_llama_and_is_found_by_its_bits():
    norms = ("self_attn.inner_attn_ln", "mlp.ffn_layernorm")
    for config in (ONE_BIT, {k: v for k, v in ONE_BIT.items() if not k.endswith("_bits")}):
        fmt = found(config, stored(norms=norms))
        assert (fmt.layout, fmt.storage, fmt.tied) == ("1bitLLM", "latent", True)
        assert fmt.sub_norms == ("attn_sub_norm", "ffn_sub_norm")
        assert "drop two norms a block" in fmt.mended[0]


def test_ternary_codes_in_floating_point_are_a_third_storage():
    """What transformers' save_pretrained writes of an offline model."""
    assert found(BITNET | OFFLINE, stored(scales=True)).storage == "codes"


@pytest.mark.parametrize("weights", [True, False])
def test_norms_inside_the_linears_are_found_with_or_without_weights(weights):
    tensors = stored(True)
    if weights:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name.replace(".weight", ".rms_norm.weight")] = Stored((8,), "BF16")
    fmt = found(LLAMA | bitnet(use_rms_norm=True, rms_norm_eps=1e-5), tensors)
    assert (fmt.norm_eps, fmt.norm_weights) == (1e-5, weights)
    assert bool(fmt.mended) is not weights


B1 = {"model_type": "qbench_bitnet_b1"}


def test_b1_brings_its_own_quantizers():
    fmt = found(B1 | {"bitlinear": {"weights": "binary", "norm": "layer"}}, stored())
    assert fmt.layout == "qbench b1" and fmt.is_latent and fmt.has_input_norms
    assert str(fmt.scheme) == "W1A8:w=tensor,a=token,grid=sign,agrid=restricted"


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"qmax": "paper"}, "W1A8:w=tensor,a=token,grid=sign,agrid=bitnet"),
        ({"abits": 4}, "W1A4:w=tensor,a=token,grid=sign,agrid=restricted"),
        ({"abits": 16}, "W1A16:w=tensor,grid=sign"),
        ({"activation_granularity": "tensor"}, "W1A8:w=tensor,a=tensor,grid=sign,agrid=restricted"),
        ({"activation_granularity": "paper"}, "W1A8:w=tensor,a=token,grid=sign,agrid=restricted"),
    ],
)
def test_the_scheme_of_a_b1_follows_its_options(options, scheme):
    fmt = found(B1 | {"bitlinear": {"weights": "binary", "norm": "layer", **options}}, stored())
    assert str(fmt.scheme) == scheme


def test_a_b1_of_a_width_no_scheme_has_is_refused():
    with pytest.raises(QBenchError, match="activation bits 12 is not offered"):
        detect("ckpt", B1 | {"bitlinear": {"abits": 12}}, stored())


def test_every_b158_is_at_the_scheme_of_the_released_code():
    """127 / absmax per token is grid restricted; mean |W| and half to even is grid ternary."""
    expected = "W1.58A8:w=tensor,a=token,grid=ternary,agrid=restricted"
    assert str(found(BITNET | ONLINE, stored()).scheme) == expected
    assert str(found(LLAMA | bitnet(), stored(True)).scheme) == expected


def test_packed_parameters_are_weights_and_not_bytes():
    """Two blocks of 4·8·8 + 3·12·8 weights and one norm of 8, embeddings of 16·8."""
    count = 2 * (4 * 64 + 3 * 96 + 8) + 128
    assert found(BITNET | OFFLINE, stored(True)).parameters(stored(True)) == count
    assert found(BITNET | ONLINE, stored()).parameters(stored()) == count


# refusals -----------------------------------------------------------------------------------------
def test_an_unknown_mode_names_the_known_ones():
    config = BITNET | bitnet(linear_class="autobitlinear", quantization_mode="ofline")
    assert "did you mean 'offline'" in refused(config, stored(True))


def test_an_unknown_linear_class_names_the_known_ones():
    assert "autobitlinear" in refused(BITNET | bitnet(linear_class="autobit"), stored(True))


def test_a_missing_scale_is_named():
    tensors = stored(True)
    del tensors[f"{DOWN}.weight_scale"]
    assert f"{DOWN} has no weight_scale" in refused(BITNET | OFFLINE, tensors)


@pytest.mark.parametrize("config", [BITNET | OFFLINE, LLAMA | bitnet()], ids=["auto", "bitlinear"])
def test_a_half_converted_checkpoint_names_one_of_each(config):
    tensors = stored(True) | {f"{Q}.weight": Stored((8, 8), "BF16")}
    message = refused(config, tensors)
    assert "half converted" in message and f"{Q}.weight is BF16" in message


def test_a_matrix_kept_by_name_is_not_half_converted():
    tensors = stored(True) | {f"{Q}.weight": Stored((8, 8), "BF16")}
    del tensors[f"{Q}.weight_scale"]
    kept = bitnet(linear_class="autobitlinear", modules_to_not_convert=["lm_head", Q])
    assert found(BITNET | kept, tensors).storage == "packed"


def test_online_with_packed_weights_is_refused():
    assert "say offline" in refused(BITNET | ONLINE, stored(True))


def test_offline_with_latent_weights_is_refused():
    assert "say linear_class autobitlinear and quantization_mode online" in refused(
        BITNET | OFFLINE, stored()
    )


def test_bitlinear_with_codes_that_are_not_packed_is_refused():
    assert "whose weights are packed in U8" in refused(LLAMA | bitnet(), stored(scales=True))


@pytest.mark.parametrize("config", [BITNET, LLAMA], ids=["bitnet", "llama"])
def test_packed_codes_without_quantization_config_are_refused(config):
    assert "multiplies or divides" in refused(config, stored(True))


def test_weights_of_another_dtype_are_refused():
    tensors = stored() | {f"{Q}.weight": Stored((8, 8), "I8")}
    assert f"{Q}.weight is stored as I8" in refused(BITNET | ONLINE, tensors)


@pytest.mark.parametrize("norm", ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"])
def test_1bitllm_without_one_of_its_norms_is_refused(norm):
    tensors = stored(norms=("self_attn.inner_attn_ln", "mlp.ffn_layernorm"))
    del tensors[f"model.layers.1.{norm}.weight"]
    assert f"lacks model.layers.1.{norm}.weight" in refused(ONE_BIT, tensors)


@pytest.mark.parametrize(("field", "value"), [("weight_bits", 2), ("input_bits", 4)])
def test_1bitllm_of_other_widths_is_refused(field, value):
    tensors = stored(norms=("self_attn.inner_attn_ln", "mlp.ffn_layernorm"))
    assert f"{field} {value}" in refused(ONE_BIT | {field: value}, tensors)


def test_some_norms_inside_linears_and_some_not_are_refused():
    tensors = stored(True) | {f"{Q}.rms_norm.weight": Stored((8,), "BF16")}
    assert "has an rms_norm.weight and" in refused(LLAMA | bitnet(use_rms_norm=True), tensors)


def test_pickled_weights_cannot_be_checked():
    assert "convert them to safetensors" in refused(BITNET | ONLINE, {})


def test_a_config_that_converts_nothing_is_refused():
    config = LLAMA | bitnet(modules_to_not_convert=["model"])
    assert "correct modules_to_not_convert" in refused(config, stored(True))


def test_a_pattern_that_is_no_regular_expression_is_refused():
    config = LLAMA | bitnet(modules_to_not_convert=["lm_head", "*.down"])
    assert "'*.down' in modules_to_not_convert" in refused(config, stored(True))


# transformers decides what is kept by should_convert_module; the two must agree
@pytest.mark.parametrize("name", ["lm_head", Q, DOWN, "model.layers.11.mlp.gate_proj"])
@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head",
        "model.layers.1",
        "model.layers.*",
        "mlp.gate",
        "gate_proj",
        "proj",
        "model",
        r".*q_",
    ],
)
def test_what_is_kept_is_what_transformers_keeps(name, pattern):
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert is_kept(name, [pattern]) is not should_convert_module(name, [pattern])


def test_the_report_says_every_decision():
    fmt = found(LLAMA | bitnet() | {"tie_word_embeddings": True}, stored(True))
    lines = LoadReport.of(fmt).lines()
    assert [line.partition(":")[0] for line in lines] == [
        *("weights", "scale", "quantizers", "activation function", "norms", "embeddings"),
    ]
    text = "\n".join(lines)
    assert re.search("4 a byte.*divides the product.*W1.58A8.*silu.*no sub-norms.*tied", text, re.S)


def test_the_report_names_what_was_mended_and_b1s_centred_sign():
    assert LoadReport.of(found(BITNET, stored())).lines()[-1].startswith("mended: config.json has")
    fmt = found(B1 | {"bitlinear": {"weights": "binary", "norm": "layer"}}, stored())
    text = "\n".join(LoadReport.of(fmt).lines())
    assert "mean is subtracted before the sign" in text and "layer norm without weights" in text


def test_the_report_of_latent_weights_promises_no_quantizer():
    lines = LoadReport.of(found(BITNET | ONLINE, stored()), latent=True).lines()
    assert "quantizers: none; trained at W1.58A8:" in "\n".join(lines)
