"""SmoothQuant: move the difficulty of quantizing activations into the weights, then use absmax.

SmoothQuant 2211.10438. Per input channel j, s_j = max|X_j|^α / max|W_j|^(1-α) (eq. 4); the norm in
front is divided by s and the weights it feeds are multiplied by it, so the function stays (eq. 3).
max|W_j| runs over the rows of all linears that read the norm. Only norm -> query/key/value and
norm -> first MLP layer are smoothed; what has no norm in front (output and down projections) is
quantized without. Activation maxima are those of the full-precision model.

Published settings: α 0.5 (OPT, BLOOM), 0.75 (GLM-130B), 0.8 (LLaMA), and in the released code 0.85
to 0.9 for Llama-2, 0.8 for Mistral, 0.6 to 0.7 for Falcon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, Tensor

from qbench import (
    Baseline,
    QBenchError,
    QuantizedWeight,
    Scheme,
    Statistics,
    TransformContext,
    round_to_nearest,
)

if TYPE_CHECKING:
    from qbench.models.blocks import Block

SMALLEST = 1e-5
"""Floor of weight maxima and of smoothing scales, as released."""


@dataclass(frozen=True)
class SmoothQuant(Baseline):
    """Absmax after smoothing; per output channel and per token as in the released code."""

    is_random: ClassVar[bool] = False
    rows_are_independent: ClassVar[bool] = True
    weights_ignore_activations: ClassVar[bool] = True
    transform_statistics: ClassVar[tuple[str, ...]] = ("absmax",)
    calibrate_on: ClassVar[str] = "full_precision"

    alpha: float = 0.5
    """Migration strength: 0 leaves activations as they are, 1 flattens them wholly."""

    def check(self) -> None:
        """Alpha divides the difficulty between weights and activations."""
        if not 0 <= self.alpha <= 1:
            raise QBenchError(
                f"SmoothQuant alpha={self.alpha:g} is outside 0 (all in the activations) to 1 "
                "(all in the weights); the paper uses 0.5"
            )

    def default_grid(self, scheme: Scheme) -> str:
        """As Absmax: ``restricted``, at 1 bit BitNet's eq. 4, ternary at 1.58."""
        return {1: "bitnet", 1.58: "ternary"}.get(scheme.wbits, "restricted")

    def transform(self, block: Block, context: TransformContext) -> None:
        """Fold a smoothing scale into every norm that feeds linears, in place."""
        for fold in block.folds:
            linears = [reader for reader in fold.readers if reader.name in context.stats]
            observed = [context.stats[reader.name].absmax for reader in linears]
            observed = [absmax for absmax in observed if absmax is not None]
            if not observed:
                continue
            activations = torch.stack(observed).amax(0)
            weights = torch.stack([reader.weight.float().abs().amax(0) for reader in linears])
            fold.fold_(smoothing_scale(activations, weights.amax(0), self.alpha))

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Round the smoothed ``weight`` (out_features, in_features) to the scheme's grid."""
        return round_to_nearest(weight, scheme)


def smoothing_scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Eq. 4: s = activations^α / weights^(1-α) from per-channel maxima, both (in_features,)."""
    weights = weights.clamp(min=SMALLEST)
    return (activations.pow(alpha) / weights.pow(1 - alpha)).clamp(min=SMALLEST)
