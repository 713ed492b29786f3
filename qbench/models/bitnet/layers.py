"""BitLinear: an ``nn.Linear`` that quantizes its weight and its input whenever it runs.

B1 (2310.11453 eq. 11): y = W~ Quant(LN(x)) · βγ/Q_b, here with dequantized factors, which is the
same product: ``F.linear(x_q * γ/Q_b, W~ * β)``. The latent full-precision weight is what is
trained and saved. Backwards the quantizers are the identity (straight-through, B1 section 2.2): the
released code's ``w + (quant(w) - w).detach()``, which also passes α, β and γ by.

Two presets say which quantizers a model has:

``B1``    eq. 1-3, 11-12 with the paper's Sign(0) = -1 and its LN inside the layer (SubLN, no affine
          part); rounding, Q_b = 127 and a scale per token as in the released code, so that training
          computes what inference computes, in int8.
``B158``  the released code of b1.58, bit for bit what transformers' online ``AutoBitLinear``
          computes; no norm inside: released checkpoints keep theirs as modules of the model.

Nothing here calls a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import QBenchError, unknown
from qbench.models.bitnet import quantizers
from qbench.models.bitnet.quantizers import WeightCodes, at_least_float32, check_choice

WEIGHTS = ("binary", "ternary")
NORMS = ("none", "layer", "rms")
GRANULARITIES = (*quantizers.GRANULARITIES, "paper")
PARTITIONS = ("in", "out")


@dataclass(frozen=True)
class BitLinearOptions:
    """How a BitLinear quantizes; JSON-able through :meth:`to_dict`. Constructed, it is checked."""

    weights: str = "ternary"
    """"binary" (B1) or "ternary" (B158)."""
    sign_of_zero: str = "negative"
    """Binary: "negative" (paper) or "zero" (released code)."""
    epsilon: str = "clamp"
    """Ternary: "clamp" (released code) or "add" (paper)."""
    abits: int = 8
    """Width of the activations; 16 leaves them alone."""
    qmax: str = "code"
    """Q_b: "code" 2^(b-1) - 1 or "paper" 2^(b-1)."""
    rounding: bool = True
    """Whether activations are rounded; eq. 4 prints no rounding."""
    activation_granularity: str = "token"
    """"token", "tensor", or "paper": tensor while training, token in inference."""
    span: str = "symmetric"
    """"symmetric" (eq. 4), or "shifted" or "printed" for eq. 6."""
    norm: str = "none"
    """Norm on the input, inside the layer and without affine part: "none", "layer" or "rms"."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    groups: int = 1
    """G of eq. 13-15."""
    partition: str = "in"
    """Dimension of the weight that is cut into groups: "in" (also groups activations and norm, as
    n of eq. 8, 13-15 is the input's) or "out" (weights alone; every part reads the whole input)."""

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)
        check_choice("sign_of_zero", self.sign_of_zero, quantizers.SIGNS_OF_ZERO)
        check_choice("epsilon", self.epsilon, quantizers.EPSILONS)
        check_choice("activation_granularity", self.activation_granularity, GRANULARITIES)
        check_choice("span", self.span, quantizers.SPANS)
        check_choice("norm", self.norm, NORMS)
        check_choice("partition", self.partition, PARTITIONS)
        for name, kind in (("abits", int), ("groups", int), ("rounding", bool)):
            if type(getattr(self, name)) is not kind:
                raise QBenchError(f"{name}={getattr(self, name)!r}; give a {kind.__name__}")
        quantizers.activation_qmax(self.abits, self.qmax)
        if self.groups < 1:
            raise QBenchError(f"groups={self.groups}; give 1 or more")
        if not isinstance(self.norm_eps, (int, float)) or not 0 < self.norm_eps < 1:
            raise QBenchError(f"norm_eps={self.norm_eps!r}; give a number between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> BitLinearOptions:
        """Options from (some of) their fields.

        Raises:
            QBenchError: for an unknown field or a value that a field cannot have.
        """
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise unknown("BitLinear option", name, known)
        return cls(**given)

    @property
    def input_groups(self) -> int:
        """Groups of the input's features."""
        return self.groups if self.partition == "in" else 1

    def weight_codes(self, weight: Tensor) -> WeightCodes:
        """A latent weight (out_features, in_features), quantized."""
        dim = 1 if self.partition == "in" else 0
        if self.weights == "binary":
            return quantizers.binary_weight(
                weight, sign_of_zero=self.sign_of_zero, groups=self.groups, dim=dim
            )
        return quantizers.ternary_weight(weight, epsilon=self.epsilon, groups=self.groups, dim=dim)

    def quantize_activations(self, x: Tensor, training: bool = False) -> Tensor:
        """Inputs (..., in_features) as the quantizer leaves them, in their dtype."""
        if self.abits == 16:
            return x
        granularity = self.activation_granularity
        if granularity == "paper":
            granularity = "tensor" if training else "token"
        return quantizers.fake_quantize_activations(
            x,
            self.abits,
            qmax=self.qmax,
            rounding=self.rounding,
            granularity=granularity,
            span=self.span,
            groups=self.input_groups,
        )

    def normalize(self, x: Tensor) -> Tensor:
        """SubLN (eq. 12, per group eq. 15), or its RMS variant; at least float32."""
        if self.norm == "none":
            return x
        x = at_least_float32(x)
        groups = self.input_groups
        sliced = x.unflatten(-1, (groups, -1)) if groups > 1 else x
        size = sliced.shape[-1:]
        if self.norm == "layer":
            normed = F.layer_norm(sliced, size, eps=self.norm_eps)
        else:
            normed = F.rms_norm(sliced, size, eps=self.norm_eps)
        return normed.flatten(-2) if groups > 1 else normed


B1 = BitLinearOptions(weights="binary", norm="layer")
"""BitNet, W1A8."""
B158 = BitLinearOptions()
"""BitNet b1.58, W1.58A8."""


class _QuantizeWeight(torch.autograd.Function):
    """Forward the quantized weight, backward the identity; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, options: BitLinearOptions) -> Tensor:
        return options.weight_codes(weight).dequantize().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _QuantizeActivations(torch.autograd.Function):
    """Forward the quantized input, backward the identity; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: BitLinearOptions, training: bool) -> Tensor:
        return options.quantize_activations(x, training)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class BitLinear(nn.Linear):
    """A linear layer whose ``weight`` is latent: quantized anew in every forward pass.

    After :meth:`freeze_` the weight is the quantized one and only activations are quantized. A
    frozen layer's state dict has a ``frozen_scale`` beside the weight, so that it cannot be loaded
    as a latent weight by mistake (the mean of ternary weights is not the scale they came from).
    """

    frozen_scale: Tensor | None
    """(groups,): what the codes of a frozen weight are multiplied by; None while it is latent."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        options: BitLinearOptions = B158,
    ) -> None:
        size = in_features if options.partition == "in" else out_features
        if size % options.groups:
            raise QBenchError(f"groups={options.groups} does not divide {size}; choose a divisor")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.options = options
        self.register_buffer("frozen_scale", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, options: BitLinearOptions) -> BitLinear:
        """A BitLinear that shares the parameters of ``linear``.

        Raises:
            QBenchError: if the layer has groups that do not divide it.
        """
        biased = linear.bias is not None
        # on meta, so that the global random number generator is not touched
        new = cls(linear.in_features, linear.out_features, biased, "meta", options=options)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    @property
    def frozen(self) -> bool:
        """Whether the weight is the quantized one."""
        return self.frozen_scale is not None

    def weight_codes(self) -> WeightCodes:
        """Codes and scale of the weight, latent or frozen, in float32."""
        if self.frozen_scale is None:
            return self.options.weight_codes(self.weight.detach())
        codes = self.weight.detach().sign().to(self.frozen_scale.dtype)
        return WeightCodes(codes, self.frozen_scale, dim=1 if self.options.partition == "in" else 0)

    def effective_weight(self) -> Tensor:
        """The weight (out_features, in_features) that multiplies; gradients pass it unchanged."""
        return self.weight if self.frozen else _QuantizeWeight.apply(self.weight, self.options)

    def forward(self, input: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features), in the input's dtype."""
        x = self.options.normalize(input)
        if self.options.abits != 16:
            x = _QuantizeActivations.apply(x, self.options, self.training)
        return F.linear(x.to(input.dtype), self.effective_weight(), self.bias)

    def freeze_(self, codes: WeightCodes | None = None) -> BitLinear:
        """Put the quantized weight in the place of the latent one, for good.

        Args:
            codes: what the weight is known to be (from a packed checkpoint), where there is no
                latent weight; otherwise it is quantized now. A frozen layer stays as it is.
        """
        if self.frozen and codes is None:
            return self
        found = codes if codes is not None else self.weight_codes()
        weight = found.dequantize().to(device=self.weight.device, dtype=self.weight.dtype)
        if weight.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise QBenchError(f"codes of shape {tuple(weight.shape)} for a weight of {expected}")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.frozen_scale = found.scale.detach().to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        o = self.options
        state = "frozen" if self.frozen else "latent"
        return f"{super().extra_repr()}, {o.weights}, A{o.abits}, norm={o.norm}, {state}"


def replace_linears_(
    model: nn.Module, options: BitLinearOptions, keep: Sequence[str] = ("lm_head",)
) -> list[str]:
    """Turn every ``nn.Linear`` of a model into a BitLinear with the same parameters, in place.

    Args:
        model: in which linears are replaced.
        options: of all of them.
        keep: names that stay: a full name, its last part, or a parent's full name.

    Returns:
        The names of those that were replaced, in the model's order.

    Raises:
        QBenchError: if there is nothing to replace, or a linear is quantized already.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _kept(name, keep)
    ]
    if not found:
        raise QBenchError(f"{type(model).__name__} has no linear to replace but {', '.join(keep)}")
    for name, module in found:
        if type(module) is not nn.Linear:
            raise QBenchError(
                f"{name} is a {type(module).__name__} already; start from plain linears"
            )
    for name, module in found:
        model.set_submodule(name, BitLinear.from_linear(module, options))
    return [name for name, _ in found]


def _kept(name: str, keep: Sequence[str]) -> bool:
    return any(name == k or name.startswith(f"{k}.") or name.endswith(f".{k}") for k in keep)


def bitlinears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Every BitLinear of a model with its name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, BitLinear))


def freeze_(model: nn.Module) -> list[str]:
    """Freeze every BitLinear of a model in place; returns their names.

    Raises:
        QBenchError: if there is none.
    """
    found = list(bitlinears(model))
    if not found:
        raise QBenchError(f"{type(model).__name__} has no BitLinear to freeze")
    for _, layer in found:
        layer.freeze_()
    return [name for name, _ in found]
