"""A model whose blocks stay on disk: the numbers of the model in memory, to the last bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cli_fixtures import DATA, edit_config, qbench, records
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qbench import Baseline, QBenchError, evaluate, quantize_model
from qbench.errors import RunFailed
from qbench.models import streamed, streaming
from qbench.models.blocks import find_blocks
from qbench.models.bypass import bypass_of
from qbench.models.checkpoints import find_checkpoint
from qbench.models.streamed import open_streamed, save_streamed
from qbench.models.streaming import resident, stream_of
from qbench.quantization.outcome import quantization_of
from qbench.registry import load_baseline
from qbench.study import supply
from qbench.testing import ARCHITECTURES, tiny_checkpoint, tiny_tokenizer, tiny_windows

WINDOWS = tiny_windows(6, 24)
CELLS = [
    ("rtn", "W4A16"),
    ("absmax", "W8A8:a=tensor"),
    ("smoothquant", "W8A8:static"),
    ("gptq", "W3A8g32"),
    ("quip", "W4A16"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("streaming") / "tiny")


def opened(folder, work=None, dtype="float32"):
    return open_streamed(find_checkpoint(str(folder)), dtype, work=work)


def in_memory(folder, dtype="float32"):
    return find_checkpoint(str(folder)).load_model(dtype)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_windows(3, 20, seed=9)).logits


def without_times(result):
    return [layer.model_copy(update={"seconds": None}) for layer in result.layers]


# --- the model as it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"mixtral"}))
def test_a_streamed_model_computes_what_the_model_in_memory_computes(architecture, tmp_path):
    tiny_checkpoint(tmp_path / "tiny", architecture)
    model = opened(tmp_path / "tiny")
    assert torch.equal(logits(model), logits(in_memory(tmp_path / "tiny")))
    assert not bypass_of(model, lambda name: resident(model, name)).refused


def test_tensors_that_transformers_merges_while_loading_are_refused(tmp_path):
    """Mixtral stores one tensor per expert and runs on one tensor for all."""
    tiny_checkpoint(tmp_path / "tiny", "mixtral")
    with pytest.raises(QBenchError, match="cannot be streamed.*makes it of several.*--no-stream"):
        opened(tmp_path / "tiny")


def test_only_one_block_has_weights_and_only_while_it_is_wanted(folder):
    model = opened(folder)
    blocks = dict(find_blocks(model))

    def present():
        return [n for n, b in blocks.items() if next(b.parameters()).device.type != "meta"]

    assert present() == []
    with resident(model, "model.layers.1"):
        assert present() == ["model.layers.1"]
    assert present() == []
    logits(model)  # every block brings itself in
    assert present() == []


def test_weights_in_another_dtype_are_cast(folder):
    model, whole = opened(folder, dtype="bfloat16"), in_memory(folder, "bfloat16")
    assert torch.equal(logits(model), logits(whole))
    assert logits(model).dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_refused_when_their_block_comes(tmp_path):
    tiny_checkpoint(tmp_path / "tiny")
    path = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(QBenchError, match="model.layers.1.mlp.up_proj.weight contains NaN"):
        logits(opened(tmp_path / "tiny"))


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """A checkpoint whose configuration says that its attention is not causal."""
    tiny_checkpoint(tmp_path / "tiny", "gemma")
    edit_config(tmp_path / "tiny", use_bidirectional_attention=True)
    with pytest.raises(QBenchError, match="its attention looks ahead"):
        in_memory(tmp_path / "tiny")
    with pytest.raises(QBenchError, match="its attention looks ahead"):
        opened(tmp_path / "tiny")


def test_a_bitnet_checkpoint_is_not_streamed():
    with pytest.raises(QBenchError, match="b158-0.5m is a BitNet checkpoint.*--no-stream"):
        opened("bundled:b158-0.5m")


# --- quantization ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("baseline", "scheme"), CELLS, ids=lambda cell: str(cell))
def test_quantized_block_by_block_is_quantized_as_in_memory(folder, tmp_path, baseline, scheme):
    model, whole = opened(folder, tmp_path / "work"), in_memory(folder)
    found = quantize_model(model, baseline, scheme, WINDOWS)
    expected = quantize_model(whole, baseline, scheme, WINDOWS)
    assert without_times(found) == without_times(expected)
    assert found.notes == expected.notes
    assert torch.equal(logits(model), logits(whole))


class Interrupted(Exception):
    """A kill."""


def dying(name, at):
    """The baseline ``name``, which dies when it has rounded ``at`` stacks of matrices."""
    base = type(load_baseline(name).instance)
    rounded = []

    @dataclass(frozen=True)
    class Dying(base):
        def quantize_weight(self, weight, scheme, stats, generator):
            if len(rounded) == at:
                raise Interrupted
            rounded.append(weight)
            return super().quantize_weight(weight, scheme, stats, generator)

    return Dying(), rounded


@pytest.mark.parametrize(("baseline", "scheme"), CELLS[2:], ids=lambda cell: str(cell))
def test_what_was_killed_goes_on_at_its_block(folder, tmp_path, baseline, scheme):
    counting, rounded = dying(baseline, at=-1)
    expected = opened(folder, tmp_path / "whole")
    quantize_model(expected, counting, scheme, WINDOWS)
    per_block = len(rounded) // 2

    killed, _ = dying(baseline, at=per_block + 1)
    with pytest.raises(Interrupted):
        quantize_model(opened(folder, tmp_path / "work"), killed, scheme, WINDOWS)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["block-00000.safetensors"]

    resumed, rounded = dying(baseline, at=-1)
    model = opened(folder, tmp_path / "work")
    result = quantize_model(model, resumed, scheme, WINDOWS)
    assert len(rounded) == per_block
    assert without_times(result) == without_times(quantization_of(expected))
    assert torch.equal(logits(model), logits(expected))


def test_every_block_is_on_disk_before_the_next_one_begins(folder, tmp_path):
    seen = []

    def progress(done, total, name):
        seen.append((done, len(list((tmp_path / "work").glob("block-*")))))

    quantize_model(opened(folder, tmp_path / "work"), "gptq", "W4A16", WINDOWS, progress=progress)
    assert seen == [(0, 0), (1, 1), (2, 2)]


@dataclass(frozen=True)
class Turning(Baseline):
    """Rounds nothing and turns the sign of every input at run time."""

    rounded: ClassVar[list[int]] = []

    def quantize_weight(self, weight, scheme, stats, generator):
        from qbench import QuantizedWeight

        self.rounded.append(1)
        return QuantizedWeight(-weight, input_transform=torch.neg)


def test_a_block_with_an_input_transform_is_done_again(folder, tmp_path):
    """A function cannot be stored."""
    Turning.rounded.clear()
    for _ in range(2):
        model = opened(folder, tmp_path / "work")
        quantize_model(model, Turning(), "W8A16", WINDOWS)
        assert torch.equal(logits(model), logits(in_memory(folder)))
    assert len(Turning.rounded) == 2 * 14


@dataclass(frozen=True)
class Preparing(Baseline):
    def prepare(self, model, generator):
        pass

    def quantize_weight(self, weight, scheme, stats, generator):
        return weight


def test_a_method_that_rewrites_the_whole_model_first_is_refused(folder, tmp_path):
    with pytest.raises(QBenchError, match="Preparing rewrites the whole model.*--no-stream"):
        quantize_model(opened(folder, tmp_path / "work"), Preparing(), "W4A16", WINDOWS)


def test_large_activations_lie_in_a_file_without_a_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SPILLED", 1)
    model = opened(folder, tmp_path / "work")
    hidden = torch.randn(3, 20, 64)
    kept = stream_of(model).spill(hidden)
    assert torch.equal(kept, hidden)
    assert kept.data_ptr() != hidden.data_ptr()
    assert not list((tmp_path / "work").glob("activations*"))
    quantize_model(model, "gptq", "W4A16", WINDOWS)
    whole = in_memory(folder)
    quantize_model(whole, "gptq", "W4A16", WINDOWS)
    assert torch.equal(logits(model), logits(whole))


def test_a_saved_streamed_model_is_an_ordinary_checkpoint(folder, tmp_path):
    model, whole = opened(folder, tmp_path / "work"), in_memory(folder)
    for each in (model, whole):
        quantize_model(each, "gptq", "W4A16", WINDOWS)
    (tmp_path / "saved").mkdir()
    save_streamed(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(whole))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in whole.parameters())


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "batching"), [("W4A8", "padded"), ("W4A4:a=tensor", None)])
def test_every_score_is_that_of_the_model_in_memory_and_blocks_are_read_once(
    folder, tmp_path, monkeypatch, scheme, batching
):
    options = {"limit": 6, "data_dir": DATA, "batch_tokens": 64, "batching": batching}
    model, whole = opened(folder, tmp_path / "work"), in_memory(folder)
    for each in (model, whole):
        quantize_model(each, "gptq", scheme, WINDOWS)
    expected = evaluate(whole, tiny_tokenizer(), ["arc_easy", "wikitext2@gptq-32"], **options)
    assert {r.details["batching"] for r in expected.values()} == {batching or "unshared"}
    loads = []
    load = streaming.Stream._load
    monkeypatch.setattr(
        streaming.Stream, "_load", lambda self, name, *a: (loads.append(name), load(self, name, *a))
    )
    found = evaluate(model, tiny_tokenizer(), ["wikitext2@gptq-32"], **options)
    assert loads == ["model.layers.0", "model.layers.1"]  # for three batches
    found |= evaluate(model, tiny_tokenizer(), ["arc_easy"], **options)
    for name, result in expected.items():
        assert found[name].metrics == result.metrics
        for column, values in result.items.items():
            assert (found[name].items[column] == values).all()


def test_a_run_with_stream_stores_the_records_of_a_run_without(tiny, text, tmp_path):
    options = ["--baseline", "gptq", "--scheme", "W4A16", "--calibration", text, "--nsamples", 2]
    options += ["--seqlen", 16, "--tasks", f"{text}@gptq-16", "--limit", 2]
    qbench("run", tiny, *options, "--results", tmp_path / "memory")
    qbench("run", tiny, *options, "--results", tmp_path / "stream", "--stream")
    found = [
        {path: timeless(record) for path, record in records(tmp_path / name).items()}
        for name in ("memory", "stream")
    ]
    assert len(found[0]) == 2
    assert found[0] == found[1]
    assert not list((tmp_path / "stream").rglob("block*"))


def timeless(record):
    """A record without what no two runs share."""
    own = {k: v for k, v in record.items() if k not in ("wall_seconds", "peak_memory_bytes")}
    own.pop("created")
    own["layers"] = [{**layer, "seconds": None} for layer in record.get("layers", [])]
    return own


def test_what_does_not_fit_into_memory_twice_is_streamed_unless_forbidden(
    tiny, text, tmp_path, monkeypatch
):
    options = ["--scheme", "W4A16", "--baseline", "rtn", "--tasks", f"{text}@gptq-16"]
    opened = []
    real = streamed.open_streamed
    monkeypatch.setattr(streamed, "open_streamed", lambda *a: (opened.append(a), real(*a))[1])
    qbench("run", tiny, *options, "--results", tmp_path / "much")
    assert not opened
    monkeypatch.setattr(supply, "free_memory", lambda device: 1000)
    qbench("run", tiny, *options, "--results", tmp_path / "whole", "--no-stream")
    assert not opened
    result = qbench("run", tiny, *options, "--results", tmp_path / "little")
    assert len(opened) == 1
    assert "two copies of its weights do not fit into memory" in result.stderr


SWEEP = """
checkpoints: [{folder}]
baselines: [rtn]
schemes: [W4A16, W4A8, W3A16]
tasks: ["{text}@gptq-16"]
limit: 2
stream: true
results: {results}
"""


def test_a_streamed_sweep_shares_blocks_and_leaves_none_behind(tiny, text, tmp_path, monkeypatch):
    calls = []
    quantize = supply.quantize_model
    monkeypatch.setattr(
        supply, "quantize_model", lambda *a, **k: (calls.append(str(a[2])), quantize(*a, **k))[1]
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(folder=tiny, text=text, results=tmp_path / "runs"))
    qbench("sweep", file)
    assert [call.partition(":")[0] for call in calls] == ["W4A16", "W3A16"]
    assert not list((tmp_path / "runs").rglob("block*"))
    file.write_text(file.read_text().replace("stream: true", "stream: false"))
    found = records(tmp_path / "runs")
    file.write_text(file.read_text().replace(str(tmp_path / "runs"), str(tmp_path / "memory")))
    qbench("sweep", file)
    expected = records(tmp_path / "memory")
    assert {p: timeless(r) for p, r in found.items()} == {
        p: timeless(r) for p, r in expected.items()
    }


def test_blocks_of_a_cell_that_is_done_are_cleared_when_it_is_met_again(tiny, text, tmp_path):
    """As after a kill between the last record and the end."""
    options = ["--scheme", "W4A16", "--baseline", "rtn", "--tasks", f"{text}@gptq-16"]
    qbench("run", tiny, *options, "--results", tmp_path, "--stream")
    (record,) = tmp_path.rglob("quantization.json")
    (record.parent / "blocks").mkdir()
    (record.parent / "blocks" / "block-00000.safetensors").write_bytes(b"left")
    qbench("run", tiny, *options, "--results", tmp_path)
    assert not (record.parent / "blocks").exists()


def test_two_processes_do_not_share_a_work_folder(tmp_path):
    first = supply._lock(tmp_path / "blocks")
    assert first is not None
    assert supply._lock(tmp_path / "blocks") is None
    first.close()
    assert supply._lock(tmp_path / "blocks") is not None


def test_blocks_of_another_version_are_not_taken_over(folder, tmp_path, monkeypatch):
    quantize_model(opened(folder, tmp_path / "work"), "rtn", "W4A16")
    assert len(stream_of(opened(folder, tmp_path / "work")).reports) == 2
    monkeypatch.setattr(streaming, "__version__", "another")
    assert not stream_of(opened(folder, tmp_path / "work")).reports


def test_weights_that_the_config_ties_but_the_file_does_not_stay_apart(tmp_path):
    tiny_checkpoint(tmp_path / "tiny")
    edit_config(tmp_path / "tiny", tie_word_embeddings=True)
    assert torch.equal(logits(opened(tmp_path / "tiny")), logits(in_memory(tmp_path / "tiny")))


def test_parts_that_transformers_keeps_in_float32_are_not_cast(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", {"norm"})
    opened(folder, dtype="bfloat16")
    with pytest.raises(QBenchError, match="keeps norm in float32; use --dtype float32"):
        opened(folder, dtype="float16")


def test_how_a_checkpoint_generates_is_saved_with_it(tmp_path):
    tiny_checkpoint(tmp_path / "tiny")
    path = tmp_path / "tiny" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}))
    model = opened(tmp_path / "tiny")
    (tmp_path / "saved").mkdir()
    save_streamed(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 5] and saved["temperature"] == 0.6


def test_a_full_disk_is_an_error_and_not_a_crash(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming, "SPILLED", 1)
    monkeypatch.setattr(streaming.os, "posix_fallocate", full)
    model = opened(folder, tmp_path / "work")
    with pytest.raises(RunFailed, match="no room for activations.*No space left"):
        stream_of(model).spill(torch.zeros(4, 4))


def test_estimates_know_when_activations_lie_in_files():
    from qbench.study import costs

    assert costs.SPILLED == streaming.SPILLED
