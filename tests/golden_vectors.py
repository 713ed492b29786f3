"""Access to the vectors in tests/golden, made by running the official implementations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@cache
def index(name: str = "index") -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def cases(method: str, codes_only: bool = True) -> list[dict[str, Any]]:
    """Layer cases whose method starts with ``method``; with codes, those of matrices a and c."""
    found = [c for c in index()["cases"] if c["method"].startswith(method)]
    if codes_only:
        found = [c for c in found if c["matrix"] in "ac" and not c.get("metric_only")]
    return found


def weight(matrix: str) -> Tensor:
    return tensors("inputs")[f"{matrix}.W"].float()


def activations(matrix: str) -> Tensor:
    return tensors("inputs")[f"{matrix}.X"].float()


def relative_proxy(matrix: str, quantized: Tensor) -> float:
    """tr(ΔHΔᵀ)/tr(WHWᵀ) with H = Σxxᵀ in float64, as the index defines ``rel``."""
    w = weight(matrix).double()
    x = activations(matrix).double().flatten(0, 1)
    hessian = x.T @ x
    delta = quantized.double() - w
    return float(((delta @ hessian) * delta).sum() / ((w @ hessian) * w).sum())


def same_codes(found: Tensor, stored: Tensor) -> float:
    return float((found == stored.to(found.dtype)).double().mean())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
