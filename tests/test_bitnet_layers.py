"""BitLinear: golden outputs, the literal equations, straight-through gradients, freezing.

Golden numbers: tests/golden/index.json and bitnet_e2e_index.json (transformers' AutoBitLinear and
BitLinear). Equation numbers are those of 2310.11453.
"""

from __future__ import annotations

import json
import math

import golden_vectors as golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM

from qbench.errors import QBenchError
from qbench.models.bitnet.layers import (
    B1,
    B158,
    BitLinear,
    BitLinearOptions,
    bitlinears,
    freeze_,
    replace_linears_,
)
from qbench.models.bitnet.quantizers import WeightCodes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor, options: BitLinearOptions, bias: Tensor | None = None) -> BitLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return BitLinear.from_linear(linear, options)


EVERY_KIND = {
    "b1": B1,
    "b158": B158,
    "b1-as-coded": BitLinearOptions(weights="binary", norm="rms", sign_of_zero="zero"),
    "b1-as-printed": BitLinearOptions(
        weights="binary",
        norm="layer",
        qmax="paper",
        rounding=False,
        activation_granularity="paper",
    ),
    "b158-as-printed": BitLinearOptions(epsilon="add", norm="rms", qmax="paper"),
    "shifted": BitLinearOptions(span="shifted"),
    "grouped": BitLinearOptions(weights="binary", norm="layer", groups=4),
    "grouped-rows": BitLinearOptions(groups=4, partition="out"),
    "weights-only": BitLinearOptions(abits=16),
}
every_kind = pytest.mark.parametrize("options", EVERY_KIND.values(), ids=EVERY_KIND)

# --- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["a", "c"])
def test_b158_computes_what_transformers_online_layer_computes(matrix):
    found = layer(golden.weight(matrix), B158)(golden.activations(matrix).flatten(0, 1)[:16])
    stored = golden.tensors("bitnet")[f"bitnet.{matrix}.linear_online.y"]
    assert torch.allclose(found, stored, rtol=1e-6, atol=1e-6 * float(stored.abs().max()))


def golden_model() -> BitNetForCausalLM:
    """The tiny model of the goldens, still with plain linears."""
    model = BitNetForCausalLM(BitNetConfig(**golden.index("bitnet_e2e_index")["config"]))
    stored = golden.tensors("bitnet_e2e")
    weights = {k[2:]: v.float() for k, v in stored.items() if k.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the head is tied
    return model.eval()


@pytest.fixture(scope="module")
def online() -> BitNetForCausalLM:
    model = golden_model()
    replace_linears_(model, B158)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(golden.tensors("bitnet_e2e")["ids"]).logits


def relative(found: Tensor, name: str) -> float:
    stored = golden.tensors("bitnet_e2e")[f"logits.{name}"]
    return float((found - stored).norm() / stored.norm())


@pytest.mark.parametrize("name", ["online", "hooks", "offline", "packed"])
def test_a_whole_model_gives_the_logits_of_every_storage_form(online, name):
    assert relative(logits(online), name) < 1e-6


def test_the_golden_model_without_bitlinear_is_another_model():
    plain = logits(golden_model())
    assert relative(plain, "plain") < 1e-5 and relative(plain, "online") > 0.5


def test_a_whole_frozen_model_gives_the_same_logits_to_the_last_bit(online):
    import copy

    frozen = copy.deepcopy(online)
    names = freeze_(frozen)
    assert len(names) == 14 and "lm_head" not in names
    assert torch.equal(logits(frozen), logits(online))
    assert not any(layer.frozen for _, layer in bitlinears(online))


# --- the equations, literally --------------------------------------------------------------------


def eq_11(x: Tensor, w: Tensor, q: int, rounding: bool, eps: float = 1e-5) -> Tensor:
    """y = Sign(W - α) Quant(LN(x)) · βγ/Q_b, γ per token."""
    ln = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    gamma = ln.abs().amax(-1, keepdim=True)
    quantized = ln * q / gamma
    quantized = quantized.round() if rounding else quantized.clamp(-q + 1e-5, q - 1e-5)
    signs = torch.where(w - w.mean() > 0, 1.0, -1.0).to(w)
    return (quantized @ signs.T) * (w.abs().mean() * gamma / q)


@pytest.mark.parametrize(
    ("q", "rounding", "changes"),
    [
        (127, True, {}),
        (128, True, {"qmax": "paper"}),
        (128, False, {"qmax": "paper", "rounding": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantized_factors_multiply_to_eq_11(dtype, q, rounding, changes):
    x, w = noise(3, 7, 96).to(dtype) * 3 + 1, noise(64, 96, seed=1).to(dtype) / 10
    found = layer(w, BitLinearOptions.from_dict({**B1.to_dict(), **changes}))(x)
    expected = eq_11(x, w, q, rounding)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_b1_divides_its_activation_codes_by_127_unless_told_otherwise():
    x, w = noise(5, 32).double(), noise(8, 32, seed=1).double()
    assert (layer(w, B1)(x) - eq_11(x, w, 128, True)).norm() > 1e-4 * eq_11(x, w, 128, True).norm()


def test_groups_along_the_input_are_sums_of_layers_of_their_own():
    """Eq. 13-15: every group has its own α, β, γ and LN."""
    x, w = noise(5, 96).double() * torch.logspace(-1, 1, 96), noise(64, 96, seed=1).double()
    w += torch.linspace(-1, 1, 96)
    found = layer(w, BitLinearOptions(weights="binary", norm="layer", groups=4))(x)
    parts = zip(x.chunk(4, 1), w.chunk(4, 1), strict=True)
    expected = sum(eq_11(xg, wg, 127, True) for xg, wg in parts)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_groups_along_the_output_are_stacked_layers_that_read_the_whole_input():
    x, w = noise(5, 96).double(), noise(64, 96, seed=1).double() * torch.logspace(-1, 1, 96)
    w += torch.linspace(-1, 1, 64)[:, None]
    options = BitLinearOptions(weights="binary", norm="layer", groups=4, partition="out")
    expected = torch.cat([eq_11(x, wg, 127, True) for wg in w.chunk(4, 0)], 1)
    assert torch.allclose(layer(w, options)(x), expected, rtol=1e-9)


def test_b158_is_ternary_weights_times_rounded_tokens():
    x, w = noise(5, 96).double(), noise(64, 96, seed=1).double()
    gamma = x.abs().amax(-1, keepdim=True)
    ternary = (w / w.abs().mean()).round().clamp(-1, 1)
    expected = ((x * 127 / gamma).round() @ ternary.T) * (w.abs().mean() * gamma / 127)
    assert torch.allclose(layer(w, B158)(x), expected, rtol=1e-9, atol=1e-12)


def test_the_bias_is_added_in_full_precision():
    x, w, bias = noise(5, 32), noise(8, 32, seed=1), noise(8, seed=2) * 1e-3
    assert torch.allclose(layer(w, B1, bias)(x), layer(w, B1)(x) + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_sub_norm_keeps_the_variance_of_the_output_at_one(scale):
    """Eq. 8-10: Var(y) = n β² E[x~²]; with LN inside E[x~²] = Var(x) / (Var(x) + eps)."""
    n = 1024
    w = noise(512, n, seed=1) * math.sqrt(math.pi / 2 / n)  # n β² = 1 for Gaussian weights
    x = noise(64, n) * scale
    normed, bare = layer(w, B1), layer(w, BitLinearOptions(weights="binary"))
    expected = scale**2 / (scale**2 + B1.norm_eps)  # 0.91 at 0.01, else 1
    assert normed(x).detach().var().item() == pytest.approx(expected, rel=0.03)
    assert bare(x).detach().var().item() == pytest.approx(scale**2, rel=0.03)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norm_inside_has_no_parameters_and_removes_the_inputs_scale(norm):
    options = BitLinearOptions(norm=norm)
    module = layer(noise(8, 32, seed=1), options)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    x = noise(5, 32).double()
    x64 = module.double()(x)
    assert torch.allclose(module(x * 8), x64, rtol=1e-3)
    shift_matters = not torch.allclose(module(x + 3), x64, rtol=1e-3, atol=1e-2)
    assert shift_matters == (norm == "rms")


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norms_epsilon_is_added_to_the_variance(norm):
    x = torch.tensor([[3.0, -3.0]], dtype=torch.float64)  # variance and mean square 9
    normed = BitLinearOptions(norm=norm, norm_eps=0.75).normalize(x)
    assert torch.allclose(normed, x / math.sqrt(9.75), rtol=1e-9)


# --- gradients -----------------------------------------------------------------------------------


def gradients(module: BitLinear, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    module.weight.grad = None
    (module(x) * upstream).sum().backward()
    assert x.grad is not None and module.weight.grad is not None
    return x.grad, module.weight.grad


@every_kind
def test_gradients_pass_both_quantizers_as_if_they_were_not_there(options):
    """dL/dW = gᵀ x_q and dL/dx = LNᵀ(g W_q): the quantizers' own derivative is 1 everywhere."""
    x, w, g = noise(6, 32).double(), noise(8, 32, seed=1).double(), noise(6, 8, seed=2).double()
    module = layer(w, options)
    to_input, to_weight = gradients(module, x, g)
    normed = x.clone().requires_grad_()
    seen = options.normalize(normed)
    quantized = options.quantize_activations(seen.detach(), training=True)
    assert torch.allclose(to_weight, g.T @ quantized, rtol=1e-9, atol=1e-12)
    seen.backward(g @ module.weight_codes().dequantize())
    assert torch.allclose(to_input, normed.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_b1_is_the_textbook_derivative_of_layer_norm_times_the_signs():
    x, w, g = noise(6, 32).double(), noise(8, 32, seed=1).double(), noise(6, 8, seed=2).double()
    to_input, _ = gradients(layer(w, B1), x, g)
    h = g @ torch.where(w > w.mean(), w.abs().mean(), -w.abs().mean())
    sigma = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hat = (x - x.mean(-1, keepdim=True)) / sigma
    expected = (h - h.mean(-1, keepdim=True) - hat * (h * hat).mean(-1, keepdim=True)) / sigma
    assert torch.allclose(to_input, expected, rtol=1e-9, atol=1e-12)


@every_kind
def test_gradients_equal_those_of_the_released_codes_detach_form(options):
    x, w, g = noise(6, 32), noise(8, 32, seed=1), noise(6, 8, seed=2)
    module = layer(w, options)
    to_input, to_weight = gradients(module, x, g)
    x2, w2 = x.clone().requires_grad_(), w.clone().requires_grad_()
    seen = options.normalize(x2)
    quantized = options.quantize_activations(seen, training=True)
    xq = seen + (quantized - seen).detach()
    wq = w2 + (options.weight_codes(w2).dequantize() - w2).detach()
    (F.linear(xq, wq) * g).sum().backward()
    assert torch.allclose(to_weight, w2.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(to_input, x2.grad, rtol=1e-4, atol=1e-5)


def test_a_step_of_training_moves_the_latent_weight_and_forward_does_not():
    module = layer(noise(8, 32, seed=1), B1)
    before = module.weight.detach().clone()
    out = module(noise(4, 32))
    assert torch.equal(module.weight, before)
    out.sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert not torch.equal(module.weight, before)
    assert module.weight.unique().numel() > 2  # latent, not two levels


# --- freezing ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_equals_unfrozen_to_the_last_bit(options, dtype):
    module = layer(noise(16, 32, seed=1).to(dtype), options).eval()
    x = noise(3, 5, 32).to(dtype)
    before, weight = module(x), module.effective_weight().detach().clone()
    assert module.freeze_() is module and module.frozen
    assert torch.equal(module(x), before)
    assert torch.equal(module.weight, weight) and not module.weight.requires_grad
    assert torch.equal(module.freeze_().weight, weight)  # again does nothing


@pytest.mark.parametrize(
    ("options", "levels"),
    [(B1, 2), (B158, 3), (BitLinearOptions(weights="binary", groups=4), 8)],
)
def test_the_effective_weight_has_two_levels_or_three_per_group(options, levels):
    module = layer(noise(16, 32, seed=1), options)
    assert module.effective_weight().unique().numel() == levels
    assert module.weight.unique().numel() == 16 * 32


@every_kind
def test_codes_and_scale_survive_freezing(options):
    module = layer(noise(16, 32, seed=1), options)
    latent = module.weight_codes()
    frozen = module.freeze_().weight_codes()
    assert torch.equal(latent.codes, frozen.codes) and torch.equal(latent.scale, frozen.scale)
    assert torch.equal(frozen.dequantize(), module.weight)


def test_a_frozen_layer_cannot_be_loaded_as_a_latent_one():
    frozen = layer(noise(16, 32, seed=1), B158).freeze_()
    with pytest.raises(RuntimeError, match="frozen_scale"):
        layer(noise(16, 32), B158).load_state_dict(frozen.state_dict())


def test_a_layer_can_be_frozen_at_codes_that_come_from_elsewhere():
    stored = golden.tensors("bitnet")
    codes, scale = stored["bitnet.a.b158.codes"].float(), 1 / stored["bitnet.a.b158.inv_scale"]
    module = BitLinear(96, 64, bias=False).freeze_(WeightCodes(codes, scale))
    found = module(golden.activations("a").flatten(0, 1)[:16])
    expected = stored["bitnet.a.linear_online.y"]
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    with pytest.raises(QBenchError, match=r"shape \(96, 64\) for a weight of \(64, 96\)"):
        module.freeze_(WeightCodes(codes.T, scale))


def test_freezing_a_model_without_bitlinear_is_refused():
    with pytest.raises(QBenchError, match="Sequential has no BitLinear"):
        freeze_(nn.Sequential(nn.Linear(4, 4)))


# --- dtypes, modes, granularity ------------------------------------------------------------------


@every_kind
def test_bfloat16_layers_quantize_in_float32_and_answer_in_bfloat16(options):
    w, x = noise(16, 32, seed=1).bfloat16(), noise(5, 32).bfloat16()
    found = layer(w, options).eval()(x)
    exact = layer(w.float(), options).eval()(x.float())
    assert found.dtype == torch.bfloat16
    seen = options.quantize_activations(options.normalize(x.float()))
    weight = options.weight_codes(w.float()).dequantize()
    assert torch.equal(found, F.linear(seen.bfloat16(), weight.bfloat16()))
    assert (found.float() - exact).norm() < 2e-2 * exact.norm()


def test_the_papers_granularity_is_one_scale_in_training_and_one_per_token_in_inference():
    x, w = noise(5, 32) * torch.logspace(-1, 1, 5)[:, None], noise(8, 32, seed=1)
    modules = {
        name: layer(w, BitLinearOptions(weights="binary", activation_granularity=name))
        for name in ("token", "tensor", "paper")
    }
    outputs = {n: (m.train()(x).detach(), m.eval()(x).detach()) for n, m in modules.items()}
    assert torch.equal(outputs["paper"][0], outputs["tensor"][0])
    assert torch.equal(outputs["paper"][1], outputs["token"][1])
    assert torch.equal(*outputs["token"]) and torch.equal(*outputs["tensor"])
    assert not torch.allclose(*outputs["paper"])


@pytest.mark.parametrize("preset", [B1, B158])
def test_with_the_presets_no_token_depends_on_another_even_in_training(preset):
    module = layer(noise(8, 32, seed=1), preset).train()
    x = noise(2, 6, 32)
    changed = x.clone()
    changed[:, -1] *= 100
    assert torch.equal(module(x)[:, :-1], module(changed)[:, :-1])


# --- replacing -----------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8, bias=False)})
        self.head = nn.ModuleDict({"score": nn.Linear(8, 4)})
        self.lm_head = nn.Linear(8, 32, bias=False)


def test_replacing_keeps_parameters_names_and_the_output_head():
    model = Tiny().eval()
    before = dict(model.named_parameters())
    assert replace_linears_(model, B1) == ["block.up", "block.down", "head.score"]
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert type(model.lm_head) is nn.Linear
    assert not any(layer.training for _, layer in bitlinears(model))


@pytest.mark.parametrize(
    ("keep", "replaced"),
    [
        ((), ["block.up", "block.down", "head.score", "lm_head"]),
        (("block",), ["head.score", "lm_head"]),
        (("block.up", "score"), ["block.down", "lm_head"]),
        (("ore", "block.d"), ["block.up", "block.down", "head.score", "lm_head"]),
    ],
)
def test_what_is_kept_is_named_wholly_by_its_last_part_or_by_a_parent(keep, replaced):
    assert replace_linears_(Tiny(), B158, keep) == replaced


def test_replacing_leaves_the_global_generator_alone():
    model = Tiny()
    state = torch.get_rng_state()
    replace_linears_(model, B158)
    assert torch.equal(torch.get_rng_state(), state)


def test_replacing_twice_or_nothing_is_refused_and_changes_nothing():
    model = Tiny()
    replace_linears_(model, B158, keep=("head", "lm_head"))
    with pytest.raises(QBenchError, match="block.up is a BitLinear already"):
        replace_linears_(model, B1)
    assert type(model.head["score"]) is nn.Linear
    with pytest.raises(QBenchError, match="no linear to replace but lm_head"):
        replace_linears_(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), B1)


def test_groups_that_do_not_divide_a_layer_are_refused():
    with pytest.raises(QBenchError, match="groups=3 does not divide 8"):
        BitLinear(8, 9, options=BitLinearOptions(groups=3))
    BitLinear(8, 9, options=BitLinearOptions(groups=3, partition="out"))


# --- options -------------------------------------------------------------------------------------


@every_kind
def test_options_come_back_from_json(options):
    assert BitLinearOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_the_presets_are_what_their_description_says():
    assert B158 == BitLinearOptions()
    assert B1 == BitLinearOptions.from_dict({"weights": "binary", "norm": "layer"})
    assert (B1.sign_of_zero, B1.qmax, B1.rounding) == ("negative", "code", True)
    assert B158.epsilon == "clamp" and B158.norm == "none"
    assert B1.abits == B158.abits == 8
    assert B1.activation_granularity == B158.activation_granularity == "token"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": "binary"}, "unknown BitLinear option 'weight'; did you mean 'weights'"),
        ({"weights": "trinary"}, "unknown weights 'trinary'; did you mean 'ternary'"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"norm": None}, "unknown norm 'None'"),
        ({"partition": "columns"}, "unknown partition 'columns'"),
        ({"activation_granularity": "channel"}, "unknown activation_granularity 'channel'"),
        ({"abits": 1}, "activations cannot have 1 bits"),
        ({"abits": 8.0}, "abits=8.0; give a int"),
        ({"groups": 0}, "groups=0; give 1 or more"),
        ({"rounding": "yes"}, "rounding='yes'; give a bool"),
        ({"norm_eps": 0}, "norm_eps=0; give a number between 0 and 1"),
    ],
)
def test_options_that_do_not_exist_are_refused(given, message):
    with pytest.raises(QBenchError, match=message):
        BitLinearOptions.from_dict(given)
