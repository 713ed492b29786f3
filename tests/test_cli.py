"""The command line, through typer: what is printed, what is stored, what is never loaded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from cli_fixtures import DATA, qbench, records, refused
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qbench.quantization.quantize import quantize_model
from qbench.study import supply
from qbench.testing import tiny_model

PLUGIN = '''
from dataclasses import dataclass
from qbench import Baseline, round_to_nearest

@dataclass(frozen=True)
class Halved(Baseline):
    """Round, then shrink."""

    factor: float = 0.5

    def quantize_weight(self, weight, scheme, stats, generator):
        return round_to_nearest(weight, scheme).weight * self.factor
'''


def test_a_run_quantizes_measures_and_stores_and_a_second_one_only_looks_up(
    tiny, tmp_path, monkeypatch
):
    command = ["run", tiny, "--baseline", "gptq", "--scheme", "W4A16", "--data", DATA]
    command += ["--calibration", "tinystories", "--nsamples", 4, "--seqlen", 16]
    command += ["--tasks", "tinystories, piqa", "--results", tmp_path / "runs"]
    first = qbench(*command)
    lines = first.stdout.splitlines()
    assert lines[0].startswith("quantized 14 matrices, 4.")
    assert lines[1].startswith("tinystories [documents-512]  perplexity ")
    assert lines[2].startswith("piqa [lm-eval]  acc ") and "(n=3" in lines[2]
    assert first.stderr.startswith("tiny · gptq W4A16:w=channel,grid=asym\n")

    stored = records(tmp_path / "runs")
    folder = "tiny/W4A16_w-channel_grid-asym/gptq-"
    assert len(stored) == 3 and all(path.startswith(folder) for path in stored)
    quantized = next(r for path, r in stored.items() if path.endswith("quantization.json"))
    assert quantized["key"]["calibration"]["nsamples"] == 4
    assert quantized["environment"]["torch"] and quantized["created"]
    assert len(quantized["layers"]) == 14 and quantized["parameters"] > 100_000
    items = sorted((tmp_path / "runs").rglob("*.items.parquet"))
    assert [pyarrow.parquet.read_table(path).num_rows for path in items] == [6, 3]

    def fail(*args, **kwargs):
        raise AssertionError("a finished measurement was repeated")

    monkeypatch.setattr(supply, "quantize_model", fail)
    monkeypatch.setattr(supply.Checkpoint, "load_model", fail)
    second = qbench(*command)
    # the last part of a line is the time it took, and the mark
    assert [line.split("  (")[0] for line in second.stdout.splitlines()] == [
        line.split("  (")[0] for line in lines[1:]
    ]
    assert second.stdout.count("(stored)") == 2
    assert records(tmp_path / "runs") == stored


def test_a_new_task_is_measured_beside_the_stored_one(tiny, text, tmp_path):
    command = ["run", tiny, "--results", tmp_path / "runs", "--limit", 2, "--tasks"]
    qbench(*command, f"{text}@gptq-16")
    again = qbench(*command, f"{text}@gptq-16,{text}@gptq-32").stdout.splitlines()
    assert again[0].startswith("text.txt [gptq-16]") and again[0].endswith("(stored)")
    assert again[-1].startswith("text.txt [gptq-32]") and "stored" not in again[-1]


def test_protocol_limit_and_shots_reach_the_record(tiny, text, tmp_path):
    command = ["run", tiny, "--results", tmp_path, "--data", DATA, "--limit", 2]
    qbench(*command, "--tasks", f"{text}@documents-64,winogrande", "--num-fewshot", 1)
    found = {r["key"]["task"]: r for r in records(tmp_path).values() if "task" in r["key"]}
    assert found["text.txt"]["key"]["protocol"] == "documents-64"
    assert found["text.txt"]["key"]["num_fewshot"] == 0
    assert found["winogrande"]["key"]["num_fewshot"] == 1
    assert found["winogrande"]["key"]["limit"] == found["winogrande"]["n_items"] == 2


def test_one_task_named_twice_is_measured_once(tiny, text, tmp_path):
    names = f"{text}@gptq-16,{text}@gptq-16,{os.path.relpath(text)}@gptq-16"
    out = qbench("run", tiny, "--tasks", names, "--results", tmp_path / "runs").stdout
    assert out.count("text.txt [gptq-16]") == 1


def test_fields_of_the_baseline_are_set_and_recorded(tiny, text, tmp_path):
    command = ["run", tiny, "--baseline", "gptq", "--scheme", "W3A16", "--calibration", text]
    command += ["--nsamples", 2, "--seqlen", 16, "--tasks", f"{text}@gptq-16"]
    fields = ["--set", "percdamp=0.05", "--set", "act_order=true"]
    qbench(*command, *fields, "--results", tmp_path / "runs")
    (record,) = (r for r in records(tmp_path / "runs").values() if "baseline" in r["key"])
    parameters = record["key"]["baseline"]["parameters"]
    assert (parameters["percdamp"], parameters["act_order"]) == (0.05, True)
    assert {layer["damping"] for layer in record["layers"]} == {0.05}


def test_a_method_in_a_file_runs_without_being_installed(tiny, text, tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(PLUGIN)
    command = ["run", tiny, "--baseline", f"{file}:Halved", "--scheme", "W4A16"]
    command += ["--tasks", f"{text}@gptq-16", "--results", tmp_path / "runs"]
    qbench(*command, "--set", "factor=0.25")
    file.write_text(PLUGIN + "\n# edited\n")
    assert "stored" not in qbench(*command, "--set", "factor=0.25").stdout
    keys = [r["key"]["baseline"] for r in records(tmp_path / "runs").values() if "layers" in r]
    assert [k["name"] for k in keys] == ["Halved", "Halved"]
    assert keys[0]["source"] != keys[1]["source"]
    assert keys[0]["parameters"] == {"factor": 0.25}


def test_a_saved_model_is_the_quantized_one_and_loads_anywhere(tiny, tmp_path):
    target = tmp_path / "new" / "saved"
    command = ["run", tiny, "--baseline", "rtn", "--scheme", "W3A16", "--tasks", ""]
    done = qbench(*command, "--save", target, "--results", tmp_path / "runs")
    assert f"saved to {target}" in done.stderr
    expected = tiny_model()
    quantize_model(expected, "rtn", "W3A16")
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(target)(ids).logits
        assert torch.equal(logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(target)("Anna")["input_ids"][0] == 1
    assert json.loads((target / "qbench.json").read_text())["key"]["baseline"]["name"] == "rtn"
    assert sorted(p.name for p in target.parent.iterdir()) == ["saved"]


def test_what_is_stored_can_still_be_saved(tiny, text, tmp_path):
    command = ["run", tiny, "--baseline", "rtn", "--scheme", "W4A16"]
    command += ["--tasks", f"{text}@gptq-16", "--results", tmp_path / "runs"]
    qbench(*command)
    before = records(tmp_path / "runs")
    qbench(*command, "--save", tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert records(tmp_path / "runs") == before


def test_saving_says_that_activation_quantizers_stay_behind(tiny, tmp_path):
    command = ["run", tiny, "--scheme", "W16A8", "--tasks", "", "--results", tmp_path / "runs"]
    assert (
        "activation quantizers are not in it" in qbench(*command, "--save", tmp_path / "s").stderr
    )


@pytest.mark.usefixtures("no_model")
def test_an_occupied_folder_is_refused_before_anything_runs(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    message = refused("run", tiny, "--save", tmp_path, "--results", tmp_path / "runs")
    assert message == f"{tmp_path} exists and is not empty; --save never overwrites"
    message = refused("run", tiny, "--save", tmp_path / "mine.txt" / "x", "--results", tmp_path)
    assert message.startswith(f"cannot save to {tmp_path / 'mine.txt' / 'x'} (Not a directory")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: No space left on device"),
    ],
)
def test_a_save_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch, error):
    def save(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    target = tmp_path / "out" / "saved"
    command = ["run", tiny, "--tasks", "", "--results", tmp_path / "runs", "--save", target]
    result = qbench(*command, code=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot save to {target}")
    assert "No space left on device" in last
    assert list(target.parent.iterdir()) == []


def test_results_go_where_one_stands_and_data_may_be_relative(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = os.path.relpath(DATA, tmp_path)
    qbench("run", tiny, "--tasks", "tinystories", "--limit", 1, "--data", data)
    (record,) = (r for p, r in records(tmp_path / "results" / "runs").items() if "tinys" in p)
    assert str(DATA) not in json.dumps(record)
    absolute = qbench("run", tiny, "--tasks", "tinystories", "--limit", 1, "--data", DATA)
    assert absolute.stdout.count("(stored)") == 1


def test_an_interrupt_says_that_what_is_finished_is_kept(tiny, text, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(supply, "quantize_model", interrupt)
    command = ["run", tiny, "--baseline", "rtn", "--scheme", "W4A16", "--tasks", f"{text}@gptq-16"]
    result = qbench(*command, "--results", tmp_path / "runs", code=130)
    assert result.stderr.splitlines()[-1] == (
        "interrupted; what was finished is stored, run the same again"
    )
    assert not (tmp_path / "runs").exists()


def test_reading_commands_never_import_torch(tiny, text, tmp_path):
    qbench("run", tiny, "--tasks", f"{text}@gptq-16", "--results", tmp_path)
    script = f"""
import sys
from typer.testing import CliRunner
from qbench.cli import app
for command in (
    "--help", "run --help", "list baselines", "list tasks", "list corpora",
    "list runs --results {tmp_path}", "list checkpoints --results {tmp_path}",
    "table --results {tmp_path}",
    "plot --metric perplexity --results {tmp_path} -o {tmp_path}/figure.svg",
):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0 and result.stdout, (command, result.output, result.exception)
    loaded = {{"torch", "transformers", "lm_eval", "datasets"}} & set(sys.modules)
    assert not loaded, (command, loaded)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lists_name_what_there_is(tiny, text, tmp_path):
    baselines = qbench("list", "baselines").stdout
    assert [line.split()[0] for line in baselines.splitlines()] == [
        "absmax", "auto-gptq", "gptq", "none", "quip", "rtn", "smoothquant",
    ]  # fmt: skip
    assert all(len(line.split()) > 3 for line in baselines.splitlines())
    tasks = {line.split()[0] for line in qbench("list", "tasks").stdout.splitlines()}
    assert tasks >= {"wikitext2", "b158", "piqa", "wsc285", "storycloze_2018", "lambada_openai"}
    corpora = {line.split()[0] for line in qbench("list", "corpora").stdout.splitlines()}
    assert corpora == {
        "wikitext2",
        "ptb",
        "ptb-new",
        "c4",
        "c4-new",
        "tinystories",
        "world",
        "pile-val",
    }
    qbench("run", tiny, "--tasks", f"{text}@gptq-16", "--results", tmp_path)
    assert (
        qbench("list", "runs", "--results", tmp_path).stdout == "tiny  W16A16  none  ok  text.txt\n"
    )
    listed = qbench("list", "checkpoints", "--results", tmp_path).stdout.splitlines()
    assert {line.split()[0] for line in listed} > {"tiny", "bundled:fp16-2m", "bundled:b1-0.5m"}


def test_a_list_of_what_was_never_stored_says_so(tmp_path):
    message = refused("list", "runs", "--results", tmp_path / "none")
    assert message.startswith(f"no results under {tmp_path / 'none'}")


def test_check_passes_a_good_plugin(tmp_path):
    file = tmp_path / "good.py"
    file.write_text(PLUGIN)
    out = qbench("check", f"{file}:Halved", "--set", "factor=1.0").stdout.splitlines()
    assert out[-1] == "Halved: all checks passed"
    assert all(line.startswith("ok ") for line in out[:-1]) and len(out) > 10


def test_check_says_what_a_bad_plugin_does_wrong(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(PLUGIN.replace("* self.factor", "* self.factor * float('nan')"))
    result = qbench("check", f"{file}:Halved", code=1)
    assert "FAIL every claimed width gives finite weights" in result.stdout
    assert "at 8 bits weights are not finite" in result.stdout
    assert "checks failed" in result.stdout.splitlines()[-1]


def test_the_command_is_installed_and_answers(tmp_path):
    command = Path(sys.executable).with_name("qbench")
    done = subprocess.run(
        [command, "list", "corpora"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "wikitext2" in done.stdout
    done = subprocess.run([command, "list", "runs"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr == "error: no results under results/runs; name another folder with --results\n"
    )


def test_a_terminal_that_lacks_a_sign_shows_a_question_mark(tiny, text, tmp_path):
    qbench("run", tiny, "--tasks", f"{text}@gptq-16", "--results", tmp_path)
    command = [Path(sys.executable).with_name("qbench"), "table", "--results", tmp_path]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "full precision  ?" in done.stdout, done.stderr
