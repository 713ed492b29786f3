"""qbench: what does a checkpoint lose at W×A bits, with this method, on these tasks?

Names are imported when first used, so that reading results never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "QBenchError": "errors",
    "Scheme": "scheme",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from qbench.errors import QBenchError as QBenchError
    from qbench.scheme import Scheme as Scheme


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'qbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qbench.{_HOME[name]}"), name)
