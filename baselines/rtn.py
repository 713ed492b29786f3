"""Round to nearest, per row and asymmetric: the "RTN" and "Near" rows of GPTQ's and QuIP's tables.

GPTQ 2210.17323 section 4 and its released ``--nearest``; no data is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from qbench import Baseline, QuantizedWeight, Scheme, Statistics, round_to_nearest


@dataclass(frozen=True)
class RTN(Baseline):
    """Round every weight to the nearest code of its row."""

    is_random: ClassVar[bool] = False
    rows_are_independent: ClassVar[bool] = True
    weights_ignore_activations: ClassVar[bool] = True

    mse: bool = False
    """Shrink each row's range to the one of least rounding error."""

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> QuantizedWeight:
        """Round ``weight`` (out_features, in_features) to the scheme's grid."""
        return round_to_nearest(weight, scheme, mse=self.mse)
