"""The latent weights of a BitNet model as an ordinary model: nothing is quantized, norms stay.

What post-training quantization is compared on: the same weights, without the training's quantizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from qbench.models.bitnet.formats import LATENT_MARK
from qbench.models.bitnet.layers import BitLinearOptions, bitlinears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class InputNorm(nn.Module):
    """The norm inside a BitLinear, on its own."""

    def __init__(self, options: BitLinearOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in_features) normalized, in its dtype."""
        return self.options.normalize(x).to(x.dtype)


class NormedLinear(nn.Module):
    """What is left of a BitLinear with a norm inside when nothing is quantized."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        return self.linear(self.norm(x))


def unquantized_(model: PreTrainedModel) -> PreTrainedModel:
    """Make every BitLinear an ordinary linear with the same (latent) weight, in place.

    A norm inside stays, in front of the linear; without that the model would be another. The
    configuration is marked, so that what is saved later is not taken for a BitNet to be rounded.
    """
    setattr(model.config, LATENT_MARK, True)
    for name, layer in list(bitlinears(model)):
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight, linear.bias = layer.weight, layer.bias
        norm: nn.Module | None = getattr(layer, "rms_norm", None)
        if norm is None and layer.options.norm != "none":
            norm = InputNorm(layer.options)
        model.set_submodule(name, linear if norm is None else NormedLinear(norm, linear))
    return model
