"""Biases of ternary linears: transformers' autobitlinear scales them together with the product."""

from __future__ import annotations

import pytest
import torch
from bitnet_fixtures import (
    OFFLINE,
    ONLINE,
    config_of,
    logits,
    packed_state,
    quantization_config,
    random_bitnet,
    relative,
    state_of,
    transformers_logits,
    write,
)

from qbench.models.bitnet.saving import save_packed
from qbench.models.checkpoints import find_checkpoint
from qbench.testing import tiny_tokenizer

TIE = 0.01
"""What activations on the other side of a tie may move, relative to the largest logit."""


def biased():
    """Biases of standard deviation one at q, k, v and o: left unscaled they would drown all."""
    model = random_bitnet(attention_bias=True)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def loaded(folder):
    return find_checkpoint(str(folder)).load_model()


@pytest.mark.parametrize("kind", ["offline", "online", "bitlinear"])
def test_biases_give_the_logits_of_transformers(tmp_path, kind):
    model, state = biased(), state_of(biased())
    entry = {"offline": OFFLINE, "online": ONLINE, "bitlinear": quantization_config()}[kind]
    if kind != "online":
        state = packed_state(state, divides=kind == "bitlinear")
    folder = write(tmp_path / kind, state, config_of(model, entry))
    assert relative(logits(loaded(folder)), transformers_logits(folder)) < TIE


def test_biases_that_are_saved_packed_come_back_here_and_in_transformers(tmp_path):
    folder = write(tmp_path / "on", state_of(biased()), config_of(biased(), ONLINE))
    model = loaded(folder)
    save_packed(model, tiny_tokenizer(), tmp_path / "packed")
    expected = logits(model)
    assert relative(logits(loaded(tmp_path / "packed")), expected) < TIE
    assert relative(transformers_logits(tmp_path / "packed"), expected) < TIE
