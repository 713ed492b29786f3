"""What a model takes: bits per weight, bytes on disk, memory at a batch and a length.

Two densities, which are easily mixed up:

    bits per quantized weight   stored bits of the blocks' matrices / their weights
    bits per weight, whole      (stored bits of the matrices + 16 bits for every other parameter)
                                / all parameters

Stored bits are codes, scales, zero points and group indices, as each run recorded them. Everything
else (embeddings, output head, norms, biases, matrices left alone) counts 16 bits, whatever the
checkpoint's files have. A code costs log2 of its levels where that is more than its width: 1.585
bits for ternary. ``packed`` rounds that up to whole bits, as files and kernels do (2 for ternary).

Memory while text is generated, in bytes:

    weights       as above
    KV cache      2 blocks kv_heads head_dim tokens batch kvbits / 8, and 2 bytes of scale for every
                  token, head and block of keys and of values where kvbits < 16
    activations   2 tokens batch (2 hidden + 2 intermediate): residual stream, the norm's output,
                  gate and up (one block at a time)

Left out: the allocator, the framework, workspaces of kernels, and logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qbench.errors import QBenchError
from qbench.record import Dimensions, QuantizationRecord
from qbench.scheme import Scheme

_WHOLE = 16.0


@dataclass(frozen=True)
class Footprint:
    """How densely a model is stored."""

    parameters: int
    """All of them, tied ones once."""
    quantized: int
    """Weights of the matrices with bits of their own."""
    quantized_bits: float
    """What those take, scales and all."""

    @property
    def bits_per_quantized_weight(self) -> float:
        """Over the matrices alone."""
        return self.quantized_bits / self.quantized if self.quantized else _WHOLE

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model."""
        return 8 * self.bytes / self.parameters

    @property
    def bytes(self) -> float:
        """Size of a checkpoint that stores it so, without its headers."""
        return (self.quantized_bits + _WHOLE * (self.parameters - self.quantized)) / 8


@dataclass(frozen=True)
class Memory:
    """Bytes while text is generated."""

    weights: float
    kv_cache: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.kv_cache + self.activations


def footprint_of(record: QuantizationRecord) -> Footprint | None:
    """Of a quantized model as it was recorded; None where its size or its layers are unknown."""
    if record.status != "ok" or not record.parameters:
        return None
    if not record.layers and Scheme.parse(record.key.scheme).quantizes_weights:
        return None
    weights = sum(layer.shape[0] * layer.shape[1] for layer in record.layers)
    return Footprint(record.parameters, weights, sum(layer.stored_bits for layer in record.layers))


def footprint_at(
    dimensions: Dimensions, scheme: Scheme, parameters: int | None = None, packed: bool = False
) -> Footprint:
    """Of a model whose blocks' matrices would all be stored at a scheme.

    A grid that is still ``auto`` is taken to need no zero points.

    Args:
        dimensions: of the model.
        scheme: of all matrices.
        parameters: of the model; None takes matrices, embeddings and output head.
        packed: whether codes take whole bits.

    Raises:
        QBenchError: for per-layer overrides, which need the names of matrices.
    """
    if scheme.overrides:
        raise QBenchError(
            f"{scheme} names single matrices, which a shape does not have; leave its overrides out"
        )
    outside = dimensions.embedding_parameters + dimensions.head_parameters
    everything = parameters or dimensions.matrix_weights + outside
    if scheme.wbits >= 16:
        return Footprint(everything, 0, 0.0)
    code = code_bits(scheme)
    per_scale = 16.0 + (scheme.wbits if scheme.grid == "asym" else 0.0)
    bits = 0.0
    for matrix in dimensions.matrices:
        rows, columns = matrix.out_features, matrix.in_features
        codes = (math.ceil(code) if packed else code) * rows * columns
        bits += matrix.count * (codes + per_scale * _scales(scheme, rows, columns))
    return Footprint(everything, dimensions.matrix_weights, bits)


def code_bits(scheme: Scheme) -> float:
    """What one code of a scheme's grid takes (:meth:`qbench.grid.Grid.bits_per_code`)."""
    if scheme.wbits == 1.58:
        return math.log2(3)
    return math.log2(2**scheme.wbits + 1) if scheme.grid == "bitnet" else float(scheme.wbits)


def kv_cache_bytes(dimensions: Dimensions, tokens: int, batch: int = 1, kvbits: int = 16) -> float:
    """Keys and values of some sequences."""
    heads = 2 * dimensions.n_blocks * dimensions.n_kv_heads * tokens * batch
    scale = 2 if kvbits < 16 else 0
    return heads * (dimensions.head_dim * kvbits / 8 + scale)


def activation_bytes(dimensions: Dimensions, tokens: int, batch: int = 1) -> float:
    """What one block at work holds in 16 bits for tokens that pass through it together."""
    inside = dimensions.intermediate_size or 4 * dimensions.hidden_size
    return 2 * tokens * batch * (2 * dimensions.hidden_size + 2 * inside)


def memory_of(
    dimensions: Dimensions,
    footprint: Footprint,
    tokens: int,
    batch: int = 1,
    kvbits: int = 16,
    activations: bool = False,
) -> Memory:
    """Memory for some sequences of a length.

    Args:
        dimensions: of the model.
        footprint: of its weights.
        tokens: of each sequence.
        batch: sequences.
        kvbits: bits of a key or value.
        activations: whether to add those of a prompt that is read at once.
    """
    inside = activation_bytes(dimensions, tokens, batch) if activations else 0.0
    return Memory(footprint.bytes, kv_cache_bytes(dimensions, tokens, batch, kvbits), inside)


def max_batch(
    dimensions: Dimensions, footprint: Footprint, capacity: float, tokens: int, kvbits: int = 16
) -> int:
    """How many sequences of a length fit beside the weights; 0 where not even one does.

    Args:
        dimensions: of the model.
        footprint: of its weights.
        capacity: bytes of memory, with nothing reserved.
        tokens: of each sequence.
        kvbits: bits of a key or value.
    """
    left = capacity - footprint.bytes
    return max(0, math.floor(left / kv_cache_bytes(dimensions, tokens, 1, kvbits)))


def size_text(size: float) -> str:
    """Bytes in decimal units: "13.5 GB", "3.95 MB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            scaled = size / unit
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {name}"
    return f"{size:.0f} B"


def _scales(scheme: Scheme, rows: int, columns: int) -> int:
    if scheme.group_size > 0:
        return rows * math.ceil(columns / scheme.group_size)
    trained = scheme.wbits < 2 and scheme.w_granularity == "auto"
    return 1 if scheme.w_granularity == "tensor" or trained else rows
