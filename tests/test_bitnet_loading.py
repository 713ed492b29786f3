"""Every public BitNet format, written tiny and loaded: the logits are those of transformers.

Where transformers cannot run a checkpoint as it was trained (1bitLLM, b1, norms that it would drop)
the expected numbers come from a forward written here, or from tests/golden/bitnet_e2e.safetensors.
The fixtures' packed scales are powers of two, so that with autobitlinear equality is to the last
bit. Elsewhere (bitlinear divides sums of integers) a last bit can send an 8-bit activation to the
other side of a tie, which moves logits by parts in a thousand; there, linears are compared one by
one as well.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from dataclasses import replace

import golden_vectors as golden
import pytest
import torch
import torch.nn.functional as F
from bitnet_fixtures import (
    FALCON,
    HF_LLAMA,
    IDS,
    N_LINEARS,
    OFFLINE,
    ONLINE,
    b1,
    config_of,
    hf_llama,
    is_projection,
    logits,
    microsoft,
    no_compiler,
    one_bit_llm,
    pack_rows,
    packed_state,
    quantization_config,
    random_bitnet,
    relative,
    state_of,
    ternary,
    transformers_logits,
    transformers_model,
    write,
)
from cli_fixtures import edit_config, edit_weights
from safetensors.torch import load_file

from qbench import evaluate, load_checkpoint, quantize_model
from qbench.errors import QBenchError
from qbench.models.bitnet import loading
from qbench.models.bitnet.layers import bitlinears
from qbench.models.bitnet.loading import load
from qbench.models.bitnet.quantizers import WeightCodes
from qbench.models.checkpoints import find_checkpoint
from qbench.testing import tiny_model, tiny_tokenizer

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
TIE = 0.01
"""What activations on the other side of a tie may move, relative to the largest logit."""


def loaded(folder, dtype="float32", **how):
    return find_checkpoint(str(folder), **how).load_model(dtype)


def refused(folder, **how) -> str:
    with pytest.raises(QBenchError) as caught:
        loaded(folder, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


def one_bit_llm_forward(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of a 1bitLLM checkpoint of the fixtures' shape (4 heads of 16, all of them keys')."""

    def rms(x, name):
        return state[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def linear(x, name):
        codes, scale = ternary(state[f"{name}.weight"])
        inverse = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear((x * inverse).round().clamp(-128, 127) / inverse, codes * scale)

    def rotate(x):
        angles = torch.arange(x.shape[2])[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    x = state["model.embed_tokens.weight"][ids]
    batch, length = ids.shape
    for number in range(2):
        block = f"model.layers.{number}"
        h = rms(x, f"{block}.input_layernorm")
        q, k, v = (
            linear(h, f"{block}.self_attn.{p}_proj").view(batch, length, 4, 16).transpose(1, 2)
            for p in "qkv"
        )
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        h = rms(h.transpose(1, 2).flatten(2), f"{block}.self_attn.inner_attn_ln")
        x = x + linear(h, f"{block}.self_attn.o_proj")
        h = rms(x, f"{block}.post_attention_layernorm")
        h = F.silu(linear(h, f"{block}.mlp.gate_proj")) * linear(h, f"{block}.mlp.up_proj")
        x = x + linear(rms(h, f"{block}.mlp.ffn_layernorm"), f"{block}.mlp.down_proj")
    return rms(x, "model.norm") @ state["model.embed_tokens.weight"].T


# --- the public formats ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_microsofts_latent_weights_give_transformers_logits_bit_for_bit(tmp_path, dtype):
    folder = microsoft(tmp_path / "ms", packed=False, dtype=dtype)
    assert torch.equal(logits(loaded(folder)), transformers_logits(folder))


@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_microsofts_packed_weights_give_transformers_logits(tmp_path, act, stored, dtype):
    of = getattr(torch, stored)
    folder = microsoft(tmp_path / "ms", packed=True, dtype=of, hidden_act=act)
    assert torch.equal(logits(loaded(folder, dtype)), transformers_logits(folder, of))


def test_microsofts_packed_bfloat16_runs_at_float32_where_transformers_fails(tmp_path):
    """transformers 5.23 unpacks to bfloat16 all the same; the same bytes, upcast, it runs."""
    folder = microsoft(tmp_path / "ms", packed=True)
    upcast = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    config = json.loads((folder / "config.json").read_text())
    expected = transformers_logits(write(tmp_path / "upcast", upcast, config))
    assert torch.equal(logits(loaded(folder)), expected)


@pytest.mark.parametrize("divides", [False, True])
def test_a_packed_linear_with_any_scale_gives_transformers_output(tmp_path, divides):
    """Linear by linear on equal inputs, where no tie can fall differently."""
    state = packed_state(state_of(tiny_model("llama")), divides, exact=False)
    quantization = quantization_config(linear_class="bitlinear" if divides else "autobitlinear")
    folder = write(tmp_path / "any", state, config_of(tiny_model("llama"), quantization))
    ours, theirs = loaded(folder), transformers_model(folder)
    for name, layer in bitlinears(ours):
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
        with no_compiler(), torch.no_grad():
            assert relative(layer(x), theirs.get_submodule(name)(x)) < 1e-6


@pytest.mark.parametrize("packed", [True, False])
def test_shards_make_no_difference(tmp_path, packed):
    """Scales land in other files than their codes."""
    whole = microsoft(tmp_path / "whole", packed)
    parts = microsoft(tmp_path / "parts", packed, shards=3)
    assert len(list(parts.glob("*.safetensors"))) == 3
    assert torch.equal(logits(loaded(whole)), logits(loaded(parts)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [HF_LLAMA, FALCON], ids=["HF1BitLLM", "Falcon3"])
def test_packed_llamas_give_transformers_logits(tmp_path, quantization, tied):
    folder = hf_llama(tmp_path / "llama", quantization, torch.float32, tied)
    assert relative(logits(loaded(folder)), transformers_logits(folder)) < TIE


def test_packed_bfloat16_llamas_give_transformers_logits(tmp_path):
    folder = hf_llama(tmp_path / "llama")
    found = logits(loaded(folder, "bfloat16"))
    assert relative(found, transformers_logits(folder, torch.bfloat16)) < 0.05


def test_a_head_that_is_converted_too_gives_transformers_logits(tmp_path):
    """``modules_to_not_convert: []`` converts the output head; null does not."""
    state = packed_state(state_of(tiny_model("llama")), divides=True)
    codes, scale = ternary(state["lm_head.weight"])
    scale = 2 ** (1 / scale).log2().round()
    state |= {"lm_head.weight": pack_rows(codes), "lm_head.weight_scale": scale}
    config = config_of(tiny_model("llama"), quantization_config(modules_to_not_convert=[]))
    folder = write(tmp_path / "all", state, config)
    model = loaded(folder)
    assert len(dict(bitlinears(model))) == N_LINEARS + 1
    assert relative(logits(model), transformers_logits(folder)) < TIE


def test_codes_that_transformers_saved_unpacked_are_read(tmp_path):
    state = state_of(random_bitnet())
    for name in [name for name in state if is_projection(name)]:
        state[name], state[f"{name}_scale"] = ternary(state[name])[0], torch.full((1,), 2**-5)
    folder = write(tmp_path / "codes", state, config_of(random_bitnet(), OFFLINE))
    assert find_checkpoint(str(folder)).bitnet.storage == "codes"
    assert torch.equal(logits(loaded(folder)), transformers_logits(folder))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_norms_inside_the_linears_give_transformers_logits(tmp_path, linear_class, weights):
    state = packed_state(state_of(tiny_model("llama")), divides=linear_class == "bitlinear")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in state if is_projection(name)]:
        if weights and name.endswith(".weight"):
            size = state[name].shape[1]
            norm = 1 + 0.3 * torch.randn(size, generator=generator)
            state[name.replace(".weight", ".rms_norm.weight")] = norm
    quantization = quantization_config(
        linear_class=linear_class, use_rms_norm=True, rms_norm_eps=1e-3
    )
    folder = write(tmp_path / "normed", state, config_of(tiny_model("llama"), quantization))
    assert relative(logits(loaded(folder)), transformers_logits(folder)) < TIE


def test_1bitllm_gives_the_logits_of_a_forward_written_from_its_code(tmp_path):
    """Origin: papers.md 2.6; norms before o_proj and down_proj, SwiGLU, RoPE 10000, absmean."""
    folder = one_bit_llm(tmp_path / "1bit")
    expected = one_bit_llm_forward(load_file(folder / "model.safetensors"), IDS)
    assert relative(logits(loaded(folder)), expected) < TIE


def test_1bitllm_gives_the_logits_of_the_bitnet_that_it_is(tmp_path):
    """The same weights under transformers' names and class, run online, to the last bit."""
    model = random_bitnet(hidden_act="silu", num_key_value_heads=4, rope_theta=10000.0)
    folder = write(tmp_path / "renamed", state_of(model), config_of(model, ONLINE))
    found = logits(loaded(one_bit_llm(tmp_path / "1bit")))
    assert torch.equal(found, transformers_logits(folder))


def test_transformers_runs_1bitllm_as_something_else(tmp_path):
    """The trap: the same folder in plain AutoModelForCausalLM is off by more than half."""
    folder = one_bit_llm(tmp_path / "1bit")
    assert relative(transformers_logits(folder), logits(loaded(folder))) > 0.5


def test_1bitllm_without_a_rotary_base_has_the_base_of_a_llama(tmp_path):
    """BitNetConfig's own default is 500000."""
    folder = one_bit_llm(tmp_path / "1bit")
    expected = logits(loaded(folder))
    assert torch.equal(logits(loaded(edit_config(folder, rope_theta=None))), expected)


def test_b1_gives_the_logits_of_the_model_that_was_saved(tmp_path):
    from qbench.models.bitnet.architecture import new_model

    folder = b1(tmp_path / "b1")
    config = json.loads((folder / "config.json").read_text())
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    fields = {name: config[name] for name in (*shape, *more)}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = new_model("b1", seed=3, initializer_range=0.3, **fields, **ends).eval()
    assert torch.equal(logits(loaded(folder)), logits(model))


@pytest.mark.parametrize("kind", ["online", "offline", "packed"])
def test_the_golden_logits_of_transformers_are_met(tmp_path, kind):
    """tests/golden/bitnet_e2e: autobitlinear online, offline, and bitlinear, run in 5.23.0."""
    vectors = golden.tensors("bitnet_e2e")
    state = {name[2:]: t for name, t in vectors.items() if name.startswith("w.")}
    config = golden.index("bitnet_e2e_index")["config"]
    config |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    config |= {"hidden_act": "relu2"}
    state = {name: tensor.float() for name, tensor in state.items()}
    quantization = {"online": ONLINE, "offline": OFFLINE, "packed": quantization_config()}[kind]
    if kind != "online":
        state = packed_state(state, divides=kind == "packed", exact=False)
    folder = write(tmp_path / kind, state, config | {"quantization_config": quantization})
    with torch.no_grad():
        found = loaded(folder)(vectors["ids"]).logits
    assert relative(found, vectors[f"logits.{kind}"]) < 1e-5


def test_without_a_quantization_config_the_golden_ternary_logits_are_met_and_not_the_plain_ones(
    tmp_path,
):
    vectors = golden.tensors("bitnet_e2e")
    state = {name[2:]: t for name, t in vectors.items() if name.startswith("w.")}
    config = golden.index("bitnet_e2e_index")["config"]
    config |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    folder = write(tmp_path / "bare", state, config)
    with torch.no_grad():
        found = loaded(folder)(vectors["ids"]).logits
        plain = loaded(folder, latent=True)(vectors["ids"]).logits
    assert relative(found, vectors["logits.online"]) < 1e-5
    assert relative(plain, vectors["logits.plain"]) < 1e-5
    assert relative(found, vectors["logits.plain"]) > 0.5
    assert "mended: config.json has no" in find_checkpoint(str(folder)).load_report[-1]


FORMATS = {
    "microsoft packed": lambda folder: microsoft(folder, packed=True),
    "microsoft latent": lambda folder: microsoft(folder, packed=False),
    "HF1BitLLM": hf_llama,
    "1bitLLM": one_bit_llm,
    "b1": b1,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_evaluates_and_counts_its_weights(tmp_path, text, kind):
    folder = FORMATS[kind](tmp_path / "model")
    model, tokenizer = load_checkpoint(str(folder))
    result = evaluate(model, tokenizer, [f"{text}@gptq-16"], limit=4)
    perplexity = result[f"{text}@gptq-16"].metrics["perplexity"].as_float()
    assert math.isfinite(perplexity)
    expected = sum(p.numel() for p in model.parameters())
    assert find_checkpoint(str(folder)).parameters == expected
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("kind", FORMATS)
def test_a_loaded_matrix_holds_two_or_three_values_at_any_dtype(tmp_path, kind):
    model = loaded(FORMATS[kind](tmp_path / "model"), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layers = dict(bitlinears(model))
    assert len(layers) == N_LINEARS and all(layer.frozen for layer in layers.values())
    levels = {layer.weight.unique().numel() for layer in layers.values()}
    assert levels == {2 if kind == "b1" else 3}


def test_loading_leaves_the_global_generator_alone(tmp_path):
    folder = microsoft(tmp_path / "ms", packed=True)
    before = torch.random.get_rng_state()
    loaded(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_compiler_and_no_remote_code_are_needed(tmp_path):
    """A fresh process whose torch.compile raises; the modelling files that auto_map names are not
    there."""
    folder = microsoft(tmp_path / "ms", packed=True)
    code = (
        "import torch\n"
        "def refuse(*a, **k): raise AssertionError('compiled')\n"
        "from qbench import load_checkpoint\n"
        "import torch._dynamo.convert_frame as frames\n"
        "frames.convert_frame = frames.convert_frame_assert = refuse\n"
        f"model, _ = load_checkpoint({str(folder)!r})\n"
        "print(model(torch.tensor([[3, 4]])).logits.shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([1, 2, 512])" in run.stdout, run.stderr


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    found = (obj for obj in gc.get_objects() if type(obj) in (torch.Tensor, torch.nn.Parameter))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def test_when_the_last_tensor_is_read_the_others_are_held_once(tmp_path, monkeypatch):
    folder = microsoft(tmp_path / "ms", packed=False, dtype=torch.float32)
    reads, held, read = [], [], loading._Files.read
    last = len(load_file(folder / "model.safetensors"))

    def watched(self, name):
        reads.append(name)
        if len(reads) == last:
            held.append(live_bytes())
        return read(self, name)

    monkeypatch.setattr(loading._Files, "read", watched)
    before = live_bytes()
    model = loaded(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert len(reads) == last and held[0] - before < 1.1 * size


# --- latent weights -------------------------------------------------------------------------------
def test_latent_weights_of_b158_are_the_plain_model(tmp_path):
    folder = microsoft(tmp_path / "ms", packed=False, dtype=torch.float32)
    model = loaded(folder, latent=True)
    assert not list(bitlinears(model))
    assert relative(logits(model), logits(random_bitnet())) < 1e-6
    assert find_checkpoint(str(folder), latent=True).name == "ms-latent"


def test_latent_weights_of_a_b1_keep_its_norms(tmp_path):
    """Frozen at the latent weights (codes are they, the scale is 1) and with 16-bit activations."""
    checkpoint = find_checkpoint(str(b1(tmp_path / "b1")), latent=True)
    expected = load(checkpoint, "online")
    for _, layer in bitlinears(expected):
        layer.options = replace(layer.options, abits=16)
        layer.freeze_(WeightCodes(layer.weight.detach().clone(), torch.ones(1)))
    assert relative(logits(checkpoint.load_model()), logits(expected)) < 1e-6


@pytest.mark.parametrize("kind", ["microsoft latent", "1bitLLM", "b1"])
def test_latent_weights_have_another_fingerprint_and_the_same_rows(tmp_path, kind):
    folder = FORMATS[kind](tmp_path / "model")
    trained, latent = (find_checkpoint(str(folder), latent=on) for on in (False, True))
    assert trained.fingerprint != latent.fingerprint
    assert trained.trained_scheme is not None and latent.trained_scheme is None
    assert sorted(trained.row_lengths.values()) == sorted(latent.row_lengths.values())
    assert len(latent.row_lengths) == N_LINEARS
    names = {name for name, module in latent.load_model().named_modules()}
    assert set(latent.row_lengths) <= names


@pytest.mark.parametrize("kind", ["microsoft packed", "HF1BitLLM"])
def test_packed_checkpoints_have_no_latent_weights(tmp_path, kind):
    folder = FORMATS[kind](tmp_path / "model")
    assert "holds ternary codes and no latent weights" in refused(folder, latent=True)


def test_an_ordinary_checkpoint_has_no_latent_weights(tiny):
    assert "is no BitNet checkpoint; drop --latent" in refused(tiny, latent=True)


@pytest.mark.parametrize("kind", ["microsoft latent", "1bitLLM"])
def test_rounding_latent_weights_to_ternary_gives_the_trained_logits(tmp_path, kind):
    """rtn at the scheme of the training is what the training computes: the grids are the same."""
    folder = FORMATS[kind](tmp_path / "model")
    checkpoint = find_checkpoint(str(folder))
    model = loaded(folder, latent=True)
    report = quantize_model(model, "rtn", str(checkpoint.trained_scheme))
    trained = checkpoint.load_model()
    assert len(report.layers) == N_LINEARS
    for name, layer in bitlinears(trained):
        assert relative(model.get_submodule(name).weight, layer.weight) < 1e-6
    assert relative(logits(model), logits(trained)) < TIE


def test_a_model_trained_at_low_width_is_not_quantized(tmp_path):
    folder = microsoft(tmp_path / "ms", packed=False)
    for model in (loaded(folder), load(find_checkpoint(str(folder)), "online")):
        with pytest.raises(QBenchError, match=r"trained at low bit width .*latent=True"):
            quantize_model(model, "rtn", "W4A16")


def test_what_is_quantized_from_latent_weights_is_no_bitnet_when_it_is_loaded_again(tmp_path):
    model = loaded(microsoft(tmp_path / "ms", packed=False), latent=True)
    quantize_model(model, "rtn", "W4A16")
    model.save_pretrained(tmp_path / "rtn")
    tiny_tokenizer().save_pretrained(tmp_path / "rtn")
    assert find_checkpoint(str(tmp_path / "rtn")).bitnet is None
    assert relative(logits(loaded(tmp_path / "rtn")), logits(model)) < 1e-6


# --- refusals -------------------------------------------------------------------------------------
def packed(tmp_path, change=None, **config):
    folder = microsoft(tmp_path / "ms", packed=True)
    if config:
        edit_config(folder, **config)
    return folder if change is None else edit_weights(folder, change)


def test_a_missing_scale_is_refused_before_anything_is_loaded(tmp_path, no_model):
    folder = packed(tmp_path, lambda tensors: tensors.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(QBenchError, match=f"{DOWN} has no weight_scale"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("rows", [15, 17, 64])
def test_codes_of_another_number_of_rows_are_refused(tmp_path, rows):
    def change(tensors):
        tensors[f"{Q}.weight"] = torch.zeros(rows, 64, dtype=torch.uint8)

    message = refused(packed(tmp_path, change))
    assert f"{Q}.weight is packed as [{rows}, 64] where 64 x 64 codes are [16, 64]" in message


def test_outputs_that_are_no_multiple_of_four_cannot_be_packed(tmp_path):
    """transformers rounds up when it packs, and cannot load what it packed."""
    message = refused(packed(tmp_path, intermediate_size=98))
    assert "gate_proj has 98 outputs, which is no multiple of 4" in message


def test_a_fourth_code_is_refused(tmp_path):
    def change(tensors):
        tensors[f"{DOWN}.weight"][0, 3] = 0b00110001

    assert f"{DOWN}.weight: a packed byte holds code 3" in refused(packed(tmp_path, change))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(tmp_path, value):
    def change(tensors):
        tensors[f"{DOWN}.weight_scale"].fill_(value)

    message = refused(packed(tmp_path, change))
    assert f"{DOWN}.weight_scale is {value:g} where one positive number belongs" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(tmp_path, value):
    def change(tensors):
        tensors[f"{DOWN}.weight_scale"].fill_(value)

    assert f"{DOWN}.weight_scale contains NaN or infinite" in refused(packed(tmp_path, change))


def test_a_scale_for_every_row_is_refused(tmp_path):
    def change(tensors):
        tensors[f"{DOWN}.weight_scale"] = torch.ones(64)

    assert "is 64 numbers where one" in refused(packed(tmp_path, change))


def test_floating_point_codes_that_are_not_ternary_are_refused(tmp_path):
    state = state_of(random_bitnet())
    for name in [name for name in state if is_projection(name)]:
        state[f"{name}_scale"] = torch.ones(1)
    folder = write(tmp_path / "codes", state, config_of(random_bitnet(), OFFLINE))
    assert "where codes are -1, 0 and 1; latent weights are" in refused(folder)


def test_nan_in_a_latent_weight_is_refused_by_name(tmp_path):
    def change(tensors):
        tensors[f"{DOWN}.weight"][0, 0] = float("nan")

    folder = edit_weights(microsoft(tmp_path / "ms", packed=False), change)
    assert f"{DOWN}.weight contains NaN" in refused(folder)


@pytest.mark.parametrize("norm", ["attn_sub_norm", "ffn_sub_norm"])
def test_a_bitnet_without_its_norms_is_refused(tmp_path, norm):
    def change(tensors):
        for name in [name for name in tensors if norm in name]:
            del tensors[name]

    message = refused(edit_weights(microsoft(tmp_path / "ms", packed=False), change))
    assert "lacks tensors" in message and norm in message


def test_tensors_the_model_has_no_place_for_are_refused(tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.inner_attn_ln.weight"] = torch.ones(64)

    assert "its model class ignores" in refused(packed(tmp_path, change))


def test_tensors_of_another_shape_are_refused(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(60)

    assert "of another shape" in refused(packed(tmp_path, change))


def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    assert "correct tie_word_embeddings" in refused(packed(tmp_path, change))


def test_a_head_that_is_stored_beside_its_twin_is_no_mistake(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    whole = loaded(packed(tmp_path, change))
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_blocks_of_something_else_than_linears_are_refused(tmp_path):
    """GPT-2 keeps its matrices in Conv1D, mixtures in one tensor for all experts."""
    for architecture in ("gpt2", "mixtral"):
        model = tiny_model(architecture)
        state = {n: t for n, t in state_of(model).items()} if architecture == "mixtral" else {}
        state = state or {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        folder = write(tmp_path / architecture, state, config | {"quantization_config": ONLINE})
        message = refused(folder)
        assert type(model).__name__ in message and "is no linear; qbench runs" in message


def test_damaged_options_of_a_b1_are_refused(tmp_path):
    folder = edit_config(b1(tmp_path / "b1"), bitlinear={"weights": "binary", "wrong": 1})
    assert "wrong" in refused(folder)


def test_remote_code_of_a_tokenizer_is_not_run(tmp_path):
    folder = one_bit_llm(tmp_path / "1bit")
    path = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "BitnetTokenizer"}
    code |= {"auto_map": {"AutoTokenizer": ["tokenization_bitnet.BitnetTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    tokenizer = find_checkpoint(str(folder)).load_tokenizer()
    assert tokenizer("Anna found")["input_ids"] == tiny_tokenizer()("Anna found")["input_ids"]
