"""A checkpoint's files: which hold weights, what their headers promise, where bundled ones lie.

No weight is read here and nothing heavy is imported, so that a sweep can be planned in a moment.
What does not fit together (missing shards, cut files) is refused before anything takes time.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from qbench.errors import QBenchError, unknown

WORLD = Path(__file__).resolve().parent.parent / "world"
"""Room of the bundled world: ``checkpoints/<name>`` and ``data``, installed with the package."""
BUNDLED = "bundled:"
"""Prefix of names that mean something in :data:`WORLD`."""
_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model")


def bundled_checkpoints() -> dict[str, Path]:
    """Every bundled checkpoint by its name (without ``bundled:``)."""
    folders = sorted((WORLD / "checkpoints").glob("*/config.json"))
    return {path.parent.name: path.parent for path in folders}


def bundled_checkpoint(name: str) -> Path:
    """The folder of ``bundled:NAME``.

    Raises:
        QBenchError: for a name nobody bundled, with the nearest ones.
    """
    known = bundled_checkpoints()
    short = name.removeprefix(BUNDLED)
    if short not in known:
        raise unknown("bundled checkpoint", name, [f"{BUNDLED}{other}" for other in known])
    return known[short]


def data_folder(path: Path | str | None) -> Path | None:
    """A data folder as given, or the bundled one for ``bundled:world``.

    Raises:
        QBenchError: for another ``bundled:`` name.
    """
    if path is None or not str(path).startswith(BUNDLED):
        return None if path is None else Path(path)
    if str(path) != f"{BUNDLED}{WORLD.name}":
        raise unknown("bundled data", str(path), [f"{BUNDLED}{WORLD.name}"])
    return WORLD / "data"


def weight_files(folder: Path, pickled: bool = False) -> list[Path]:
    """The files transformers reads: one, or the shards that the index names.

    Other copies of the weights in the folder (``consolidated.safetensors``) are none of them.
    """
    name = "pytorch_model.bin" if pickled else "model.safetensors"
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():
        return [path for path in [folder / name] if path.is_file()]
    shards = read_json(index).get("weight_map") or {}
    return sorted({folder / str(shard) for shard in shards.values()})


def check_present(files: list[Path]) -> None:
    """Refuse missing shards.

    Raises:
        QBenchError: naming the first.
    """
    for path in files:
        if not path.is_file():
            raise QBenchError(f"{path} is missing, though the index beside it names it")


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file holds: tensor name -> dtype, shape and place in the file.

    Raises:
        QBenchError: for a file that is none, or is cut short.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size)) if size < 10**8 else {}
        found.pop("__metadata__", None)
        promised = 8 + size + max(entry["data_offsets"][1] for entry in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QBenchError(
            f"{path} cannot be read as safetensors; it is damaged or cut short, fetch it again"
        ) from error
    if path.stat().st_size != promised:
        raise QBenchError(
            f"{path} has {path.stat().st_size} bytes where its header promises {promised}; it is "
            "cut short or damaged, fetch it again"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        QBenchError: naming the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QBenchError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise QBenchError(f"cannot read {path}: it holds no JSON object")
    return found


def sha256(path: Path) -> bytes:
    """Digest of a file's bytes."""
    begun = _BEGUN.pop(path.resolve(), None)
    if begun is not None:
        digest = begun.digest.result()
        if begun.version == _version(path):
            return digest
    return _sha256(path)


def begin_hashing(name: str) -> None:
    """Hash the weights of a local or bundled checkpoint in a thread, for :func:`sha256` to come.

    Meant for the seconds that imports take. What is wrong with the files is not said here.
    """
    folder = Path(name).expanduser()
    if name.startswith(BUNDLED):
        folder = bundled_checkpoints().get(name.removeprefix(BUNDLED), folder)
    try:
        begun = {path.resolve(): _Begun(_version(path)) for path in weight_files(folder)}
    except (OSError, QBenchError):  # said once the checkpoint is looked for
        return
    if begun:
        _BEGUN.update(begun)
        Thread(target=_hash, args=(begun,), daemon=True).start()  # nobody waits for it at the end


def _sha256(path: Path) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(1 << 23)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.digest()


@dataclass
class _Begun:
    """A file that a thread is reading."""

    version: tuple[int, ...]
    digest: Future[bytes] = field(default_factory=Future)


_BEGUN: dict[Path, _Begun] = {}


def _version(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, or another is put in its place."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(begun: dict[Path, _Begun]) -> None:
    for path, file in begun.items():
        try:
            file.digest.set_result(_sha256(path))
        except BaseException as error:  # noqa: BLE001 - raised where the digest is asked for
            file.digest.set_exception(error)


def download(name: str, allow_pickle: bool = False) -> Path:
    """Fetch a checkpoint from the Hub, or find it in the Hub's cache.

    Raises:
        QBenchError: if it cannot be had.
    """
    return _snapshot(name, [*_PATTERNS, *(["*.bin"] if allow_pickle else [])])


def download_config(name: str) -> Path:
    """Fetch a checkpoint's configuration alone; the folder it is in.

    Raises:
        QBenchError: if it cannot be had.
    """
    return _snapshot(name, ["config.json"])


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise QBenchError(f"no such checkpoint folder: {name}") from None
    except Exception as error:  # the Hub client raises many kinds, all meaning "not to be had"
        if constants.HF_HUB_OFFLINE:
            raise QBenchError(
                f"no folder {name!r} here, nor in the Hub cache; HF_HUB_OFFLINE is set, so the Hub "
                "was not asked"
            ) from error
        raise QBenchError(
            f"no folder {name!r} here, and the Hub does not give it ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a message of one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
