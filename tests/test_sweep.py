"""Sweep files: their cells, their plan, and that nothing is lost or repeated when one is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_fixtures import DATA, edit_weights, qbench, records, refused

from qbench.errors import QBenchError
from qbench.progress import Reporter
from qbench.study import runner, supply
from qbench.study.commands import run_sweep
from qbench.study.store import Store
from qbench.study.sweep import Sweep
from qbench.tables.table import table


def sweep(**fields) -> Sweep:
    known = {"checkpoints": ["x"], "baselines": ["none"], "schemes": ["W4A16"], "tasks": ["piqa"]}
    return Sweep(**(known | fields))


def cells(**fields) -> list[str]:
    return [str(cell) for cell in sweep(**fields).cells()]


@pytest.fixture
def write(tiny, text, tmp_path):
    """Writes a sweep file over the tiny checkpoint; the given fields replace its own."""

    def make(**fields) -> Path:
        known = {
            "checkpoints": [str(tiny)],
            "baselines": ["none", "rtn", "gptq"],
            "schemes": ["W4A16", "W2A8"],
            "calibration": {"source": str(text), "nsamples": 2, "seqlen": 16},
            "tasks": [f"{text}@gptq-16", f"{text}@documents"],
            "limit": 2,
            "results": str(tmp_path / "runs"),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in (known | fields).items() if v is not None})
        )
        return path

    return make


def test_full_precision_runs_once_and_at_every_scheme_of_whole_weights():
    schemes = ["W8A8", "W16A8", "W4A16", "W16A16", "W16A4"]
    found = cells(baselines=["none"], schemes=schemes)
    assert found[0] == "none W16A16"
    assert [text.split(":")[0] for text in found[1:]] == ["none W16A8", "none W16A4"]


def test_a_method_never_runs_at_sixteen_bits():
    assert cells(baselines=["rtn"], schemes=["W16A16", "W4A16"]) == [
        "rtn W4A16:w=channel,grid=asym"
    ]


def test_a_method_meets_whole_weights_with_narrow_activations_only_where_it_is_asked():
    found = cells(baselines=["none", {"name": "rtn", "schemes": ["W4A16"]}], schemes=["W16A8"])
    assert [text.split(":")[0] for text in found] == ["none W16A16", "none W16A8", "rtn W4A16"]


def test_a_baseline_with_its_own_schemes_ignores_those_of_the_sweep():
    found = cells(baselines=[{"name": "rtn", "schemes": ["W3A16"]}, "gptq"], schemes=["W4A16"])
    assert [text.split(":")[0] for text in found] == ["rtn W3A16", "gptq W4A16"]


def test_cells_that_mean_the_same_are_made_once():
    entries = [
        "gptq",
        "gptq",
        {"name": "gptq", "percdamp": 0.01},
        {"name": "gptq", "percdamp": 0.1},
    ]
    found = cells(baselines=entries, schemes=["W4A16", "W4A16:grid=asym", "W4A16:w=channel"])
    assert found == ["gptq W4A16:w=channel,grid=asym"] * 2  # two values of percdamp


def test_fields_of_an_entry_reach_the_method():
    (cell,) = sweep(baselines=[{"name": "gptq", "act_order": True}]).cells()
    assert cell.baseline.spec.parameters["act_order"] is True


def test_a_sweep_without_any_cell_is_refused():
    with pytest.raises(QBenchError, match="has no cell.*add the baseline none"):
        cells(baselines=["gptq"], schemes=["W16A16"])


def test_tasks_take_the_limit_and_shots_of_the_sweep_unless_they_say():
    entries = [
        "piqa",
        "wikitext2@documents",
        {"name": "boolq", "num_fewshot": 0},
        {"name": "arc_easy", "limit": 7},
        {"name": "hellaswag", "limit": None},
        {"name": "tinystories", "protocol": "gptq-64"},
        {"name": "ptb@gptq-32"},
    ]
    specs = sweep(tasks=entries, num_fewshot=4, limit=100).task_specs()
    assert [(str(s), s.num_fewshot, s.limit) for s in specs] == [
        ("piqa", 4, 100),
        ("wikitext2@documents", 0, 100),
        ("boolq", 0, 100),
        ("arc_easy", 4, 7),
        ("hellaswag", 4, None),
        ("tinystories@gptq-64", 0, 100),
        ("ptb@gptq-32", 0, 100),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baseline": ["none"]}, "unknown field in .* 'baseline'; did you mean 'baselines'"),
        ({"checkpoints": None}, "checkpoints is missing"),
        ({"schemes": "W4A16"}, "schemes: Input should be a valid list .got 'W4A16'."),
        ({"schemes": []}, "schemes: List should have at least 1 item"),
        ({"schemes": [4]}, "schemes.0: Input should be a valid string .got 4."),
        ({"limit": "many"}, "limit: Input should be a valid integer.* .got 'many'."),
        ({"calibration": {"nsample": 3}}, "unknown field calibration 'nsample'; .*'nsamples'"),
        ({"calibration": {"nsamples": 0}}, "calibration.nsamples: .* greater than 0 .got 0."),
        ({"calibration": "c4"}, "calibration: .* .got 'c4'."),
        (
            {"tasks": [{"name": "piqa", "num_few_shot": 4}]},
            "tasks.0 'num_few_shot'; .*'num_fewshot'",
        ),
        ({"tasks": [{"name": "piqa", "limit": "x"}]}, "tasks.0.limit: .*valid integer.* .got 'x'."),
        ({"tasks": [{"limit": 3}]}, "tasks.0.name is missing"),
        ({"tasks": [3]}, "tasks.0: .* .got 3."),
        ({"tasks": [{"name": "piqa", "limit": 0}]}, "limit 0 leaves nothing to measure"),
        ({"tasks": ["piqa@gptq"]}, "'piqa' is not a corpus, so it has no protocol"),
        ({"baselines": [{"schemes": ["W4A16"]}]}, "baselines.0.name is missing"),
        ({"baselines": ["gtpq"]}, "unknown baseline 'gtpq'; did you mean 'gptq'"),
        ({"baselines": [{"name": "gptq", "actorder": 1}]}, "'actorder'; did you mean 'act_order'"),
        ({"schemes": ["W4A17"]}, "activation bits 17 is not offered"),
        ({"schemes": ["W4A16:grid=asymm"]}, "unknown grid 'asymm'; did you mean 'asym'"),
        ({"encoding": "jont"}, "unknown encoding 'jont'"),
        ({"dtype": "int8"}, "dtype 'int8' is not offered"),
        ({"device": "cuda:99"}, "cannot use device 'cuda:99'"),
        ({"max_length": 0}, "max_length 0 is too short"),
        (
            {"data": "/no/such/folder", "tasks": ["piqa"]},
            "data folder /no/such/folder does not exist",
        ),
        ({"checkpoints": ["/no/such/model"]}, "no such checkpoint folder: /no/such/model"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_mistake_in_a_sweep_file_is_one_line_before_anything_runs(
    write, tmp_path, no_model, fields, message, dry
):

    assert re.search(message, refused("sweep", write(**fields), *dry))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"checkpoints: [a", "is not YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"when: 2024-99-99", "is not YAML: month must be in 1..12"),
        (b"", "holds no mapping"),
        (b"- a\n- b", "holds no mapping"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    line = refused("sweep", path)
    assert line.startswith(str(path)) and message in line


def test_a_sweep_file_that_cannot_be_read_is_named(tmp_path):
    assert refused("sweep", tmp_path / "no.yaml") == (
        f"cannot read {tmp_path / 'no.yaml'}: No such file or directory"
    )
    assert refused("sweep", tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_a_dry_run_prints_the_plan_and_writes_nothing(write, tmp_path, no_model):
    file = write(baselines=["none", "rtn", "quip"], schemes=["W4A16", "W4A16g32"])
    before = sorted(tmp_path.rglob("*"))
    lines = qbench("sweep", file, "--dry-run").stdout.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    start = "tiny: 0.127 M parameters, 0.511 MB on disk, fingerprint "  # 127,296 of 4 bytes each
    assert lines[0].startswith(start)
    assert "memory about" in lines[1] and "--save writes about 497 KiB per cell" in lines[1]
    states = [line[2:17].strip() for line in lines[2:-1]]
    assert states == ["to run", "to run", "to run", "to run", "not applicable"]
    assert "group" in lines[-2].partition(": ")[2]
    start = "5 cells: 4 to run, 1 not applicable; 8 measurements to make; about "
    assert lines[-1].startswith(start)


def test_a_dry_run_tells_what_is_stored_and_what_failed(write, tmp_path, text, monkeypatch):
    qbench("sweep", write(baselines=["none", "rtn"], schemes=["W4A16"]))

    def fail(*args, **kwargs):
        raise ValueError("no idea")

    monkeypatch.setattr(supply, "quantize_model", fail)
    qbench("sweep", write(baselines=["gptq"], schemes=["W4A16"]), code=1)
    more = [f"{text}@gptq-16", f"{text}@documents", f"{text}@gptq-24"]
    out = qbench("sweep", write(schemes=["W4A16"], tasks=more[:2]), "--dry-run").stdout
    assert "  stored          none W16A16\n" in out
    assert "failed before   gptq W4A16:w=channel,grid=asym: ValueError: no idea (repeat" in out
    assert out.splitlines()[-1] == "3 cells: 2 stored, 1 failed before; 0 measurements to make"
    out = qbench("sweep", write(schemes=["W4A16"], tasks=more), "--dry-run").stdout
    assert f"to run          none W16A16: {more[2]} · " in out


def test_a_cell_that_cannot_be_is_stored_with_its_sentence(write, tmp_path):
    file = write(baselines=["none", "quip"], schemes=["W4A16g32", "W4A16"])
    result = qbench("sweep", file)
    assert "not applicable: " in result.stderr
    status = {
        (r["key"]["baseline"]["name"], r["key"]["scheme"].split(":")[0]): (r["status"], r["error"])
        for r in records(tmp_path / "runs").values()
        if "layers" in r
    }
    assert status["none", "W16A16"] == status["quip", "W4A16"] == ("ok", None)
    assert status["quip", "W4A16g32"][0] == "not_applicable"
    assert status["quip", "W4A16g32"][1] in result.stderr


def test_a_group_size_that_does_not_fit_a_checkpoint_is_not_applicable_to_it(write, tmp_path):
    file = write(baselines=["rtn"], schemes=["W4A16g64", "W4A16g32"])
    out = qbench("sweep", file, "--dry-run").stdout
    sentence = "group size 64 does not divide a row of 96 weights"
    assert f"not applicable  rtn W4A16g64:grid=asym: {sentence}" in out
    assert "(model.layers.0.mlp.down_proj)" in out
    qbench("sweep", file)
    found = [r for r in records(tmp_path / "runs").values() if "layers" in r]
    assert sorted(r["status"] for r in found) == ["not_applicable", "ok"]


def test_a_sweep_measures_every_cell_and_a_second_one_none(write, tmp_path, monkeypatch):
    first = qbench("sweep", write())
    assert "[1/5] tiny · none W16A16\n" in first.stderr
    assert "[5/5] tiny · gptq W2A8" in first.stderr
    assert first.stderr.splitlines()[-1] == f"results in {tmp_path / 'runs'}"
    stored = records(tmp_path / "runs")
    assert len(stored) == 5 * 3

    def fail(*args, **kwargs):
        raise AssertionError("a finished measurement was repeated")

    monkeypatch.setattr(supply, "quantize_model", fail)
    monkeypatch.setattr(runner.Checkpoint, "load_model", fail)
    second = qbench("sweep", write())
    assert second.stderr.count(": stored\n") == 5
    assert records(tmp_path / "runs") == stored


def test_a_sweep_and_single_runs_share_their_results(write, tiny, text, tmp_path):
    qbench("sweep", write())
    command = ["run", tiny, "--baseline", "gptq", "--scheme", "W4A16", "--calibration", text]
    command += ["--nsamples", 2, "--seqlen", 16, "--tasks", f"{text}@gptq-16", "--limit", 2]
    assert qbench(*command, "--results", tmp_path / "runs").stdout.count("(stored)") == 1


def test_options_go_before_what_the_file_says(write, tmp_path):
    file = write(tasks=["tinystories"], baselines=["none"], data="/no/such/folder")
    qbench("sweep", file, "--data", DATA, "--results", tmp_path / "others")
    assert len(records(tmp_path / "others")) == 2 and not (tmp_path / "runs").exists()


def test_one_failing_cell_does_not_stop_the_others(write, tmp_path, monkeypatch):
    quantize = supply.quantize_model

    def sometimes(model, baseline, scheme, *args, **kwargs):
        if type(baseline).__name__ == "RTN" and scheme.wbits == 4:
            raise ValueError("no idea")
        return quantize(model, baseline, scheme, *args, **kwargs)

    monkeypatch.setattr(supply, "quantize_model", sometimes)
    first = qbench("sweep", write(), code=1)
    assert "quantization failed: ValueError: no idea" in first.stderr
    assert first.stderr.splitlines()[-1].endswith("1 failed, repeat them with --retry-failed")
    monkeypatch.setattr(supply, "quantize_model", quantize)
    second = qbench("sweep", write(), code=1)
    assert "[2/5] tiny · rtn W4A16:w=channel,grid=asym: stored, failed: ValueError" in second.stderr
    qbench("sweep", write(), "--retry-failed")
    assert len(records(tmp_path / "runs")) == 15


def test_a_checkpoint_that_cannot_be_loaded_does_not_stop_the_others(
    write, tiny, copy_of, tmp_path
):
    def change(tensors):
        tensors["model.norm.weight"][0] = float("nan")

    sick = edit_weights(copy_of("sick"), change)
    file = write(checkpoints=[str(sick), str(tiny)], baselines=["none", "rtn"], schemes=["W4A16"])
    result = qbench("sweep", file, code=1)
    assert result.stderr.count("failed: sick: model.norm.weight contains NaN") == 2
    assert {path.split("/")[0] for path in records(tmp_path / "runs")} == {"tiny"}


def test_only_one_model_is_held_at_a_time(write, tiny, copy_of, monkeypatch):
    released = []
    release = runner.Workbench.release
    monkeypatch.setattr(
        runner.Workbench, "release", lambda self: (released.append(self), release(self))
    )
    others = [str(copy_of("b")), str(tiny)]
    qbench("sweep", write(checkpoints=[others[1], others[0]], baselines=["rtn"]))
    assert [bench.checkpoint.name for bench in released] == ["tiny", "b"]


def _start_forked(file: Path) -> int:
    """Run the sweep in a copy of this process: no start-up, so kills fall into the work."""

    def work() -> None:
        torch.set_num_threads(1)  # a forked OpenMP pool has no threads
        run_sweep(Sweep.read(file), Reporter(quiet=True))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process.pid or 0


def _start_command(file: Path) -> int:
    command = [Path(sys.executable).with_name("qbench"), "sweep", file]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid


def _finished(results: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a finished measurement: when it was written, and what is in it."""
    found = {}
    for path in results.rglob("*.json"):
        for file in (path, path.with_suffix(".items.parquet")):
            if file.exists():
                found[file] = (file.stat().st_mtime_ns, file.read_bytes())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "start", [_start_forked, pytest.param(_start_command, marks=pytest.mark.slow)]
)
def test_a_killed_sweep_loses_nothing_repeats_nothing_and_ends_in_the_same_table(
    write, tmp_path, start
):
    file, results = write(), tmp_path / "runs"
    draw = random.Random(0)
    kills = 0
    for goal in (2, 6, 11):
        before = _finished(results)
        pid = start(file)
        while len(list(results.rglob("*.json"))) < goal:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the sweep ended before it was killed"
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        after = _finished(results)
        assert before.items() <= after.items()  # nothing finished was written again
    assert kills == 3
    before = _finished(results)
    assert len(list(results.rglob("*.json"))) < 15
    qbench("sweep", file)
    assert before.items() <= _finished(results).items()
    assert len(list(results.rglob("*.json"))) == 15

    qbench("sweep", file, "--results", tmp_path / "whole")
    tables = [table(Store(tmp_path / name), format="csv") for name in ("runs", "whole")]
    assert tables[0] == tables[1] and tables[0].count("\n") > 5
    shutil.rmtree(results)
