"""A baseline that stops the process when the first block is worked on (see startup.py)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Generator, Tensor

from qbench import Baseline, Scheme, Statistics, round_to_nearest


@dataclass(frozen=True)
class FirstBlock(Baseline):
    """Collects a hessian as GPTQ does, and ends there.

    ``QBENCH_MARK`` names a file that gets the monotonic clock's seconds.
    """

    is_random: ClassVar[bool] = False
    weight_statistics: ClassVar[tuple[str, ...]] = ("hessian",)

    def default_grid(self, scheme: Scheme) -> str:
        """Any grid: nothing is rounded."""
        return "asym"

    def stages(self, block: object) -> list[list[str]]:
        """Asked once the block is found and before it sees data: the clock stops."""
        Path(os.environ["QBENCH_MARK"]).write_text(repr(time.monotonic()))
        os._exit(0)

    def quantize_weight(
        self, weight: Tensor, scheme: Scheme, stats: Statistics, generator: Generator
    ) -> Tensor:
        """Never reached."""
        return round_to_nearest(weight, scheme).weight
