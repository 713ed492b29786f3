"""Absmax quantization: scale by the largest magnitude of the whole tensor, round to nearest.

LLM.int8 2208.07339 section 2.1 (X_i8 = round(127 X / max|X|)), the "Absmax" rows of BitNet
2310.11453 Table 3. The papers scale weights and activations per tensor; ``w=channel`` and
``a=token`` in the scheme give the row-wise variants.

At 1 bit the released formulas divide by zero. BitNet's own eq. 4 does not: with Q_b = 2^(b-1) = 1
and rounding it leaves {-1, 0, 1} times the maximum, which is what the default grid ``bitnet`` does.
``grid=sign`` is the other reading, ±(mean magnitude).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from qbench import Baseline, QuantizedWeight, Scheme, Statistics, round_to_nearest


@dataclass(frozen=True)
class Absmax(Baseline):
    """Round to nearest on a symmetric grid scaled by the absolute maximum."""

    is_random: ClassVar[bool] = False
    rows_are_independent: ClassVar[bool] = True
    weights_ignore_activations: ClassVar[bool] = True
    activation_granularity: ClassVar[str] = "tensor"

    def default_grid(self, scheme: Scheme) -> str:
        """``restricted`` as coded; at 1 bit BitNet's eq. 4; ternary at 1.58."""
        return {1: "bitnet", 1.58: "ternary"}.get(scheme.wbits, "restricted")

    def default_granularity(self, scheme: Scheme) -> str:
        """The whole tensor, as in the papers."""
        return "tensor"

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Round ``weight`` (out_features, in_features) to the scheme's grid."""
        return round_to_nearest(weight, scheme)
