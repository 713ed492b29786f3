"""What a BitNet model leaves on disk: transformers' own forms, packed at two bits a weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import golden_vectors as golden
import pytest
import torch
from bitnet_fixtures import (
    HF_LLAMA,
    IDS,
    N_CODES,
    N_LINEARS,
    SHAPE,
    b1,
    config_of,
    hf_llama,
    is_projection,
    logits,
    microsoft,
    one_bit_llm,
    packed_state,
    quantization_config,
    random_bitnet,
    relative,
    state_of,
    transformers_logits,
    transformers_model,
    write,
)
from safetensors.torch import load_file, save_file

from qbench.errors import QBenchError, RunFailed
from qbench.models.bitnet.architecture import new_model
from qbench.models.bitnet.layers import (
    B158,
    BitLinearOptions,
    bitlinears,
    freeze_,
    replace_linears_,
)
from qbench.models.bitnet.loading import load
from qbench.models.bitnet.saving import pack, save_latent, save_packed, unpack
from qbench.models.checkpoints import find_checkpoint
from qbench.models.files import header
from qbench.testing import tiny_model, tiny_tokenizer

TINY = {name: value for name, value in SHAPE.items() if name != "pad_token_id"}


def trained(kind="b158", seed=1):
    """A model as the trainer has it: latent weights, BitLinear layers, uneven norms."""
    model = new_model(kind, seed=seed, initializer_range=0.3, **TINY).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def loaded(folder: Path, dtype="float32"):
    return find_checkpoint(str(folder)).load_model(dtype)


# --- packing --------------------------------------------------------------------------------------
@pytest.mark.parametrize("matrix", ["a", "c"])
def test_packing_gives_the_bytes_of_transformers(matrix):
    """tests/golden/bitnet: pack_weights of transformers 5.23 on b1.58 codes."""
    vectors = golden.tensors("bitnet")
    codes, packed = vectors[f"bitnet.{matrix}.b158.codes"], vectors[f"bitnet.{matrix}.packed"]
    assert torch.equal(pack(codes), packed)
    assert torch.equal(unpack(packed), codes)


def test_every_byte_of_ternary_codes_comes_back():
    """All 81 bytes of four codes."""
    codes = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 4).T
    packed = pack(codes)
    assert packed.unique().numel() == 81
    assert torch.equal(unpack(packed), codes.to(torch.int8))


def test_rows_that_are_no_multiple_of_four_are_not_packed():
    with pytest.raises(QBenchError, match="6 rows cannot be packed 4 a byte"):
        pack(torch.zeros(6, 3))


@pytest.mark.parametrize("value", [2, 0.5, float("nan")])
def test_other_values_than_ternary_codes_are_not_packed(value):
    with pytest.raises(QBenchError, match="codes to pack are -1, 0 and 1"):
        pack(torch.full((4, 4), float(value)))


# --- what transformers makes of it ----------------------------------------------------------------
def test_latent_and_packed_load_in_plain_transformers_without_qbench(tmp_path):
    """In a process that never imports qbench. Packed scales are powers of two: equal bits."""
    model = trained()
    save_latent(model, tiny_tokenizer(), tmp_path / "latent")
    packed = loaded(microsoft(tmp_path / "source", packed=True, dtype=torch.float32))
    save_packed(packed, tiny_tokenizer(), tmp_path / "packed")
    save_file({"latent": logits(model), "packed": logits(packed)}, tmp_path / "expected")
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        "expected = load_file('expected')\n"
        "for kind in ('latent', 'packed'):\n"
        "    assert AutoTokenizer.from_pretrained(kind)('Anna')['input_ids'][0] == 1\n"
        "    model = AutoModelForCausalLM.from_pretrained(kind, dtype=torch.float32)\n"
        "    with torch.no_grad():\n"
        "        found = model(ids).logits\n"
        "    off = ((found - expected[kind]).abs().max() / expected[kind].abs().max()).item()\n"
        "    print(kind, type(model).__name__, off, off < 1e-5)\n"
        "assert not any(name.split('.')[0] == 'qbench' for name in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [(w[0], w[1], w[3]) for w in lines] == [
        ("latent", "BitNetForCausalLM", "True"),
        ("packed", "BitNetForCausalLM", "True"),
    ], run.stderr


def test_latent_weights_come_back_as_they_were(tmp_path):
    model = trained()
    save_latent(model, tiny_tokenizer(), tmp_path / "latent")
    assert torch.equal(logits(loaded(tmp_path / "latent")), logits(model))
    state = load_file(tmp_path / "latent" / "model.safetensors")
    expected = state_of(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("frozen", [True, False])
def test_packed_codes_and_scales_are_those_of_the_model(tmp_path, frozen):
    model, reference = trained(), trained()
    if frozen:
        freeze_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_packed(model, tiny_tokenizer(), tmp_path / "packed")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    state = load_file(tmp_path / "packed" / "model.safetensors")
    back = dict(bitlinears(loaded(tmp_path / "packed")))
    for name, layer in bitlinears(reference):
        codes = layer.weight_codes()
        assert torch.equal(unpack(state[f"{name}.weight"]).float(), codes.codes)
        assert torch.equal(state[f"{name}.weight_scale"], codes.scale)
        assert torch.equal(back[name].weight, layer.effective_weight())
    assert torch.equal(logits(loaded(tmp_path / "packed")), logits(model))


def test_packed_files_hold_two_bits_a_weight(tmp_path):
    """Bytes of the file: length, header, codes/4, a float32 scale a matrix, the rest in float32."""
    save_packed(trained(), tiny_tokenizer(), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    stored = header(path)
    sizes = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in stored.items()}
    packed = [n for n, entry in stored.items() if entry["dtype"] == "U8"]
    assert len(packed) == N_LINEARS and sum(sizes[n] for n in packed) == N_CODES // 4
    norms = 2 * (3 * 64 + 96) + 64  # per block: two norms, two sub-norms; and the last one
    rest = 4 * (N_LINEARS + norms + 512 * 64)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header_size + N_CODES // 4 + rest


def test_the_dtype_of_what_is_not_packed_can_be_chosen(tmp_path):
    save_packed(trained(), tiny_tokenizer(), tmp_path / "half", dtype=torch.float16)
    stored = header(tmp_path / "half" / "model.safetensors")
    assert {entry["dtype"] for entry in stored.values()} == {"U8", "F16"}
    assert relative(logits(loaded(tmp_path / "half")), logits(trained())) < 0.05


def test_a_latent_model_in_half_precision_runs_alike_in_transformers(tmp_path):
    save_latent(trained(), tiny_tokenizer(), tmp_path / "half", dtype=torch.float16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert torch.equal(logits(loaded(tmp_path / "half")), transformers_logits(tmp_path / "half"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_llama_is_saved_packed_again(tmp_path, tied):
    """From a scale that divides to one that multiplies; both are exact powers of two."""
    source = hf_llama(tmp_path / "source", HF_LLAMA, torch.float32, tied)
    model = loaded(source)
    save_packed(model, tiny_tokenizer(), tmp_path / "again")
    checkpoint = find_checkpoint(str(tmp_path / "again"))
    assert not checkpoint.bitnet.divides and checkpoint.bitnet.tied is tied
    assert torch.equal(logits(checkpoint.load_model()), logits(model))
    assert torch.equal(transformers_logits(tmp_path / "again"), logits(model))
    names = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied


def test_a_1bitllm_checkpoint_becomes_one_that_transformers_runs(tmp_path):
    model = loaded(one_bit_llm(tmp_path / "1bit"))
    save_packed(model, tiny_tokenizer(), tmp_path / "packed")
    theirs = transformers_model(tmp_path / "packed")
    assert theirs.config.hidden_act == "silu"
    assert theirs.config.rope_parameters["rope_theta"] == 10000.0
    for name, layer in bitlinears(model):
        codes = theirs.get_submodule(name)
        assert relative(codes.weight * codes.weight_scale, layer.weight) < 1e-6


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_norms_inside_the_linears_are_saved(tmp_path, weights):
    state = packed_state(state_of(tiny_model("llama")))
    for name in [name for name in state if is_projection(name)]:
        if weights and name.endswith(".weight"):
            norm = torch.linspace(0.5, 1.5, state[name].shape[1])
            state[name.replace(".weight", ".rms_norm.weight")] = norm
    entries = {"linear_class": "autobitlinear", "use_rms_norm": True, "rms_norm_eps": 1e-3}
    config = config_of(tiny_model("llama"), quantization_config(**entries))
    model = loaded(write(tmp_path / "source", state, config))
    save_packed(model, tiny_tokenizer(), tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))
    assert torch.equal(transformers_logits(tmp_path / "again"), logits(model))


# --- b1 -------------------------------------------------------------------------------------------
def test_a_b1_is_saved_latent_under_a_model_type_of_its_own(tmp_path):
    model = trained("b1")
    save_latent(model, tiny_tokenizer(), tmp_path / "b1")
    assert torch.equal(logits(loaded(tmp_path / "b1")), logits(model))
    config = json.loads((tmp_path / "b1" / "config.json").read_text())
    assert config["model_type"] == "qbench_bitnet_b1" and "quantization_config" not in config


def test_a_b1_cannot_be_packed():
    with pytest.raises(QBenchError, match=r"no class for binary weights.*save the latent"):
        save_packed(trained("b1"), tiny_tokenizer(), Path("never made"))
    assert not Path("never made").exists()


# --- refusals -------------------------------------------------------------------------------------
def test_frozen_weights_are_not_saved_as_latent_ones(tmp_path):
    model = trained()
    freeze_(model)
    with pytest.raises(QBenchError, match="is frozen, its latent weight is gone"):
        save_latent(model, tiny_tokenizer(), tmp_path / "latent")
    assert not (tmp_path / "latent").exists()


@pytest.mark.parametrize("save", [save_latent, save_packed])
@pytest.mark.parametrize(
    "options",
    [BitLinearOptions(abits=4), BitLinearOptions(norm="layer"), BitLinearOptions(epsilon="add")],
    ids=["A4", "layer norm", "epsilon"],
)
def test_quantizers_that_transformers_does_not_have_are_not_saved(tmp_path, save, options):
    model = random_bitnet()
    replace_linears_(model, options)
    with pytest.raises(QBenchError, match="has quantizers that transformers does not have"):
        save(model, tiny_tokenizer(), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_a_model_without_bitlinears_is_saved_another_way(tmp_path):
    with pytest.raises(QBenchError, match="has no BitLinear"):
        save_packed(random_bitnet(), tiny_tokenizer(), tmp_path / "plain")


def test_matrices_that_cannot_be_packed_are_named(tmp_path):
    model = random_bitnet(intermediate_size=98)
    replace_linears_(model, B158)
    with pytest.raises(QBenchError, match="gate_proj: 98 rows cannot be packed"):
        save_packed(model, tiny_tokenizer(), tmp_path / "odd")


def test_a_taken_folder_is_left_as_it_is(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(QBenchError, match="exists and is not empty"):
        save_packed(trained(), tiny_tokenizer(), tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_save_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(RunFailed, match="No space left on device.*nothing was left there"):
        save_packed(trained(), tiny_tokenizer(), tmp_path / "full")
    assert list(tmp_path.iterdir()) == []


def test_latent_weights_read_for_training_run_as_the_trained_model(tmp_path):
    """``load(..., "online")``: quantized in every forward pass, with gradients."""
    checkpoint = find_checkpoint(str(b1(tmp_path / "b1")))
    model = load(checkpoint, "online")
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer.frozen for _, layer in bitlinears(model))
    assert torch.equal(logits(model), logits(checkpoint.load_model()))
