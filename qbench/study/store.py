"""The result store: records on disk, found again by what was measured.

Layout under the root (``results/runs`` by default)::

    <checkpoint>/<scheme>/<baseline>-<hash8>/quantization.json
                                             <task>-<hash8>.json
                                             <task>-<hash8>.items.parquet

Names are for people; what decides is the full key inside each file. Two keys that share the eight
characters get a longer name. A file is written under a temporary name, synced and renamed, so a
file that exists is complete, whatever was killed meanwhile. ``quantization.json`` comes before any
task of its folder, a task's items before its JSON.

Left out on purpose: locks (two processes that measure the same thing write the same file, the
last one wins), deleting, and any index: the folder tree is the index.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from qbench.errors import QBenchError, RunFailed
from qbench.record import RECORD_FORMAT, QuantizationKey, QuantizationRecord, TaskKey, TaskRecord

if TYPE_CHECKING:
    from pandas import DataFrame

_Record = TypeVar("_Record", QuantizationRecord, TaskRecord)

_HASH_LENGTHS = (8, 16, 64)
_STALE_SECONDS = 3600  # no single write takes this long, so an older temporary file has no owner
_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # format n -> format n + 1


@dataclass(frozen=True)
class Run:
    """One quantized model and everything measured on it."""

    path: Path
    quantization: QuantizationRecord
    tasks: list[TaskRecord]


class Store:
    """Records under one folder. Nothing is created until something is saved."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def find_quantization(self, checkpoint: str, key: QuantizationKey) -> QuantizationRecord | None:
        """The record with exactly this key, whatever the checkpoint was called when it was saved.

        Raises:
            RunFailed: if the file that should hold it cannot be read.
        """
        found = self._find_folder(checkpoint, key)
        return found[1] if found else None

    def find_task(
        self, checkpoint: str, quantization_key: QuantizationKey, task_key: TaskKey
    ) -> TaskRecord | None:
        """The measurement with exactly these keys, or None.

        Raises:
            RunFailed: if the file that should hold it cannot be read.
        """
        folder = self._find_folder(checkpoint, quantization_key)
        found = _find_task_file(folder[0], task_key) if folder else None
        return found[1] if found else None

    def save_quantization(self, record: QuantizationRecord) -> Path:
        """Write (or replace) the record; returns its path.

        Raises:
            RunFailed: if it cannot be written; an earlier record is then still whole.
        """
        folder = self.folder(record.checkpoint, record.key)
        return _write_json(folder / "quantization.json", record)

    def save_task(
        self,
        checkpoint: str,
        quantization_key: QuantizationKey,
        record: TaskRecord,
        items: Mapping[str, Sequence[Any]] | None = None,
    ) -> Path:
        """Write (or replace) a measurement, its items first; returns the path of its JSON.

        Args:
            checkpoint: display name of the checkpoint.
            quantization_key: key of the model it was measured on, saved before.
            record: the measurement.
            items: one column per name, one entry per scored item.

        Raises:
            RunFailed: if it cannot be written.
        """
        found = self._find_folder(checkpoint, quantization_key)
        if found is None:
            raise QBenchError(
                f"task {record.key.task!r} belongs to a model that is not in {self.root}; "
                "save its quantization record first"
            )
        folder = found[0]
        known = _find_task_file(folder, record.key)
        path = known[0] if known else _free_task_path(folder, record.key)
        if items is not None:
            _write_parquet(path.with_suffix(".items.parquet"), items)
        return _write_json(path, record)

    def runs(self) -> Iterator[Run]:
        """Every run, in the order of the folder names.

        A file that cannot be read is named in a warning and left out; the others are not hidden.
        """
        for folder in sorted({path.parent for path in self.root.glob("*/*/*/*.json")}):
            try:
                quantization = _read(folder / "quantization.json", QuantizationRecord)
            except QBenchError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            tasks = []
            for path in sorted(folder.glob("*.json")):
                if path.name == "quantization.json":
                    continue
                try:
                    tasks.append(_read(path, TaskRecord))
                except QBenchError as error:
                    warnings.warn(f"left out: {error}", stacklevel=2)
            yield Run(folder, quantization, tasks)

    def items(self, run: Run, task: TaskRecord) -> DataFrame:
        """The items of one measurement, one row each.

        Raises:
            QBenchError: if none were stored.
        """
        import pandas

        found = _find_task_file(run.path, task.key)
        path = found[0].with_suffix(".items.parquet") if found else None
        if path is None or not path.exists():
            raise QBenchError(
                f"no items are stored for task {task.key.task!r} in {run.path}; "
                "measure it again to get them"
            )
        try:
            return pandas.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RunFailed(f"cannot read {path} ({_first_line(error)}); {_DELETE}") from error

    def check_writable(self) -> None:
        """Find out before a long run whether its results can be saved. Leaves nothing behind.

        Raises:
            QBenchError: naming the folder that cannot be written.
        """
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"qbench")
                probe.flush()
        except OSError as error:
            raise QBenchError(
                f"cannot write results under {self.root} ({_reason(error)} at {folder}); "
                "make it writable or name another folder with --results"
            ) from error

    def folder(self, checkpoint: str, key: QuantizationKey) -> Path:
        """Where the record with this key is, or is going to be."""
        found = self._find_folder(checkpoint, key)
        return found[0] if found else self._new_folder(checkpoint, key)

    def _find_folder(
        self, checkpoint: str, key: QuantizationKey
    ) -> tuple[Path, QuantizationRecord] | None:
        """The folder whose record has this key: under this checkpoint's name first, then any."""
        digest, scheme = key.digest(), slug(key.scheme)
        for length in _HASH_LENGTHS:
            name = f"{slug(key.baseline.name)}-{digest[:length]}"
            home = self.root / slug(checkpoint) / scheme / name
            elsewhere = sorted(self.root.glob(f"*/{scheme}/{name}"))
            for folder in dict.fromkeys([home, *elsewhere]):
                path = folder / "quantization.json"
                if path.exists():
                    record = _read(path, QuantizationRecord)
                    if record.key.digest() == digest:
                        return folder, record
        return None

    def _new_folder(self, checkpoint: str, key: QuantizationKey) -> Path:
        digest, base = key.digest(), self.root / slug(checkpoint) / slug(key.scheme)
        names = [f"{slug(key.baseline.name)}-{digest[:length]}" for length in _HASH_LENGTHS]
        free = [name for name in names if not (base / name / "quantization.json").exists()]
        return base / free[0]


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Bring the dictionary of an older record up to the current format, one step at a time.

    Raises:
        QBenchError: for a record of a newer format, or one without a format.
    """
    version = data.get("format")
    if not isinstance(version, int):
        raise QBenchError("it has no record format number, so qbench did not write it")
    if version > RECORD_FORMAT:
        raise QBenchError(
            f"it has record format {version}, this qbench reads up to {RECORD_FORMAT}; "
            "upgrade qbench"
        )
    for step in range(version, RECORD_FORMAT):
        data = _STEPS[step](data) | {"format": step + 1}
    return data


def slug(text: str) -> str:
    """A name that every file system takes; not unique, the key inside the file is."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", text.replace("=", "-")).strip("._-")
    if len(name) > 100:
        name = f"{name[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name or "unnamed"


_DELETE = "delete it to measure again"


def _find_task_file(folder: Path, key: TaskKey) -> tuple[Path, TaskRecord] | None:
    for path in _task_paths(folder, key):
        if path.exists():
            record = _read(path, TaskRecord)
            if record.key.digest() == key.digest():
                return path, record
    return None


def _free_task_path(folder: Path, key: TaskKey) -> Path:
    return next(path for path in _task_paths(folder, key) if not path.exists())


def _task_paths(folder: Path, key: TaskKey) -> list[Path]:
    digest = key.digest()
    return [folder / f"{slug(key.task)}-{digest[:length]}.json" for length in _HASH_LENGTHS]


def _read(path: Path, kind: type[_Record]) -> _Record:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise QBenchError("it is not a JSON object, so qbench did not write it")
        return kind.model_validate(_decode(migrate(data)))
    except QBenchError as error:
        raise RunFailed(f"cannot use {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunFailed(
            f"{path} is not a {kind.__name__} ({where}: {first['msg']}); "
            "move it away, or delete it to measure again"
        ) from error
    except OSError as error:
        raise RunFailed(f"cannot read {path} ({_reason(error)}); check it, or {_DELETE}") from error
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise RunFailed(f"{path} is damaged ({_first_line(error)}); {_DELETE}") from error


def _write_json(path: Path, record: QuantizationRecord | TaskRecord) -> Path:
    try:
        data = _encode(record.model_dump(mode="python"))
        text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RunFailed(
            f"the record for {path} holds a value JSON cannot ({_first_line(error)}); "
            "reports, details and parameters take numbers, strings, lists and dictionaries"
        ) from error
    return write_whole(path, lambda file: file.write(text.encode()))


def _write_parquet(path: Path, items: Mapping[str, Sequence[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.table(dict(items))
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        lengths = {name: len(column) for name, column in items.items()}
        raise RunFailed(
            f"the items of {path.name} do not form a table ({_first_line(error)}); "
            f"every column needs one entry per item, they have {lengths}"
        ) from error
    return write_whole(path, lambda file: pyarrow.parquet.write_table(table, file))


def write_whole(path: Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Fill a temporary file in the same folder, sync it, rename it over ``path``, sync the folder.

    The temporary file never ends in .json or .parquet, so readers do not see it.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunFailed(
            f"cannot write {path} ({_reason(error)}); nothing half-written was left; "
            "make room or make the folder writable, or name another one with --results"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and its renames need no sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes: only those too old to have a living owner."""
    for path in folder.glob("*.tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:  # another process was faster, or may not: a leftover harms nobody
            continue


def _encode(value: Any) -> Any:
    """JSON has no infinity: a float that is not finite becomes {"non_finite": "inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"non_finite": str(value)}
    if isinstance(value, dict):
        return {key: _encode(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(inner) for inner in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"non_finite"}:
            return float(value["non_finite"])
        return {key: _decode(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    return value


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
