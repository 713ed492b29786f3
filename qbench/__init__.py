"""qbench: what does a checkpoint lose at W×A bits, with this method, on these tasks?

Everything a plugin or a script needs is imported from here. Names are loaded when first used, so
that reading results never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Affine": "grid",
    "Baseline": "baseline",
    "CannotQuantize": "quantization.factorize",
    "Corrections": "quantization.columns",
    "Observer": "quantization.observers",
    "QBenchError": "errors",
    "QuantizedWeight": "grid",
    "Rounding": "quantization.columns",
    "Scheme": "scheme",
    "Statistics": "quantization.observers",
    "TransformContext": "baseline",
    "check_group_size": "grid",
    "damped": "quantization.factorize",
    "evaluate": "evaluation.evaluate",
    "feedback_factor": "quantization.factorize",
    "get_grid": "grid",
    "load_checkpoint": "models.checkpoints",
    "lower_cholesky": "quantization.factorize",
    "quantize_model": "quantization.quantize",
    "round_columns_": "quantization.columns",
    "round_to_nearest": "grid",
    "rows_of": "grid",
    "search_clip": "grid",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from qbench.baseline import Baseline as Baseline
    from qbench.baseline import TransformContext as TransformContext
    from qbench.errors import QBenchError as QBenchError
    from qbench.evaluation.evaluate import evaluate as evaluate
    from qbench.grid import Affine as Affine
    from qbench.grid import QuantizedWeight as QuantizedWeight
    from qbench.grid import check_group_size as check_group_size
    from qbench.grid import get_grid as get_grid
    from qbench.grid import round_to_nearest as round_to_nearest
    from qbench.grid import rows_of as rows_of
    from qbench.grid import search_clip as search_clip
    from qbench.models.checkpoints import load_checkpoint as load_checkpoint
    from qbench.quantization.columns import Corrections as Corrections
    from qbench.quantization.columns import Rounding as Rounding
    from qbench.quantization.columns import round_columns_ as round_columns_
    from qbench.quantization.factorize import CannotQuantize as CannotQuantize
    from qbench.quantization.factorize import damped as damped
    from qbench.quantization.factorize import feedback_factor as feedback_factor
    from qbench.quantization.factorize import lower_cholesky as lower_cholesky
    from qbench.quantization.observers import Observer as Observer
    from qbench.quantization.observers import Statistics as Statistics
    from qbench.quantization.quantize import quantize_model as quantize_model
    from qbench.scheme import Scheme as Scheme


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'qbench' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qbench.{_HOME[name]}"), name)
    globals()[name] = value  # a submodule of the same name must not shadow it later
    return value
