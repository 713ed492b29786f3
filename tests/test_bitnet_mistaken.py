"""BitNet checkpoints that would run, and compute something else than what was trained."""

from __future__ import annotations

import pytest
import torch
from bitnet_fixtures import (
    ONLINE,
    config_of,
    is_projection,
    microsoft,
    one_bit_llm,
    random_bitnet,
    state_of,
    ternary,
    write,
)
from cli_fixtures import edit_config, edit_weights

from qbench.errors import QBenchError
from qbench.models.bitnet.layers import bitlinears
from qbench.models.checkpoints import find_checkpoint

Q = "model.layers.0.self_attn.q_proj"


def loaded(folder, dtype="float32", **how):
    return find_checkpoint(str(folder), **how).load_model(dtype)


def refused(folder, **how) -> str:
    with pytest.raises(QBenchError) as caught:
        loaded(folder, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- weights that are ternary already -------------------------------------------------------------
def rounded(state, bare: bool):
    """The projections as codes times their scale, or as bare codes."""
    for name in [name for name in state if is_projection(name)]:
        codes, scale = ternary(state[name])
        state[name] = codes if bare else codes * scale
    return state


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bare", [False, True], ids=["codes x scale", "codes"])
@pytest.mark.parametrize("entry", [ONLINE, None], ids=["online", "no quantization_config"])
def test_weights_that_are_ternary_already_are_no_latent_weights(tmp_path, entry, bare, latent):
    """Half of the codes are zeros, so mean |W| is half of the scale."""
    model = random_bitnet()
    folder = write(tmp_path / "m", rounded(state_of(model), bare), config_of(model, entry))
    message = refused(folder, latent=latent)
    assert f"{Q}.weight is no latent weight but ternary already" in message
    assert "quantization_mode offline" in message and "weight_scale" in message


def test_ternary_weights_of_1bitllms_layout_are_refused_too(tmp_path):
    def change(tensors):
        codes, scale = ternary(tensors[f"{Q}.weight"])
        tensors[f"{Q}.weight"] = codes * scale

    assert "ternary already" in refused(edit_weights(one_bit_llm(tmp_path / "1bit"), change))


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_a_latent_matrix_of_zeros_but_for_two_values_is_one(tmp_path, value):
    """The refusal is of one magnitude alone: all zeros, or a second magnitude, are run."""
    model = random_bitnet()
    state = state_of(model)
    state[f"{Q}.weight"] = torch.zeros(64, 64)
    state[f"{Q}.weight"][0, :2] = torch.tensor([value, -2 * value])
    folder = write(tmp_path / "m", state, config_of(model, ONLINE))
    layer = dict(bitlinears(loaded(folder)))[Q]
    assert int(layer.weight.count_nonzero()) == (2 if value else 0)


def test_a_model_without_heads_is_one_line(tmp_path):
    folder = microsoft(tmp_path / "ms", packed=False)
    assert "cannot load ms: ZeroDivisionError" in refused(
        edit_config(folder, num_attention_heads=0)
    )
