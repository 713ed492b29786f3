"""What a dry run says: shapes without weights, costs from closed forms, checkpoints of any size."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fixtures import DATA, qbench, records
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.models import files
from qbench.models.checkpoints import find_checkpoint
from qbench.study import planning
from qbench.study.costs import ANONYMOUS, PROCESS, Work, estimate, seconds
from qbench.study.planning import duration, gib, scaled
from qbench.study.shapes import BlockShape, InputShape, ModelShape, model_shape
from qbench.study.speed import Speed, measure
from qbench.testing import tiny_checkpoint, tiny_model
from qbench.testing.models import tiny_tokenizer

SPEED = Speed(products=1e9, products32=1e8, rounding=1e6, read=1e7, hashed=1e9, threads=1)
BLOCK = BlockShape(3_000_000, (InputShape(1000, 2000), InputShape(500, 2000)))
SHAPE = ModelShape(parameters=40_000_000, blocks=(BLOCK,) * 10, hidden=1000, vocabulary=5000)
WORK = Work(dtype="bfloat16", stored_bytes=80_000_000, is_cast=False, quantizes=True)
CALIBRATED = replace(WORK, nsamples=16, seqlen=128, passes=2)
LLAMA = {  # Llama 2 and 3: hidden, feed-forward, blocks, heads, key-value heads, vocabulary
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}


def sparse_llama(folder: Path, size: str) -> Path:
    """A checkpoint whose headers promise a large Llama in bfloat16 and whose files hold nothing."""
    hidden, inner, blocks, heads, groups, vocabulary = LLAMA[size]
    narrow = hidden // heads * groups
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    outer = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    parts: list[dict[str, tuple[int, ...]]] = [{**outer, "model.norm": (hidden,)}]
    for number in range(blocks):
        inside = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        parts.append({f"model.layers.{number}.{name}": shape for name, shape in inside.items()})
    places = {}
    for number, tensors in enumerate(parts):
        name, header, end = f"model-{number}.safetensors", {}, 0
        for key, shape in tensors.items():
            size_ = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            places[f"{key}.weight"] = name
            header[f"{key}.weight"] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [end, end + size_],
            }  # fmt: skip
            end += size_
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever reads or hashes weights fails the test."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(files, "sha256", read)
    monkeypatch.setattr("safetensors.safe_open", read)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)


def plan_of(*arguments: object) -> list[str]:
    return qbench("run", *arguments, "--dry-run").stdout.splitlines()


# --- shapes --------------------------------------------------------------------------------------


def test_the_inputs_of_a_llama_are_those_its_matrices_read(tiny):
    shape = model_shape(find_checkpoint(str(tiny)))
    # hidden 64, 4 heads of 16 with 2 key-value heads, feed-forward 96
    inputs = (
        InputShape(64, 64 + 32 + 32), InputShape(64, 64), InputShape(64, 96 + 96),
        InputShape(96, 64),
    )  # fmt: skip
    matrices = 64 * (64 + 32 + 32 + 64 + 96 + 96) + 96 * 64
    assert shape.blocks == (BlockShape(matrices + 2 * 64, inputs, matrices + 2 * 64),) * 2
    assert (shape.hidden, shape.vocabulary, shape.outside) == (64, 512, 2 * 512 * 64 + 64)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "phi", "mixtral"])
def test_shapes_are_those_of_the_loaded_model(tmp_path, architecture):
    folder = tiny_checkpoint(tmp_path / "model", architecture)
    shape = model_shape(find_checkpoint(str(folder)))
    assert shape.parameters == sum(p.numel() for p in tiny_model(architecture).parameters())
    inputs = shape.blocks[0].inputs
    weights = sum(i.n_inputs * i.n_outputs * i.n_alike for i in inputs)
    assert 0.95 * shape.largest_block < weights <= shape.largest_block
    # queries, keys and values read one tensor everywhere; with Phi the feed-forward reads it too
    assert len(inputs) == {"phi": 3}.get(architecture, 4)


def test_a_token_meets_only_the_experts_it_is_sent_to(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "mixtral")
    block = model_shape(find_checkpoint(str(folder))).blocks[0]
    assert block.inputs[-2:] == (InputShape(64, 192, 4), InputShape(96, 64, 4))
    assert block.parameters - block.active == 2 * (64 * 192 + 96 * 64)  # two of four experts


# --- costs ---------------------------------------------------------------------------------------


def test_memory_holds_the_model_and_its_copy_and_a_stream_holds_one_block():
    plain, kept = (
        estimate(SHAPE, WORK, SPEED),
        estimate(SHAPE, replace(WORK, quantizes=False), SPEED),
    )
    rounding = 6 * 4 * 1000 * 2000
    assert plain.memory == PROCESS + 2 * 80_000_000 + rounding
    assert plain.streamed_memory == ANONYMOUS + 6_000_000 + rounding
    assert kept.memory == PROCESS + 80_000_000
    assert (plain.disk, plain.work_files, kept.work_files) == (80_000_000, 60_000_000, 0)


def test_what_lies_outside_the_blocks_is_a_copy_only_where_it_is_cast():
    cast = estimate(SHAPE, replace(WORK, is_cast=True), SPEED)
    mapped = estimate(SHAPE, WORK, SPEED)
    assert cast.streamed_memory - mapped.streamed_memory == 2 * 10_000_000
    assert cast.memory == mapped.memory


def test_hessians_of_one_block_are_held_and_in_memory_those_of_the_first_too():
    without = estimate(SHAPE, CALIBRATED, SPEED)
    hessians = estimate(SHAPE, replace(CALIBRATED, hessians=True), SPEED)
    held, factors = 4 * (1000**2 + 500**2), 2 * 4 * 1000**2
    assert hessians.streamed_memory - without.streamed_memory == held + factors
    assert hessians.memory - without.memory == 2 * held + factors


def test_activations_are_held_three_times_and_large_ones_of_a_stream_lie_in_files():
    small, large = (
        estimate(SHAPE, replace(CALIBRATED, nsamples=n, seqlen=100), SPEED) for n in (1, 3)
    )
    one = 100 * 1000 * 2  # 0.6 MB a batch of three, below the MiB from which on it is a file
    assert large.memory - small.memory >= 3 * 2 * one
    assert large.streamed_memory - small.streamed_memory >= 3 * 2 * one
    one = 8192 * 1000 * 2
    wide = replace(CALIBRATED, dtype="float32", seqlen=8192)
    small, large = (estimate(SHAPE, replace(wide, nsamples=n), SPEED) for n in (1, 3))
    assert large.streamed_memory == small.streamed_memory
    assert large.work_files - small.work_files == 3 * 2 * 2 * one


def test_a_streamed_model_of_more_blocks_takes_disk_and_no_memory():
    more = replace(SHAPE, blocks=(BLOCK,) * 20, parameters=70_000_000)
    work = replace(CALIBRATED, hessians=True, evaluated=10_000)
    one, other = estimate(SHAPE, work, SPEED), estimate(more, work, SPEED)
    assert other.streamed_memory == one.streamed_memory
    assert other.work_files - one.work_files == 60_000_000
    assert other.memory - one.memory == 2 * 60_000_000


def test_time_is_passes_solving_rounding_evaluation_and_reading():
    work = replace(CALIBRATED, hessians=True, evaluated=100)
    tokens = 16 * 128
    forwards = 2 * 30e6 * tokens * 2 + 2 * (30e6 + 5000 * 1000) * 100
    solving = sum(2 * tokens * n**2 + n**3 + m * n**2 for n, m in ((1000, 2000), (500, 2000)))
    expected = forwards / 1e9 + 10 * solving / 1e8 + 30e6 / 1e6 + 80e6 / 1e7
    assert seconds(SHAPE, work, SPEED) == pytest.approx(expected)
    untouched = replace(WORK, quantizes=False, evaluated=100)
    assert seconds(SHAPE, untouched, SPEED) == pytest.approx(2 * 35e6 * 100 / 1e9 + 8)


def test_speed_is_measured_on_the_files_at_hand(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(100))
    speed = measure(64, "float32", "cpu", [tmp_path / "weights"])
    assert 0 < speed.read < float("inf") and min(speed.products, speed.products32) > 1e6
    assert measure(64, "float32", "cpu", []).read == float("inf")


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "head", "least", "streamed"),
    [
        # in memory twice the weights and more; streamed a block, its hessians, its roundings
        ("7b", "7b: 6.74 B parameters, 13.5 GB on disk", 2 * 12.6, 8),
        ("70b", "70b: 70.6 B parameters, 141 GB on disk", 2 * 131.4, 24),
    ],
)
def test_a_plan_of_a_large_checkpoint_reads_no_weight_and_says_what_it_needs(
    tmp_path, no_weights, monkeypatch, size, head, least, streamed
):
    monkeypatch.setattr(planning, "free_memory", lambda device: 30 * 2**30)
    folder = sparse_llama(tmp_path / size, size)
    options = ["--baseline", "gptq", "--scheme", "W4A16g128", "--dtype", "bfloat16"]
    lines = plan_of(folder, *options, "--results", tmp_path / "runs")
    assert lines[0] == head
    memory, stream = lines[1].split("; ")[:2]
    assert least < float(memory.split()[2]) < 1.2 * least + 12 and memory.endswith(" GiB")
    assert 2 < float(stream.split()[3]) < streamed and stream.split()[4] == "GiB"
    assert "30 GiB are free here, so it needs --stream" in lines[1]
    assert lines[2].startswith("  no fingerprint was taken, so what is stored was not looked up")
    assert lines[3].startswith(f"  not looked up: {size} has no tokenizer that can be read")
    assert lines[4].startswith("  to run          gptq W4A16g128:grid=asym: wikitext2 · ")
    assert not (tmp_path / "runs").exists()


def test_a_plan_says_when_no_way_fits(tiny, text, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**20)
    lines = plan_of(tiny, "--tasks", f"{text}@gptq-16", "--results", tmp_path / "runs")
    assert "1 MiB are free here, so neither fits" in lines[1]


def test_a_dry_run_finds_what_a_run_has_stored(tiny, tmp_path, request, monkeypatch):
    command = [tiny, "--baseline", "rtn", "--scheme", "W4A16", "--data", DATA, "--limit", 2]
    command += ["--tasks", "tinystories,piqa", "--results", tmp_path / "runs"]
    before = plan_of(*command)
    assert not (tmp_path / "runs").exists()
    assert before[-2].startswith(
        "  to run          rtn W4A16:w=channel,grid=asym: tinystories, piqa"
    )
    qbench("run", *command)
    stored = records(tmp_path / "runs")
    request.getfixturevalue("no_model")
    after = plan_of(*command)
    assert after[-2:] == [
        "  stored          rtn W4A16:w=channel,grid=asym",
        "1 cells: 1 stored; 0 measurements to make",
    ]
    assert records(tmp_path / "runs") == stored
    monkeypatch.setattr(planning, "HASHED", 0)  # as if hashing took long
    unknown = plan_of(*command)
    assert any("no fingerprint was taken" in line for line in unknown)
    assert unknown[-2].split(" · ")[0] == before[-2].split(" · ")[0]


def test_a_plan_of_data_that_are_not_here_names_them_and_goes_on(tiny, tmp_path):
    lines = plan_of(tiny, "--data", tmp_path, "--tasks", "piqa", "--results", tmp_path / "runs")
    assert "memory about" in lines[1]
    assert sum(line.startswith("  not looked up: ") for line in lines) == 1
    assert lines[-2].startswith("  to run          none W16A16: piqa · ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gib(1023), "1023 B"), (gib(497.25 * 1024), "497 KiB"), (gib(9.84 * 2**30), "9.84 GiB"),
        (gib(290.3 * 2**30), "290 GiB"), (gib(1.5 * 2**40), "1.5 TiB"),
        (scaled(127_296, "B", "M"), "0.127 M"), (scaled(70.55e9, "B", "M"), "70.5 B"),
        (duration(0.2), "1 s"), (duration(119), "119 s"), (duration(720), "12 min"),
        (duration(31 * 3600), "31 h"), (duration(5 * 86400), "5 days"),
    ],
)  # fmt: skip
def test_figures_read_as_people_write_them(text, expected):
    assert text == expected


# --- against what is measured --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(("dtype", "stream"), [("float32", False), ("bfloat16", True)])
def test_memory_and_disk_are_within_half_of_what_a_run_takes(tmp_path, dtype, stream):
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        vocab_size=16000, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")  # 29 M parameters
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["run", tmp_path / "model", "--baseline", "gptq", "--scheme", "W4A16g32"]
    command += ["--calibration", "world", "--nsamples", 8, "--seqlen", 256, "--limit", 8]
    command += ["--data", "bundled:world", "--tasks", "world@gptq-256", "--dtype", dtype]
    command += ["--results", tmp_path / "runs", *(["--stream"] if stream else [])]
    if not stream:
        command += ["--save", tmp_path / "saved"]
    line = plan_of(*command[1:])[1]
    peak = {"VmRSS": 0, "RssAnon": 0}
    child = subprocess.Popen(
        [sys.executable, "-m", "qbench.cli", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        with suppress(OSError):  # it has ended in between
            text = status.read_text()
            for key in (key for key in peak if f"{key}:" in text):
                peak[key] = max(peak[key], int(text.split(f"{key}:")[1].split()[0]) * 1024)
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.005)
    assert child.returncode == 0
    said = _bytes(line.split("with --stream about ")[1] if stream else line)
    measured = peak["RssAnon" if stream else "VmRSS"]
    assert measured / 1.5 < said < 1.5 * measured
    if not stream:
        saved = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
        disk = _bytes(line.split("--save writes about ")[1])
        assert saved / 1.05 < disk < 1.05 * saved


def _bytes(text: str) -> float:
    """The first size in a text."""
    words = text.split()
    place = next(i for i, word in enumerate(words) if word.rstrip(";") in ("KiB", "MiB", "GiB"))
    unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[words[place].rstrip(";")]
    return float(words[place - 1]) * unit
