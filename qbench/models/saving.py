"""Write a quantized model as an ordinary transformers checkpoint.

Weights are stored dequantized, so the folder loads anywhere. Activation quantizers are no part of
such a checkpoint; what was done is written to ``qbench.json`` beside the weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import QBenchError, RunFailed
from qbench.models.streamed import save_streamed
from qbench.models.streaming import stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qbench.record import QuantizationRecord


def check_target(folder: Path) -> None:
    """Refuse a target that holds something already, or that cannot be made.

    Raises:
        QBenchError: naming the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QBenchError(f"{folder} exists and is not empty; --save never overwrites")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise QBenchError(f"cannot save to {folder} ({error.strerror} at {parent})") from error


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` when all went well and is gone if not.

    Raises:
        QBenchError: if ``folder`` is taken.
        RunFailed: if it cannot be written.
    """
    from safetensors import SafetensorError

    check_target(folder)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunFailed(f"cannot save to {folder} ({reason}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: QuantizationRecord,
    folder: Path,
) -> None:
    """Save to ``folder``, which appears only when it is complete.

    Raises:
        QBenchError: if the folder is taken, or an online input transform is part of the model.
        RunFailed: if it cannot be written.
    """
    check_target(folder)
    online = [layer.name for layer in record.layers if layer.extra.get("input_transform")]
    if online:
        raise QBenchError(
            f"{record.key.baseline.name} transforms the input of {online[0]} at run time, which an "
            "ordinary checkpoint cannot hold; nothing was saved"
        )
    with writing(folder) as partial:
        if stream_of(model) is None:
            model.save_pretrained(partial)
        else:
            save_streamed(model, partial)
        tokenizer.save_pretrained(partial)
        write_record(record, partial)


def write_record(record: QuantizationRecord, folder: Path) -> None:
    """Write what was done to a model beside its weights."""
    (folder / "qbench.json").write_text(record.model_dump_json(indent=2), encoding="utf-8")
