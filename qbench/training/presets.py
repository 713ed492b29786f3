"""The published training recipes as named data: shapes, learning rates, steps, Adam, decay.

``bitnet-*`` is BitNet (arXiv 2310.11453, section 3.1 and appendix A); ``bitnet-b1.58-*`` is "The
Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm), tables 1 and 2.

What the papers leave open is filled in so: BitNet names no learning rate of its FP16 models ("same
data and settings"), so its presets train both with one. It names no sequence length either: 2048.
Its blocks have two matrices of 4 x hidden_size where ours have three; ``intermediate_size`` is the
nearest multiple of 8 to 8/3 x hidden_size, which makes them equally large. The tips list no FP16
model of 3.9B, so that preset has no learning rate for one. Whether input and output embeddings are
tied (here they are), and how weights start (here from a normal distribution of standard deviation
0.02), is said by neither. "1M" and "256K" tokens are powers of
two, because a step is whole windows.

Left out: data and tokenizer, which are the reader's own.
"""

from __future__ import annotations

from typing import Any

# parameters -> hidden size, layers, heads, peak learning rate, weight decay (B1, appendix A)
_BITNET = {
    "125m": (768, 12, 12, 2.4e-3, 0.01),
    "350m": (1024, 24, 16, 1.2e-3, 0.01),
    "760m": (1536, 24, 16, 1e-3, 0.01),
    "1.3b": (2048, 24, 32, 8e-4, 0.01),
    "2.7b": (2560, 32, 32, 6.4e-4, 0.01),
    "6.7b": (4096, 32, 32, 4.8e-4, 0.01),
    "13b": (5120, 40, 40, 4e-4, 0.05),
    "30b": (7168, 48, 56, 4e-4, 0.05),
}

# parameters -> hidden size, GLU size, heads, layers, both b1.58 peaks, LLaMA's peak (tables 1, 2)
_B158: dict[str, tuple[int, int, int, int, list[float], float | None]] = {
    "700m": (1536, 4096, 24, 24, [1.5e-3, 1e-3], 2.5e-4),
    "1.3b": (2048, 5460, 32, 24, [1.2e-3, 8e-4], 2e-4),
    "3b": (3200, 8640, 32, 26, [1.2e-3, 8e-4], 2e-4),
    "3.9b": (3200, 12800, 32, 26, [1.2e-3, 8e-4], None),
}


def _bitnet(size: str) -> dict[str, Any]:
    hidden, layers, heads, rate, decay = _BITNET[size]
    return {
        "name": size,
        "twins": ["fp16", "b1"],
        "shape": _shape(hidden, 8 * round(hidden / 3), layers, heads),
        "seqlen": 2048,
        "tokens_per_step": 256 * 1024,
        "steps": 40_000,
        "learning_rate": rate,
        "schedule": "polynomial",
        "warmup": 750,
        "weight_decay": decay,
        "betas": [0.9, 0.98],
    }


def _b158(size: str) -> dict[str, Any]:
    hidden, glu, heads, layers, rates, llama = _B158[size]
    return {
        "name": size,
        "twins": ["b158"] if llama is None else ["fp16", "b158"],
        "shape": _shape(hidden, glu, layers, heads),
        "seqlen": 2048,
        "tokens_per_step": 1024 * 1024,
        "steps": 100_000,
        "learning_rate": {"b158": rates} | ({} if llama is None else {"fp16": llama}),
        "schedule": {"fp16": "linear", "b158": "two-stage"},
        "warmup": 375,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
    }


def _shape(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    **{f"bitnet-{size}": _bitnet(size) for size in _BITNET},
    **{f"bitnet-b1.58-{size}": _b158(size) for size in _B158},
}
"""Fields of a recipe by the preset's name; a recipe overrides any of them."""


def known_presets() -> dict[str, str]:
    """Every preset with one line of what it is."""
    return {name: _summary(fields) for name, fields in PRESETS.items()}


def _summary(fields: dict[str, Any]) -> str:
    shape, rate = fields["shape"], fields["learning_rate"]
    rates = rate if isinstance(rate, dict) else dict.fromkeys(fields["twins"], rate)
    shown = ", ".join(f"{kind} {_rate(rates[kind])}" for kind in fields["twins"])
    return (
        f"{shape['num_hidden_layers']} blocks of {shape['hidden_size']}, {fields['steps']} steps "
        f"of {fields['tokens_per_step']} tokens, learning rate {shown}"
    )


def _rate(rate: float | list[float]) -> str:
    return " then ".join(f"{r:g}" for r in rate) if isinstance(rate, list) else f"{rate:g}"
