"""The loop over blocks: who sees which activations, what is rounded, what is left alone."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from invented_architecture import odd_model, odd_windows
from registered import built_in
from transformers import AutoModelForCausalLM

from qbench import (
    Baseline,
    CannotQuantize,
    Observer,
    QBenchError,
    QuantizedWeight,
    Scheme,
    Statistics,
    get_grid,
    quantize_model,
    round_to_nearest,
)
from qbench.baseline import resolve_scheme
from qbench.errors import RunFailed
from qbench.models.blocks import find_blocks, trace_block
from qbench.models.saving import save_checkpoint
from qbench.quantization.activations import ActivationQuantizer
from qbench.quantization.calibration import capture
from qbench.quantization.passes import collect
from qbench.quantization.rounding import quadratic
from qbench.record import BaselineSpec, QuantizationKey, QuantizationRecord
from qbench.registry import load_baseline
from qbench.testing import tiny_model, tiny_tokenizer, tiny_windows
from qbench_baselines.gptq import GPTQ
from qbench_baselines.quip import QuIP
from qbench_baselines.rtn import RTN
from qbench_baselines.smoothquant import SmoothQuant

BASELINES = built_in()
QUANTIZING = [name for name in BASELINES if name != "none"]
WINDOWS, TEST = tiny_windows(4, 24), tiny_windows(2, 20, seed=9)
UNREACHED = {  # of the invented architecture
    f"decoder.{b}.experts.{e}.{part}"
    for b in range(2)
    for e in (2, 3)
    for part in ("widen", "narrow")
}


def logits(model, ids=TEST):
    with torch.no_grad():
        return torch.cat([model(row[None]).logits for row in ids])


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def layer(result, name):
    return next(report for report in result.layers if report.name == name)


# --- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
def test_sixteen_bits_change_nothing_and_attach_nothing(baseline):
    model = tiny_model()
    before = weights(model)
    result = quantize_model(model, baseline, "W16A16", WINDOWS)
    assert same(weights(model), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert result.layers == [] and result.effective_bits == 16


@pytest.mark.parametrize("baseline", QUANTIZING)
def test_embeddings_head_and_norms_stay_and_every_linear_changes(baseline):
    model = tiny_model()
    before = weights(model)
    result = quantize_model(model, baseline, "W3A16", WINDOWS)
    changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
    linears = {f"{report.name}.weight" for report in result.layers}
    assert len(linears) == 14 and linears <= changed
    if baseline == "smoothquant":  # it folds scales into these
        changed -= {n for n in changed if n.endswith("layernorm.weight")}
    assert changed == linears


def test_tied_embeddings_stay_tied_and_untouched():
    model = tiny_model(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    quantize_model(model, "rtn", "W2A16")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, before)


def test_matrices_that_stay_in_full_precision_are_named_with_the_reason():
    result = quantize_model(tiny_model("mixtral"), "rtn", "W4A16")
    router = "not an nn.Linear (a router, for instance)"
    assert result.skipped == {f"model.layers.{i}.mlp.gate.weight": router for i in range(2)}


def test_the_calibration_tokens_are_not_written_to():
    windows = WINDOWS.clone()
    quantize_model(tiny_model(), "gptq", "W4A4", windows)
    assert torch.equal(windows, WINDOWS)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("grid", ["restricted", "asym", "bitnet", "rms"])
def test_an_activation_quantizer_never_writes_into_its_input(granularity, grid):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for static in (None, get_grid(grid).fit(torch.tensor([[-1.0, 1.0]]), 4)):
        found = ActivationQuantizer(4, grid, granularity, static)(x)
        assert torch.equal(x, before) and not torch.equal(found, x)
        assert found.shape == x.shape and found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("scheme", ["W16A4", "W16A4:a=tensor", "W16A4:static", "W16A4KV4:bmm"])
def test_what_flows_through_a_quantized_model_is_never_modified_in_place(scheme):
    model = tiny_model()
    quantize_model(model, "none", scheme, WINDOWS)
    seen = []
    for module in model.modules():  # the residual stream and everything derived from it
        module.register_forward_hook(
            lambda m, args, output: seen.extend(
                (x, x.clone()) for x in (*args, output) if isinstance(x, torch.Tensor)
            )
        )
    logits(model)
    assert len(seen) > 100
    assert all(torch.equal(x, copied) for x, copied in seen)


def by_hand(model, quantize_input=None, quantize_output=None):
    """Attach plain hooks to every linear of every block: an independent activation quantizer."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            if quantize_input:
                module.register_forward_pre_hook(lambda m, a, n=name: (quantize_input(n, a[0]),))
            if quantize_output and name.endswith(("q_proj", "k_proj", "v_proj")):
                module.register_forward_hook(lambda m, a, y: quantize_output(y))
    return model


def absmax_round(x, bits, scale_over=-1):
    top = x.abs().amax(scale_over, keepdim=True) if scale_over is not None else x.abs().max()
    step = top / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def test_activations_are_rounded_per_token_or_over_the_tensor_in_front_of_every_linear():
    for text, over in (("W16A5:a=token", -1), ("W16A5:a=tensor", None)):
        model = tiny_model()
        quantize_model(model, "none", text)
        expected = by_hand(tiny_model(), lambda name, x, o=over: absmax_round(x, 5, o))
        assert torch.allclose(logits(model), logits(expected), atol=1e-5)


def test_static_scales_are_the_extremes_that_calibration_saw():
    """Both of calibration and of the test rows, so that later values are clipped to them."""
    tops = {}

    def observe(name, x):
        tops[name] = max(tops.get(name, 0.0), float(x.abs().max()))
        return x

    logits(by_hand(tiny_model(), observe), WINDOWS)
    model = tiny_model()
    quantize_model(model, "none", "W16A6:static", WINDOWS)

    def static(name, x):
        step = tops[name] / 31
        return (x / step).round().clamp(-31, 31) * step

    assert torch.allclose(logits(model), logits(by_hand(tiny_model(), static)), atol=1e-5)


def test_bmm_rounds_the_outputs_of_query_key_and_value_projections_too():
    model = tiny_model()
    quantize_model(model, "none", "W16A5:bmm")
    expected = by_hand(
        tiny_model(), lambda name, x: absmax_round(x, 5), lambda y: absmax_round(y, 5)
    )
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    without = tiny_model()
    quantize_model(without, "none", "W16A5")
    assert not torch.allclose(logits(model), logits(without), atol=1e-5)


def test_kv_bits_round_keys_and_values_where_the_attention_product_reads_them(monkeypatch):
    model, plain = tiny_model(), logits(tiny_model())
    quantize_model(model, "none", "W16A16KV3")
    found = logits(model)
    attend = F.scaled_dot_product_attention

    def rounded(query, key, value, *args, **kwargs):
        return attend(query, absmax_round(key, 3), absmax_round(value, 3), *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", rounded)
    assert torch.allclose(found, logits(tiny_model()), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_kv_bits_work_where_attention_is_called_by_keyword():
    model, plain = odd_model(), odd_model()
    quantize_model(model, "none", "W16A16KV2")
    with torch.no_grad():
        assert not torch.allclose(model(odd_windows()), plain(odd_windows()), atol=1e-5)
        quantized = F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4))
    assert torch.equal(quantized, torch.ones(1, 1, 2, 4))  # nothing lingers outside the model


def test_kv_bits_are_refused_where_attention_is_no_sdpa_before_anything_is_changed():
    model = tiny_model("bloom")
    before = weights(model)
    with pytest.raises(QBenchError) as error:
        quantize_model(model, "rtn", "W4A16KV4")
    assert "KV4: the attention of transformer.h.0" in str(error.value)
    assert "use kvbits 16 for this architecture" in str(error.value)
    assert same(weights(model), before)


@pytest.mark.parametrize("baseline", ["gptq", "quip", "smoothquant"])
def test_activation_quantizers_are_off_while_calibrating(baseline):
    """So the weights do not depend on the activation bits, not even in the last block."""
    plain, rounded = tiny_model(), tiny_model()
    quantize_model(plain, baseline, "W3A16", WINDOWS)
    quantize_model(rounded, baseline, "W3A2KV2", WINDOWS)
    assert same(weights(plain), weights(rounded))
    assert not torch.allclose(logits(plain), logits(rounded), atol=1e-3)


def test_an_expert_that_calibration_missed_gets_scales_per_token_and_a_note():
    model = odd_model()
    result = quantize_model(model, "none", "W16A8:static", odd_windows())
    assert {note.split(":")[0] for note in result.notes} == UNREACHED
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expert, fresh = model.decoder[0].experts[3].widen, odd_model().decoder[0].experts[3].widen
    with torch.no_grad():
        assert torch.allclose(expert(x), fresh(absmax_round(x, 8)), atol=1e-5)


# --- which stream calibrates ----------------------------------------------------------------------


SEEN: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class Spy(Baseline):
    """Rounds to nearest at 2 bits and keeps the hessians it is shown, in order."""

    weight_statistics: ClassVar[tuple[str, ...]] = ("hessian",)

    def quantize_weight(self, weight, scheme, stats, generator):
        SEEN[len(SEEN)] = stats.hessian.clone()
        return round_to_nearest(weight, scheme)


class SpyOnFullPrecision(Spy):
    calibrate_on: ClassVar[str] = "full_precision"


class SpyInStages(Spy):
    def stages(self, block):
        return block.input_groups


def hessian_by_hook(model, name):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: found.append(args[0].flatten(0, 1))
    )
    logits(model, WINDOWS)
    handle.remove()
    x = torch.cat(found).double()
    return 2 / len(WINDOWS) * x.T @ x


def quantized_prefix(names):
    """A fresh model with some linears rounded by hand."""
    model = tiny_model()
    scheme = resolve_scheme(Scheme(wbits=2), RTN())
    for name in names:
        module = model.get_submodule(name)
        module.weight.data = round_to_nearest(module.weight.data, scheme).weight
    return model


BLOCK = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("spy", "rounded_before", "number", "name"),
    [
        # number of the call -> the linear it belongs to, and what must be rounded before it
        (Spy, [], 3, "model.layers.0.self_attn.o_proj"),
        (Spy, [f"model.layers.0.{n}" for n in BLOCK], 7, "model.layers.1.self_attn.q_proj"),
        (SpyOnFullPrecision, [], 7, "model.layers.1.self_attn.q_proj"),
        (SpyOnFullPrecision, [], 13, "model.layers.1.mlp.down_proj"),
        (
            SpyInStages,
            [f"model.layers.0.{n}" for n in BLOCK[:3]],
            3,
            "model.layers.0.self_attn.o_proj",
        ),
        (
            SpyInStages,
            [f"model.layers.0.{n}" for n in BLOCK] + [f"model.layers.1.{n}" for n in BLOCK[:6]],
            13,
            "model.layers.1.mlp.down_proj",
        ),
    ],
)
def test_statistics_come_from_the_stream_the_method_asked_for(spy, rounded_before, number, name):
    SEEN.clear()
    quantize_model(tiny_model(), spy(), "W2A16", WINDOWS)
    assert len(SEEN) == 14
    expected = hessian_by_hook(quantized_prefix(rounded_before), name)
    error = (SEEN[number] - expected).norm() / expected.norm()
    assert error < 1e-5
    other = hessian_by_hook(quantized_prefix([] if rounded_before else BLOCK_NAMES), name)
    assert (SEEN[number] - other).norm() / other.norm() > 100 * error


BLOCK_NAMES = [f"model.layers.{i}.{n}" for i in range(2) for n in BLOCK]


def test_true_sequential_gptq_walks_through_the_shared_inputs():
    plain, staged = tiny_model(), tiny_model()
    one = quantize_model(plain, GPTQ(), "W3A16", WINDOWS)
    other = quantize_model(staged, GPTQ(true_sequential=True), "W3A16", WINDOWS)
    assert [r.name for r in one.layers] == [r.name for r in other.layers] == BLOCK_NAMES
    first = "model.layers.0.self_attn.q_proj.weight"
    later = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(plain.state_dict()[first], staged.state_dict()[first])
    assert not torch.equal(plain.state_dict()[later], staged.state_dict()[later])


# --- schemes per linear ---------------------------------------------------------------------------


def test_overrides_give_single_linears_their_own_scheme():
    model = tiny_model()
    before = weights(model)
    text = "W2A16;*.down_proj=W4A16g32;model.layers.1.*=W16A16"
    result = quantize_model(model, "rtn", text)
    for report in result.layers:
        rows = model.get_parameter(f"{report.name}.weight")
        if report.name.endswith("down_proj"):
            assert report.scheme == "W4A16g32:grid=asym"
            assert 4 < max(len(r.unique()) for r in rows.reshape(-1, 32)) <= 16
        elif report.name.startswith("model.layers.1"):
            assert torch.equal(rows, before[f"{report.name}.weight"])
            assert (report.scheme, report.relative_error) == ("W16A16", 0.0)
            assert report.stored_bits == 16 * rows.numel() and report.fallback is None
        else:
            assert report.scheme == "W2A16:w=channel,grid=asym"
            assert max(len(r.unique()) for r in rows) <= 4
    # codes, scales and zero points by hand: 6 x 2 bits in block 0, 2 x 4 bits in groups, rest 16
    sizes = {r.name: r.shape for r in result.layers}
    total = sum(a * b for a, b in sizes.values())
    bits = 0
    for name, (out, inn) in sizes.items():
        if name.endswith("down_proj"):
            bits += out * inn * 4 + out * inn // 32 * 20
        else:
            bits += out * inn * 2 + out * 18 if "layers.0" in name else out * inn * 16
    assert result.effective_bits == pytest.approx(bits / total)


def test_an_override_of_activation_bits_reaches_only_its_linears():
    model = tiny_model()
    quantize_model(model, "none", "W16A16;*.down_proj=W16A4:a=token")
    expected = by_hand(
        tiny_model(), lambda n, x: absmax_round(x, 4) if n.endswith("down_proj") else x
    )
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)


# --- requests that cannot be ----------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetful(Baseline):
    def stages(self, block):
        return [list(block.linears)[1:], ["not_there"]]

    def quantize_weight(self, weight, scheme, stats, generator):
        return weight


@pytest.mark.parametrize(
    ("baseline", "scheme", "calibration", "said"),
    [
        ("gptq", "W4A16", None, "reads calibration data; pass token windows"),
        ("smoothquant", "W16A8", None, "reads calibration data; pass token windows"),
        ("rtn", "W8A8:static", None, "reads calibration data; pass token windows"),
        ("quip", "W4A16g32", WINDOWS, "QuIP cannot do W4A16g32: QuIP has one scale per matrix"),
        ("none", "W4A16", WINDOWS, "it leaves weights alone"),
        (
            "rtn",
            "W4A16g64",
            None,
            "model.layers.0.mlp.down_proj: group size 64 does not divide a row of 96 weights",
        ),
        ("rtn", "W1A16:grid=full", None, "grid 'full' has no 1-bit codes"),
        (Forgetful(), "W4A16", None, "wrong for not_there, self_attn.q_proj in model.layers.0"),
        ("nothing", "W4A16", None, "unknown baseline 'nothing'"),
        ("gptq", "W4A16", WINDOWS[0], "calibration of shape (24,) cannot be used"),
        ("gptq", "W4A16", WINDOWS[:0], "calibration of shape (0, 24) cannot be used"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(baseline, scheme, calibration, said):
    model = tiny_model()
    before = weights(model)
    with pytest.raises(QBenchError) as error:
        quantize_model(model, baseline, scheme, calibration)
    assert said in str(error.value)
    assert same(weights(model), before)


def test_a_model_in_training_mode_is_refused():
    """Dropout would draw from the global generator and spoil every statistic."""
    with pytest.raises(QBenchError, match="training mode.*call .eval()"):
        quantize_model(tiny_model("gpt2").train(), "rtn", "W4A16")


def test_an_override_that_matches_nothing_is_noted():
    result = quantize_model(tiny_model(), "rtn", "W4A16;*.donw_proj=W8A16;*.up_proj=W8A16")
    assert result.notes == ["override '*.donw_proj' matches no linear"]


def test_bmm_is_refused_where_no_attention_is_seen():
    model = odd_model()
    for block in model.decoder:
        block.forward = lambda stream, *args, b=block, **kwargs: (stream + b.out(stream), None)
    with pytest.raises(QBenchError, match="bmm: no linear of decoder.0 was seen to feed"):
        quantize_model(model, "none", "W16A8:bmm")


def test_a_weight_that_is_not_finite_ends_the_run_naming_the_linear():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(RunFailed, match="non-finite weights in model.layers.1.mlp.up_proj"):
        quantize_model(model, "rtn", "W4A16")


# --- damping and fallback -------------------------------------------------------------------------


def test_a_singular_hessian_climbs_the_ladder_and_the_record_says_how_far():
    """Sixteen tokens span at most sixteen of 64 dimensions; without damping H has no inverse."""
    result = quantize_model(tiny_model(), GPTQ(percdamp=0.0), "W3A16", tiny_windows(1, 16))
    assert {r.fallback for r in result.layers} == {None}
    assert all(r.damping in (1e-4, 1e-3, 1e-2, 0.1) for r in result.layers)
    enough = quantize_model(tiny_model(), GPTQ(percdamp=0.02), "W3A16", WINDOWS)
    assert {r.damping for r in enough.layers} == {0.02}


@pytest.mark.parametrize("baseline", ["gptq", "quip"])
def test_experts_that_no_token_reached_are_rounded_to_nearest_and_flagged(baseline):
    model = odd_model()
    before = weights(model)
    result = quantize_model(model, baseline, "W4A16:grid=asym,w=channel", odd_windows())
    fallen = {r.name for r in result.layers if r.fallback}
    assert fallen == {
        f"decoder.{b}.experts.{e}.{p}"
        for b in range(2)
        for e in (2, 3)
        for p in ("widen", "narrow")
    }
    scheme = Scheme.parse("W4A16:grid=asym,w=channel")
    for name in fallen:
        assert layer(result, name).fallback == "no calibration token reached it"
        expected = round_to_nearest(before[f"{name}.weight"], scheme).weight
        assert torch.equal(model.get_parameter(f"{name}.weight"), expected)


@dataclass(frozen=True)
class Hopeless(Baseline):
    def quantize_weight(self, weight, scheme, stats, generator):
        weight.zero_()  # not allowed, and must not reach the fallback
        raise CannotQuantize("this never works")


def test_a_method_that_gives_up_is_replaced_by_rounding_to_nearest_with_its_reason():
    model, reference = tiny_model(), tiny_model()
    result = quantize_model(model, Hopeless(), "W4A16")
    quantize_model(reference, "rtn", "W4A16")
    assert same(weights(model), weights(reference))
    assert {r.fallback for r in result.layers} == {"this never works"}


def test_inputs_that_are_all_zero_do_no_harm():
    """QuIP cannot normalize a hessian of zeros and says so; GPTQ calls every input dead."""
    stats = Statistics(("hessian",))
    stats.update(torch.zeros(2, 5, 8))
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CannotQuantize, match="the hessian is zero or not finite"):
        QuIP().quantize_weight(
            weight, Scheme.parse("W4A16:w=tensor,grid=rms"), stats, torch.Generator()
        )
    scheme = Scheme.parse("W4A16:w=channel,grid=asym")
    found = GPTQ().quantize_weight(weight, scheme, stats, torch.Generator())
    assert not found.weight.any()


# --- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", QUANTIZING)
def test_a_seed_gives_one_model_and_the_global_generators_stay(baseline):
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    one, other = tiny_model(), tiny_model()
    quantize_model(one, baseline, "W2A16", WINDOWS, seed=5)
    torch.rand(3, generator=torch.Generator().manual_seed(1))
    quantize_model(other, baseline, "W2A16", WINDOWS, seed=5)
    assert same(weights(one), weights(other))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (numpy.random.get_state()[1] == state[2]).all()


def test_another_seed_draws_other_rotations_and_leaves_other_methods_alone():
    for baseline, differs in (("quip", True), ("gptq", False), ("smoothquant", False)):
        one, other = tiny_model(), tiny_model()
        quantize_model(one, baseline, "W2A16", WINDOWS, seed=0)
        quantize_model(other, baseline, "W2A16", WINDOWS, seed=1)
        assert same(weights(one), weights(other)) is not differs


def test_a_linears_randomness_does_not_depend_on_what_ran_before_it():
    """The first block's query projection alone, and among all others."""
    alone, full = tiny_model(), tiny_model()
    name = "model.layers.0.self_attn.k_proj"
    quantize_model(alone, "quip", f"W16A16;{name}=W2A16", WINDOWS)
    quantize_model(full, "quip", "W2A16", WINDOWS)
    assert torch.equal(alone.get_parameter(f"{name}.weight"), full.get_parameter(f"{name}.weight"))


# --- copies and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_deep_copy_computes_the_same_and_is_independent(architecture):
    model = tiny_model(architecture)
    quantize_model(model, "rtn", "W4A4KV4:bmm", WINDOWS)
    expected = logits(model)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied), expected)


def record_of(result, name="test"):
    key = QuantizationKey(
        weights="0" * 64, baseline=BaselineSpec(name=name), scheme=str(result.scheme)
    )
    return QuantizationRecord(key=key, checkpoint="tiny", layers=result.layers)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gpt2", {}),
        ("opt", {}),
        ("mixtral", {}),
    ],
)
def test_a_saved_model_loads_anywhere_and_gives_the_same_logits(architecture, changes, tmp_path):
    model = tiny_model(architecture, **changes)
    result = quantize_model(model, "gptq", "W3A16", WINDOWS)
    save_checkpoint(model, tiny_tokenizer(), record_of(result), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied is (model.lm_head.weight is model.get_input_embeddings().weight)
    stored = QuantizationRecord.model_validate_json((tmp_path / "out" / "qbench.json").read_text())
    assert stored.layers == result.layers
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- methods that need more than the built-in ones ------------------------------------------------


def rotation(size, seed=0):
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
    return q


@dataclass(frozen=True)
class OnlineRotation(Baseline):
    """Turns every input at run time; the weight is rounded in the turned basis."""

    on_grid: ClassVar[bool] = False

    def quantize_weight(self, weight, scheme, stats, generator):
        q = rotation(weight.shape[1])
        rounded = round_to_nearest(weight @ q, scheme)
        return QuantizedWeight(rounded.weight, input_transform=lambda x: x @ q)


def test_a_method_may_transform_inputs_at_run_time():
    model = tiny_model()
    plain = logits(model)
    result = quantize_model(model, OnlineRotation(), "W8A16")
    assert (logits(model) - plain).norm() < 0.05 * plain.norm()
    report = result.layers[0]
    assert report.extra == {"input_transform": True} and report.relative_error is None
    w = tiny_model().model.layers[0].mlp.up_proj.weight.data
    q = rotation(64)
    expected = round_to_nearest(w @ q, Scheme.parse("W8A16:w=channel,grid=asym")).weight
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_activations_are_rounded_after_the_transform():
    model = tiny_model()
    quantize_model(model, OnlineRotation(), "W8A3:a=token")
    module = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = absmax_round(x @ rotation(64), 3) @ module.weight.T
        assert torch.allclose(module(x), expected, atol=1e-5)


def test_a_model_with_online_transforms_is_not_saved_and_not_static(tmp_path):
    model = tiny_model()
    result = quantize_model(model, OnlineRotation(), "W8A16")
    with pytest.raises(QBenchError, match="OnlineRotation transforms the input of model.layers.0"):
        save_checkpoint(
            model, tiny_tokenizer(), record_of(result, "OnlineRotation"), tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(QBenchError, match="transforms inputs at run time.*drop static"):
        quantize_model(tiny_model(), OnlineRotation(), "W8A8:static", WINDOWS)


LOSSES: list[tuple[float, float]] = []


@dataclass(frozen=True)
class LearnedOffset(Baseline):
    """Rounds in ``transform``, then learns the block's biases back with gradients."""

    steps: int = 8
    preserves_function: ClassVar[bool] = False

    def transform(self, block, context):
        for name, linear in block.linears.items():
            scheme = context.scheme.for_linear(f"{block.name}.{name}")
            linear.set_weight_(round_to_nearest(linear.weight, scheme).weight)
        biases = [p for p in block.module.parameters() if p.ndim == 1]
        losses = []
        with torch.enable_grad():
            optimizer = torch.optim.SGD(biases, lr=0.3)
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = sum(
                    F.mse_loss(context.run(i), reference, reduction="sum")
                    for i, reference in enumerate(context.reference_outputs)
                ) / sum(r.numel() for r in context.reference_outputs)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        LOSSES.append((losses[0], losses[-1]))
        for name in block.linears:
            context.report[name] = {"learned": losses[-1]}

    def quantize_weight(self, weight, scheme, stats, generator):
        return weight  # rounded already


def test_a_method_may_learn_with_gradients_on_what_the_block_reads_and_gave():
    LOSSES.clear()
    result = quantize_model(tiny_model("opt"), LearnedOffset(), "W2A16", WINDOWS)
    assert len(LOSSES) == 2
    assert all(0 < last < 0.9 * first for first, last in LOSSES)
    # what transform reports about a linear stands in the record
    assert layer(result, "model.decoder.layers.1.fc1").extra == {"learned": LOSSES[1][1]}


class Kurtosis(Observer):
    name = "kurtosis"

    def __init__(self):
        self.fourth = self.second = None
        self.tokens = 0

    def update(self, x, n_sequences):
        second, fourth = x.square().sum(0), x.pow(4).sum(0)
        self.second = second if self.second is None else self.second + second
        self.fourth = fourth if self.fourth is None else self.fourth + fourth
        self.tokens += len(x)

    def result(self):
        return None if self.second is None else self.fourth * self.tokens / self.second.square()


@dataclass(frozen=True)
class ByKurtosis(Baseline):
    weight_statistics: ClassVar[tuple[type[Observer], ...]] = (Kurtosis,)

    def quantize_weight(self, weight, scheme, stats, generator):
        found = round_to_nearest(weight, scheme)
        report = {"kurtosis": float(stats.kurtosis.mean())}
        return QuantizedWeight(found.weight, report=report)


def test_a_method_may_bring_its_own_statistic():
    result = quantize_model(tiny_model(), ByKurtosis(), "W4A16", WINDOWS)
    values = [r.extra["kurtosis"] for r in result.layers]
    assert all(1 <= v < 100 for v in values)
    assert len({round(v, 6) for v in values}) == 8  # one per shared input


def test_a_method_may_name_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from qbench import Baseline, round_to_nearest\n"
        "class Mine(Baseline):\n"
        "    def quantize_weight(self, weight, scheme, stats, generator):\n"
        "        return round_to_nearest(weight, scheme)\n"
    )
    one, other = tiny_model(), tiny_model()
    quantize_model(one, f"{path}:Mine", "W4A16")
    quantize_model(other, "rtn", "W4A16")
    assert same(weights(one), weights(other))


# --- SmoothQuant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma", "opt", "bloom", "falcon", "mixtral"])
def test_smoothing_alone_keeps_the_function_of_the_model(architecture):
    model = tiny_model(architecture)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    plain, before = logits(model), weights(model)
    quantize_model(model, SmoothQuant(alpha=0.8), "W16A8", WINDOWS)
    for module in model.modules():  # without the activation quantizers
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    assert not same(weights(model), before)
    assert (logits(model) - plain).norm() < 1e-5 * plain.norm()


def test_smoothing_balances_activations_and_weights_of_the_full_precision_model():
    """At alpha 0.5 eq. 4 leaves max|X_j| = max|W_j| in every channel, in every block."""
    model = tiny_model()
    tops = {}

    def observe(name, x):
        seen = x.flatten(0, -2).abs().amax(0)
        tops[name] = torch.maximum(tops[name], seen) if name in tops else seen
        return x

    logits(by_hand(tiny_model(), observe), WINDOWS)
    quantize_model(model, SmoothQuant(alpha=0.5), "W16A8", WINDOWS)
    for i in range(2):
        for norm, names in (
            ("input_layernorm", BLOCK[:3]),
            ("post_attention_layernorm", BLOCK[4:6]),
        ):
            full = f"model.layers.{i}."
            scale = tiny_model().get_parameter(f"{full}{norm}.weight") / model.get_parameter(
                f"{full}{norm}.weight"
            )
            columns = torch.stack(
                [model.get_parameter(f"{full}{n}.weight").abs().amax(0) for n in names]
            ).amax(0)
            assert torch.allclose(tops[full + names[0]] / scale, columns, rtol=1e-3)


# --- reports --------------------------------------------------------------------------------------


def test_reported_errors_are_those_of_brute_force():
    model = tiny_model()
    before = weights(model)
    result = quantize_model(model, "gptq", "W3A16", WINDOWS)
    name = "model.layers.0.self_attn.k_proj"
    w, found = (
        before[f"{name}.weight"].double(),
        model.get_parameter(f"{name}.weight").detach().double(),
    )
    hessian = hessian_by_hook(tiny_model(), name)
    delta = w - found
    report = layer(result, name)
    assert report.shape == (32, 64) and report.damping == 0.01
    assert report.relative_error == pytest.approx(float(delta.square().sum() / w.square().sum()))
    proxy = torch.trace(delta @ hessian @ delta.T) / torch.trace(w @ hessian @ w.T)
    assert report.proxy_loss == pytest.approx(float(proxy), rel=1e-3)
    assert report.stored_bits == 32 * 64 * 3 + 32 * (16 + 3)


def test_methods_without_a_hessian_report_no_proxy_loss():
    result = quantize_model(tiny_model(), "rtn", "W3A16")
    assert {r.proxy_loss for r in result.layers} == {None}
    assert all(0 < r.relative_error < 0.2 for r in result.layers)


def test_progress_names_every_block_and_ends_at_the_number_of_blocks():
    seen = []
    quantize_model(tiny_model(), "rtn", "W4A16", progress=lambda *step: seen.append(step))
    assert seen == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1"), (2, 2, "done")]


def test_a_methods_own_proxy_loss_is_that_of_its_weights():
    """GPTQ knows it from its walk: with dead inputs, more damping, groups and another order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 64, generator=generator) * torch.rand(64, generator=generator)
    x[..., 5] = 0
    stats = Statistics(("hessian",))
    stats.update(x)
    weight = torch.randn(48, 64, generator=generator)
    for fields in ({}, {"act_order": True}, {"percdamp": 0.3}, {"block_size": 20}):
        for text in ("W3A16:w=channel,grid=asym", "W3A16g16:grid=asym"):
            method = load_baseline("gptq", fields).instance
            found = method.quantize_weight(weight, Scheme.parse(text), stats, generator)
            delta = (weight - found.weight).double()
            expected = ((delta @ stats.hessian.double()) * delta).sum(1)
            assert torch.allclose(found.proxy.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_energy_of_outputs_is_the_proxy_of_the_whole_weight():
    model = tiny_model("opt")  # with biases
    captured = capture(model, WINDOWS)
    name, module = find_blocks(model)[0]
    with torch.no_grad():
        block, _ = trace_block(name, module, captured.runner(name, module), captured.hidden[0])
        stats, _ = collect(block, list(block.linears), ("hessian",), captured.hidden)
    for linear in block.linears.values():
        seen = stats[linear.name]
        energy = seen.energies[f"{name}.{linear.name}"] * 2 / seen.n_sequences
        expected = quadratic(linear.weight, seen.hessian)
        assert float(energy) == pytest.approx(float(expected), rel=1e-4)
