"""Dimensions of a model, against the tensors of the model itself."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from qbench.cli import app
from qbench.models.checkpoints import find_checkpoint
from qbench.models.dimensions import checkpoint_dimensions, dimensions
from qbench.record import QuantizationRecord
from qbench.study.store import Store
from qbench.testing import ARCHITECTURES, tiny_checkpoint, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_of_a_real_run_has_the_heads_that_the_dimensions_say(architecture):
    model = tiny_model(architecture)
    found = dimensions(model)
    with torch.no_grad():
        cache = model(torch.full((1, 7), 5), use_cache=True).past_key_values
    keys = cache.layers[0].keys
    assert keys.shape == (1, found.n_kv_heads, 7, found.head_dim)
    assert found.n_blocks == len(cache.layers) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_with_two_axes_is_a_matrix_of_a_block_or_embedding_or_head(architecture):
    model = tiny_model(architecture)
    found = dimensions(model)
    wide = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "wpe" not in n)
    positions = sum(p.numel() for n, p in model.named_parameters() if "embed_positions" in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("gate.weight"))
    named = found.matrix_weights + found.embedding_parameters + found.head_parameters
    assert named == wide - positions - routers
    assert found.embedding_parameters == found.vocabulary * 64


def test_a_token_meets_two_of_four_experts_but_all_of_attention():
    found = {(m.out_features, m.in_features): m for m in dimensions(tiny_model("mixtral")).matrices}
    assert found[64, 96].count == 8 and found[64, 96].active == 4  # down, 2 blocks x 4 experts
    assert found[64, 64].count == found[64, 64].active == 4  # queries and outputs


def test_a_falcon_with_multi_query_has_one_head_of_keys():
    model = tiny_model("falcon", multi_query=True, new_decoder_architecture=False)
    assert dimensions(model).n_kv_heads == 1


def test_an_untied_head_is_counted_apart_and_a_tied_one_is_not():
    untied = dimensions(tiny_model("llama", tie_word_embeddings=False))
    tied = dimensions(tiny_model("llama", tie_word_embeddings=True))
    assert (untied.head_parameters, untied.tied_embeddings) == (512 * 64, False)
    assert (tied.head_parameters, tied.tied_embeddings) == (0, True)


def test_a_checkpoint_says_the_same_from_its_configuration_alone(tmp_path, no_model):
    folder = tiny_checkpoint(tmp_path / "tiny")
    size = (folder / "model.safetensors").stat().st_size
    found = checkpoint_dimensions(find_checkpoint(str(folder)))
    assert found == dimensions(tiny_model(), stored_bytes=size)


def test_records_from_before_dimensions_still_read():
    old = {
        "key": {"weights": "w", "baseline": {"name": "none"}, "scheme": "W16A16"},
        "checkpoint": "old",
    }
    assert QuantizationRecord.model_validate(old).dimensions is None
    kept = dimensions(tiny_model())
    record = QuantizationRecord.model_validate(old | {"dimensions": kept.model_dump()})
    again = QuantizationRecord.model_validate_json(record.model_dump_json())
    assert again.dimensions == kept


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_run_keeps_the_dimensions_of_its_model(tiny, text, tmp_path, stream):
    arguments = ["run", str(tiny), "--baseline", "rtn", "--scheme", "W4A16", "--tasks", str(text)]
    arguments += ["--max-length", "64", "--results", str(tmp_path / "runs"), stream]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (run,) = Store(tmp_path / "runs").runs()
    found = run.quantization.dimensions
    assert found == checkpoint_dimensions(find_checkpoint(str(tiny)))
    quantized = sum(layer.shape[0] * layer.shape[1] for layer in run.quantization.layers)
    assert found.matrix_weights == quantized
