"""Entries of a BitNet's config.json that are of another kind: one line each, no traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qbench.errors import QBenchError
from qbench.models.bitnet.formats import Stored, detect, once
from qbench.models.checkpoints import Checkpoint, find_checkpoint

TENSORS = {
    "model.layers.0.self_attn.q_proj.weight": Stored((4, 16), "U8"),
    "model.layers.0.self_attn.q_proj.weight_scale": Stored((1,), "F32"),
}


def refused(**config: Any) -> str:
    with pytest.raises(QBenchError) as caught:
        detect("ckpt", {"model_type": "bitnet", **config}, TENSORS)
    return str(caught.value)


def quantization(**entries: Any) -> dict[str, Any]:
    return {"quant_method": "bitnet", **entries}


@pytest.mark.parametrize("value", ["bitnet", ["bitnet"], 5])
def test_a_quantization_config_that_is_no_object_is_named(value):
    expected = f"ckpt has quantization_config {value!r} in its config.json; give an object"
    assert refused(quantization_config=value) == expected


@pytest.mark.parametrize("value", [5, "lm_head", {"lm_head": True}])
def test_linears_to_keep_that_are_no_list_are_named(value):
    """A bare string would be read letter by letter."""
    message = refused(quantization_config=quantization(modules_to_not_convert=value))
    assert message.endswith(
        f"modules_to_not_convert {value!r} in its config.json; give a list of names"
    )


@pytest.mark.parametrize("value", ["abc", [1e-5]])
def test_an_epsilon_that_is_no_number_is_named(value):
    entries = quantization(use_rms_norm=True, rms_norm_eps=value)
    assert f"rms_norm_eps {value!r} in its config.json; give a number" in refused(
        quantization_config=entries
    )


@pytest.mark.parametrize("value", [5, "x", ["binary"]])
def test_options_of_a_b1_that_are_no_object_are_named(value):
    message = refused(model_type="qbench_bitnet_b1", bitlinear=value)
    assert f"bitlinear {value!r} in its config.json; give an object" in message


@pytest.mark.parametrize("value", [5, "BitNetForCausalLM"])
def test_architectures_that_are_no_list_are_named(tmp_path, value):
    config = {"model_type": "bitnet", "architectures": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QBenchError, match=f"has architectures {value!r} in its config.json; give"):
        find_checkpoint(str(tmp_path))


# --- the activation function, under every class's own name ----------------------------------------
@pytest.mark.parametrize(
    ("config", "act"),
    [
        ({"model_type": "falcon", "activation": "gelu"}, "gelu"),
        ({"model_type": "opt", "activation_function": "relu"}, "relu"),
        ({"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"model_type": "llama", "hidden_act": "relu2"}, "relu2"),
        ({"model_type": "llama"}, "silu"),
        ({"model_type": "bitnet"}, "relu2"),
        ({"model_type": "falcon"}, "as the class has it"),
    ],
)
def test_the_activation_function_is_read_under_the_name_its_class_gives_it(config, act):
    found = detect("ckpt", config | {"quantization_config": quantization()}, TENSORS)
    assert found is not None and found.hidden_act == act


# --- a head stored beside the embeddings it is tied to --------------------------------------------
EMBEDDING = {"model.embed_tokens.weight": Stored((32, 16), "F32")}
HEAD = {"lm_head.weight": Stored((32, 16), "F32")}


@pytest.mark.parametrize(("tied", "matrices"), [(True, 1), (False, 2)])
def test_a_tied_head_that_is_stored_too_is_counted_once(tied, matrices):
    """q_proj has 16 x 16 codes."""
    config = {"quantization_config": quantization(), "tie_word_embeddings": tied}
    tensors = TENSORS | EMBEDDING | HEAD
    found = detect("ckpt", config, tensors)
    assert found is not None and found.parameters(tensors) == 256 + matrices * 32 * 16


@pytest.mark.parametrize(("tied", "matrices"), [(True, 1), (False, 2)])
def test_an_ordinary_tied_head_that_is_stored_too_is_counted_once(tmp_path, tied, matrices):
    checkpoint = Checkpoint("ckpt", tmp_path)
    known = {"tensors": EMBEDDING | HEAD, "config": {"tie_word_embeddings": tied}}
    checkpoint.__dict__.update(known | {"bitnet": None})
    assert checkpoint.parameters == matrices * 32 * 16


def test_a_tied_head_without_stored_embeddings_is_counted():
    assert once(HEAD, tied=True) == HEAD
