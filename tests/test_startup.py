"""What every command loads and what it leaves alone: how soon it answers, without a clock."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from cli_fixtures import DATA
from study_fixtures import bitnet_store

from qbench.process import uncollected

HEAVY = {
    "torch", "transformers", "lm_eval", "datasets", "numba", "scipy", "sklearn", "evaluate",
    "pandas", "numpy", "pyarrow", "matplotlib", "matplotlib.pyplot", "huggingface_hub",
    "lm_eval.models.huggingface",
}  # fmt: skip
FIGURES = {"numpy", "pandas", "pyarrow"}
"""What reads a store into a table."""
MODELS = {"torch", "transformers", "numpy", "huggingface_hub", "scipy"}
"""What a model takes; scipy is loaded by transformers itself."""
BEFORE_THE_FIRST_BLOCK = """
import sys
from qbench.cli import app
from qbench.study import runner, supply
def stop(*args, **kwargs):
    print("loaded:", *sys.modules)
    raise KeyboardInterrupt
supply.quantize_model = stop
try:
    app(sys.argv[1:])
except SystemExit:
    pass
"""


def loaded(script: str, *arguments: object) -> set[str]:
    """The heavy modules that a script had loaded when it printed ``loaded: ...``."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("loaded: ")]
    assert lines, done.stderr
    return HEAVY & set(lines[-1].split())


def after(command: str) -> set[str]:
    script = (
        "import sys\n"
        "from qbench.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert end.code in (0, None), end.code\n"
        "print('loaded:', *sys.modules)\n"
    )
    return loaded(script, *command.split())


@pytest.mark.parametrize(
    "command",
    ["--help", "run --help", "sweep --help", "list baselines", "list tasks", "list corpora"],
)
def test_help_and_lists_load_nothing_heavy(command):
    assert after(command) == set()


@pytest.mark.parametrize("what", ["runs", "checkpoints"])
def test_stored_results_are_listed_without_a_table(tmp_path, what):
    bitnet_store(tmp_path)
    assert after(f"list {what} --results {tmp_path}") == set()


def test_a_table_loads_pandas_alone_and_a_figure_matplotlib_without_its_windows(tmp_path):
    bitnet_store(tmp_path)
    assert after(f"table --results {tmp_path}") <= FIGURES
    assert after(f"plot --results {tmp_path} -o {tmp_path}/f.svg") <= {*FIGURES, "matplotlib"}


@pytest.mark.parametrize(
    ("tasks", "more"),
    [
        ("tinystories", set()),  # a perplexity needs no task library
        ("piqa", {"lm_eval", "datasets", "pyarrow", "pandas"}),  # the last two by datasets
    ],
)
def test_a_run_loads_what_it_needs_before_the_first_block(tiny, tmp_path, tasks, more):
    arguments = ["run", tiny, "--baseline", "rtn", "--scheme", "W4A16", "--data", DATA]
    arguments += ["--tasks", tasks, "--results", tmp_path]
    assert loaded(BEFORE_THE_FIRST_BLOCK, *arguments) <= MODELS | more


def test_a_dry_run_loads_neither_tasks_nor_tables_for_a_perplexity(tiny, tmp_path):
    command = f"run {tiny} --baseline rtn --scheme W4A16 --tasks tinystories --dry-run"
    assert after(f"{command} --data {DATA} --results {tmp_path}") <= MODELS


def test_imports_leave_the_garbage_collector_as_it_was():
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_imported_is_frozen_once():
    code = """
import gc
from qbench.study.imports import import_models
import_models()
first = gc.get_freeze_count()
import_models()
print(gc.isenabled(), first > 100_000, gc.get_freeze_count() <= first)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True", "True"], result.stderr
