"""A decoder that exists in no library, to show that nothing in qbench knows an architecture.

Its blocks take odd arguments, run attention and a mixture of experts side by side, keep one
``nn.Linear`` per expert of which the router reaches only some, use one projection twice, gate a
norm with a second input, and call attention by keyword.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Geometry(NamedTuple):
    mask: torch.Tensor
    scale: float


class Gain(nn.Module):
    """A norm under another name, with a per-channel weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],)) * self.weight


class GatedGain(Gain):
    """Looks like a norm and cannot be called like one."""

    def forward(self, x, gate):
        return super().forward(x) * torch.sigmoid(gate)


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.narrow(F.silu(self.widen(x)))


class OddBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.entry = Gain(width)
        self.leave = GatedGain(width)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.twice = nn.Linear(width, width)
        self.router = nn.Parameter(torch.randn(config.experts, width))
        self.router.data[config.reached :] = 0
        self.experts = nn.ModuleList(Expert(width) for _ in range(config.experts))
        self.calls_empty = config.calls_empty
        self.heads = config.heads

    def forward(self, stream, geometry, *, temperature, extras=None):
        y = self.entry(stream)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.mix(y).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(
            query=query, key=key, value=value, attn_mask=geometry.mask, scale=geometry.scale
        )
        attended = self.out(attended.transpose(1, 2).flatten(2))
        attended = attended + self.twice(self.twice(attended) * temperature)
        mixed = self._mixture(y.flatten(0, 1)).view_as(y)
        return stream + self.leave(attended + mixed, gate=stream) + extras[
            "shift"
        ], "something else"

    def _mixture(self, rows):
        chosen = (rows @ self.router.T).abs().argmax(-1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.calls_empty or mine.any():
                result[mine] = expert(rows[mine])
        return result


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, experts=4, reached=2, calls_empty=False, heads=4, **kwargs):
        self.hidden_size, self.vocab_size, self.layers = 32, 64, 2
        self.experts, self.reached, self.calls_empty, self.heads = (
            experts,
            reached,
            calls_empty,
            heads,
        )
        super().__init__(**kwargs)


class OddModel(PreTrainedModel):
    config_class = OddConfig
    _no_split_modules = ["OddBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = nn.ModuleList(OddBlock(config) for _ in range(config.layers))
        self.read_out = nn.Linear(config.hidden_size, config.vocab_size)
        self.spoil = False

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, use_cache=False):
        x = self.words(input_ids)
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for number, block in enumerate(self.decoder):
            geometry = Geometry(mask, 0.3)
            x, _ = block(x, geometry, temperature=0.5 + number, extras={"shift": 0.01 * number})
            if self.spoil:
                x = x * 1.5
        return self.read_out(x)


def odd_model(seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OddModel(OddConfig(**config))
    return model.eval()


def odd_windows(nsamples=4, seqlen=12, seed=0):
    return torch.randint(0, 64, (nsamples, seqlen), generator=torch.Generator().manual_seed(seed))
