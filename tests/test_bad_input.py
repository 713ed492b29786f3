"""Whatever is wrong with what was asked: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
from pathlib import Path

import pytest
from cli_fixtures import DATA, qbench, records, refused

from qbench.study import runner, store

SLOW = pytest.mark.slow


@pytest.fixture
def command(tiny, text, tmp_path):
    """A run of the tiny checkpoint that would succeed."""
    return [
        "run", tiny, "--results", tmp_path / "runs", "--data", DATA, "--tasks", f"{text}@gptq-16",
        "--calibration", text, "--nsamples", 2, "--seqlen", 16,
    ]  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--baseline gtpq", "unknown baseline 'gtpq'; did you mean 'gptq'?"),
        ("--baseline my.py", "my.py names no class; write file.py:Class, as in my.py:MyMethod"),
        ("--baseline no.py:Mine", "no such baseline file: no.py (looked in "),
        ("--baseline gptq --set percdump=1", "'percdump'; did you mean 'percdamp'?"),
        ("--baseline gptq --set percdamp", "--set 'percdamp' is not field=value"),
        ("--baseline gptq --set percdamp=few", "GPTQ.percdamp takes a float, got 'few'"),
        ("--baseline gptq --set act_order=2", "GPTQ.act_order takes a bool, got '2'"),
        ("--baseline gptq --set block_size=1.5", "GPTQ.block_size takes a int, got '1.5'"),
        ("--baseline none --set x=1", "'x'; known: (it has none)"),
        ("--scheme W4", "cannot read scheme 'W4'; write it like W4A16"),
        ("--scheme W9A16", "weight bits 9 is not offered; choose one of 16, 8"),
        ("--scheme W4A1.5", "cannot read scheme 'W4A1.5'"),
        ("--scheme W4A16KV9", "KV-cache bits 9 is not offered"),
        ("--scheme W4A16g0", "group size 0 is impossible"),
        ("--scheme W4A16g32:w=channel", "group size 32 contradicts w=channel"),
        ("--scheme W4A16:w=rows", "weight granularity 'rows' is not offered"),
        ("--scheme W4A8:static,a=token", "static activation scales are per tensor"),
        ("--scheme W4A16:gird=asym", "unknown option 'gird=asym'"),
        ("--scheme W4A16;down", "override 'down' in scheme"),
        ("--baseline rtn --scheme W4A16:grid=asymm", "unknown grid 'asymm'; did you mean 'asym'?"),
        ("--baseline rtn --scheme W1A16:grid=restricted", "restricted"),
        ("--baseline none --scheme W4A16", "none cannot do W4A16:w=channel,grid=asym: it leaves"),
        ("--baseline quip --scheme W4A16g32", "quip cannot do W4A16g32:grid=rms: "),
        ("--baseline rtn --scheme W4A16g7", "group size 7 does not divide a row of 64 weights"),
        ("--baseline gptq --scheme W4A16g64", "a row of 96 weights; choose one that does (near:"),
        # lm-eval reads all its definitions before it can say that it knows no such task
        pytest.param("--tasks piqaa", "unknown task 'piqaa'; did you mean 'piqa'", marks=SLOW),
        ("--baseline rtn --scheme W4A16;*.downproj=W8A16", "no matrix is called *.downproj; they "),
        ("--tasks wikitext2@gtpq", "unknown protocol 'gtpq'; write one of gptq, documents"),
        ("--tasks wikitext2@gptq-1", "protocol 'gptq-1': a window needs at least 2 tokens"),
        ("--tasks piqa@gptq", "task 'piqa' is not a corpus, so it has no protocol 'gptq'"),
        ("--tasks no.txt", "the text file no.txt does not exist"),
        ("--tasks no.yaml", "the task file no.yaml does not exist"),
        ("--tasks ,", "--tasks names no task"),
        ("--limit 0", "limit 0 leaves nothing to measure"),
        ("--tasks piqa --num-fewshot -1", "-1 few-shot examples cannot be"),
        ("--tasks winogrande --num-fewshot 9", "its train split has 3 rows; ask for at most 2"),
        ("--max-length 1", "max_length 1 is too short; give at least 2 tokens"),
        ("--encoding jont", "unknown encoding 'jont'; choose one of joint+bos, joint, lmeval03"),
        ("--data /no/such/folder --tasks piqa", "the data folder /no/such/folder does not exist"),
        ("--device cuda:99", "cannot use device 'cuda:99'; this machine and this torch have cpu"),
        ("--device gpu", "cannot use device 'gpu'; this machine and this torch have cpu"),
        ("--dtype int4", "dtype 'int4' is not offered; choose one of float32"),
        ("--baseline gptq --scheme W4A16 --calibration c5", "calibration: unknown corpus 'c5'"),
        ("--baseline gptq --scheme W4A16 --calibration no.txt", "calibration: the text file no"),
        ("--baseline gptq --scheme W4A16 --nsamples 0", "calibration of 0 samples"),
        ("--baseline gptq --scheme W4A16 --seqlen 0", "calibration of 2 samples of 0 tokens"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_loaded_or_stored(
    command, tmp_path, monkeypatch, options, expected
):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*command, *options.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_model")
def test_a_calibration_text_that_is_too_short_says_how_long_it_is(command, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Anna carried the bread.")
    options = ["--baseline", "gptq", "--scheme", "W4A16", "--calibration", short]
    message = refused(*command, *options)
    assert message.startswith("calibration: short.txt (file short.txt) has ")
    assert "too few for a window of 16" in message and "--seqlen" in message


@pytest.mark.usefixtures("no_model")
def test_missing_data_names_the_file_and_every_place_looked_at(command, tmp_path, monkeypatch):
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data = tmp_path / "data"
    data.mkdir()
    result = qbench(*command, "--tasks", "piqa", "--data", data, code=2)
    assert "error: the validation split of piqa was found nowhere (looked for" in result.stderr
    assert f"(looked for {data}/tasks/piqa/validation.jsonl, " in result.stderr
    assert f"put it at {data}/tasks/piqa/validation.jsonl" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_model")
def test_a_damaged_data_file_is_named_with_its_line(command, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(DATA / "tasks" / "piqa", data / "tasks" / "piqa")
    file = data / "tasks" / "piqa" / "validation.jsonl"
    file.write_text(file.read_text() + '{"goal": \n')
    message = refused(*command, "--tasks", "piqa", "--data", data)
    assert message.startswith(f"{file}, line 4 is not JSON")


@pytest.mark.usefixtures("no_model")
def test_results_that_cannot_be_written_are_noticed_before_anything_runs(command, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(*command, "--results", tmp_path / "file" / "runs")
    assert message.startswith(f"cannot write results under {tmp_path / 'file' / 'runs'}")
    assert message.endswith("make it writable or name another folder with --results")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_results_folder_is_noticed_before_anything_runs(command, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused(*command, "--results", tmp_path / "locked")


def _fill_disk(monkeypatch, after: int) -> None:
    """Let so many files of the store be written, then fail in the middle of each."""
    written = []

    def opens(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if "x" in mode:
            written.append(path)
            if len(written) > after:
                file.write(b"half")
                file.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    monkeypatch.setattr(store, "open", opens, raising=False)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_whole_records_only_and_the_run_can_go_on(
    command, tmp_path, monkeypatch, after
):
    whole = tmp_path / "whole"
    qbench(*command, "--results", whole)
    names = {path.name for path in whole.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        _fill_disk(patch, after)
        result = qbench(*command, code=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write ") and "No space left on device" in last
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(left) == after and {path.name for path in left} <= names
    qbench(*command)
    assert {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()} == names


def test_a_full_disk_ends_a_sweep_at_once(tiny, text, tmp_path, monkeypatch):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"checkpoints: [{tiny}]\nbaselines: [none, rtn]\nschemes: [W4A16]\n"
        f"tasks: ['{text}@gptq-16']\nresults: {tmp_path / 'runs'}\n"
    )
    _fill_disk(monkeypatch, 0)
    result = qbench("sweep", file, code=1)
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert "rtn" not in result.stderr


def test_a_damaged_record_is_named_and_never_overwritten(command, tmp_path):
    qbench(*command)
    (path,) = (tmp_path / "runs").rglob("text.txt-*.json")
    path.write_text(path.read_text()[:100])
    message = refused(*command, code=1)
    assert message.startswith(f"{path} is damaged") and "delete it to measure again" in message
    assert len(path.read_text()) == 100
    path.unlink()
    qbench(*command)
    assert len(records(tmp_path / "runs")) == 2


def test_reading_names_a_damaged_record_in_one_line_and_shows_the_others(command, tmp_path):
    qbench(*command)
    qbench(*command, "--scheme", "W16A8")
    path = next((tmp_path / "runs").rglob("W16A8*/*/quantization.json"))
    path.write_text("{")
    result = qbench("table", "--results", tmp_path / "runs")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"warning: left out: {path} is damaged")
    assert "full precision" in result.stdout


def test_a_group_size_that_only_the_loop_can_judge_stores_nothing(command, tmp_path, monkeypatch):
    """Experts in one tensor are no linears: their rows are seen when they are quantized."""
    monkeypatch.setattr(runner.Checkpoint, "row_lengths", {})
    result = qbench(*command, "--baseline", "rtn", "--scheme", "W4A16g64", code=2)
    assert "group size 64 does not divide a row of 96" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nothing_like_it", "cannot import {file}: ModuleNotFoundError"),
        ("def broken(:", "cannot import {file}: SyntaxError"),
        ("class Mine:\n    pass\n", "{file}:Mine is not a qbench.Baseline subclass"),
        ("class Min:\n    pass\n", "unknown class in {file} 'Mine'; did you mean 'Min'?"),
        ("x = 1\n", "unknown class in {file} 'Mine'; there is none"),
        ("from qbench import Baseline\nclass Mine(Baseline):\n    pass\n", "quantize_weight"),
    ],
)
def test_a_plugin_file_that_is_no_method_is_one_line(command, tmp_path, source, expected):
    file = tmp_path / "mine.py"
    file.write_text(source)
    name = f"{file}:Mine"
    expected = expected.format(file=file)
    assert expected in refused(*command, "--baseline", name, "--scheme", "W4A16")
    assert expected in refused("check", name)


def test_an_unknown_kind_of_list_is_refused_with_those_there_are():
    assert refused("list", "baseline") == "unknown kind 'baseline'; did you mean 'baselines'?"


def test_an_unknown_command_or_option_is_wrong_usage():
    assert "No such command" in qbench("rnu", code=2).stderr
    assert "No such option" in qbench("run", "x", "--shceme", "W4A16", code=2).stderr
    assert "Missing argument" in qbench("run", code=2).stderr
    assert "valid int" in qbench("run", "x", "--limit", "few", code=2).stderr


def test_a_path_is_shown_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert refused("run", "model") == "model is no checkpoint: it has no config.json"
