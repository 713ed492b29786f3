"""The quantizers of BitNet: golden vectors of the released code, and each option's two behaviours.

Origin of the golden numbers: tests/golden/index.json (code lines out of the authors' training tips,
equal to transformers' and microsoft/BitNet's). Equation numbers are those of 2310.11453 (B1) and
2402.17764 (B158).
"""

from __future__ import annotations

import golden_vectors as golden
import pytest
import torch

from qbench.errors import QBenchError
from qbench.grid import get_grid
from qbench.models.bitnet.quantizers import (
    EPSILON,
    absmax_activations,
    activation_qmax,
    binary_weight,
    fake_quantize_activations,
    ternary_weight,
)


def stored(name: str) -> torch.Tensor:
    return golden.tensors("bitnet")[f"bitnet.{name}"]


def inputs(matrix: str) -> torch.Tensor:
    """The 16 tokens that the golden activations were made from."""
    return golden.activations(matrix).flatten(0, 1)[:16]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the released code ---------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["a", "c"])
def test_b1_weights_are_those_of_the_released_code(matrix):
    found = binary_weight(golden.weight(matrix))
    assert torch.equal(found.codes, stored(f"{matrix}.b1.codes").float())
    assert torch.allclose(found.scale, stored(f"{matrix}.b1.scale"), rtol=1e-6, atol=0)
    assert torch.allclose(found.mean, stored(f"{matrix}.b1.mean"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("matrix", ["a", "c"])
def test_b158_weights_are_those_of_the_released_code_to_the_last_bit(matrix):
    found = ternary_weight(golden.weight(matrix))
    codes = stored(f"{matrix}.b158.codes").float()
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.dequantize(), codes / stored(f"{matrix}.b158.inv_scale"))


def test_b158_weights_repeat_the_released_line_at_any_scale():
    """Its division by 1/γ is not always a product with γ: the last bit differs in 1 of 5 cases."""
    unequal = 0
    for seed in range(50):
        w = noise(8, 12, seed=seed)
        scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
        assert torch.equal(
            ternary_weight(w).dequantize(), (w * scale).round().clamp_(-1, 1) / scale
        )
        unequal += bool(1 / scale != w.abs().mean())
    assert unequal > 0


@pytest.mark.parametrize("matrix", ["a", "c"])
def test_activations_are_those_of_the_released_code_to_the_last_bit(matrix):
    found = absmax_activations(inputs(matrix))
    assert torch.equal(found.inverse_scale, stored(f"{matrix}.act8.inv_scale"))
    assert torch.equal(found.dequantize(), stored(f"{matrix}.act8.y"))
    assert torch.equal(fake_quantize_activations(inputs(matrix)), found.dequantize())


# --- binary weights ------------------------------------------------------------------------------


def test_a_weight_equal_to_the_mean_is_minus_one_in_the_paper_and_nothing_in_the_code():
    case = golden.index()["b1_sign_of_zero"]
    w = torch.tensor([case["w"]], dtype=torch.float32)
    assert binary_weight(w).codes.tolist() == [[-1, 1, -1, -1]]  # eq. 2: Sign(x <= 0) = -1
    coded = binary_weight(w, sign_of_zero="zero")
    assert coded.dequantize().tolist() == [case["u"]]


def test_binary_weights_are_centred_by_the_signed_mean_and_scaled_by_the_mean_magnitude():
    w = torch.tensor([[4.0, 1.0], [0.0, -1.0]])  # alpha 1, beta 1.5
    found = binary_weight(w)
    assert found.mean.tolist() == [1.0] and found.scale.tolist() == [1.5]
    assert found.dequantize().tolist() == [[1.5, -1.5], [-1.5, -1.5]]


@pytest.mark.parametrize("dim", [0, 1])
def test_each_group_of_binary_weights_has_its_own_mean_and_scale(dim):
    """Eq. 13, against the ungrouped quantizer on the slices."""
    w = noise(6, 8) + torch.arange(48.0).view(6, 8) / 10
    found = binary_weight(w, groups=2, dim=dim)
    alone = [binary_weight(part) for part in w.chunk(2, dim)]
    assert torch.equal(found.codes, torch.cat([a.codes for a in alone], dim))
    assert torch.allclose(found.dequantize(), torch.cat([a.dequantize() for a in alone], dim))
    assert torch.allclose(found.scale, torch.cat([a.scale for a in alone]))
    assert torch.allclose(found.mean, torch.cat([a.mean for a in alone]))
    assert not torch.equal(found.codes, binary_weight(w).codes)


# --- ternary weights -----------------------------------------------------------------------------


def test_ternary_codes_round_half_to_even_and_clip_at_one():
    w = torch.tensor([[1.0, -1.0, 3.0, -3.0]])  # mean magnitude 2: ties at a half and at 1.5
    found = ternary_weight(w)
    assert found.codes.tolist() == [[0, 0, 1, -1]]
    assert found.dequantize().tolist() == [[0, 0, 2, -2]]


def test_weights_near_epsilon_show_whether_it_is_a_floor_or_a_summand():
    w = torch.full((2, 2), 0.8e-5)
    coded, printed = ternary_weight(w), ternary_weight(w, epsilon="add")
    assert coded.codes.unique().tolist() == [1]  # 0.8 / max(0.8, 1)
    assert coded.scale.item() == pytest.approx(EPSILON)
    assert printed.codes.unique().tolist() == [0]  # 0.8 / (0.8 + 1)
    assert printed.scale.item() == pytest.approx(0.8e-5)


def test_on_ordinary_weights_the_epsilons_differ_only_between_their_two_thresholds():
    w = golden.weight("a")
    differ = ternary_weight(w).codes != ternary_weight(w, epsilon="add").codes
    gamma = w.abs().mean()
    between = (w.abs() > gamma / 2) & (w.abs() <= (gamma + EPSILON) / 2)
    assert torch.equal(differ, between) and 0 < differ.float().mean() < 1e-3


@pytest.mark.parametrize("epsilon", ["clamp", "add"])
@pytest.mark.parametrize("dim", [0, 1])
def test_each_group_of_ternary_weights_has_its_own_scale(dim, epsilon):
    w = noise(6, 8) * torch.logspace(0, 1, 48).view(6, 8)
    found = ternary_weight(w, groups=2, dim=dim, epsilon=epsilon)
    alone = [ternary_weight(part, epsilon=epsilon) for part in w.chunk(2, dim)]
    assert torch.equal(found.codes, torch.cat([a.codes for a in alone], dim))
    assert torch.allclose(found.dequantize(), torch.cat([a.dequantize() for a in alone], dim))
    assert not torch.equal(found.codes, ternary_weight(w).codes)


@pytest.mark.parametrize("quantizer", [binary_weight, ternary_weight])
def test_weights_of_zeros_stay_zeros(quantizer):
    assert not quantizer(torch.zeros(3, 4)).dequantize().any()


@pytest.mark.parametrize("quantizer", [binary_weight, ternary_weight])
def test_weights_in_bfloat16_are_quantized_in_float32(quantizer):
    w = noise(64, 96).bfloat16()
    found, reference = quantizer(w), quantizer(w.float())
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.codes, reference.codes) and torch.equal(found.scale, reference.scale)


# --- activations ---------------------------------------------------------------------------------

TOKEN = torch.tensor([[1.0, 0.5, -0.25, 0.003]])


def test_the_code_scales_to_127_and_the_paper_to_128():
    coded = absmax_activations(TOKEN)
    assert coded.codes.tolist() == [[127, 64, -32, 0]]  # 63.5 rounds to the even 64
    printed = absmax_activations(TOKEN, qmax="paper")
    assert printed.codes.tolist() == [[128, 64, -32, 0]]
    assert printed.inverse_scale.item() == 128


def test_without_rounding_eq_4_only_moves_the_ends_by_epsilon():
    printed = absmax_activations(TOKEN.double(), qmax="paper", rounding=False)
    expected = [[128 - EPSILON, 64, -32, 0.384]]
    assert torch.allclose(printed.codes, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    coded = fake_quantize_activations(TOKEN, rounding=False)
    assert torch.allclose(coded, TOKEN, rtol=1e-6)


@pytest.mark.parametrize(("qmax", "grid"), [("code", "restricted"), ("paper", "bitnet")])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounded_activations_lie_on_the_grid_of_that_name(qmax, grid, bits):
    x = noise(32, 48)
    found = fake_quantize_activations(x, bits, qmax=qmax)
    assert torch.allclose(found, get_grid(grid).fake_quantize(x, bits), rtol=1e-6, atol=1e-7)


def test_at_one_bit_the_paper_has_three_codes_and_the_code_none():
    found = absmax_activations(TOKEN, 1, qmax="paper")
    assert found.codes.tolist() == [[1, 0, 0, 0]]
    with pytest.raises(QBenchError, match="activations cannot have 1 bits with qmax='code'"):
        absmax_activations(TOKEN, 1)


def clipped_as_coded(x: torch.Tensor) -> torch.Tensor:
    """The released line, with its clamp."""
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


def test_leaving_out_the_clamp_changes_no_bit_at_any_magnitude():
    magnitudes = torch.logspace(-12, 30, 4096).unsqueeze(1)
    x = noise(4096, 16) * magnitudes
    assert torch.equal(fake_quantize_activations(x), clipped_as_coded(x))


def test_a_token_has_its_own_scale_or_shares_the_tensors():
    x = noise(2, 5, 16) * torch.logspace(-1, 1, 10).view(2, 5, 1)
    by_token = absmax_activations(x)
    assert by_token.inverse_scale.shape == (2, 5, 1)
    for batch in range(2):
        for token in range(5):
            alone = fake_quantize_activations(x[batch, token])
            assert torch.equal(by_token.dequantize()[batch, token], alone)
    whole = absmax_activations(x, granularity="tensor")
    assert whole.inverse_scale.tolist() == [[[127 / x.abs().max()]]]
    assert torch.equal(whole.dequantize().flatten(), fake_quantize_activations(x.flatten()))


def test_the_shifted_span_fills_all_codes_from_the_smallest_value_to_the_largest():
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]])
    found = absmax_activations(x, span="shifted")
    assert found.shift.tolist() == [[-1.0]]
    assert found.codes.tolist() == [[0, 32, 64, 127]]  # (x + 1) * 127/4
    assert torch.allclose(found.dequantize(), x, atol=4 / 127 / 2)


def test_eq_6_as_printed_clips_what_lies_above_the_shifted_maximum():
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]])
    found = absmax_activations(x, span="printed")
    assert found.codes.tolist() == [[0, 42, 85, 127]]  # (x + 1) * 127/3, the last from 169.3
    assert found.dequantize()[0, 3] == pytest.approx(2.0)  # -1 + gamma
    assert absmax_activations(x, span="printed", qmax="paper").codes[0, 3] == 128


@pytest.mark.parametrize("span", ["shifted", "printed"])
def test_eq_6_without_rounding_keeps_epsilon_away_from_both_ends(span):
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    codes = absmax_activations(x, span=span, qmax="paper", rounding=False).codes
    gamma = {"shifted": 4, "printed": 3}[span]
    expected = ((x + 1) * 128 / gamma).clamp(EPSILON, 128 - EPSILON)
    assert torch.allclose(codes, expected, rtol=1e-12)


@pytest.mark.parametrize("span", ["symmetric", "shifted"])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_each_group_of_features_is_quantized_as_if_alone(granularity, span):
    """Eq. 14, against the ungrouped quantizer on the slices."""
    x = noise(3, 4, 12) * torch.logspace(-1, 1, 12)
    options = {"granularity": granularity, "span": span}
    found = fake_quantize_activations(x, groups=3, **options)
    alone = [fake_quantize_activations(part, **options) for part in x.chunk(3, -1)]
    assert torch.equal(found, torch.cat(alone, -1))
    assert torch.equal(absmax_activations(x, groups=3, **options).dequantize(), found)
    assert not torch.equal(found, fake_quantize_activations(x, **options))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activations_take_every_code_of_their_width_and_no_other(bits):
    x = torch.linspace(-1, 1, 10_001).unsqueeze(0)
    limit = 2 ** (bits - 1) - 1
    assert absmax_activations(x, bits).codes.unique().tolist() == list(range(-limit, limit + 1))
    assert activation_qmax(bits) == limit and activation_qmax(bits, "paper") == limit + 1


@pytest.mark.parametrize("span", ["symmetric", "shifted", "printed"])
def test_a_token_of_zeros_stays_zero(span):
    assert not fake_quantize_activations(torch.zeros(2, 8), span=span).any()


def test_activations_in_bfloat16_are_quantized_in_float32_and_come_back_in_bfloat16():
    x = noise(16, 64).bfloat16()
    found = fake_quantize_activations(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quantize_activations(x.float()).bfloat16())


def test_inputs_are_not_written_to():
    x, w = noise(4, 8), noise(8, 8)
    before = x.clone(), w.clone()
    for span in ("symmetric", "shifted", "printed"):
        fake_quantize_activations(x, span=span, groups=2)
        found = absmax_activations(x, span=span)
        assert torch.equal(found.dequantize(), found.dequantize())
    binary_weight(w)
    ternary_weight(w, groups=2)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_weight(torch.ones(2, 2), sign_of_zero="plus"), "sign_of_zero 'plus'"),
        (lambda: ternary_weight(torch.ones(2, 2), epsilon="clam"), "'clam'; did you mean 'clamp'"),
        (lambda: absmax_activations(TOKEN, qmax="127"), "unknown qmax '127'"),
        (lambda: absmax_activations(TOKEN, granularity="row"), "unknown granularity 'row'"),
        (lambda: absmax_activations(TOKEN, span="positive"), "unknown span 'positive'"),
        (lambda: binary_weight(torch.ones(2, 6), groups=4), "groups=4 does not divide 6"),
        (lambda: absmax_activations(TOKEN, groups=3), "groups=3 does not divide 4"),
        (lambda: activation_qmax(17), "activations cannot have 17 bits"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(call, message):
    with pytest.raises(QBenchError, match=message):
        call()
