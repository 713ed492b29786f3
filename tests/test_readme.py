"""What the README shows must work as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qbench.cli import app
from qbench.study.store import Store
from qbench.study.sweep import Sweep
from qbench.testing import tiny_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def plugin(tmp_path):
    [source] = [b for b in blocks("python") if "class PercentileClip" in b]
    assert len(source.splitlines()) < 40
    path = tmp_path / "percentile.py"
    path.write_text(source, encoding="utf-8")
    return path


def test_the_readmes_baseline_keeps_the_contract(plugin):
    result = CliRunner().invoke(app, ["check", f"{plugin}:PercentileClip"])
    assert result.exit_code == 0, result.output
    assert "all checks passed" in result.output


def test_the_readmes_baseline_runs_without_being_installed(plugin, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("Anna found the boat near the river. " * 60, encoding="utf-8")
    arguments = ["run", str(checkpoint), "--baseline", f"{plugin}:PercentileClip"]
    arguments += ["--set", "quantile=0.98", "--scheme", "W3A16", "--tasks", str(text)]
    arguments += ["--max-length", "64", "--results", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    [run] = Store(tmp_path / "runs").runs()
    assert run.quantization.key.baseline.parameters == {"quantile": 0.98}
    assert run.quantization.key.baseline.source
    assert run.tasks[0].metrics["perplexity"].value > 1


def test_the_readmes_sweep_file_is_valid(tmp_path):
    [text] = [b for b in blocks("yaml") if "checkpoints:" in b]
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    sweep = Sweep.read(path)
    names = [str(cell) for cell in sweep.cells()]
    assert names[0] == "none W16A16"
    assert sum(name.startswith("gptq") for name in names) == 2
    assert [spec.num_fewshot for spec in sweep.task_specs()] == [0, 0, 4]


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "sweeps").glob("*.yaml")), ids=str)
def test_every_kept_sweep_file_is_valid(path):
    assert Sweep.read(path).cells()


def test_every_file_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_command_the_readme_names_exists():
    shown = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.DOTALL))
    commands = set(re.findall(r"^(?:\$ )?qbench (\w+)", shown, flags=re.MULTILINE))
    offered = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert commands and commands <= offered


def test_the_readmes_python_runs(tmp_path, capsys):
    [code] = [b for b in blocks("python") if "load_checkpoint" in b]
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    code = code.replace("models/stories260K", str(checkpoint))
    code = code.replace('"DATA"', repr(str(ROOT / "tests" / "data")))
    exec(compile(code, "README.md", "exec"), {})
    assert "perplexity" in capsys.readouterr().out
