"""``qbench train`` and ``qbench curves``: files in, twins and figures out, mistakes in one line."""

import subprocess
import sys

import pytest
import torch
import yaml
from cli_fixtures import qbench, refused
from training_fixtures import FIELDS, lose_at_step_five, record_of, weights

from qbench.progress import Reporter
from qbench.testing.models import _SENTENCES, tiny_tokenizer
from qbench.training import commands
from qbench.training.data import fingerprint, pack
from qbench.training.presets import PRESETS
from qbench.training.recipe import Recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recipe's own files."""
    folder = tmp_path_factory.mktemp("files")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "corpus.txt").write_text("\n".join(_SENTENCES[:60]))
    (folder / "held_out.txt").write_text("\n".join(_SENTENCES[60:80]))
    return {
        "corpus": str(folder / "corpus.txt"),
        "held_out": str(folder / "held_out.txt"),
        "tokenizer": str(folder / "tokenizer"),
    }


@pytest.fixture
def write(files, tmp_path):
    """Write a recipe whose output is ``tmp_path / "out"``."""

    def write(**changes):
        fields = {**FIELDS, **files, "output": str(tmp_path / "out"), **changes}
        fields = {name: value for name, value in fields.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def test_the_command_trains_what_is_left_and_draws_one_figure(write, tmp_path):
    recipe, out = write(twins=["fp16", "b158"]), tmp_path / "out"
    first = qbench("train", recipe, "--twin", "fp16")
    assert first.stdout.startswith("fp16-t: 10,800 parameters, 8 steps, 512 tokens, loss ")
    assert first.stdout.endswith(f"{out}/loss-t.png\n") and len(first.stdout.splitlines()) == 2
    before = (out / "loss-t.png").read_bytes()
    second = qbench("train", recipe)
    lines = second.stdout.splitlines()
    assert lines[0].endswith("(trained before)") and lines[1].startswith("b158-t: ")
    assert sorted(path.name for path in out.iterdir()) == ["b158-t", "fp16-t", "loss-t.png"]
    assert (out / "loss-t.png").read_bytes() != before
    both = qbench("curves", out / "fp16-t", out / "b158-t", "-o", tmp_path / "both.svg")
    assert both.stdout == f"{tmp_path}/both.svg\n"
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")


def test_another_output_moves_everything_there(write, tmp_path):
    qbench("train", write(), "--output", tmp_path / "elsewhere")
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["fp16-t", "loss-t.png"]
    assert not (tmp_path / "out").exists()


def test_texts_that_are_no_file_can_be_handed_in(files, tmp_path):
    corpora = {"bundled:world/train": lambda: _SENTENCES[:60]}
    recipe = Recipe.of({**FIELDS, **files, "corpus": "bundled:world/train", "steps": 3})
    (record,) = commands.train(
        recipe, output=tmp_path, corpora=corpora, reporter=Reporter(quiet=True)
    )
    tokens = pack(_SENTENCES[:60], tiny_tokenizer(), 16)
    assert record["recipe"]["corpus"] == fingerprint(tokens)


def test_presets_are_listed_without_torch():
    script = """
import sys
from typer.testing import CliRunner
from qbench.cli import app
result = CliRunner().invoke(app, ["train", "--list"])
print(result.stdout)
assert result.exit_code == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert listed == list(PRESETS)
    assert "b158 0.0012 then 0.0008" in done.stdout


# --- divergence ----------------------------------------------------------------------------------


def test_a_diverged_twin_is_a_failed_run_that_names_the_step(write, tmp_path, monkeypatch):
    lose_at_step_five(monkeypatch)
    recipe = write(learning_rate=0.02)
    for _ in range(2):  # it is not tried again either
        result = qbench("train", recipe, code=1)
        assert result.stderr.splitlines()[-1] == (
            "error: fp16-t: the loss became nan at step 5; lower learning_rate (0.02) or set clip, "
            f"and delete {tmp_path}/out/.fp16-t.training"
        )
    assert (tmp_path / "out" / "loss-t.png").is_file()


def test_among_several_learning_rates_divergence_is_a_finding(write, tmp_path, monkeypatch):
    lose_at_step_five(monkeypatch)
    result = qbench("train", write(learning_rate=None, learning_rates=[0.01, 0.02]))
    finished, diverged, figure = result.stdout.splitlines()
    assert finished.startswith("fp16-t-lr0.01: 10,800 parameters")
    assert diverged == "fp16-t-lr0.02: diverged, loss nan at step 5"
    assert figure == f"{tmp_path}/out/loss-t.png"


def test_a_divergence_before_the_first_row_neither_hides_nor_ends_anything(write, tmp_path):
    said = "fp16-t: the loss became nan at step 3; lower learning_rate (1e+30)"
    alone = {"warmup": 0, "log_every": 5, "save_every": 5, "eval_every": 5}
    for _ in range(2):
        result = qbench("train", write(learning_rate=1e30, **alone), code=1)
        assert said in result.stderr.splitlines()[-1]
    several = write(learning_rate=None, learning_rates=[1e30, 0.01], **alone)
    diverged, finished, figure = qbench("train", several).stdout.splitlines()
    assert diverged == "fp16-t-lr1e+30: diverged, loss nan at step 3"
    assert finished.startswith("fp16-t-lr0.01: 10,800 parameters")
    assert figure == f"{tmp_path}/out/loss-t.png"


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "unknown preset 'bitnet-1b'; did you mean": ({"preset": "bitnet-1b"}, ()),
    "unknown field 'learning_rat'; did you mean 'learning_rate'": ({"learning_rat": 1}, ()),
    "unknown twin 'b1'; did you mean 'b158'": ({"twins": ["b158"]}, ("--twin", "b1")),
    "cannot use device 'tpu'": ({}, ("--device", "tpu")),
    "device 'cpu:0': give cuda": ({}, ("--device", "cpu:0")),
    "no tokenizer at nowhere": ({"tokenizer": "nowhere"}, ()),
    "unknown bundled data 'bundled:wrld'; did you mean": ({"tokenizer": "bundled:wrld"}, ()),
    "unknown bundled corpus 'bundled:world/trian'; did you mean 'bundled:world/train'": (
        {"corpus": "bundled:world/trian"},
        (),
    ),
    "the text file nowhere.txt does not exist": ({"corpus": "nowhere.txt"}, ()),
    "unknown corpus 'wikitext'; did you mean 'wikitext2'": ({"corpus": "wikitext"}, ()),
    "the corpus has 809 tokens, less than one window of 1024": (
        {"seqlen": 1024, "tokens_per_step": 1024},
        (),
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(write, message):
    fields, options = MISTAKES[message]
    line = refused("train", write(**fields), *options)
    assert message in line


def test_a_recipe_or_the_list_must_be_asked_for():
    assert refused("train") == ("name a recipe file, or --list the published ones")


def test_a_folder_of_another_recipe_is_one_line(write, tmp_path):
    qbench("train", write(steps=3))
    line = refused("train", write(steps=4))
    assert f"{tmp_path}/out/fp16-t belongs to another recipe (steps 3, not 4)" in line


def test_a_broken_tokenizer_is_one_line(write, tmp_path):
    (tmp_path / "broken").mkdir()
    assert "cannot read the tokenizer in" in refused(
        "train", write(tokenizer=str(tmp_path / "broken"))
    )


def test_a_folder_without_a_twin_has_no_curve(tmp_path):
    line = refused("curves", tmp_path, "-o", tmp_path / "x.png")
    assert line.endswith("is no trained twin: it has no training.json")


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_trains(write, tmp_path):
    recipe = write(twins=["fp16", "b158"])
    qbench("train", recipe, "--output", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "qbench.cli", "train", str(recipe)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3  # one process speaks
    for name in ("fp16-t", "b158-t"):
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "out" / name)
        for tensor in one:  # sums in another order, then float16
            assert torch.allclose(one[tensor], two[tensor], atol=2e-4)
        assert (
            record_of(tmp_path / "one" / name)["recipe"]
            == record_of(tmp_path / "out" / name)["recipe"]
        )
        steps = [line.split(",")[0] for line in (tmp_path / "out" / name / "loss.csv").open()]
        assert steps == ["step", "2", "3", "4", "6", "8"]
