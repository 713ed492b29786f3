"""What this machine has for a run: packages, extras, processor, memory, data, results.

Everything is looked up where it lies; nothing is downloaded, and the Hub is asked only on request.
Left out: whether a method or a checkpoint works, which ``qbench check`` and ``--dry-run`` say.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from qbench.errors import QBenchError
from qbench.record import QuantizationRecord, TaskRecord
from qbench.study.data_findings import GROUP as DATA
from qbench.study.data_findings import data_findings, is_offline
from qbench.study.environment import environment
from qbench.study.findings import Finding
from qbench.study.speed import free_memory
from qbench.study.store import Run, Store

PACKAGES, EXTRAS, MACHINE = "Packages", "Optional", "Machine"
RESULTS = "Results"
_DECIDING = ("torch", "transformers", "lm_eval", "tokenizers")
"""Packages whose version can move a number."""
_LATEX = ("latexmk", "pdflatex", "xelatex", "lualatex", "tectonic")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_HUB_SECONDS = 6


def examine(data: Path | None, results: Path, ask_hub: bool = False) -> list[Finding]:
    """Everything worth knowing before a run.

    Args:
        data: the user's data folder.
        results: where runs are stored.
        ask_hub: whether to see if the Hub answers, which takes up to some seconds.
    """
    found = [*_packages(), *_optional(), *_machine(), *_results(results)]
    answers = _hub_answers() if ask_hub and not is_offline() else None
    return [*found, _hub(answers), *data_findings(data, answers)]


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """(name, specifier) of what qbench needs; with an extra, of what that adds."""
    from packaging.requirements import Requirement

    for text in requires("qbench") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        wanted = marker is None or marker.evaluate({"extra": extra})
        if wanted and always == (not extra):
            yield requirement.name, str(requirement.specifier)


def _fits(have: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(have, prereleases=True)


def _packages() -> Iterator[Finding]:
    yield Finding(PACKAGES, "qbench", _version("qbench") or "not installed as a package")
    for name, specifier in _requirements(""):
        have = _version(name)
        if have is None:
            found = f'is not installed; pip install "{name}{specifier}"'
        elif not _fits(have, specifier):
            found = (
                f'{have}, but qbench needs {specifier}; pip install --upgrade "{name}{specifier}"'
            )
        else:
            yield Finding(PACKAGES, name, have)
            continue
        yield Finding(PACKAGES, name, found, "PROBLEM")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _optional() -> Iterator[Finding]:
    """Extras of qbench, and programs that some results are made for."""
    for extra in metadata("qbench").get_all("Provides-Extra") or []:
        if extra == "dev":
            continue
        wanted = list(_requirements(extra))
        have = {name: _version(name) for name, _ in wanted}
        if not wanted:
            yield Finding(EXTRAS, extra, "has no release for this version of Python", "absent")
        elif all(v is not None and _fits(v, dict(wanted)[n]) for n, v in have.items()):
            yield Finding(EXTRAS, extra, ", ".join(f"{n} {v}" for n, v in have.items()))
        else:
            found = f'not installed; pip install "qbench[{extra}]" adds the baseline'
            yield Finding(EXTRAS, extra, found, "absent")
    programs = (
        ("LaTeX", _LATEX, "tables for a paper are written without it, and not tried out"),
        ("browser", _BROWSERS, "report pages are written without it; any browser opens them"),
    )
    for what, names, without in programs:
        path = next((p for p in map(shutil.which, names) if p), None)
        yield Finding(EXTRAS, what, path or without, "ok" if path else "absent")


def _machine() -> Iterator[Finding]:
    import torch

    facts = environment()
    yield Finding(MACHINE, "python", f"{facts['python']} on {facts['system']}")
    processor = f"{facts['cpu']}, {facts['cpus']} usable, {facts['threads']} threads"
    yield Finding(MACHINE, "processor", processor)
    yield _waiting()
    yield _column_loops()
    free = free_memory()
    if free is not None:
        text = f"{free / 2**30:.1f} GiB free"
        little = free < 2**30
        text += "; a small model takes 1, close something or take --stream" if little else ""
        yield Finding(MACHINE, "memory", text, "PROBLEM" if little else "ok")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding(MACHINE, "gpu", ", ".join(names))
    else:
        yield Finding(MACHINE, "gpu", "none; everything runs on the processor", "note")


def _waiting() -> Finding:
    """What threads do at the end of a product; qbench's own commands let them sleep."""
    policy = os.environ.get("OMP_WAIT_POLICY", "not set").lower()
    if policy == "passive":
        return Finding(MACHINE, "waiting threads", "asleep (OMP_WAIT_POLICY=passive)")
    found = (
        f"awake (OMP_WAIT_POLICY={policy}), many times slower beside another process; set it to "
        "passive"
    )
    return Finding(MACHINE, "waiting threads", found, "note")


def _column_loops() -> Finding:
    """Whether the column loops of GPTQ and LDLQ are compiled."""
    have = _version("numba")
    if have is not None:
        return Finding(MACHINE, "column loops", f"compiled by numba {have}")
    slow = "numba is not installed, so they run in torch, many times slower"
    return Finding(MACHINE, "column loops", slow, "absent")


def _results(results: Path) -> Iterator[Finding]:
    try:
        Store(results).check_writable()
    except QBenchError as error:
        yield Finding(RESULTS, "folder", str(error), "PROBLEM")
        return
    folder = results
    while not folder.exists():
        folder = folder.parent if folder != folder.parent else Path()
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{results} can be written, {free:.1f} GiB free"
    yield Finding(RESULTS, "folder", text, "PROBLEM" if free < 1 else "ok")
    yield from _stored(results)


def _stored(results: Path) -> Iterator[Finding]:
    """How many runs are stored, which cannot be read, and which other versions measured."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runs = list(Store(results).runs())
    for warning in said:
        found = str(warning.message).removeprefix("left out: ")
        found += "" if "delete it" in found else "; delete it to measure again"
        yield Finding(RESULTS, "unreadable", found, "PROBLEM")
    failed = sum(run.quantization.status == "failed" for run in runs)
    failed += sum(task.status == "failed" for run in runs for task in run.tasks)
    text = f"{len(runs)}, {sum(len(run.tasks) for run in runs)} measurements"
    text += f"; {failed} failures are stored, --retry-failed repeats them" if failed else ""
    yield Finding(RESULTS, "stored runs", text, "note" if failed else "ok")
    yield from _other_versions(runs)


def _other_versions(runs: list[Run]) -> Iterator[Finding]:
    """Numbers of other versions, to be compared with full-precision rows of their own alone."""
    installed = {name: _version(name) for name in _DECIDING}
    others: Counter[tuple[str, str]] = Counter()
    for run in runs:
        records: list[QuantizationRecord | TaskRecord] = [run.quantization, *run.tasks]
        others.update(
            {
                (name, record.environment[name])
                for record in records
                for name in _DECIDING
                if record.environment.get(name, installed[name]) != installed[name]
            }
        )
    for (name, old), count in sorted(others.items()):
        found = (
            f"{count} runs were measured with {name} {old}, {installed[name]} is installed; before "
            "they are compared with new ones, measure their full-precision rows anew (into "
            "another --results)"
        )
        yield Finding(RESULTS, "other versions", found, "note")


def _hub(answers: bool | None) -> Finding:
    if is_offline():
        found = "HF_HUB_OFFLINE is set: only what was fetched before"
    elif answers is None:
        found = "not asked; qbench doctor --hub does"
    elif answers:
        return Finding(DATA, "hub", "answers")
    else:
        found = "does not answer: checkpoints and data have to be local (--data DIR)"
    return Finding(DATA, "hub", found, "note")


def _hub_answers() -> bool:
    from qbench.evaluation.data import hub_answers

    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(hub_answers()), daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)  # looking up its address has no time limit of its own
    return bool(answers and answers[0])
