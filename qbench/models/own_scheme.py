"""A checkpoint that brings its own scheme: its low width was trained, or applied elsewhere.

Nothing is left to be quantized on such a model. It is measured as its checkpoint holds it, and its
row stands at the width of its weights instead of at 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from qbench.record import BaselineSpec
from qbench.scheme import Scheme


@dataclass(frozen=True)
class OwnScheme:
    """The scheme of the stored weights, and where it comes from."""

    scheme: Scheme
    method: BaselineSpec
    """What its rows are stored under: ``none`` where the width was trained."""
    trained: bool
    """Trained at the width (BitNet), or quantized elsewhere after training."""

    def __str__(self) -> str:
        return f"{'trained' if self.trained else self.method.name} {self.scheme}"


def trained_at(scheme: Scheme) -> OwnScheme:
    """The scheme a model was trained at."""
    return OwnScheme(scheme, BaselineSpec(name="none"), trained=True)
