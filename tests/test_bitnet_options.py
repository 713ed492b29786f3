"""Every reading of the papers reaches the layer: what an option says is what it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from qbench.models.bitnet import quantizers
from qbench.models.bitnet.layers import B1, B158, BitLinear, BitLinearOptions

PLAIN_B1 = replace(B1, norm="none")
TIED = torch.tensor([[1.0, -1.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0]])  # mean 0, so Sign(0) is asked
TINY = torch.tensor([[2e-5, -1e-6, 1e-6, 0.0], [1e-6, 1e-6, -3e-5, 0.0]])  # mean |W| near epsilon
SKEWED = torch.tensor([[0.2, 0.9, 3.0, 1.1], [0.5, 0.4, 0.3, 7.0]])


def computed(weight: torch.Tensor, options: BitLinearOptions) -> torch.Tensor:
    layer = BitLinear(4, 2, bias=False, options=options)
    layer.weight.data = weight.clone()
    return layer(SKEWED).detach()


@pytest.mark.parametrize("sign", ["negative", "zero"])
def test_the_sign_of_zero_reaches_the_layer(sign):
    codes = quantizers.binary_weight(TIED, sign_of_zero=sign)
    expected = linear(quantizers.fake_quantize_activations(SKEWED), codes.dequantize())
    found = computed(TIED, replace(PLAIN_B1, sign_of_zero=sign))
    other = computed(TIED, replace(PLAIN_B1, sign_of_zero="zero" if sign != "zero" else "negative"))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("epsilon", ["clamp", "add"])
def test_the_epsilon_of_ternary_weights_reaches_the_layer(epsilon):
    codes = quantizers.ternary_weight(TINY, epsilon=epsilon)
    expected = linear(quantizers.fake_quantize_activations(SKEWED), codes.dequantize())
    found = computed(TINY, replace(B158, epsilon=epsilon))
    other = computed(TINY, replace(B158, epsilon="add" if epsilon == "clamp" else "clamp"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not torch.allclose(found, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("span", ["symmetric", "shifted", "printed"])
def test_the_span_of_activations_reaches_the_layer(span):
    x = quantizers.fake_quantize_activations(SKEWED, span=span)
    expected = linear(x, quantizers.binary_weight(TIED).dequantize())
    torch.testing.assert_close(computed(TIED, replace(PLAIN_B1, span=span)), expected)
    if span != "symmetric":
        assert not torch.allclose(expected, computed(TIED, PLAIN_B1))
