"""No weight quantization: the FP16 row, and activation-only quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from qbench import Baseline, Scheme, Statistics


@dataclass(frozen=True)
class NoQuantization(Baseline):
    """Weights as they are. Every comparison reruns this row in its own environment."""

    is_random: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """Only 16-bit weights."""
        return "it leaves weights alone; use W16" if scheme.wbits < 16 else None

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> Tensor:
        """The weight itself."""
        return weight
