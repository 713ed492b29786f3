"""Where a training keeps its state, and what a finished one leaves.

    OUTPUT/.fp16-2m.training/   while it runs: training.json, loss.csv, the Trainer's checkpoints
    OUTPUT/fp16-2m/             afterwards: the model, its tokenizer, loss.csv, training.json

Both say in ``training.json`` which recipe they belong to, by a digest of everything that decides
the weights, so that a training never continues from another one's state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.errors import QBenchError, RunFailed
from qbench.training.curves import CURVE_FILE
from qbench.training.recipe import TwinRun, digest

RECORD_FILE = "training.json"
RECIPE_FILE = "recipe.yaml"
CHECKPOINT_PREFIX = "checkpoint-"
_STATE_FILE = "trainer_state.json"  # the last file that the Trainer writes of a checkpoint


@dataclass(frozen=True)
class TwinFolder:
    """The two folders of one training."""

    final: Path

    @property
    def work(self) -> Path:
        """Where it keeps its state while it runs."""
        return self.final.with_name(f".{self.final.name}.training")

    @property
    def curve(self) -> Path:
        """The loss curve: of the finished training, else of the running one."""
        return (self.final if self.final.exists() else self.work) / CURVE_FILE

    def record(self) -> dict[str, Any] | None:
        """What is known of the training, finished or not; None before it began."""
        for folder in (self.final, self.work):
            path = folder / RECORD_FILE
            if path.is_file():
                return _read_json(path)
        return None

    def claim(self, run: TwinRun, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Make the work folder, or check that what is there belongs to this training.

        Returns:
            The record of a training that has ended (``status`` is "finished" or "diverged"), else
            None: there is something to do.

        Raises:
            QBenchError: for a folder of another recipe, or of something else.
        """
        found = self.record()
        if found is not None:
            _check_same(self.final, found, identity)
            if found.get("status") == "finished":  # killed before it could tidy up, perhaps
                shutil.rmtree(self.work, ignore_errors=True)
            return found if found.get("status") in ("finished", "diverged") else None
        taken = self.final.exists()
        if taken and (not self.final.is_dir() or any(self.final.iterdir())):
            raise QBenchError(f"{self.final} exists and is no training; choose another --output")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / RECIPE_FILE).write_text(run.recipe.as_yaml(), encoding="utf-8")
            self.write({"status": "running", "digest": digest(identity), "recipe": identity})
        except OSError as error:
            raise QBenchError(f"cannot write to {self.work}: {error.strerror}") from error
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from the same training; a killed one leaves no lock behind.

        Raises:
            QBenchError: if another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise QBenchError(
                    f"{self.final} is being trained by another process; wait for it, or end it"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    def write(self, record: dict[str, Any]) -> None:
        """Write the record of the running training."""
        write_json(self.work / RECORD_FILE, record)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; half-written ones are removed."""
        steps: dict[int, Path] = {}
        for folder in self.work.glob(f"{CHECKPOINT_PREFIX}*"):
            if _is_complete(folder):
                steps[int(folder.name.removeprefix(CHECKPOINT_PREFIX))] = folder
            else:
                shutil.rmtree(folder)
        return steps[max(steps)] if steps else None

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """A folder to write the finished twin to; it becomes the final one when the block ends.

        Raises:
            RunFailed: if it cannot be written.
        """
        partial = self.final.with_name(f".{self.final.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for name in (CURVE_FILE, RECIPE_FILE):
                shutil.copyfile(self.work / name, partial / name)
            if self.final.exists():
                self.final.rmdir()
            partial.rename(self.final)
        except OSError as error:
            reason = error.strerror or error
            raise RunFailed(f"cannot save {self.final} ({reason}); run the same again") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either the old one or the complete new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _is_complete(folder: Path) -> bool:
    try:
        return "global_step" in _read_json(folder / _STATE_FILE)
    except QBenchError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QBenchError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise QBenchError(f"{path} is no record of a training")
    return content


def _check_same(folder: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    if found.get("digest") == digest(identity):
        return
    there = found.get("recipe") or {}
    same = json.loads(json.dumps(identity))
    for field, here in same.items():
        if there.get(field) == here:
            continue
        if field == "corpus":
            difference = "the corpus has another text"
        else:
            difference = f"{field} {json.dumps(there.get(field))}, not {json.dumps(here)}"
        break
    else:
        difference = "by another version of qbench"
    raise QBenchError(
        f"{folder} belongs to another recipe ({difference}); choose another name or --output"
    )
