"""Energy of a model's arithmetic, as BitNet counts it (arXiv 2310.11453, section 2.3, Tables 1, 2).

Arithmetic only: no memory access, which costs more than the arithmetic in most real runs, no
softmax, norms or positions, and, as in the paper, no embedding and no output head. With a product
of (m, n) and (n, p) and an energy per addition and multiplication:

    E_add = m (n - 1) p e_add     (eq. 16)
    E_mul = m n p e_mul           (eq. 17)
    E_mul = (m p + m n) e_mul     (eq. 18, weights of 1 or 1.58 bits: only scales are multiplied)

What a width means for the arithmetic is said by :func:`arithmetic_of`. Queries times keys and
attention times values, (S, d)(d, S) and (S, S)(S, d) in every block, stay in FP16: that is what
gives the paper's numbers. With these rules 34 of the 36 cells of Table 1 come out as printed; for
BitNet's additions at 7 nm the paper prints 0.04 J (6.7B; computed 0.034) and 0.14 J (30B; 0.135).
Of the nine ratios in Fig. 1 and in Fig. 3 of BitNet b1.58 (arXiv 2402.17764) eight come out as
printed, the ninth as 38.86 where 38.8 is printed.

The papers add ternary products in INT8, which only holds two of them without overflow. Real kernels
accumulate in INT32; ``accumulator`` is a parameter, so that both can be printed: 71.4 times less
than FP16 for one multiply-accumulate becomes 16.7 times.

Left out: causal masks (the paper counts every pair of tokens), corrections for zero points, what a
method computes at run time, such as rotated inputs, and what ``bmm`` and ``KV`` widths would save
in the attention products, which stay in FP16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from qbench.errors import QBenchError, unknown
from qbench.record import Dimensions, QuantizationRecord
from qbench.scheme import Scheme

NODES = ("7nm", "45nm")
ACCUMULATORS = ("int8", "int32")
PICOJOULES: dict[str, dict[str, tuple[float, float]]] = {
    "45nm": {
        "fp32": (0.9, 3.7),
        "fp16": (0.4, 1.1),
        "int8": (0.03, 0.2),
        "int32": (0.1, 3.1),
    },
    "7nm": {
        "fp32": (0.38, 1.31),
        "fp16": (0.16, 0.34),
        "int8": (0.007, 0.07),
        "int32": (0.03, 1.48),
    },
}
"""Node -> type -> picojoules of one addition, of one multiplication.

FP32, FP16 and INT8 as in BitNet's Table 2. INT32 is not in it: at 45 nm from Horowitz (ISSCC 2014),
whose numbers these are; at 7 nm as published code of quantization research has it.
"""


@dataclass(frozen=True)
class Arithmetic:
    """What multiplies and what adds in the linears of a model."""

    multiplies: str | None
    """Type of the n multiplications of each output; None where codes are only added."""
    adds: str
    scales: bool = False
    """Whether inputs and outputs are multiplied by scales in FP16 (eq. 18)."""
    attention: str = "fp16"


@dataclass(frozen=True)
class Energy:
    """Joules."""

    multiplications: float
    additions: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.multiplications + self.additions

    def __add__(self, other: Energy) -> Energy:
        """Sum of both parts."""
        return Energy(
            self.multiplications + other.multiplications, self.additions + other.additions
        )

    def __mul__(self, factor: float) -> Energy:
        """So many times as much."""
        return Energy(factor * self.multiplications, factor * self.additions)


@dataclass(frozen=True)
class Product:
    """Equal linears: (out_features, in_features), and how many of them a token meets."""

    out_features: int
    in_features: int
    count: float
    arithmetic: Arithmetic
    groups: int = 1
    """Scales along a row of the weight: each rescales a partial sum."""


Products = list[Product]
FP32 = Arithmetic("fp32", "fp32", attention="fp32")
FP16 = Arithmetic("fp16", "fp16")


def arithmetic_of(wbits: float, abits: int, accumulator: str = "int8") -> Arithmetic:
    """The arithmetic of linears whose weights and inputs have these widths.

    - Weights or inputs at 16 bits: FP16. A weight-only scheme (W4A16) is dequantized and computed
      in FP16, so it saves memory and no arithmetic.
    - Weights of 1 or 1.58 bits, inputs of 8 or fewer: additions alone, and scales (eq. 18).
    - Both at 8 bits or fewer: the wider of the two, and INT8 at least, for which there are numbers;
      scales are counted as in eq. 18.

    Args:
        wbits: bits of a weight.
        abits: bits of an activation.
        accumulator: ``int8``, as the papers count, or ``int32``, as kernels do.

    Raises:
        QBenchError: for another accumulator.
    """
    if accumulator not in ACCUMULATORS:
        raise unknown("accumulator", accumulator, ACCUMULATORS)
    if wbits > 8 or abits > 8:
        return FP16
    return Arithmetic(None if wbits < 2 else "int8", accumulator, scales=True)


def product_energy(m: int, product: Product, node: str) -> Energy:
    """Energy of (m, in_features) times a linear's weight, for all linears of a kind."""
    n, p, kind = product.in_features, product.out_features, product.arithmetic
    prices = _prices(node)
    multiplications = 0.0 if kind.multiplies is None else m * n * p * prices[kind.multiplies][1]
    if kind.scales:
        multiplications += (m * p * product.groups + m * n) * prices["fp16"][1]
    additions = m * (n - 1) * p * prices[kind.adds][0]
    return Energy(multiplications, additions) * (product.count * 1e-12)


def attention_energy(width: int, n_blocks: int, seqlen: int, node: str, kind: str) -> Energy:
    """Queries times keys and attention times values, for one sequence.

    Args:
        width: channels of all query heads together.
        n_blocks: decoder blocks.
        seqlen: tokens.
        node: of the process.
        kind: the type of its numbers.
    """
    arithmetic = Arithmetic(kind, kind)
    scores = product_energy(seqlen, Product(seqlen, width, n_blocks, arithmetic), node)
    return scores + product_energy(seqlen, Product(width, seqlen, n_blocks, arithmetic), node)


def model_energy(
    dimensions: Dimensions,
    products: Sequence[Product],
    seqlen: int,
    *,
    batch: int = 1,
    node: str = "7nm",
    attention: str = "fp16",
) -> Energy:
    """Energy of one forward pass.

    Args:
        dimensions: of the model.
        products: its linears (:func:`products_at`, :func:`products_of`).
        seqlen: tokens of a sequence.
        batch: sequences.
        node: ``7nm`` or ``45nm``.
        attention: type of the attention products.

    Raises:
        QBenchError: for an unknown node, or no tokens.
    """
    if seqlen < 1 or batch < 1:
        raise QBenchError(f"{batch} x {seqlen} tokens are none; give at least one")
    energy = attention_energy(
        dimensions.attention_width, dimensions.n_blocks, seqlen, node, attention
    )
    for product in products:
        energy += product_energy(seqlen, product, node)
    return energy * batch


def products_at(dimensions: Dimensions, arithmetic: Arithmetic, group_size: int = -1) -> Products:
    """The linears of a model, all with one arithmetic."""
    return [
        _product(m.out_features, m.in_features, m.active, arithmetic, group_size)
        for m in dimensions.matrices
    ]


def products_of(record: QuantizationRecord, accumulator: str = "int8") -> Products:
    """The linears of a quantized model, each with the arithmetic of its own scheme.

    Those that were not quantized are in FP16.

    Args:
        record: with dimensions.
        accumulator: of the quantized ones.
    """
    assert record.dimensions is not None
    shares = {
        shape: matrix.active / matrix.count
        for matrix in record.dimensions.matrices
        for shape in _both(matrix.out_features, matrix.in_features)
    }
    left = {(m.out_features, m.in_features): m.active for m in record.dimensions.matrices}
    alike = Counter((layer.shape, layer.scheme) for layer in record.layers)
    found: Products = []
    for (layer_shape, text), count in alike.items():
        if layer_shape not in shares:  # an output head that was quantized too
            continue
        scheme, active = _parsed(text), count * shares[layer_shape]
        arithmetic = arithmetic_of(scheme.wbits, scheme.abits, accumulator)
        found.append(_product(*layer_shape, active, arithmetic, scheme.group_size))
        known = next((shape for shape in _both(*layer_shape) if left.get(shape, 0) > 0), None)
        if known is not None:
            left[known] -= active
    rest = [(shape, active) for shape, active in left.items() if active > 1e-6]
    return found + [Product(*shape, active, FP16) for shape, active in rest]


def ratio_of_one(node: str, accumulator: str) -> float:
    """How many times less one ternary multiply-accumulate takes than one in FP16."""
    prices = _prices(node)
    return sum(prices["fp16"]) / prices[accumulator][0]


def energy_of(
    record: QuantizationRecord, seqlen: int, *, node: str = "7nm", accumulator: str = "int8"
) -> float | None:
    """Joules of one forward pass over ``seqlen`` tokens; None without dimensions."""
    if record.dimensions is None:
        return None
    products = products_of(record, accumulator)
    return model_energy(record.dimensions, products, seqlen, node=node).total


def _product(
    out_features: int, in_features: int, count: float, arithmetic: Arithmetic, group_size: int
) -> Product:
    groups = 1 if group_size < 1 else -(-in_features // group_size)
    return Product(out_features, in_features, count, arithmetic, groups)


def _both(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    """A shape and its transpose: fused experts may be stored either way."""
    return dict.fromkeys(((rows, columns), (columns, rows)))


@cache
def _parsed(scheme: str) -> Scheme:
    return Scheme.parse(scheme)


def _prices(node: str) -> dict[str, tuple[float, float]]:
    if node not in PICOJOULES:
        raise unknown("process node", node, PICOJOULES)
    return PICOJOULES[node]
