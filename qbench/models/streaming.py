"""Models larger than memory: decoder blocks stay on disk and come one at a time.

A streamed model is an ordinary transformers model whose blocks have no weights until they are
wanted. :func:`resident` brings one in; a block that is called without it brings itself in for that
call, so everything that works on a model works on a streamed one, slowly. Blocks that were
quantized are written to a work folder before the next one begins, and come from there afterwards:
what was interrupted goes on at its block.

Tensors are mapped from the checkpoint's safetensors and copied only where the dtype changes or a
method writes. Left out: checkpoints whose tensors transformers renames or merges while loading,
pickles, and BitNet formats; they are refused and load whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qbench import __version__
from qbench.errors import QBenchError, RunFailed
from qbench.models import files
from qbench.models.blocks import find_blocks
from qbench.models.bypass import is_replaced
from qbench.models.checks import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_STREAM = "_qbench_stream"
"""Attribute of a streamed model."""
_REPORT = "qbench"
"""Key of a finished block's report among its file's metadata."""
_VERSION = "qbench_version"
"""Key of the version that wrote it: a block is finished by the version that began the model."""
SPILLED = 1 << 20
"""Activations of a batch of this many bytes and more lie in a file of their own."""


class Stream:
    """Where the tensors of one streamed model lie, and which blocks are in memory."""

    def __init__(
        self,
        checkpoint: str,
        model: PreTrainedModel,
        places: Mapping[str, tuple[Path, str]],
        dtype: torch.dtype,
        device: torch.device,
        work: Path | None,
    ) -> None:
        self.checkpoint, self.places = checkpoint, dict(places)
        self.dtype, self.device, self.work = dtype, device, work
        self.blocks = dict(find_blocks(model))
        self.present: set[str] = set()
        self.checked: set[str] = set()
        self.reports: dict[str, dict[str, Any]] = {}
        """What was said about finished blocks when they were written."""
        for name, module in self.blocks.items():
            self._bring_itself(name, module)
        self._find_finished()

    def _bring_itself(self, name: str, module: nn.Module) -> None:
        """A block that is called while it has no weights has them for that call."""
        open_calls: list[AbstractContextManager[None]] = []

        def before(module: nn.Module, args: Any) -> None:
            needed = name not in self.present and not is_replaced(module)
            here = self.resident(name) if needed else nullcontext()
            here.__enter__()
            open_calls.append(here)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if open_calls:  # none where the weights could not be read
                open_calls.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(before, prepend=True)
        module.register_forward_hook(after, always_call=True)

    def _path(self, name: str) -> Path | None:
        number = list(self.blocks).index(name)
        return None if self.work is None else self.work / f"block-{number:05d}.safetensors"

    def _find_finished(self) -> None:
        for name in self.blocks:
            path = self._path(name)
            if path is not None and path.is_file():
                with safe_open(path, "pt") as file:
                    said = file.metadata()
                if said.get(_VERSION) == __version__:
                    self.reports[name] = json.loads(said[_REPORT])

    @contextmanager
    def resident(self, name: str) -> Iterator[None]:
        """Within this, the block has its weights: the finished ones if there are any.

        What is written to them is lost afterwards unless :meth:`keep` stored it.
        """
        if name in self.present:
            yield
            return
        self._load(name)
        self.present.add(name)
        try:
            yield
        finally:
            self.present.discard(name)
            empty_(self.blocks[name])

    @contextmanager
    def original(self, name: str) -> Iterator[None]:
        """Within this, a resident block has the weights of the checkpoint."""
        self._load(name, original=True)
        try:
            yield
        finally:
            self._load(name)

    def _load(self, name: str, original: bool = False) -> None:
        module = self.blocks[name]
        own = self._path(name) if name in self.reports and not original else None
        wanted = module.state_dict()
        found = {
            key: self.read(f"{name}.{key}") if own is None else self._read(own, f"{name}.{key}")
            for key in wanted
        }
        module.load_state_dict(found, assign=True)
        module.requires_grad_(False)

    def read(self, name: str) -> Tensor:
        """A tensor of the original checkpoint by its name in the model, finite."""
        path, key = self.places[name]
        tensor = self._read(path, key)
        if name not in self.checked:
            check_finite(self.checkpoint, name, tensor)
            self.checked.add(name)
        return tensor

    def _read(self, path: Path, key: str) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)

    def keep(self, name: str, report: dict[str, Any]) -> None:
        """Write a resident block and what is to be known of it; it is on disk when this returns.

        Raises:
            RunFailed: if it cannot be written.
        """
        path = self._path(name)
        if path is None:
            raise QBenchError("this streamed model has no work folder to keep quantized blocks in")
        state = self.blocks[name].state_dict()
        tensors = {f"{name}.{key}": value.contiguous() for key, value in state.items()}
        write_tensors(path, tensors, {_REPORT: json.dumps(report), _VERSION: __version__})
        self.reports[name] = report

    def forget(self, name: str) -> None:
        """Let the block be the checkpoint's again."""
        del self.reports[name]

    def spill(self, hidden: Tensor) -> Tensor:
        """The same activations, in a nameless file if they are large (their pages can go).

        Raises:
            RunFailed: if the disk is full.
        """
        if self.work is None or hidden.nbytes < SPILLED or hidden.device.type != "cpu":
            return hidden
        path = self.work / f"activations-{os.getpid()}"
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:  # a mapped page without a place on disk kills the process
                os.posix_fallocate(file.fileno(), 0, hidden.nbytes)
            kept = torch.from_file(
                str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype
            ).view(hidden.shape)
        except OSError as error:
            raise RunFailed(f"no room for activations at {path} ({error.strerror})") from error
        finally:
            path.unlink(missing_ok=True)
        return kept.copy_(hidden)


def attach_(model: nn.Module, stream: Stream) -> None:
    """Make a model, in place, one whose blocks come from this stream."""
    setattr(model, _STREAM, stream)


def stream_of(model: nn.Module) -> Stream | None:
    """The stream of a streamed model, None for one in memory."""
    found = getattr(model, _STREAM, None)
    return found if isinstance(found, Stream) else None


def resident(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Within this, a decoder block has its weights; one in memory has them anyway."""
    stream = stream_of(model)
    return nullcontext() if stream is None else stream.resident(name)


def empty_(module: nn.Module) -> None:
    """Let go of a module's stored tensors in place; computed buffers stay."""
    stored = set(module.state_dict())
    for prefix, part in module.named_modules():
        for key, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[key] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
        for key, buffer in list(part._buffers.items()):
            if buffer is not None and f"{prefix}.{key}".lstrip(".") in stored:
                part._buffers[key] = torch.empty_like(buffer, device="meta")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that it is complete and on disk, or not there.

    Raises:
        RunFailed: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the name, too, is on disk
        finally:
            os.close(descriptor)
    except Exception as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunFailed(f"cannot write {path} ({files.first_line(error)})") from error
        raise
