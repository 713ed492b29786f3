"""The quantizers of BitNet (2310.11453, "B1") and BitNet b1.58 (2402.17764, "B158"), as functions.

Weights are ``codes * scale`` per tensor: B1 Sign(W - α) times β = mean|W| (eq. 1-3, 12), B158
{-1, 0, 1} times γ = mean|W|. Activations are absmax-quantized (B1 eq. 4-6). With G groups (B1 eq.
13-15) each slice of the partitioned dimension has its own α, β, γ and η. Arithmetic is float32
(float64 stays) whatever the dtype given. Gradients are not here: see ``layers.py``.

Paper and released code ("code": the training tips that the authors published in microsoft/unilm)
differ. The defaults, and why:

=====================  ==========================================  ===============================
option                 default                                     the other
=====================  ==========================================  ===============================
``sign_of_zero``       negative: Sign(0) = -1 (B1 eq. 2), so a     zero: torch.sign(0) = 0 (code)
                       weight has one bit, never a third value
``epsilon``            clamp: W / max(γ, ε) (code; what every      add: W / (γ + ε) (B158 eq. 1)
                       released checkpoint was made with)
``qmax``               code: Q_b = 2^(b-1) - 1, which an int8      paper: Q_b = 2^(b-1), clipped to
                       holds                                       ±(Q_b - ε), 257 codes at 8 bits
``rounding``           on (code): what is multiplied are integers  off: eq. 4 prints no rounding
``granularity``        token (code, and inference in the paper):   tensor: the paper while training
                       no token's scale depends on a later token
``span``               symmetric (eq. 4; all of B158)              shifted, printed: eq. 6
=====================  ==========================================  ===============================

Eq. 6 moves the smallest value η to 0 before a non-linearity, to fill [0, Q_b]. As printed its scale
is still γ = max|x|, which clips everything above η + γ; ``shifted`` takes max(x - η) so that the
whole range fits, ``printed`` is the literal formula.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qbench.errors import QBenchError, unknown

EPSILON = 1e-5
"""Floor of every scale, and the ε of eq. 4 and 6; the released code's value."""
SIGNS_OF_ZERO = ("negative", "zero")
EPSILONS = ("clamp", "add")
QMAX = ("code", "paper")
GRANULARITIES = ("token", "tensor")
SPANS = ("symmetric", "shifted", "printed")


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """A quantized weight matrix."""

    codes: Tensor
    """(out_features, in_features), -1, 0 or 1, floating point."""
    scale: Tensor
    """(groups,): a weight is code times scale. β of B1, γ of B158."""
    mean: Tensor | None = None
    """(groups,): α of B1."""
    dim: int = 1
    """The dimension that is cut into groups."""

    def dequantize(self) -> Tensor:
        """The weights (out_features, in_features) that the codes stand for."""
        if self.scale.numel() == 1:
            return self.codes * self.scale
        sliced = self.codes.unflatten(self.dim, (self.scale.numel(), -1))
        return (sliced * _along(self.scale, self.dim)).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True, eq=False)
class ActivationCodes:
    """Quantized activations."""

    codes: Tensor
    """(..., features), integral where rounding is on."""
    inverse_scale: Tensor
    """Q_b / γ, with a last dimension of ``groups``; an activation is code / inverse_scale + shift.

    Kept inverse as in the released code, whose division this repeats to the last bit.
    """
    shift: Tensor | None = None
    """η of eq. 6, shaped like ``inverse_scale``; None on the symmetric span."""

    def dequantize(self) -> Tensor:
        """The activations (..., features) that the codes stand for."""
        return _decode(self.codes.clone(), self.inverse_scale, self.shift)


def binary_weight(
    weight: Tensor, *, sign_of_zero: str = "negative", groups: int = 1, dim: int = 1
) -> WeightCodes:
    """B1's weights: codes Sign(W - α) with α = mean W, scale β = mean|W| (eq. 1-3, 12, 13).

    Args:
        weight: (out_features, in_features).
        sign_of_zero: code of a weight equal to α: "negative" -1 as in eq. 2, "zero" 0 as coded.
        groups: G of eq. 13; each group has its own α and β.
        dim: the partitioned dimension, 0 or 1.

    Raises:
        QBenchError: for an unknown option, or groups that do not divide the dimension.
    """
    check_choice("sign_of_zero", sign_of_zero, SIGNS_OF_ZERO)
    w = _sliced(at_least_float32(weight), groups, dim)
    mean, scale = _mean(w, groups, dim), _mean(w.abs(), groups, dim)
    alpha = _along(mean, dim) if groups > 1 else mean
    if sign_of_zero == "zero":
        codes = (w - alpha).sign_()
    else:
        codes = (w > alpha).to(w.dtype).mul_(2).sub_(1)
    return WeightCodes(codes.view(weight.shape), scale, mean, dim)


def ternary_weight(
    weight: Tensor, *, epsilon: str = "clamp", groups: int = 1, dim: int = 1
) -> WeightCodes:
    """B158's weights: RoundClip(W/γ, -1, 1) with γ = mean|W|, rounding half to even.

    Args:
        weight: (out_features, in_features).
        epsilon: how γ = 0 is avoided: "clamp" max(γ, ε) as coded, "add" γ + ε as printed.
        groups: slices with a γ of their own (B158 itself needs none).
        dim: the dimension that is cut into groups, 0 or 1.

    Raises:
        QBenchError: for an unknown option, or groups that do not divide the dimension.
    """
    check_choice("epsilon", epsilon, EPSILONS)
    w = _sliced(at_least_float32(weight), groups, dim)
    mean = _mean(w.abs(), groups, dim)
    if epsilon == "add":
        divided = w / _along(mean + EPSILON, dim) if groups > 1 else w / (mean + EPSILON)
        return WeightCodes(divided.round_().clamp_(-1, 1).view(weight.shape), mean, dim=dim)
    inverse = 1.0 / mean.clamp_(min=EPSILON)
    codes = (w * (_along(inverse, dim) if groups > 1 else inverse)).round_().clamp_(-1, 1)
    # 1/(1/γ) may differ from γ in the last bit; the released code divides by the inverse
    return WeightCodes(codes.view(weight.shape), 1.0 / inverse, dim=dim)


def absmax_activations(
    x: Tensor,
    bits: int = 8,
    *,
    qmax: str = "code",
    rounding: bool = True,
    granularity: str = "token",
    span: str = "symmetric",
    groups: int = 1,
) -> ActivationCodes:
    """Absmax quantization of activations (B1 eq. 4-6, 14); see the module for the options.

    Args:
        x: (..., features); the last dimension is a token's, all others count tokens.
        bits: b of Q_b.
        qmax: "code" for Q_b = 2^(b-1) - 1, "paper" for 2^(b-1).
        rounding: whether codes are rounded, half to even.
        granularity: "token" for a scale per token, "tensor" for one scale.
        span: "symmetric" [-Q_b, Q_b]; "shifted" or "printed" [0, Q_b].
        groups: G of eq. 14: slices of the features with their own γ and η.

    Raises:
        QBenchError: for an option or width that does not exist.
    """
    return ActivationCodes(*_encode(x, bits, qmax, rounding, granularity, span, groups))


def fake_quantize_activations(
    x: Tensor,
    bits: int = 8,
    *,
    qmax: str = "code",
    rounding: bool = True,
    granularity: str = "token",
    span: str = "symmetric",
    groups: int = 1,
) -> Tensor:
    """``absmax_activations(...).dequantize()`` in the input dtype, with a copy less."""
    encoded = _encode(x, bits, qmax, rounding, granularity, span, groups)
    return _decode(*encoded).to(x.dtype)


def activation_qmax(bits: int, qmax: str = "code") -> int:
    """Q_b, the largest code.

    Raises:
        QBenchError: for a width without codes.
    """
    check_choice("qmax", qmax, QMAX)
    least = 2 if qmax == "code" else 1
    if not least <= bits <= 16:
        raise QBenchError(f"activations cannot have {bits} bits with qmax={qmax!r}; {least} to 16")
    return 2 ** (bits - 1) - (qmax == "code")


def check_choice(option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise a QBenchError for a value that the option does not have."""
    if value not in known:
        raise unknown(option, str(value), known)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or in float32 if its dtype is smaller."""
    return x.float() if x.dtype.itemsize < 4 else x


def _encode(
    x: Tensor, bits: int, qmax: str, rounding: bool, granularity: str, span: str, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (..., features), inverse scale and shift (last dimension: groups)."""
    limit = activation_qmax(bits, qmax)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("span", span, SPANS)
    values = _sliced(at_least_float32(x), groups, -1)
    # over the features, or over everything but the groups
    kept = {values.ndim - 2} if groups > 1 else set()
    tensor = tuple(d for d in range(values.ndim) if d not in kept)
    over: tuple[int, ...] = (-1,) if granularity == "token" else tensor
    shift = None
    if span == "symmetric":
        codes, largest = values, values.abs().amax(over, keepdim=True)
    else:
        shift = values.amin(over, keepdim=True)
        codes = values - shift
        extent = codes if span == "shifted" else values.abs()
        largest = extent.amax(over, keepdim=True)
    inverse = limit / largest.clamp_(min=EPSILON)
    codes = codes * inverse
    low, high = (-limit, limit) if shift is None else (0, limit)
    if not rounding:
        # eq. 4 and 6 as printed keep ε away from the ends; without the code's smaller Q_b
        margin = EPSILON if qmax == "paper" else 0.0
        codes.clamp_(low + margin, high - margin)
    elif span == "printed":
        codes.clamp_(low, high)
    # on the other spans |x| * (Q_b/γ) exceeds Q_b by two roundings at most, so that the clip of
    # eq. 4 cannot change what rounding gives: a pass over memory saved
    if rounding:
        codes.round_()
    if groups > 1:
        codes, inverse = codes.flatten(-2), inverse.squeeze(-1)
        shift = None if shift is None else shift.squeeze(-1)
    return codes, inverse, shift


def _decode(codes: Tensor, inverse: Tensor, shift: Tensor | None) -> Tensor:
    """Activations from codes, which are overwritten."""
    groups = inverse.shape[-1]
    if groups > 1:
        codes = codes.unflatten(-1, (groups, -1))
        inverse = inverse.unsqueeze(-1)
        shift = None if shift is None else shift.unsqueeze(-1)
    values = codes.div_(inverse)
    if shift is not None:
        values.add_(shift)
    return values.flatten(-2) if groups > 1 else values


def _sliced(x: Tensor, groups: int, dim: int) -> Tensor:
    """``x`` with ``dim`` split into (groups, size); itself if there is one group."""
    if groups == 1:
        return x
    size = x.shape[dim]
    if groups < 1 or size % groups:
        raise QBenchError(f"groups={groups} does not divide {size}; choose a divisor")
    return x.unflatten(dim, (groups, -1))


def _mean(w: Tensor, groups: int, dim: int) -> Tensor:
    """Mean of every group (groups,) of a sliced matrix."""
    if groups == 1:
        return w.mean().view(1)
    return w.mean(tuple(d for d in range(w.ndim) if d != dim))


def _along(scale: Tensor, dim: int) -> Tensor:
    """(groups,) shaped to meet a sliced matrix (three dimensions) along ``dim``."""
    return scale.view([-1 if d == dim else 1 for d in range(3)])
