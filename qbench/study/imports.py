"""Imports without the garbage collector, which finds nothing in them and takes a sixth of the time.

Nothing heavy is imported here, and nothing is left changed: the collector is on again afterwards,
and only what was imported is out of its sight from then on.
"""

from __future__ import annotations

import gc
import importlib
import sys

from qbench.process import uncollected

_MODELS = "transformers.models.auto.modeling_auto"
"""Brings torch and everything of transformers that a model in memory needs."""


def import_models() -> None:
    """Import torch and transformers, unless they are there."""
    if _MODELS in sys.modules:
        return
    with uncollected():
        importlib.import_module(_MODELS)
        importlib.import_module("transformers.modeling_layers")
    gc.freeze()  # what is imported stays: no later collection need look through it
