"""Checkpoints in the GPTQ format: read to the last bit, run as stored, refused where wrong.

The packer is the tests' own: codes are laid out as one stream of bits per column, b bits a code,
cut into words of 32. It knows nothing of the reader, which goes by shifts.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_fixtures import edit_config, edit_weights, qbench, records, refused
from safetensors.torch import load_file
from study_fixtures import add, cells, quantization
from torch import Tensor

from qbench.comparison.panels import accuracy_panels
from qbench.errors import QBenchError
from qbench.models.checkpoints import find_checkpoint
from qbench.models.gptq_format import damage
from qbench.models.gptq_loading import dequantize, unpack, zero_points
from qbench.quantization.quantize import quantize_model
from qbench.study.store import Store
from qbench.tables.table import stored_entries, table
from qbench.testing import tiny_checkpoint, tiny_model

BITS = (2, 3, 4, 8)


# --- the packer -----------------------------------------------------------------------------------
def pack(codes: np.ndarray, bits: int) -> Tensor:
    """Codes (n, columns) as int32 words (n * bits / 32, columns), through a stream of bits."""
    stream = (codes[:, None, :].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)[:, None]) & 1
    words = stream.reshape(-1, 32, codes.shape[1]) << np.arange(32, dtype=np.uint64)[:, None]
    return torch.from_numpy(words.sum(1).astype(np.uint32).astype(np.int32))


def quantize(weight: Tensor, bits: int, group: int, sym: bool, groups: np.ndarray):
    """Codes (in, out), zeros and scales (groups, out) of a weight (out, in); scales are float16."""
    columns = weight.double().numpy().T
    n_groups = groups.max() + 1
    zeros = np.zeros((n_groups, columns.shape[1]), dtype=np.int64)
    scales = np.ones((n_groups, columns.shape[1]))
    for number in range(n_groups):
        part = columns[groups == number]
        if sym:
            scales[number] = 2 * abs(part).max(0) / (2**bits - 1)
            zeros[number] = 2 ** (bits - 1)
        else:
            low, high = part.min(0).clip(max=0), part.max(0).clip(min=0)
            scales[number] = (high - low) / (2**bits - 1)
            zeros[number] = np.round(-low / scales[number])
    scales = scales.astype(np.float16)
    spread = scales.astype(np.float64)[groups]
    codes = np.round(columns / spread + zeros[groups]).clip(0, 2**bits - 1).astype(np.int64)
    return codes, zeros, scales


def packed(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    version: str = "gptq",
    order: np.ndarray | None = None,
    words: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of one linear, and the weight they stand for, (out, in) float32.

    Args:
        weight: (out, in).
        bits: of a code.
        group: inputs that share a scale, -1 for all.
        sym: as in the configuration.
        version: "gptq" or "gptq_v2".
        order: act-order, a permutation of the inputs: groups are consecutive in it.
        words: whether the ones of v1 are subtracted from whole words, as GPTQModel does.
    """
    inputs = weight.shape[1]
    size = inputs if group < 0 else group
    place = np.arange(inputs) if order is None else np.argsort(order)
    groups = place // size
    codes, zeros, scales = quantize(weight, bits, size, sym, groups)
    spread = scales.astype(np.float64)[groups]
    value = torch.from_numpy((spread * (codes - zeros[groups])).T).float()
    if version == "gptq" and not words:
        zeros = (zeros - 1) % 2**bits
    qzeros = pack(zeros.T, bits).T.contiguous()
    if version == "gptq" and words:
        ones = sum(2**place for place in range(0, 32, bits))
        taken = (qzeros.numpy().astype(np.int64) - ones) % 2**32
        qzeros = torch.from_numpy(taken.astype(np.uint32).astype(np.int32))
    return {
        "qweight": pack(codes, bits),
        "qzeros": qzeros,
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }, value


def entry(bits=4, group=32, sym=True, version="gptq", act_order=False, **more) -> dict:
    """A quantization_config as AutoGPTQ writes it."""
    said = {"bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    return {**said, "quant_method": "gptq", "checkpoint_format": version, **more}


def write(
    folder: Path,
    architecture: str = "llama",
    kept: str = "lm_head",
    where: str = "config.json",
    made_by: str = "",
    act_order: bool = False,
    model: dict | None = None,
    **options,
) -> Path:
    """A tiny checkpoint, its linears packed, and what it means beside it (``-plain``)."""
    torch.manual_seed(0)
    tiny_checkpoint(folder, architecture, **(model or {}))
    tiny_checkpoint(folder.with_name(f"{folder.name}-plain"), architecture, **(model or {}))
    skeleton = tiny_model(architecture, **(model or {}))
    transposed = {n for n, m in skeleton.named_modules() if type(m).__name__ == "Conv1D"}
    linears = transposed | {n for n, m in skeleton.named_modules() if type(m).__name__ == "Linear"}
    linears = {name for name in linears if kept not in name}
    generator = np.random.default_rng(0)

    def change(tensors: dict[str, Tensor], plain: bool) -> None:
        for name in sorted(linears):
            weight = tensors.pop(f"{name}.weight")
            weight = weight.T if name in transposed else weight
            order = generator.permutation(weight.shape[1]) if act_order else None
            parts, value = packed(weight, order=order, **options)
            if plain:
                value = value.T if name in transposed else value
                tensors[f"{name}.weight"] = value.contiguous()
            else:
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}

    edit_weights(folder, lambda tensors: change(tensors, False))
    generator = np.random.default_rng(0)
    edit_weights(folder.with_name(f"{folder.name}-plain"), lambda tensors: change(tensors, True))
    named = {k: v for k, v in options.items() if k in ("bits", "group", "sym", "version")}
    said = entry(act_order=act_order, **named)
    said |= {"meta": {"quantizer": made_by, "damp_percent": 0.05}} if made_by else {}
    if where == "config.json":
        edit_config(folder, quantization_config=said)
    else:
        (folder / where).write_text(json.dumps(said))
    return folder


def plain_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-plain")


def logits(model) -> Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- bits -----------------------------------------------------------------------------------------
def test_four_bits_are_eight_codes_a_word_the_lowest_first():
    """0x76543210 by hand."""
    words = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)
    assert unpack(words, 4)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] + [15] * 8


def test_two_and_eight_bits_by_hand():
    assert unpack(torch.tensor([[0b11100100]], dtype=torch.int32), 2)[:4, 0].tolist() == [
        0,
        1,
        2,
        3,
    ]
    word = torch.tensor([[0x7F - (1 << 31)]], dtype=torch.int32)  # 0x8000007F
    assert unpack(word, 8)[:, 0].tolist() == [0x7F, 0, 0, 0x80]


def test_three_bits_go_on_in_the_next_word():
    """Code 10 has bits 30, 31 of the first word and bit 0 of the second; code 21 the other way."""
    codes = np.zeros((32, 1), dtype=np.int64)
    codes[10], codes[21] = 0b101, 0b110
    # 0b101: bits 30 (1) and 31 (0), then bit 0 (1) of the next word;
    # 0b110: bit 31 of the second word (0), then bits 0 and 1 of the third (1, 1)
    words = torch.tensor([[1 << 30], [1], [3]], dtype=torch.int32)
    assert torch.equal(pack(codes, 3), words)
    assert unpack(words, 3)[:, 0].tolist() == codes[:, 0].tolist()


@pytest.mark.parametrize("bits", BITS)
def test_every_code_comes_back(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 7))
    assert (unpack(pack(codes, bits), bits).numpy() == codes).all()


def form(bits, version, carries=False):
    return SimpleNamespace(bits=bits, version=version, carries=carries)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_both_versions_come_back_zero_and_the_largest_included(bits):
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (5, 64))
    zeros[0, :2], zeros[1, -1] = [0, 2**bits - 1], 0
    as_they_are = pack(zeros.T, bits).T
    assert (zero_points(as_they_are, form(bits, "gptq_v2")).numpy() == zeros).all()
    minus_one = pack((zeros.T - 1) % 2**bits, bits).T
    assert (zero_points(minus_one, form(bits, "gptq")).numpy() == zeros).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_gptqmodel_borrow_from_their_neighbours(bits):
    """Its v1 is the word of v2 minus one in every place, as one number of 32 bits."""
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (5, 64))
    zeros[:, ::3] = 0
    ones = sum(2**place for place in range(0, 32, bits))
    words = pack(zeros.T, bits).T.numpy().astype(np.int64) - ones
    words = torch.from_numpy((words % 2**32).astype(np.uint32).astype(np.int32))
    assert (zero_points(words, form(bits, "gptq", carries=True)).numpy() == zeros).all()
    assert (zero_points(words, form(bits, "gptq")).numpy() != zeros).any()


def test_weights_are_scale_times_code_minus_zero():
    codes = torch.tensor([[3, 0], [1, 2], [0, 3]], dtype=torch.uint8)  # 3 inputs, 2 outputs
    zeros = torch.tensor([[1, 2], [0, 3]], dtype=torch.int16)
    scales = torch.tensor([[0.5, 2.0], [1.0, 4.0]], dtype=torch.float16)
    groups = torch.tensor([1, 0, 1])
    expected = torch.tensor([[3.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])
    assert torch.equal(dequantize(codes, zeros, scales, groups), expected)


# --- whole models ---------------------------------------------------------------------------------
CASES = [
    *({"bits": bits, "sym": sym, "version": v} for bits in BITS for sym in (True, False)
      for v in ("gptq", "gptq_v2")),
    {"group": -1, "sym": False},
    {"group": 32, "act_order": True},
    {"bits": 3, "group": 32, "act_order": True, "sym": False},
    {"bits": 2, "sym": False, "words": True, "made_by": "gptqmodel:7.6.0"},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{v}" for v in c.values()))
def test_a_packed_llama_is_the_fake_quantized_one(case, tmp_path):
    folder = write(tmp_path / "packed", **case)
    found, expected = (find_checkpoint(str(p)).load_model() for p in (folder, plain_of(folder)))
    state = found.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(found), logits(expected))
    assert type(found) is type(expected)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "qwen2"])
def test_biases_and_transposed_weights_come_along(architecture, tmp_path):
    folder = write(tmp_path / "packed", architecture)
    found, expected = (find_checkpoint(str(p)).load_model() for p in (folder, plain_of(folder)))
    assert torch.equal(logits(found), logits(expected))
    assert torch.isfinite(logits(found)).all()


def test_experts_are_packed_one_by_one_and_merged_when_loaded(tmp_path):
    """As GPTQ checkpoints of Mixtral store them; the class has one tensor for all."""
    folder = tiny_checkpoint(tmp_path / "packed", "mixtral")
    plain = tiny_checkpoint(tmp_path / "plain", "mixtral")
    state = load_file(folder / "model.safetensors")
    experts = [name for name in state if ".experts." in name and state[name].ndim == 2]
    assert len(experts) == 2 * 4 * 3
    made = {name.removesuffix(".weight"): packed(state[name]) for name in experts}

    def pack_experts(tensors):
        for name, (parts, _) in made.items():
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}

    edit_weights(edit_config(folder, quantization_config=entry()), pack_experts)
    values = {f"{name}.weight": value.contiguous() for name, (_, value) in made.items()}
    edit_weights(plain, lambda tensors: tensors.update(values))
    found, expected = (find_checkpoint(str(p)).load_model() for p in (folder, plain))
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_worked_out_in_float32_and_then_cast(dtype, tmp_path):
    folder = write(tmp_path / "packed", sym=False)
    found, expected = (find_checkpoint(str(p)) for p in (folder, plain_of(folder)))
    state = expected.load_model().state_dict()
    for name, tensor in found.load_model(dtype).state_dict().items():
        assert torch.equal(tensor, state[name].to(getattr(torch, dtype)))


def test_a_tied_head_stays_tied(tmp_path):
    folder = write(tmp_path / "packed", model={"tie_word_embeddings": True})
    model = find_checkpoint(str(folder)).load_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = find_checkpoint(str(plain_of(folder)))
    assert find_checkpoint(str(folder)).parameters == plain.parameters


def test_a_quantized_head_and_linears_left_in_full_precision(tmp_path):
    headed = write(tmp_path / "headed", kept="nothing is called this")
    assert "lm_head" in find_checkpoint(str(headed)).gptq.linears
    kept = write(tmp_path / "kept", kept="o_proj")
    for folder in (headed, kept):
        found, expected = (find_checkpoint(str(p)).load_model() for p in (folder, plain_of(folder)))
        assert torch.equal(logits(found), logits(expected))
    checkpoint = find_checkpoint(str(kept))
    reports = {r.name: r for r in checkpoint.layer_reports(checkpoint.load_model())}
    report = reports["model.layers.0.self_attn.o_proj"]
    assert report.relative_error == 0.0 and report.stored_bits == 16 * 64 * 64


def test_biases_of_zeros_where_the_model_has_none_are_dropped(tmp_path):
    """Early AutoGPTQ wrote them; others would be lost, so they are refused."""
    folder = write(tmp_path / "packed")
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    model = find_checkpoint(str(folder)).load_model()
    assert torch.equal(logits(model), logits(find_checkpoint(str(plain_of(folder))).load_model()))
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(QBenchError, match="tensors its model class ignores"):
        find_checkpoint(str(folder)).load_model()


def test_the_configuration_may_be_quantize_config_json_and_the_file_have_autogptqs_name(tmp_path):
    folder = write(tmp_path / "packed", where="quantize_config.json")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    checkpoint = find_checkpoint(str(folder))
    expected = find_checkpoint(str(plain_of(folder))).load_model()
    assert torch.equal(logits(checkpoint.load_model()), logits(expected))
    before = checkpoint.fingerprint
    config = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config | {"desc_act": True}))
    assert find_checkpoint(str(folder)).fingerprint != before


def test_a_model_in_memory_knows_that_it_is_quantized(tmp_path):
    model = find_checkpoint(str(write(tmp_path / "packed"))).load_model()
    with pytest.raises(QBenchError, match="quantized already, gptq .stored. W4A16g32"):
        quantize_model(model, "rtn", "W4A16")


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ({"is_marlin_format": True}, "checkpoint_format marlin"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format gptq_p"),
        ({"bits": 5}, "with 5 bits"),
        ({"bits": 7}, "with 7 bits"),
        ({"bits": "4"}, "with '4' bits"),
        ({"pack_dtype": "int16"}, "pack_dtype int16"),
        ({"quant_method": "awq"}, "quant_method=awq"),
        ({"group_size": "32"}, "give -1 or a size"),
        ({"group_size": 64}, "qzeros is I32 [3, 8] where 4 bits and group_size 64 make I32 [2, 8]"),
        ({"bits": 8}, "qweight is I32 [12, 64] where 8 bits"),
        ({"bits": 8, "dynamic": {"+:.*": {"bits": 4}}}, "layers of different widths"),
    ],
)
def test_what_is_packed_otherwise_is_refused_in_a_line(changes, said, tmp_path):
    folder = edit_config(write(tmp_path / "packed"), quantization_config=entry() | changes)
    assert said in refused("run", folder, "--tasks", "piqa", "--results", tmp_path / "runs")


def change_layer(folder: Path, part: str, value) -> Path:
    """Change a tensor of one linear; ``value`` makes the new one of the old, None removes it."""
    name = f"model.layers.1.mlp.up_proj.{part}"

    def change(tensors):
        old = tensors.pop(name)
        if value is not None:
            tensors[name] = value(old).contiguous()

    return edit_weights(folder, change)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("scales", None, "up_proj has a qweight but no scales"),
        ("qweight", lambda t: t[:4], "qweight is I32 [4, 96] where 4 bits"),
        ("qzeros", lambda t: t.long(), "qzeros is I64"),
        ("scales", lambda t: t * float("nan"), "contains NaN"),
        ("g_idx", lambda t: t * 0, "does not put 32 inputs into each of 2 groups"),
        ("g_idx", lambda t: t + 1, "does not put 32 inputs into each of 2 groups"),
        ("qzeros", lambda t: t + 1, "has a zero point 9 where symmetric 4-bit codes have 8"),
    ],
)
def test_a_damaged_file_is_refused_with_the_tensors_name(part, value, said, tmp_path):
    folder = change_layer(write(tmp_path / "packed"), part, value)
    with pytest.raises(QBenchError) as caught:
        find_checkpoint(str(folder)).load_model()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_wrong_version_is_told_by_symmetric_zero_points(tmp_path):
    folder = write(tmp_path / "packed", version="gptq_v2")
    edit_config(folder, quantization_config=entry(version="gptq"))
    with pytest.raises(QBenchError, match="checkpoint_format should be gptq_v2"):
        find_checkpoint(str(folder)).load_model()


def test_without_g_idx_the_groups_are_consecutive_unless_act_order_says_otherwise(tmp_path):
    folder = change_layer(write(tmp_path / "packed"), "g_idx", None)
    model = find_checkpoint(str(folder)).load_model()
    assert torch.equal(logits(model), logits(find_checkpoint(str(plain_of(folder))).load_model()))
    edit_config(folder, quantization_config=entry(act_order=True))
    with pytest.raises(QBenchError, match="no g_idx"):
        find_checkpoint(str(folder))


def test_two_configurations_that_contradict_each_other_are_refused(tmp_path):
    folder = write(tmp_path / "packed")
    (folder / "quantize_config.json").write_text(json.dumps(entry(bits=8)))
    with pytest.raises(QBenchError, match="bits 4 and quantize_config.json says 8"):
        find_checkpoint(str(folder))


def test_zero_points_that_autogptq_lost_are_told_and_others_are_not(tmp_path):
    """It packs a zero point of 0 as -1: 32 ones, over those that follow in the word."""
    folder = write(tmp_path / "packed", sym=False)
    checkpoint = find_checkpoint(str(folder))
    assert damage(checkpoint.layer_reports(checkpoint.load_model())) == []
    folder = change_layer(folder, "qzeros", lambda t: t | -(1 << 8))  # the third of each word is 0
    checkpoint = find_checkpoint(str(folder))
    [said] = damage(checkpoint.layer_reports(checkpoint.load_model()))
    assert said.startswith("24 words of zero points in 1 matrices end in ones")  # 2 groups x 96/8
    edit_config(folder, quantization_config=entry(sym=False, version="gptq_v2"))
    checkpoint = find_checkpoint(str(folder))
    assert damage(checkpoint.layer_reports(checkpoint.load_model())) == []


# --- runs, sweeps, tables -------------------------------------------------------------------------
SCHEME = "W4A16g32:grid=asym"


@pytest.fixture
def stored(tmp_path, text):
    folder = write(tmp_path / "packed", sym=False, act_order=True, made_by="gptqmodel:7.6.0",
                   words=True)  # fmt: skip
    return SimpleNamespace(folder=folder, runs=tmp_path / "runs", task=f"{text}@gptq-16")


def run(stored, folder, *options, code=0):
    where = ("--tasks", stored.task, "--limit", 4, "--results", stored.runs)
    return qbench("run", folder, *where, *options, code=code)


def test_a_stored_checkpoint_has_the_perplexity_of_its_weights_and_a_row_of_its_own(stored):
    result = run(stored, stored.folder)
    expected = run(stored, plain_of(stored.folder)).stdout.splitlines()[-1].split()
    found = result.stdout.splitlines()
    assert found[-1].split()[2:5] == expected[2:5]  # perplexity, its value, ±
    assert f"packed · gptq (stored) {SCHEME}" in result.stderr
    assert "minus one, subtracted from whole words (gptq)" in result.stderr
    assert "14 matrices as stored" in found[0]
    [record] = [r for r in records(stored.runs).values() if r.get("quantized_elsewhere")]
    assert record["key"]["baseline"]["name"] == "gptq (stored)"
    assert record["key"]["baseline"]["parameters"] == {"act_order": True, "percdamp": 0.05}
    assert record["key"]["scheme"] == SCHEME and record["key"]["calibration"] is None
    assert not record["trained"] and {x["relative_error"] for x in record["layers"]} == {None}
    # 4-bit codes; per 32 inputs a 16-bit scale and a 4-bit zero point for every output; and a
    # 32-bit g_idx an input, shared by the 64, 32 or 96 outputs
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2
    bits = sum(o * i * (4 + 20 / 32) + 32 * i for o, i in shapes)
    assert record["effective_bits"] == pytest.approx(bits / sum(o * i for o, i in shapes))


def test_it_is_read_from_the_store_the_second_time_and_planned_without_being_loaded(stored):
    plan = run(stored, stored.folder, "--dry-run").stdout
    assert f"to run          gptq (stored) {SCHEME}" in plan and "is a GPTQ checkpoint" in plan
    run(stored, stored.folder)
    assert "(stored)" in run(stored, stored.folder).stdout
    assert "stored" in run(stored, stored.folder, "--dry-run").stdout


def test_quantizing_it_again_is_refused_with_the_way_out(stored):
    asked = ("--baseline", "rtn", "--scheme", "W4A16", "--results", stored.runs)
    assert refused("run", stored.folder, *asked).endswith(
        f"packed is quantized already, gptq (stored) {SCHEME}; quantize its full-precision original"
    )


def test_saved_it_is_an_ordinary_checkpoint(stored, tmp_path):
    run(stored, stored.folder, "--save", tmp_path / "saved")
    saved = find_checkpoint(str(tmp_path / "saved"))
    assert saved.own_scheme is None
    expected = find_checkpoint(str(plain_of(stored.folder))).load_model()
    assert torch.equal(logits(saved.load_model()), logits(expected))


def test_a_sweep_gives_it_one_row_beside_the_methods_run_here(stored, tiny, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"checkpoints: [{tiny}, {stored.folder}]\nbaselines: [none, rtn]\nschemes: [W4A16g32]\n"
        f"tasks: ['{stored.task}']\nlimit: 4\nresults: {stored.runs}\n"
    )
    printed = qbench("sweep", file).stderr
    assert printed.count("only as it is stored: packed is quantized already") == 1
    rows = cells(table(Store(stored.runs), "comparison"))
    shown = {(r["Checkpoint"], r["Method"]): r for r in rows}
    assert len(rows) == len(shown) == 3
    row = shown["packed", "gptq (stored)"]
    assert row["W/A"] == "W4A16g32" and row["Scheme"] == "grid=asym"


def test_it_stands_with_the_full_precision_model_of_its_size_in_tables_and_figures(tmp_path):
    store = Store(tmp_path / "runs")
    scores = {"wsc273": 0.7}
    for name, size in (("small", 2_000_000), ("large", 8_000_000)):
        add(store, quantization(name, parameters=size), scores)
        add(store, quantization(name, "rtn", "W4A16:w=channel,grid=asym", parameters=size), scores)
    record = quantization("small-GPTQ", "gptq (stored)", SCHEME, parameters=2_000_000,
                          quantized_elsewhere=True)  # fmt: skip
    add(store, record, {"wsc273": 0.72})
    panels = {p.title: p.points for p in accuracy_panels(stored_entries(store), "wbits")}
    assert set(panels) == {"small", "large"}
    [point] = [p for p in panels["small"] if p.series == "gptq (stored)"]
    assert point.role == "ptq" and point.name == "small-GPTQ"
    assert {p.series for p in panels["large"]} == {"full precision", "rtn"}
    kept = ["small", "small-GPTQ"]
    rows = cells(table(store, "bitnet-table3", checkpoints=kept))
    shown = [(row["Checkpoint"], row["WBits"], row["Methods"], row["PTQ"]) for row in rows[1:]]
    assert shown == [
        ("small", "16", "full precision", "✗"),
        ("small-GPTQ", "4", "gptq (stored)", "✓"),
        ("small", "4", "rtn", "✓"),
    ]
