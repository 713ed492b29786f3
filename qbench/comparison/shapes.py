"""The shapes of the models in BitNet (arXiv 2310.11453) and BitNet b1.58 (arXiv 2402.17764).

``bitnet-125M`` to ``bitnet-30B`` are BitNet's appendix A: two matrices of 4 x hidden in an MLP, a
vocabulary of 16,384. ``bitnet-70B`` is in no paper: LLaMA 70B's width and depth in blocks of that
kind, from which Fig. 3 of b1.58 can be computed. ``b158-700M`` to ``b158-3.9B`` are the authors'
"Training Tips, Code and FAQ", table 1; beyond, no shapes are published, so ``b158-7B``, ``-13B``
and ``-70B`` have those of LLaMA 7B and 13B and of Llama 2 70B (8 heads of keys and values). Whether
input and output embeddings are tied is said by neither paper; BitNet's are taken as tied, those of
b1.58 as LLaMA's, which are not, with its vocabulary of 32,000. Norms are left out.
"""

from __future__ import annotations

from qbench.errors import unknown
from qbench.record import Dimensions, MatrixShape
from qbench.training.presets import PRESETS

_LLAMA = {  # size -> hidden, intermediate, blocks, heads, kv heads (arXiv 2302.13971, 2307.09288)
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
_WIDE = {"70B": (8192, 80, 64)}  # size -> hidden, blocks, heads


def names() -> list[str]:
    """Every shape there is a name for."""
    bitnet = [*_published("bitnet-", "bitnet-"), *(f"bitnet-{size}" for size in _WIDE)]
    return [*bitnet, *_published("bitnet-b1.58-", "b158-"), *(f"b158-{size}" for size in _LLAMA)]


def shape(name: str) -> Dimensions:
    """The dimensions of a published model, such as "bitnet-6.7B" or "b158-3B".

    Raises:
        QBenchError: for a name that is not there.
    """
    family, _, size = name.partition("-")
    known = {known.lower(): known for known in names()}.get(name.lower())
    if known is None:
        raise unknown("shape", name, names())
    if family == "bitnet":
        hidden, blocks, heads = _WIDE.get(size.upper()) or _bitnet(size)
        return _dimensions(hidden, 4 * hidden, blocks, heads, heads, gated=False)
    hidden, inside, blocks, heads, kv_heads = _LLAMA.get(size.upper()) or _b158(size)
    return _dimensions(hidden, inside, blocks, heads, kv_heads, gated=True)


def _published(prefix: str, written: str) -> list[str]:
    sizes = [name.removeprefix(prefix) for name in PRESETS if name.startswith(prefix)]
    return [f"{written}{size.upper()}" for size in sizes if size[0].isdigit()]


def _bitnet(size: str) -> tuple[int, int, int]:
    fields = PRESETS[f"bitnet-{size.lower()}"]["shape"]
    return fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]


def _b158(size: str) -> tuple[int, int, int, int, int]:
    fields = PRESETS[f"bitnet-b1.58-{size.lower()}"]["shape"]
    heads = fields["num_attention_heads"]
    blocks = fields["num_hidden_layers"]
    return fields["hidden_size"], fields["intermediate_size"], blocks, heads, heads


def _dimensions(
    hidden: int, inside: int, blocks: int, heads: int, kv_heads: int, gated: bool
) -> Dimensions:
    narrow = hidden // heads * kv_heads
    counts: dict[tuple[int, int], int] = {}
    for rows, columns, count in (
        (hidden, hidden, 2),
        (narrow, hidden, 2),
        (inside, hidden, 2 if gated else 1),
        (hidden, inside, 1),
    ):
        counts[rows, columns] = counts.get((rows, columns), 0) + count * blocks
    vocabulary = 32_000 if gated else 16_384
    return Dimensions(
        hidden_size=hidden,
        intermediate_size=inside,
        n_blocks=blocks,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        tied_embeddings=not gated,
        embedding_parameters=vocabulary * hidden,
        head_parameters=vocabulary * hidden if gated else 0,
        matrices=[
            MatrixShape(out_features=rows, in_features=columns, count=count, active=count)
            for (rows, columns), count in counts.items()
        ],
    )
