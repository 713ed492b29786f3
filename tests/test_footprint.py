"""Bits per weight and memory: against bytes on disk, grids, and a cache that was filled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from qbench.comparison.footprint import (
    activation_bytes,
    code_bits,
    footprint_at,
    footprint_of,
    kv_cache_bytes,
    max_batch,
    memory_of,
    size_text,
)
from qbench.comparison.shapes import shape
from qbench.errors import QBenchError
from qbench.grid import GRIDS
from qbench.models.dimensions import dimensions
from qbench.record import BaselineSpec, LayerReport, QuantizationKey, QuantizationRecord
from qbench.scheme import WEIGHT_BITS, Scheme
from qbench.testing import tiny_model


def record(
    parameters: int | None,
    layers: list[tuple[tuple[int, int], float]],
    scheme: str = "W4A16",
    **changes: Any,
) -> QuantizationRecord:
    reports = [
        LayerReport(name=str(i), shape=s, scheme="W4A16", relative_error=0.0, stored_bits=bits)
        for i, (s, bits) in enumerate(layers)
    ]
    key = QuantizationKey(weights="w", baseline=BaselineSpec(name="x"), scheme=scheme)
    return QuantizationRecord(
        key=key, checkpoint="c", parameters=parameters, layers=reports, **changes
    )


def test_bits_over_the_matrices_and_over_the_whole_model_are_two_numbers():
    # 64 weights at 5 bits, 32 at 3, and 104 other parameters at 16
    found = footprint_of(record(200, [((8, 8), 320.0), ((4, 8), 96.0)]))
    assert found.bits_per_quantized_weight == pytest.approx(416 / 96)
    assert found.bits_per_weight == pytest.approx((416 + 16 * 104) / 200)
    assert found.bytes == pytest.approx((416 + 1664) / 8)


def test_an_untouched_model_has_sixteen_bits_of_both_kinds():
    found = footprint_of(record(200, [], "W16A16"))
    assert (found.bits_per_quantized_weight, found.bits_per_weight, found.bytes) == (16, 16, 400)


def test_a_failed_run_and_one_of_unknown_size_have_no_footprint():
    assert footprint_of(record(None, [])) is None
    assert footprint_of(record(200, [], status="failed", error="x")) is None
    assert footprint_of(record(200, [])) is None  # at four bits, and no layer says how


@pytest.mark.parametrize("name", GRIDS)
def test_codes_take_what_their_grid_says_at_every_width(name):
    grid = GRIDS[name]
    for bits in WEIGHT_BITS:
        if bits < 16 and grid.offers(bits):
            scheme = Scheme(wbits=bits, grid=name)
            assert code_bits(scheme) == pytest.approx(grid.bits_per_code(bits)), (name, bits)


def test_a_packed_bitnet_has_the_bytes_of_its_file(tmp_path):
    """What save_packed writes, tensor by tensor, against the formula: codes in two bits."""
    from qbench.models.bitnet.architecture import new_model
    from qbench.models.bitnet.saving import save_packed
    from qbench.models.files import header
    from qbench.testing import tiny_tokenizer

    model = new_model(
        "b158", seed=0, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=512, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    save_packed(model, tiny_tokenizer(), tmp_path / "packed", torch.float16)
    path = tmp_path / "packed" / "model.safetensors"
    spans = [entry["data_offsets"] for entry in header(path).values()]
    real = sum(end - start for start, end in spans)
    parameters = sum(p.numel() for p in model.parameters())
    scheme = Scheme.parse("W1.58A8:w=tensor,grid=ternary")
    found = footprint_at(dimensions(model), scheme, parameters, packed=True)
    assert found.bytes == real
    header_bytes = path.stat().st_size - real
    assert header_bytes == 8 + int.from_bytes(path.read_bytes()[:8], "little") < 8000
    assert json.loads(path.read_bytes()[8:header_bytes])


def test_the_ideal_density_of_ternary_codes_is_below_what_is_packed():
    dims, scheme = shape("b158-3B"), Scheme.parse("W1.58A8:w=tensor,grid=ternary")
    ideal, packed = footprint_at(dims, scheme), footprint_at(dims, scheme, packed=True)
    assert ideal.bits_per_quantized_weight == pytest.approx(math.log2(3), abs=1e-4)
    assert packed.bits_per_quantized_weight == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("W4A16g32:grid=asym", 4 + (16 + 4) / 32),
        ("W4A16g32:grid=gptq_sym", 4 + 16 / 32),
        ("W8A8:w=tensor,grid=restricted", 8 + 16 / (64 * 64)),
        ("W3A16:w=channel,grid=asym", 3 + 19 / 64),
        ("W16A16", 16),
    ],
)
def test_a_scheme_has_the_bits_that_a_run_at_it_records(scheme, bits):
    from qbench import quantize_model

    model = tiny_model(intermediate_size=64, num_key_value_heads=4)
    dims = dimensions(model)
    parameters = sum(p.numel() for p in model.parameters())
    found = footprint_at(dims, Scheme.parse(scheme), parameters)
    assert found.bits_per_quantized_weight == pytest.approx(bits)
    report = quantize_model(model, "rtn", scheme)
    kept = record(parameters, [], scheme).model_copy(update={"layers": report.layers})
    measured = footprint_of(kept)
    assert found.bytes == pytest.approx(measured.bytes)


def test_the_cache_has_the_bytes_of_a_cache_that_was_filled():
    model = tiny_model("llama", num_key_value_heads=2).half()
    with torch.no_grad():
        cache = model(torch.full((3, 11), 5), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(dimensions(model), tokens=11, batch=3) == real


def test_a_quantized_cache_has_a_scale_for_each_token_and_head():
    dims = dimensions(tiny_model("llama", num_key_value_heads=2))  # two blocks, heads of 16
    assert kv_cache_bytes(dims, tokens=10, kvbits=4) == 2 * 2 * 2 * 10 * (16 * 4 / 8 + 2)


def test_llama_70b_with_all_heads_needs_1_34_gb_of_cache_for_512_tokens():
    wide = shape("bitnet-70B")  # 80 blocks of 64 heads
    assert kv_cache_bytes(wide, 512) == 2 * 80 * 8192 * 512 * 2 == 1_342_177_280
    grouped = shape("b158-70B")  # 8 heads of keys and values
    assert kv_cache_bytes(grouped, 512) == kv_cache_bytes(wide, 512) / 8


def test_the_batch_of_table_3_that_fits_next_to_llama_70b():
    """16 sequences of 512 tokens are printed for two GPUs of 80 GB (b1.58, Table 3)."""
    dims = shape("b158-70B").model_copy(update={"n_kv_heads": 64})
    fp16 = footprint_at(dims, Scheme())
    assert max_batch(dims, fp16, 160e9, 512) == 16
    low = footprint_at(dims, Scheme.parse("W1.58A8"), packed=True)
    # printed: 176, which lies between a cache of 16 and one of 8 bits
    assert max_batch(dims, low, 160e9, 512) < 176 < max_batch(dims, low, 160e9, 512, kvbits=8)
    assert max_batch(dims, fp16, 100e9, 512) == 0


def test_memory_is_weights_cache_and_on_request_activations():
    dims = shape("b158-700M")
    footprint = footprint_at(dims, Scheme())
    plain = memory_of(dims, footprint, 2048)
    assert plain.total == footprint.bytes + kv_cache_bytes(dims, 2048)
    with_activations = memory_of(dims, footprint, 2048, activations=True)
    assert with_activations.total - plain.total == 2 * 2048 * (2 * 1536 + 2 * 4096)
    assert activation_bytes(dims, 10, 3) == 3 * activation_bytes(dims, 10)


def test_overrides_need_names_that_a_shape_does_not_have():
    with pytest.raises(QBenchError, match="overrides"):
        footprint_at(shape("b158-3B"), Scheme.parse("W4A16;*.down_proj=W8A16"))


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (1234, "1.23 kB"), (3_946_152, "3.95 MB"), (13_476e6, "13.5 GB"),
     (137.9e9, "138 GB"), (999_600_000, "1.00 GB"), (99_960_000, "100 MB")],
)  # fmt: skip
def test_sizes_read_like_sizes(size, text):
    assert size_text(size) == text
