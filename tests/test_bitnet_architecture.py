"""The twins: fp16, b1 and b158 models that start equal, save, load, generate and train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qbench.errors import QBenchError
from qbench.models.bitnet.architecture import (
    KINDS,
    BitNetB1Config,
    BitNetB1ForCausalLM,
    b158_config,
    new_model,
    register,
)
from qbench.models.bitnet.layers import B1, B158, BitLinear, BitLinearOptions, bitlinears, freeze_
from qbench.models.blocks import find_blocks, trace_block
from qbench.quantization.calibration import capture
from qbench.testing import tiny_tokenizer, tiny_windows

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, seed: int = 0, **changes):
    return new_model(kind, seed=seed, **{**SHAPE, **changes})


def logits(model, windows=None):
    with torch.no_grad():
        return model(tiny_windows(2, 16) if windows is None else windows).logits


# --- what is in a model --------------------------------------------------------------------------


def test_b1_and_b158_quantize_every_linear_of_the_blocks_and_nothing_else():
    for kind, options in (("b1", B1), ("b158", B158)):
        model = tiny(kind, tie_word_embeddings=False)
        names = [name.rpartition(".")[2] for name, _ in bitlinears(model)]
        assert names == LINEARS * 2
        assert all(layer.options == options for _, layer in bitlinears(model))
        assert type(model.lm_head) is nn.Linear
    assert not list(bitlinears(tiny("fp16")))


def test_a_quantized_linear_of_b1_sees_its_input_normalized_once():
    """The blocks' own norms are gone: q_proj reads the residual stream itself."""
    model = tiny("b1").eval()
    vectors = [name for name, p in model.named_parameters() if p.ndim == 1]
    assert vectors == ["model.norm.weight"]
    seen = {}
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        model.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, args[0])
        )
    residual = []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: residual.append(output[0])
    )
    windows = tiny_windows(2, 16)
    logits(model, windows)
    embedded = model.model.embed_tokens(windows)
    assert torch.equal(seen["self_attn.q_proj"], embedded)
    assert torch.equal(seen["mlp.up_proj"], embedded + residual[0])


def test_b158_has_the_norms_of_the_released_checkpoints():
    vectors = {name.split(".")[-2] for name, p in tiny("b158").named_parameters() if p.ndim == 1}
    assert vectors == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "attn_sub_norm",
        "ffn_sub_norm",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_one_seed_gives_the_kinds_equal_tensors_where_names_are_shared(tied):
    first, *others = (
        dict(tiny(kind, tie_word_embeddings=tied).named_parameters()) for kind in KINDS
    )
    matrices = {name for name, p in first.items() if p.ndim == 2}
    assert len(matrices) == 2 * 7 + 1 + (not tied)
    for other in others:
        assert matrices == {name for name, p in other.items() if p.ndim == 2}
        assert all(torch.equal(other[name], first[name]) for name in other.keys() & first.keys())


def test_another_seed_gives_other_tensors_and_no_two_tensors_are_alike():
    one, again, two = tiny("b1"), tiny("b1"), tiny("b1", seed=1)
    for (name, p), q, r in zip(
        one.named_parameters(), again.parameters(), two.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, r), name
    q_projs = [layer.self_attn.q_proj.weight for layer in one.model.layers]
    assert not torch.equal(*q_projs)


@every_kind
def test_matrices_have_the_asked_deviation_and_norms_are_ones(kind):
    for name, p in tiny(kind, initializer_range=0.1).named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert float(p.detach().std()) == pytest.approx(0.1, rel=0.06), name


@every_kind
def test_building_a_model_leaves_the_global_generator_alone(kind):
    state = torch.get_rng_state()
    tiny(kind)
    assert torch.equal(torch.get_rng_state(), state)


def test_twins_share_every_field_of_their_configurations_that_changes_the_function():
    fp16, b1, b158 = (tiny(kind).config for kind in KINDS)
    fields = (*SHAPE, "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    for field in fields:
        assert getattr(fp16, field) == getattr(b1, field) == getattr(b158, field), field


@every_kind
def test_twins_differ_from_the_first_token_on(kind):
    others = [logits(tiny(other).eval()) for other in KINDS if other != kind]
    for other in others:
        assert not torch.allclose(logits(tiny(kind).eval()), other, atol=1e-3)


# --- the harness sees them -----------------------------------------------------------------------


@every_kind
def test_blocks_are_found_and_traced(kind):
    model = tiny(kind).eval()
    windows = tiny_windows(2, 16)
    captured = capture(model, windows, 2)
    blocks = find_blocks(model)
    assert [name for name, _ in blocks] == ["model.layers.0", "model.layers.1"]
    name, module = blocks[0]
    with torch.no_grad():
        block, _ = trace_block(name, module, captured.runner(name, module), captured.hidden[0])
    assert [linear.rpartition(".")[2] for linear in block.linears] == LINEARS
    groups = [{name.rpartition(".")[2] for name in group} for group in block.input_groups]
    assert groups == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}] + [
        {"down_proj"}
    ]
    assert not block.skipped


# --- running -------------------------------------------------------------------------------------


@every_kind
def test_reading_token_by_token_gives_what_reading_at_once_gives(kind):
    """True of a scale per token: a scale per tensor would look ahead.

    In float64, as noise of 1e-7 can move a value to the next of 255 codes.
    """
    model = tiny(kind, initializer_range=0.2).eval().double()
    windows = tiny_windows(2, 8)
    cache, steps = None, []
    with torch.no_grad():
        for t in range(windows.shape[1]):
            out = model(windows[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), logits(model, windows), rtol=1e-9, atol=1e-9)


@every_kind
def test_every_kind_learns_a_batch_by_heart(kind):
    model = tiny(kind)
    windows = tiny_windows(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(6.24, abs=0.3)  # ln 512
    assert losses[-1] < 1.0


@every_kind
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_every_weight_gets_a_gradient_also_with_gradient_checkpointing(kind):
    model, checkpointed = tiny(kind), tiny(kind)
    checkpointed.gradient_checkpointing_enable()
    windows = tiny_windows(2, 16)
    for m in (model, checkpointed):
        m(windows, labels=windows, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert p.grad is not None and p.grad.any(), name
        assert torch.equal(p.grad, q.grad), name


# --- on disk -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """b1 and b158 models, their logits beside them."""
    root = tmp_path_factory.mktemp("saved")
    for kind in ("b1", "b158"):
        model = tiny(kind, initializer_range=0.2).eval()
        model.save_pretrained(root / kind)
        tiny_tokenizer().save_pretrained(root / kind)
        torch.save(logits(model), root / f"{kind}.pt")
    return root


def test_a_b1_checkpoint_loads_through_the_auto_classes(saved):
    register()
    register()
    loaded = AutoModelForCausalLM.from_pretrained(saved / "b1")
    assert type(loaded) is BitNetB1ForCausalLM and not loaded.training
    assert torch.equal(logits(loaded), torch.load(saved / "b1.pt"))
    assert AutoTokenizer.from_pretrained(saved / "b1")("Anna").input_ids[0] == 1


def test_a_b1_checkpoint_loads_through_its_own_class_in_bfloat16(saved):
    loaded = BitNetB1ForCausalLM.from_pretrained(saved / "b1", dtype=torch.bfloat16)
    reference = torch.load(saved / "b1.pt")
    found = logits(loaded)
    assert found.dtype == torch.bfloat16
    assert (found.float() - reference).norm() < 0.2 * reference.norm()


def test_options_of_the_linears_are_part_of_the_checkpoint(tmp_path):
    options = BitLinearOptions(weights="binary", norm="rms", sign_of_zero="zero", abits=4, groups=2)
    model = tiny("b1", bitlinear=options).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bitlinear"] == options.to_dict()
    loaded = BitNetB1ForCausalLM.from_pretrained(tmp_path)
    assert all(layer.options == options for _, layer in bitlinears(loaded))
    assert torch.equal(logits(loaded), logits(model))


def test_an_option_that_nobody_knows_in_a_config_is_refused(saved, tmp_path):
    config = json.loads((saved / "b1" / "config.json").read_text())
    config["bitlinear"]["sign"] = "negative"
    (tmp_path / "config.json").write_text(json.dumps(config))
    register()
    with pytest.raises(QBenchError, match="unknown BitLinear option 'sign'"):
        AutoConfig.from_pretrained(tmp_path)


PLAIN_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

root, windows = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
try:
    AutoModelForCausalLM.from_pretrained(root + "/b1")
except ValueError as error:
    assert "qbench_bitnet_b1" in str(error), error
else:
    raise AssertionError("plain transformers ran a b1 checkpoint")
model = AutoModelForCausalLM.from_pretrained(root + "/b158")
with torch.no_grad():
    found = model(windows).logits
names = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
assert names == {"AutoBitLinear"}, names
expected = torch.load(root + "/b158.pt")
difference = float((found - expected).norm() / expected.norm())
assert difference < 1e-6, difference
assert not [m for m in sys.modules if m.startswith("qbench")]
print("done")
"""


def test_without_qbench_transformers_refuses_b1_and_quantizes_b158_itself(saved):
    """TORCHDYNAMO_DISABLE: transformers' own layers are compiled, which needs a C++ compiler."""
    windows = json.dumps(tiny_windows(2, 16).tolist())
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESS, str(saved), windows],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        cwd=saved,
    )
    assert run.stdout.strip() == "done", run.stderr[-2000:]


def test_a_frozen_b1_model_gives_the_same_logits_and_holds_two_levels_per_matrix():
    model = tiny("b1").eval()
    before = logits(model)
    freeze_(model)
    assert torch.equal(logits(model), before)
    for _, layer in bitlinears(model):
        assert isinstance(layer, BitLinear) and layer.weight.unique().numel() == 2


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("b2", {}, "unknown kind of model 'b2'; did you mean"),
        ("fp16", {"bitlinear": B158}, "an fp16 model has no BitLinear"),
        ("b158", {"bitlinear": B1}, "with the released code's quantizers and no others"),
        ("b1", {"bitlinear": B158}, "a b1 model has binary weights .* not weights='ternary'"),
        ("b1", {"bitlinear": BitLinearOptions(weights="binary")}, "norm='none'; give binary, and"),
        ("b1", {"num_attention_heads": 5}, "hidden_size=64 is not a multiple of num_attention"),
        ("b1", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of"),
        ("fp16", {"hidden_size": 60}, "heads of 15 features cannot be rotated in pairs"),
        ("fp16", {"hidden_act": "silo"}, "unknown activation function 'silo'; did you mean 'silu'"),
    ],
)
def test_models_that_cannot_be_are_refused(kind, changes, message):
    with pytest.raises(QBenchError, match=message):
        tiny(kind, **changes)


def test_configurations_start_from_the_presets():
    assert BitNetB1Config().bitlinear_options == B1
    assert BitNetB1Config().model_type == "qbench_bitnet_b1"
    config = b158_config(hidden_size=64, num_attention_heads=4)
    assert (config.hidden_act, config.model_type) == ("silu", "bitnet")
    assert config.quantization_config["quantization_mode"] == "online"
    assert type(tiny("fp16")) is LlamaForCausalLM
