"""Models whose low width was trained: what a record says of them, and that PTQ refuses them."""

from __future__ import annotations

from torch import nn

from qbench.errors import QBenchError
from qbench.grid import get_grid
from qbench.models.bitnet.layers import bitlinears
from qbench.record import LayerReport
from qbench.scheme import Scheme


def layer_reports(model: nn.Module, scheme: Scheme) -> list[LayerReport]:
    """One report for each trained matrix; it has no error, for nothing was rounded afterwards.

    Stored bits are counted as for a matrix that was quantized afterwards: codes at the grid's
    density and a 16-bit scale.
    """
    per_code = get_grid(scheme.grid).bits_per_code(scheme.wbits)
    found = []
    for name, layer in bitlinears(model):
        out_features, in_features = layer.weight.shape
        scales = 1 if layer.frozen_scale is None else layer.frozen_scale.numel()
        found.append(
            LayerReport(
                name=name,
                shape=(out_features, in_features),
                scheme=str(scheme),
                relative_error=None,
                stored_bits=per_code * out_features * in_features + 16.0 * scales,
            )
        )
    return found


def check_not_trained(model: nn.Module) -> None:
    """Refuse to quantize a model whose low width was trained.

    Raises:
        QBenchError: naming its first BitLinear.
    """
    for name, _ in bitlinears(model):
        raise QBenchError(
            f"the model was trained at low bit width ({name} is a BitLinear); quantize its latent "
            "weights: load_checkpoint(..., latent=True), or --latent"
        )
