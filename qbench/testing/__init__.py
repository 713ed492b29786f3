"""For tests and for authors of baselines: tiny models, and the contract as checks."""

from qbench.testing.conformance import Outcome, check_baseline
from qbench.testing.models import (
    ARCHITECTURES,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    tiny_windows,
)

__all__ = [
    "ARCHITECTURES",
    "Outcome",
    "check_baseline",
    "tiny_checkpoint",
    "tiny_model",
    "tiny_tokenizer",
    "tiny_windows",
]
