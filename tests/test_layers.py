"""The house rules, read from the source: who may import whom, what stays light, how large it grows.

The rules are those of README's "Style": a module imports only from its own layer and those below;
``TYPE_CHECKING`` imports are free; an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("qbench/**/*.py"), *ROOT.glob("baselines/**/*.py")])
BASELINES = sorted(ROOT.glob("baselines/*.py"))

LAYERS = (  # from the ground up; the vocabulary is one layer, and so is each folder
    ("errors", "scheme", "grid", "record", "registry", "baseline", "progress", "process"),
    ("models",),
    ("quantization",),
    ("evaluation",),
    ("training",),
    ("world",),
    ("testing",),
    ("study",),
    ("comparison",),
    ("tables",),
    ("plots",),
    ("reproduction",),
    ("report",),
    ("demo",),
    ("cli", "__main__"),
)
RANK = {room: number for number, layer in enumerate(LAYERS) for room in layer}

IMPORTS_LM_EVAL = {"qbench/evaluation/zeroshot.py", "qbench/evaluation/lm.py"}

TORCH_FREE = """
    qbench qbench.errors qbench.scheme qbench.record qbench.registry qbench.progress qbench.process
    qbench.cli
    qbench.evaluation.tasks qbench.evaluation.corpora qbench.evaluation.data
    qbench.evaluation.definitions qbench.evaluation.estimates
    qbench.models.checkpoints
    qbench.study.store qbench.comparison.frame qbench.comparison.entries qbench.tables.table
    qbench.tables.layouts qbench.tables.columns qbench.tables.sheet qbench.tables.render
    qbench.tables.published qbench.tables.latex qbench.tables.arrangement
    qbench.tables.paper_layouts
    qbench.comparison.statistics qbench.comparison.pairing qbench.comparison.significance
    qbench.comparison.circumstances
    qbench.comparison.two_runs qbench.comparison.finding qbench.tables.two_runs qbench.tables.marks
    qbench.comparison.seeds qbench.tables.flips
    qbench.comparison.headings qbench.comparison.panels qbench.comparison.reference
    qbench.plots.plot
    qbench.comparison.scaling qbench.comparison.sizes qbench.tables.size_table qbench.plots.style
    qbench.plots.against_bits qbench.plots.against_size
    qbench.comparison.layer_errors qbench.plots.wanted qbench.plots.heatmap qbench.plots.profile
    qbench.comparison.savings qbench.plots.paper_bits qbench.plots.paper_sizes
    qbench.plots.paper_costs
    qbench.reproduction.presets qbench.reproduction.published qbench.reproduction.outcome
    qbench.reproduction.printing qbench.reproduction.verdicts
    qbench.study.listing qbench.study.environment qbench.study.doctor
    qbench.report.report qbench.report.page qbench.evaluation.texts
    qbench.comparison.energy qbench.comparison.footprint qbench.comparison.shapes
    qbench.comparison.run_costs qbench.comparison.cost_points qbench.tables.costs
    qbench.tables.costs_table qbench.tables.model_costs qbench.tables.published_costs
    qbench.plots.against_cost
    qbench.study.findings qbench.study.data_findings
""".split()


class Import(NamedTuple):
    module: str
    names: tuple[str, ...]
    line: int
    in_function: bool


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> list[Import]:
    """Every import of a file but those under ``if TYPE_CHECKING``."""
    return list(_imports(parsed(path), False))


def _imports(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            names = tuple(alias.name for alias in child.names)
            yield Import(child.module or "", names, child.lineno, in_function)
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _imports(child, inside)


def room(module: str) -> str | None:
    """``models`` for ``qbench.models.blocks``; None for the package itself and foreign modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "qbench" and len(parts) > 1 else None


def imported_rooms(found: Import) -> set[str]:
    if found.module == "qbench":
        return {name for name in found.names if name in RANK}
    own = room(found.module)
    return {own} if own else set()


def room_of_file(path: Path) -> str | None:
    inside = path.relative_to(ROOT / "qbench").with_suffix("").parts
    return None if inside == ("__init__",) else inside[0]


def test_every_module_of_qbench_has_a_place_in_the_order_of_layers():
    rooms = {room_of_file(path) for path in SOURCES if ROOT / "qbench" in path.parents} - {None}
    assert rooms <= set(RANK)


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in BASELINES], ids=relative)
def test_nothing_imports_upward(path):
    own = room_of_file(path)
    upward = [
        f"line {found.line}: {found.module}"
        for found in imports(path)
        for other in imported_rooms(found)
        if own is not None and RANK[other] > RANK[own]
    ]
    assert not upward


def baseline_names() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."qbench.baselines"]')[1].split("\n[")[0]
    return {line.split("=")[0].strip() for line in section.splitlines() if "=" in line}


def test_qbench_never_imports_a_baseline():
    guilty = [
        f"{relative(path)}:{found.line}"
        for path in SOURCES
        if path not in BASELINES
        for found in imports(path)
        if found.module.split(".")[0] in ("qbench_baselines", "baselines")
    ]
    assert not guilty


def compared_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Strings that stand in a comparison, a membership test or a ``match`` case."""
    for node in ast.walk(parsed(path)):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            inside = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            inside = [node.value]
        for part in inside:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield node.lineno, leaf.value


def test_qbench_compares_nothing_with_the_name_of_a_method():
    """``none`` stays allowed as a word, ``sign`` and others are grids; methods are the rest."""
    methods = baseline_names() - {"none"}
    assert {"gptq", "quip", "smoothquant", "absmax", "rtn"} <= methods
    guilty = [
        f"{relative(path)}:{line}: {text!r}"
        for path in SOURCES
        if path not in BASELINES
        for line, text in compared_strings(path)
        if text in methods
    ]
    assert not guilty


def test_qbench_tests_for_no_architecture_by_name():
    from qbench.testing import ARCHITECTURES

    families = {*ARCHITECTURES, "llama2", "qwen", "neox", "gptneox", "deepseek", "t5"}
    guilty = [
        f"{relative(path)}:{line}: {text!r}"
        for path in SOURCES
        if relative(path) != "qbench/testing/models.py"
        for line, text in compared_strings(path)
        if families & set(re.split(r"[^a-z0-9]+", text.lower()))
    ]
    assert not guilty


@pytest.mark.parametrize("path", BASELINES, ids=relative)
def test_a_baseline_imports_only_the_public_interface(path):
    import qbench

    for found in imports(path):
        top = found.module.split(".")[0]
        assert top == "qbench" or top == "torch" or top in sys.stdlib_module_names, found
        if top == "qbench":
            assert found.module == "qbench", f"line {found.line}: import it from qbench itself"
            assert set(found.names) <= set(qbench.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_two_modules_import_lm_eval(path):
    found = [i for i in imports(path) if i.module.split(".")[0] == "lm_eval"]
    assert not found or relative(path) in IMPORTS_LM_EVAL


def test_names_exported_by_the_package_exist_and_type_checkers_know_them():
    import qbench

    for name in qbench.__all__:
        assert getattr(qbench, name) is not None
    tree = parsed(ROOT / "qbench" / "__init__.py")
    declared = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert declared == set(qbench.__all__) - {"__version__"}


def test_modules_that_read_results_never_load_torch():
    """Each in turn; the message names the first module after which torch is there."""
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {sorted(heavy)}'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.strip().splitlines()[-1]


# --- style ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_stay_under_400_lines_and_functions_under_60(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 60, f"{node.name} has {length} lines"


def test_there_is_no_utils_module():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_except_without_a_class(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parsed(path))


def seeding_calls(node: ast.AST) -> Iterator[int]:
    """Lines that seed a global generator outside ``with torch.random.fork_rng(...)``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.With) and "fork_rng" in ast.unparse(child.items[0]):
            continue
        if isinstance(child, ast.Call):
            seeds = ("torch.manual_seed", "random.seed", "np.random.seed", "numpy.random.seed")
            if ast.unparse(child.func) in seeds:
                yield child.lineno
        yield from seeding_calls(child)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_seeds_a_global_generator_but_inside_a_fork(path):
    assert not list(seeding_calls(parsed(path)))
