"""``qbench demo``: makes its model, runs every cell, prints a table, leaves a figure."""

from __future__ import annotations

import shlex

import pytest
from typer.testing import CliRunner

from qbench.cli import app
from qbench.study import demo
from qbench.study.store import Store


@pytest.fixture
def shortened(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 4)
    few = ["none", {"name": "absmax", "schemes": ["W8A8"]}, {"name": "gptq", "schemes": ["W2A16"]}]
    monkeypatch.setattr(demo, "CELLS", few)


def test_the_demo_prints_a_table_and_leaves_a_figure(tmp_path, capsys, shortened):
    assert demo.demo(tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "W2A16" in out and "gptq" in out and "full precision" in out
    assert (tmp_path / "demo" / "accuracy_vs_bits.png").stat().st_size > 10_000
    runs = list(Store(tmp_path / "demo").runs())
    assert len(runs) == 3
    assert all(len(run.tasks) == 2 for run in runs)

    [line] = [line for line in out.splitlines() if line.startswith("next:")]
    following = CliRunner().invoke(app, shlex.split(line.removeprefix("next:"))[1:])
    assert following.exit_code == 0, following.output

    assert demo.demo(tmp_path / "demo") == 0
    assert "quantized" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_demos_model_knows_its_world_and_loses_it_at_one_bit(tmp_path):
    """Origin: trained to near the entropy of its texts; facts are then certain, chance is 25 %."""
    assert demo.demo(tmp_path) == 0
    accuracy = {
        (run.quantization.key.baseline.name, run.quantization.key.scheme.split(":")[0]): next(
            t.metrics["acc"].value for t in run.tasks if "acc" in t.metrics
        )
        for run in Store(tmp_path).runs()
    }
    assert accuracy["none", "W16A16"] > 0.95
    assert accuracy["absmax", "W1A8"] < 0.6
