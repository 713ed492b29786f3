"""For every pinned task and corpus: the file it is read from, or the one that is missing.

The places are those of :mod:`qbench.evaluation.data`, in the order in which they are tried; last
comes what a library fetched from the Hub before. Nothing is read, and nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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


def how_to_get(sources: Mapping[str, Source], data: Path | None) -> str:
    """What to do about splits of one data set that are not here; what each is for -> split."""
    first = next(iter(sources.values()))
    there = "into DIR" if data is None else "there"
    if first.original is not None:
        return (
            f"put its authors' {first.original} {there}, in tasks/{first.name}, or the same rows "
            f"as {first.split}.jsonl"
        )
    if first.hub is None:
        return "comes with qbench: --data bundled:world"
    purposes: dict[str, list[str]] = {}
    for purpose, source in sources.items():
        purposes.setdefault(source.split, []).append(purpose)
    files = " and ".join(
        f"tasks/{first.name}/{split}.jsonl" + (f" ({', '.join(found)})" if any(found) else "")
        for split, found in purposes.items()
    )
    if is_offline():
        return f"put {files} {there} (Hub data set {first.hub}; HF_HUB_OFFLINE is set)"
    return f"a run fetches it from the Hub ({first.hub}), or put {files} {there}"


def is_offline() -> bool:
    """Whether the libraries were told to leave the Hub alone."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def data_findings(data: Path | None, hub_answers: bool | None = None) -> list[Finding]:
    """The data folder, and a line for every pinned task and every corpus.

    Args:
        data: the user's data folder.
        hub_answers: whether the Hub does; None where it was not asked.
    """
    if data is not None and not data.is_dir():
        return [Finding(GROUP, "folder", f"{data} is no folder; give one that exists", "PROBLEM")]
    lines = [*_tasks(data), *_corpora(data)]
    alone = is_offline() or hub_answers is False
    nothing = alone and not any(finding.state == "ok" for finding in lines)
    text = str(data) if data else "no --data DIR given"
    if nothing:
        text += "; nothing is there or was fetched before, and the Hub is out of reach"
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
        found = _have(source, data)
        text = found or how_to_get({"": source}, data)
        yield Finding(GROUP, f"task {task}", text, "ok" if found else "absent")


def _corpora(data: Path | None) -> Iterator[Finding]:
    from qbench.evaluation.corpora import CORPORA

    for name, kind in CORPORA.items():
        hub = None if kind.hub is None else kind.hub.path
        sources = {
            "to measure": Source(kind.folder or name, kind.evaluation_split, hub),
            "to calibrate": Source(kind.folder or name, kind.calibration_split, hub),
        }
        have = {purpose: _have(source, data) for purpose, source in sources.items()}
        texts = [f"{found} ({purpose})" for purpose, found in have.items() if found]
        lacking = {purpose: sources[purpose] for purpose, found in have.items() if not found}
        texts += [how_to_get(lacking, data)] if lacking else []
        state: State = "ok" if any(have.values()) else "absent"
        yield Finding(GROUP, f"corpus {name}", "; ".join(texts), state)


def _have(source: Source, data: Path | None) -> str | None:
    """Where a split is, if it is anywhere."""
    here = source.here(data)
    if here is None and source.fetched:
        return f"fetched from the Hub before ({source.hub})"
    return here


def _cache() -> Path:
    """Where ``datasets`` keeps what it fetched."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
