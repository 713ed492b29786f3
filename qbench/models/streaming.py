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
import re
from collections.abc import Iterable, Iterator, Mapping
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
from qbench.models.blocks import find_blocks, first_tensor
from qbench.models.bypass import Call, blocks_replaced, bypass_of, is_replaced
from qbench.models.checks import check_causal, check_finite, check_tensors, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.models.checkpoints import Checkpoint

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


def save_streamed(model: PreTrainedModel, folder: Path) -> None:
    """Write a streamed model as a sharded checkpoint, a block at a time, under its stored names.

    Raises:
        RunFailed: if it cannot be written.
    """
    names = [name for name, _ in find_blocks(model)]
    inside = tuple(f"{name}." for name in names)
    shards = [
        f"model-{i + 1:05d}-of-{len(names) + 1:05d}.safetensors" for i in range(len(names) + 1)
    ]
    weight_map: dict[str, str] = {}
    size = 0

    stream = stream_of(model)
    assert stream is not None

    def write(shard: str, named: dict[str, Tensor]) -> None:
        nonlocal size
        tensors = {stream.places[name][1]: value for name, value in named.items()}
        write_tensors(folder / shard, tensors, {})
        weight_map.update(dict.fromkeys(tensors, shard))
        size += sum(tensor.nbytes for tensor in tensors.values())

    outside: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name in stream.places and not name.startswith(inside):  # of tied ones the first
            outside.setdefault(tensor.data_ptr(), (name, tensor))
    write(shards[0], dict(outside.values()))
    for shard, (name, module) in zip(shards[1:], find_blocks(model), strict=True):
        with resident(model, name):
            state = module.state_dict()
            write(shard, {f"{name}.{key}": value.contiguous() for key, value in state.items()})
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def why_not_streamed(checkpoint: Checkpoint) -> str | None:
    """One sentence why a checkpoint cannot be streamed, judged by its files; None if it can."""
    if checkpoint.pickled:
        return f"{checkpoint.name} has pickled weights, which cannot be read block by block"
    if checkpoint.bitnet is not None:
        return f"{checkpoint.name} is a BitNet checkpoint, which loads whole"
    return None


def open_streamed(
    checkpoint: Checkpoint, dtype: str, device: str = "cpu", work: Path | None = None
) -> PreTrainedModel:
    """The model of a checkpoint with its decoder blocks left on disk.

    Args:
        checkpoint: with safetensors.
        dtype: of the computation, by its name in torch.
        device: where a resident block lives.
        work: folder of the blocks quantized so far; None if nothing is going to be quantized.

    Raises:
        QBenchError: for a checkpoint that cannot be streamed, or whose tensors do not fit.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    if reason := why_not_streamed(checkpoint):
        raise QBenchError(f"{reason}; --no-stream loads it")
    config = checkpoint.load_config()
    with quiet(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    _check_dtype_plan(checkpoint.name, model, dtype)
    places = _places(checkpoint, model)
    stream = Stream(
        checkpoint.name, model, places, getattr(torch, dtype), torch.device(device), work
    )
    inside = tuple(f"{name}." for name in stream.blocks)
    outside = [n for n in model.state_dict() if n in places and not n.startswith(inside)]
    model.load_state_dict({name: stream.read(name) for name in outside}, strict=False, assign=True)
    model.tie_weights(missing_keys=set(model.state_dict()) - set(places))
    setattr(model, _STREAM, stream)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    for buffered in model.modules():  # computed buffers, such as rotary frequencies
        for key, buffer in buffered._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                buffered._buffers[key] = buffer.to(stream.device)
    model.eval().requires_grad_(False)
    _check_causal(checkpoint.name, model, stream)
    return model


def _check_causal(checkpoint: str, model: PreTrainedModel, stream: Stream) -> None:
    """Refuse a model that looks ahead, judged by its first block: the others are of its kind."""
    how = bypass_of(model, stream.resident)
    if how.refused:
        check_causal(checkpoint, model)
        return
    name, first = next(iter(stream.blocks.items()))
    forward = first.forward

    def first_alone(number: int, hidden: Tensor, call: Call) -> Tensor:
        return hidden if number else first_tensor(forward(hidden, *call[0], **call[1]))

    with stream.resident(name), blocks_replaced(model, how.output, first_alone):
        check_causal(checkpoint, model)


def _check_dtype_plan(checkpoint: str, model: PreTrainedModel, dtype: str) -> None:
    """Refuse a model of which transformers keeps parts in float32 at this dtype."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "float16":
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept and dtype != "float32":
        raise QBenchError(
            f"{checkpoint} cannot be streamed in {dtype}: transformers keeps {sorted(kept)[0]} in "
            "float32; use --dtype float32, or --no-stream to load it whole"
        )


def _places(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """File and stored name of every tensor of the model, by its name in the model."""
    stored = {
        key: (path, entry["shape"])
        for path in checkpoint.weight_files
        for key, entry in files.header(path).items()
    }
    keys = _names_in_model(stored, model)
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    found, wrong = {}, []
    for name, tensor in state.items():
        for known in (name, name.removeprefix(prefix), prefix + name):
            if known in keys:
                path, shape = stored[keys[known]]
                found[name] = (path, keys[known])
                wrong += [name] if list(tensor.shape) != shape else []
                break
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameters.get(name)) for name in found}
    missing = [n for n in state if n not in found and id(parameters.get(n)) not in present]
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise QBenchError(
            f"{checkpoint.name} cannot be streamed: no stored tensor is {missing[0]}{more}; it is "
            "missing, or transformers makes it of several while loading; --no-stream loads it whole"
        )
    read = {key for _, key in found.values()}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unexpected = [
        key
        for key in set(stored) - read
        if not any(re.search(pattern, key) for pattern in (*ignored, r"rotary_emb\.inv_freq$"))
        and id(parameters.get(key)) not in present
    ]
    check_tensors(checkpoint.name, mismatched=wrong, unexpected=unexpected)
    return found


def _names_in_model(stored: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Names in the model -> names in the file, where transformers 5 renames while loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # a transformers that renames nothing, or elsewhere
        return {key: key for key in stored}
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    names = {}
    for key in stored:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[name] = key
    return names
