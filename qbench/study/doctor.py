"""What this machine has: packages, device, data, whether results can be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from qbench.errors import QBenchError
from qbench.study.environment import environment
from qbench.study.speed import free_memory
from qbench.study.store import Store


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    is_problem: bool = False
    is_absent: bool = False
    """Not here, which matters only to those who want it."""

    def __str__(self) -> str:
        state = "PROBLEM" if self.is_problem else "absent" if self.is_absent else "ok"
        return f"{state:8} {self.what}: {self.found}"


def examine(data: Path | None, results: Path) -> list[Finding]:
    """Everything worth knowing before a run."""
    found = list(_packages())
    found += _machine()
    found += _results(results)
    found += _data(data)
    return found


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for text in requires("qbench") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "is not installed; pip install qbench", True)
            continue
        fits = requirement.specifier.contains(have, prereleases=True)
        wanted = "" if fits else f", but qbench needs {requirement.specifier}"
        yield Finding(requirement.name, f"{have}{wanted}", not fits)


def _machine() -> Iterator[Finding]:
    import torch

    facts = environment()
    yield Finding("python", f"{facts['python']} on {facts['system']}")
    yield Finding(
        "processor", f"{facts['cpu']}, {facts['cpus']} usable, {facts['threads']} threads"
    )
    yield Finding("waiting threads", _waiting())
    yield _column_loops()
    free = free_memory()
    if free is not None:
        yield Finding("memory", f"{free / 2**30:.1f} GiB free", free < 2**30)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("gpu", ", ".join(names))
    else:
        yield Finding("gpu", "none; everything runs on the processor")


def _waiting() -> str:
    """What threads do at the end of a product; qbench's own commands let them sleep."""
    policy = os.environ.get("OMP_WAIT_POLICY", "not set").lower()
    if policy == "passive":
        return "asleep (OMP_WAIT_POLICY=passive)"
    return f"awake (OMP_WAIT_POLICY={policy}), many times slower beside another process"


def _column_loops() -> Finding:
    """Whether the column loops of GPTQ and LDLQ are compiled."""
    try:
        return Finding("column loops", f"compiled by numba {version('numba')}")
    except PackageNotFoundError:
        slow = "numba is not installed, so they run in torch, many times slower"
        return Finding("column loops", slow, is_absent=True)


def _results(results: Path) -> Iterator[Finding]:
    try:
        Store(results).check_writable()
    except QBenchError as error:
        yield Finding("results", str(error), True)
        return
    folder = results
    while not folder.exists():
        folder = folder.parent if folder != folder.parent else Path()
    free = shutil.disk_usage(folder).free / 2**30
    yield Finding("results", f"{results} can be written, {free:.1f} GiB free", free < 1)


def _data(data: Path | None) -> Iterator[Finding]:
    from qbench.evaluation.corpora import CORPORA
    from qbench.evaluation.definitions import pinned_tasks, read_definition

    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    if data is None:
        where = "offline, so they need --data" if offline else "they come from the Hub"
        yield Finding("data", f"no --data folder given; {where}", offline)
        return
    if not data.is_dir():
        yield Finding("data", f"{data} is no folder", True)
        return
    for kind in ("tasks", "corpora"):
        if not (data / kind).is_dir():
            yield Finding(kind, f"{data / kind} does not exist", is_absent=True)
    places = {f"corpus {name}": kind.folder or name for name, kind in CORPORA.items()}
    originals = {}
    for task, path in pinned_tasks().items():
        metadata = read_definition(path)["metadata"]
        places[f"task {task}"] = metadata.get("data", task)
        files = [v for k, v in metadata.get("original", {}).items() if k != "reader"]
        originals[f"task {task}"] = " or ".join(files)
    elsewhere = "and HF_HUB_OFFLINE is set" if offline else "so it has to come from the Hub"
    for what, folder in places.items():
        found = [path for kind in ("tasks", "corpora") for path in (data / kind / folder).glob("*")]
        names = ", ".join(sorted(path.name for path in found))
        absent = f"not in {data / 'tasks' / folder}, {elsewhere}"
        if originals.get(what):
            absent += f", or {originals[what]} be put there"
        yield Finding(what, names or absent, is_absent=not names)
