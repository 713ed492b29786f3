"""``qbench demo``: BitNet's Table 3 on the bundled twins, its table, its figure."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qbench import demo
from qbench.cli import app
from qbench.comparison.frame import frame
from qbench.progress import Reporter
from qbench.study.commands import run_sweep
from qbench.study.store import Run, Store


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo on four questions of each task."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "QUESTIONS", 4)
        assert demo.demo(folder) == 0
    return folder


def runs(results: Path) -> list[Run]:
    return list(Store(results).runs())


def test_the_demo_measures_every_row_on_ten_tasks(results):
    assert len(runs(results)) == 13
    assert all(run.quantization.status == "ok" for run in runs(results))
    assert all(len(run.tasks) == 10 for run in runs(results))


def test_the_demo_has_the_rows_of_bitnets_table(results):
    keys = [(run.quantization.checkpoint, run.quantization.key) for run in runs(results)]
    rows = {(name, key.baseline.name, key.scheme.split(":")[0]) for name, key in keys}
    both = {(m, s) for m in ("absmax", "smoothquant") for s in ("W8A8", "W4A4", "W1A8")}
    both |= {(m, s) for m in ("gptq", "quip") for s in ("W4A16", "W2A16")}
    assert {row for row in rows if row[0] == "fp16-2m"} == {
        *(("fp16-2m", method, scheme) for method, scheme in both),
        ("fp16-2m", "none", "W16A16"),
    }
    others = {(name, scheme) for name, _, scheme in rows if name != "fp16-2m"}
    assert others == {("b1-2m", "W1A8"), ("b158-2m", "W1.58A8")}
    trained = {run.quantization.checkpoint for run in runs(results) if run.quantization.trained}
    assert trained == {"b1-2m", "b158-2m"}


def test_the_demo_leaves_a_figure_repeats_nothing_and_names_a_command_that_runs(
    results, capsys, monkeypatch
):
    figure = results / "accuracy_vs_bits.png"
    assert figure.stat().st_size > 10_000
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.json")}
    monkeypatch.setattr(demo, "QUESTIONS", 4)
    assert demo.demo(results) == 0
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*.json")} == before
    printed = capsys.readouterr().out
    for part in ("b158-2m", "quip", "W2A16", str(figure)):
        assert part in printed
    [line] = [line for line in printed.splitlines() if line.startswith("next:")]
    command = [*shlex.split(line.removeprefix("next:"))[1:], "--limit", "2"]
    following = CliRunner().invoke(app, command)
    assert following.exit_code == 0, following.output


@pytest.mark.slow
def test_the_full_precision_twin_is_far_above_chance_and_falls_to_it_at_one_bit(tmp_path):
    """All questions of the nine tasks; at 1 bit absmax keeps next to nothing of the weights."""
    sweep = demo.demo_sweep(tmp_path, full=True)
    rows = {"checkpoints": ["bundled:fp16-2m"], "baselines": ["none", "absmax"]}
    rows |= {"schemes": ["W1A8"], "tasks": demo.WORLD_TASKS}
    assert run_sweep(sweep.model_copy(update=rows), Reporter()) == 0
    table = frame(Store(tmp_path)).query("metric == 'acc' and kind == 'accuracy'")
    assert (table.n_items == 200).all()
    above = (table.value - table.chance).groupby([table.baseline, table.abits]).mean()
    assert above["none", 16] > 0.25
    assert abs(above["absmax", 8]) < 0.06
