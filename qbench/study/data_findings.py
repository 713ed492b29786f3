"""For every pinned task and corpus: the file it is read from, or the one that is missing.

The places are those of :mod:`qbench.evaluation.data`, in the order in which they are tried; last
comes what a library fetched from the Hub before. Nothing is read, and nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qbench.study.findings import Finding, State

GROUP = "Data"


@dataclass(frozen=True)
class Source:
    """Where the rows of one split may lie."""

    name: str
    """Folder under ``tasks`` or ``corpora``."""
    split: str
    hub: str | None
    """Data set of the Hub."""
    original: str | None = None
    """Pattern of the file that its authors give out."""

    def here(self, data: Path | None) -> str | None:
        """The file in the data folder, by its place there."""
        if data is None:
            return None
        places = [
            data / "tasks" / self.name / f"{self.split}.jsonl",
            data / "corpora" / self.name / f"{self.split}.jsonl",
            data / "corpora" / self.name / f"{self.split}.txt",
        ]
        if self.original is not None:
            places += sorted((data / "tasks" / self.name).glob(self.original))
        found = next((path for path in places if path.is_file()), None)
        return None if found is None else found.relative_to(data).as_posix()

    @property
    def fetched(self) -> bool:
        """Whether it is among what was fetched from the Hub before."""
        return self.hub is not None and (_cache() / self.hub.replace("/", "___")).is_dir()

    def how_to_get(self, data: Path | None) -> str:
        """What to do about one that is not here."""
        folder = "DIR" if data is None else str(data)
        wanted = f"tasks/{self.name}/{self.split}.jsonl"
        file = f"put {wanted} into {folder}"
        if self.original is not None:
            return (
                f"its authors give it out on request; put their {self.original} into "
                f"{folder}/tasks/{self.name}"
            )
        if self.hub is None:
            return "comes with qbench: --data bundled:world"
        if is_offline():
            return f"{file} (Hub data set {self.hub}; HF_HUB_OFFLINE is set)"
        return f"a run fetches it from the Hub ({self.hub}), or {file}"


def is_offline() -> bool:
    """Whether the libraries were told to leave the Hub alone."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def data_findings(data: Path | None) -> list[Finding]:
    """The data folder, and a line for every pinned task and every corpus."""
    if data is not None and not data.is_dir():
        return [Finding(GROUP, "folder", f"{data} is no folder; give one that exists", "PROBLEM")]
    lines = [*_tasks(data), *_corpora(data)]
    nothing = is_offline() and not any(finding.state == "ok" for finding in lines)
    text = str(data) if data else "no --data folder given"
    if nothing:
        text += "; nothing is there or was fetched before, and HF_HUB_OFFLINE is set"
    state: State = "PROBLEM" if nothing else "ok" if data else "note"
    return [Finding(GROUP, "folder", text, state), *lines]


def _tasks(data: Path | None) -> Iterator[Finding]:
    from qbench.evaluation.definitions import pinned_tasks, read_definition, task_splits

    for task, path in pinned_tasks().items():
        definition = read_definition(path)
        metadata = definition.get("metadata") or {}
        split = task_splits(definition, 0)[0]
        original = (metadata.get("original") or {}).get(split)
        hub = definition["dataset_path"]
        source = Source(metadata.get("data", task), split, hub, original)
        yield Finding(GROUP, f"task {task}", *_state(source, data))


def _corpora(data: Path | None) -> Iterator[Finding]:
    from qbench.evaluation.corpora import CORPORA

    for name, kind in CORPORA.items():
        hub = None if kind.hub is None else kind.hub.path
        parts = {
            "to measure": Source(kind.folder or name, kind.evaluation_split, hub),
            "to calibrate": Source(kind.folder or name, kind.calibration_split, hub),
        }
        states = {purpose: _state(source, data) for purpose, source in parts.items()}
        text = "; ".join(f"{purpose}: {found}" for purpose, (found, _) in states.items())
        ready = any(state == "ok" for _, state in states.values())
        yield Finding(GROUP, f"corpus {name}", text, "ok" if ready else "absent")


def _state(source: Source, data: Path | None) -> tuple[str, State]:
    here = source.here(data)
    if here is not None:
        return here, "ok"
    if source.fetched:
        return f"fetched from the Hub before ({source.hub})", "ok"
    return source.how_to_get(data), "absent"


def _cache() -> Path:
    """Where ``datasets`` keeps what it fetched."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
