"""Finding the rows of a data set: a file under the user's data folder, or else the Hub.

A data folder holds ``tasks/<name>/<split>.jsonl`` in the Hub's columns, ``corpora/<name>/
<split>.jsonl`` or ``.txt``, or the authors' own file where a task definition names one. A file
that is there is used without touching the network. The data hash is taken over the rows, so the
same data is the same data whichever way it came.

Left out: what the rows mean (corpora, task definitions).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.errors import QBenchError

_PROBE_SECONDS = 5
_LOADERS = ("json", "csv", "text", "parquet", "arrow")  # datasets' own readers of local files


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the Hub: arguments of ``datasets.load_dataset``."""

    path: str
    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """The authors' own file of a split: a name pattern and a ``qbench_tasks.originals`` reader."""

    pattern: str
    reader: str


@dataclass(frozen=True)
class Rows:
    """The rows of one split."""

    rows: Sequence[Mapping[str, Any]]
    source: str
    """Where they came from, for the reader of a record; never part of a key."""

    def sha256(self) -> str:
        """Hash of the rows' canonical JSON."""
        return hash_json(self.rows)


def hash_json(values: Iterable[Any]) -> str:
    """SHA-256 over the canonical JSON of every value, a line each."""
    digest = hashlib.sha256()
    for value in values:
        line = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def load_rows(
    name: str,
    split: str,
    data_dir: Path | None = None,
    hub: HubSource | None = None,
    original: Original | None = None,
) -> Rows:
    """The rows of a split, from the data folder if they are there, else from the Hub.

    Raises:
        QBenchError: naming every place looked for, when there is no such data.
    """
    places: list[str] = []
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise QBenchError(f"the data folder {data_dir} does not exist; pass one that does")
        found = _local_file(name, split, Path(data_dir), original, places)
        if found is not None:
            return found
    if hub is None:
        raise _missing(name, split, places, "it is on no Hub data set that qbench knows")
    return _from_hub(name, split, hub, places)


def read_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or one row ``{"text": ...}`` for any other text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QBenchError(f"cannot read {path}: {error}; give a UTF-8 text or JSONL file") from None
    if path.suffix != ".jsonl":
        return [{"text": text}]
    rows = []
    # not splitlines(): JSON strings may hold U+2028 and its like, which end no line of JSONL
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise QBenchError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise QBenchError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def _local_file(
    name: str, split: str, data_dir: Path, original: Original | None, places: list[str]
) -> Rows | None:
    candidates = [
        data_dir / "tasks" / name / f"{split}.jsonl",
        data_dir / "corpora" / name / f"{split}.jsonl",
        data_dir / "corpora" / name / f"{split}.txt",
    ]
    for path in candidates:
        if path.is_file():
            return Rows(read_file(path), _inside(path, data_dir))
    places += [str(path) for path in candidates]
    if original is None:
        return None
    folder = data_dir / "tasks" / name
    for path in sorted(folder.glob(original.pattern)):
        reader = getattr(importlib.import_module("qbench_tasks.originals"), original.reader)
        try:
            return Rows(reader(path), _inside(path, data_dir))
        except (KeyError, ValueError) as error:
            raise QBenchError(
                f"{path} does not read as the authors' file of {name} ({error!r}); "
                "give it as it was handed out"
            ) from None
    places.append(str(folder / original.pattern))
    return None


def _inside(path: Path, data_dir: Path) -> str:
    """A file as records name it: by its place in the data folder, not on the machine."""
    return f"data folder: {path.relative_to(data_dir).as_posix()}"


def _from_hub(name: str, split: str, hub: HubSource, places: list[str]) -> Rows:
    import datasets

    label = f"Hub data set {hub.path}" + (f" ({hub.name})" if hub.name else "")
    try:
        with _fail_fast(local=hub.path in _LOADERS):
            rows = datasets.load_dataset(hub.path, hub.name, split=split, **hub.arguments)
    except (OSError, ValueError, RuntimeError) as error:  # what datasets raises for no such data
        reason = f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _missing(name, split, places, reason) from error
    return Rows(rows, label)


@contextmanager
def _fail_fast(local: bool) -> Iterator[None]:
    """Look only in the local cache while the Hub does not answer.

    Without this, datasets retries every file for about 23 seconds before it gives up.
    """
    from datasets import config
    from huggingface_hub import constants

    if local or constants.HF_HUB_OFFLINE or hub_answers():
        yield
        return
    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def hub_answers() -> bool:
    """Whether the Hub can be reached (any HTTP answer counts)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # noqa: BLE001  (whatever client the session is made of)
        return False
    return True


def _missing(name: str, split: str, places: list[str], reason: str) -> QBenchError:
    looked = ", ".join([*places, reason])
    first = f"put it at {places[0]}" if places else "pass a data folder with --data DIR that has it"
    return QBenchError(
        f"the {split} split of {name} was found nowhere (looked for {looked}); {first}, or go "
        "online (and unset HF_HUB_OFFLINE)"
    )
