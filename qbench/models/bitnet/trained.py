"""Models whose low width was trained: what a record says of them, and that PTQ refuses them."""

from __future__ import annotations

from torch import nn

from qbench.errors import QBenchError
from qbench.grid import get_grid
from qbench.models.bitnet.layers import BitLinear, bitlinears
from qbench.models.blocks import find_blocks
from qbench.record import LayerReport
from qbench.scheme import Scheme


def layer_reports(model: nn.Module, scheme: Scheme) -> list[LayerReport]:
    """One report for each matrix of the blocks; no errors, for nothing was rounded afterwards.

    Stored bits are counted as for a matrix that was quantized afterwards: codes at the grid's
    density and a 16-bit scale, or 16 bits a weight where a checkpoint kept it in full precision.
    """
    per_code = get_grid(scheme.grid).bits_per_code(scheme.wbits)
    linears = {name: layer for name, layer in bitlinears(model)}
    blocks = {
        f"{prefix}.{name}": layer
        for prefix, block in find_blocks(model)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    found = []
    for name, layer in (linears | blocks).items():
        out_features, in_features = layer.weight.shape
        trained = isinstance(layer, BitLinear)
        scale = layer.frozen_scale if isinstance(layer, BitLinear) else None
        scales = 1 if scale is None else scale.numel()
        bits = per_code * layer.weight.numel() + 16.0 * scales
        found.append(
            LayerReport(
                name=name,
                shape=(out_features, in_features),
                scheme=str(scheme if trained else Scheme()),
                relative_error=None if trained else 0.0,
                stored_bits=bits if trained else 16.0 * layer.weight.numel(),
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
