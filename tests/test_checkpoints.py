"""Checkpoints: fingerprints that mean the same model, and refusals of what would lie."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from cli_fixtures import edit_config, edit_weights
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from qbench.errors import QBenchError
from qbench.models import files
from qbench.models.checkpoints import Checkpoint, find_checkpoint, load_checkpoint
from qbench.testing import ARCHITECTURES, tiny_checkpoint, tiny_model

DOWN = "model.layers.0.mlp.down_proj.weight"
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 512,
}


def fingerprint(folder) -> str:
    return find_checkpoint(str(folder)).fingerprint


def test_a_fingerprint_does_not_depend_on_the_folder(tiny, copy_of):
    assert fingerprint(copy_of("elsewhere")) == fingerprint(tiny)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "5.0.0"},
        {"_name_or_path": "somewhere"},
        {"dtype": "bfloat16"},
        {"torch_dtype": "float16"},
        {"use_cache": False},
    ],
)
def test_a_fingerprint_ignores_what_the_config_says_about_its_making(tiny, copy_of, changes):
    assert fingerprint(edit_config(copy_of("same"), **changes)) == fingerprint(tiny)


def test_a_fingerprint_does_not_depend_on_the_order_of_the_config(tiny, copy_of):
    folder = copy_of("same")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert fingerprint(folder) == fingerprint(tiny)


def test_a_fingerprint_changes_with_one_weight(tiny, copy_of):
    def change(tensors):
        tensors[DOWN][3, 5] += 1e-6

    assert fingerprint(edit_weights(copy_of("other"), change)) != fingerprint(tiny)


def test_a_fingerprint_changes_with_the_config(tiny, copy_of):
    assert fingerprint(edit_config(copy_of("other"), rms_norm_eps=1e-3)) != fingerprint(tiny)


def test_a_fingerprint_changes_with_the_tokenizer(tiny, copy_of):
    folder = copy_of("other")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<unused0>", "<unused_0>"))
    assert fingerprint(folder) != fingerprint(tiny)


def test_a_second_copy_of_the_weights_in_the_folder_is_neither_counted_nor_hashed(tiny, copy_of):
    folder = copy_of("mistral-like")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert fingerprint(folder) == fingerprint(tiny)
    assert find_checkpoint(str(folder)).parameters == find_checkpoint(str(tiny)).parameters


@pytest.mark.parametrize("changed", [False, True])
def test_a_hash_that_was_begun_is_used_once_and_only_for_the_same_file(
    copy_of, monkeypatch, changed
):
    monkeypatch.setattr(files, "_BEGUN", {})
    folder = copy_of("begun")
    expected = fingerprint(folder)
    files.begin_hashing(str(folder))
    (begun,) = files._BEGUN.values()
    assert begun.digest.result(timeout=60) == files._sha256(folder / "model.safetensors")
    if changed:  # another file in its place, of the same size and time
        stat = (folder / "model.safetensors").stat()
        edit_weights(folder, lambda tensors: tensors[DOWN].mul_(2))
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    hashed = []
    inner = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda path: (hashed.append(path.name), inner(path))[1])
    assert (fingerprint(folder) == expected) is not changed
    assert ("model.safetensors" in hashed) is changed and not files._BEGUN
    hashed.clear()
    fingerprint(folder)
    assert "model.safetensors" in hashed


def test_hashing_is_begun_for_what_is_there_and_says_nothing_of_the_rest(
    copy_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "_BEGUN", {})
    folder = copy_of("cut")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    for name in (str(folder), str(tmp_path / "absent"), "org/name", "bundled:nothing"):
        files.begin_hashing(name)
    assert not files._BEGUN
    files.begin_hashing("bundled:fp16-2m")
    assert files._BEGUN.popitem()[1].digest.result(timeout=60)


def test_an_error_while_hashing_is_raised_where_the_hash_is_asked_for(copy_of, monkeypatch):
    monkeypatch.setattr(files, "_BEGUN", {})
    folder, tried = copy_of("unreadable"), []

    def fail(path):
        tried.append(path.name)
        raise OSError("the disk is gone")

    monkeypatch.setattr(files, "_sha256", fail)
    files.begin_hashing(str(folder))
    with pytest.raises(OSError, match="the disk is gone"):
        fingerprint(folder)
    assert tried == ["model.safetensors"]  # by the thread, and not again


def test_the_number_of_parameters_is_read_from_headers(tiny):
    expected = sum(p.numel() for p in tiny_model().parameters())
    assert find_checkpoint(str(tiny)).parameters == expected


def test_the_name_is_that_of_the_folder_however_it_is_written(tiny, monkeypatch):
    assert find_checkpoint(f"{tiny}/").name == "tiny"
    monkeypatch.chdir(tiny)
    assert find_checkpoint(".").name == "tiny"


@pytest.fixture
def sharded(tiny, tmp_path):
    folder = tmp_path / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_sharded_weights_load_to_the_same_model(sharded):
    expected = tiny_model().state_dict()
    checkpoint = find_checkpoint(str(sharded))
    loaded = checkpoint.load_model().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert checkpoint.parameters == sum(p.numel() for p in tiny_model().parameters())


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(QBenchError, match=f"{shard.name} is missing"):
        find_checkpoint(str(sharded))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_loads_and_passes_the_checks(tmp_path, architecture):
    folder = tiny_checkpoint(tmp_path / architecture, architecture)
    model, tokenizer = load_checkpoint(str(folder))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer("Anna")["input_ids"][0] == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_row_lengths_are_those_of_the_linears_though_no_weight_is_read(
    tmp_path, architecture, monkeypatch
):
    folder = tiny_checkpoint(tmp_path / architecture, architecture)
    monkeypatch.setattr(Checkpoint, "load_model", None)
    lengths = find_checkpoint(str(folder)).row_lengths
    inner = 256 if architecture == "gpt2" else 96
    assert sorted(set(lengths.values())) == [64, inner]


def test_row_lengths_name_experts_that_share_one_tensor(tmp_path):
    lengths = find_checkpoint(str(tiny_checkpoint(tmp_path / "m", "mixtral"))).row_lengths
    experts = [name for name in lengths if "experts" in name]
    assert "model.layers.1.mlp.experts.down_proj.3" in experts
    assert {lengths[name] for name in experts} == {0}
    assert lengths["model.layers.0.self_attn.q_proj"] == 64


def test_a_folder_without_config_is_no_checkpoint(copy_of):
    folder = copy_of("bare")
    (folder / "config.json").unlink()
    with pytest.raises(QBenchError, match=r"bare is no checkpoint: it has no config\.json"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused_with_its_path(copy_of, text):
    folder = copy_of("broken")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(QBenchError, match=r"cannot read .*broken/config\.json"):
        find_checkpoint(str(folder))


def test_an_unknown_model_type_is_one_line(copy_of):
    changes = {"model_type": "foonet", "architectures": ["FooForCausalLM"]}
    folder = edit_config(copy_of("foo"), **changes)
    with pytest.raises(QBenchError, match="foonet") as caught:
        find_checkpoint(str(folder)).load_config()
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_says_which_file_it_looked_for(copy_of):
    folder = copy_of("empty")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(QBenchError, match=r"holds no weights \(looked for model\.safetensors"):
        find_checkpoint(str(folder))


def test_a_folder_without_tokenizer_says_what_to_put_there(copy_of):
    folder = copy_of("mute")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(QBenchError, match=r"mute has no tokenizer.*put tokenizer\.json into"):
        find_checkpoint(str(folder)).load_tokenizer()


@pytest.mark.parametrize("kept", [0, 4, 100, -1000])
def test_truncated_safetensors_are_refused_before_anything_is_loaded(copy_of, kept):
    folder = copy_of("cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(QBenchError, match=r"model\.safetensors .*cut short"):
        find_checkpoint(str(folder))


def test_a_file_that_is_no_safetensors_is_refused(copy_of):
    folder = copy_of("garbage")
    (folder / "model.safetensors").write_bytes(b"garbage!" * 1000)
    with pytest.raises(QBenchError, match=r"cannot be read as safetensors"):
        find_checkpoint(str(folder))


@pytest.fixture
def pickled(copy_of):
    folder = copy_of("pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickle_is_refused_with_the_way_out(pickled):
    with pytest.raises(QBenchError, match=r"pytorch_model\.bin.*--allow-pickle"):
        find_checkpoint(str(pickled))


def test_a_pickle_of_tensors_loads_when_allowed(pickled):
    model = find_checkpoint(str(pickled), allow_pickle=True).load_model()
    assert torch.equal(model.state_dict()[DOWN], tiny_model().state_dict()[DOWN])


def test_safetensors_are_preferred_where_both_are_there(tiny, copy_of):
    folder = copy_of("both")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    checkpoint = find_checkpoint(str(folder), allow_pickle=True)
    assert not checkpoint.pickled
    assert checkpoint.fingerprint == fingerprint(tiny)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_allowed_pickle_still_runs_no_code(pickled, tmp_path):
    target = tmp_path / "made-by-the-pickle"
    torch.save({"a": _Evil(target)}, pickled / "pytorch_model.bin")
    with pytest.raises(QBenchError, match="more than tensors"):
        find_checkpoint(str(pickled), allow_pickle=True).load_model()
    assert not target.exists()


def test_another_bin_file_is_not_taken_for_weights(pickled):
    (pickled / "pytorch_model.bin").rename(pickled / "training_args.bin")
    for allowed in (False, True):
        with pytest.raises(QBenchError, match="holds no weights"):
            find_checkpoint(str(pickled), allow_pickle=allowed)


def _refused(folder) -> str:
    with pytest.raises(QBenchError) as caught:
        find_checkpoint(str(folder)).load_model()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(copy_of, value):
    def change(tensors):
        tensors[DOWN][0, 0] = value

    message = _refused(edit_weights(copy_of("sick"), change))
    assert DOWN in message and "NaN or infinite" in message


def test_missing_tensors_are_refused_by_name(copy_of, capfd):
    message = _refused(edit_weights(copy_of("gap"), lambda tensors: tensors.pop(DOWN)))
    assert "lacks tensors" in message and DOWN in message
    assert "REPORT" not in capfd.readouterr().err  # transformers' own, of many lines


def test_tensors_the_model_class_would_drop_are_refused(copy_of):
    extra = "model.layers.0.self_attn.inner_attn_ln.weight"

    def change(tensors):
        tensors[extra] = torch.ones(64)

    message = _refused(edit_weights(copy_of("bitnet-like"), change))
    assert "ignores" in message and extra in message


def test_tensors_of_another_shape_are_refused_by_name(copy_of, capfd):
    def change(tensors):
        tensors[DOWN] = tensors[DOWN][:, :50].clone()

    message = _refused(edit_weights(copy_of("narrow"), change))
    assert "another shape" in message and message.endswith(DOWN)
    assert "REPORT" not in capfd.readouterr().err


def test_many_wrong_tensors_are_counted_not_listed(copy_of):
    def change(tensors):
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    assert "and 3 more" in _refused(edit_weights(copy_of("gaps"), change))


def test_an_architecture_that_is_not_causal_is_refused_by_its_name(tmp_path):
    folder = tmp_path / "bert"
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(folder)
    with pytest.raises(QBenchError, match="is a BertForMaskedLM, not a causal language model"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("named", [True, False])
def test_a_model_whose_attention_looks_ahead_is_refused_whatever_it_is_called(tmp_path, named):
    folder = tmp_path / "bert"
    BertLMHeadModel(BertConfig(**BERT)).save_pretrained(folder)
    if not named:
        edit_config(folder, architectures=None)
    assert "looks ahead" in _refused(folder)


def test_a_quantized_checkpoint_is_refused(copy_of):
    quantized = {"quant_method": "awq", "bits": 4}
    folder = edit_config(copy_of("small"), quantization_config=quantized)
    with pytest.raises(QBenchError, match="quantized already .*awq.*full-precision original"):
        find_checkpoint(str(folder))


def test_a_file_instead_of_a_folder_is_refused(tiny):
    with pytest.raises(QBenchError, match=r"is a file; give the folder"):
        find_checkpoint(str(tiny / "config.json"))


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(QBenchError, match="no such checkpoint folder"):
        find_checkpoint(str(tmp_path / "nothing"))


def test_a_hub_id_while_offline_is_one_line_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    with pytest.raises(QBenchError, match="no folder .* nor in the Hub cache") as caught:
        find_checkpoint("nobody/not-a-model-of-ours")
    assert time.perf_counter() - started < 2
    assert "HF_HUB_OFFLINE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_compute_dtype_is_the_one_asked_for(tiny, dtype):
    model = find_checkpoint(str(tiny)).load_model(dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_cannot_compute_is_refused_with_those_there_are(tiny, device):
    with pytest.raises(QBenchError, match=f"cannot use device '{device}'; .* have cpu"):
        find_checkpoint(str(tiny)).load_model(device=device)


def test_an_unknown_dtype_is_refused_with_those_there_are(tiny):
    with pytest.raises(QBenchError, match="dtype 'int8' is not offered; choose one of float32"):
        find_checkpoint(str(tiny)).load_model("int8")
