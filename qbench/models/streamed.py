"""Opening and saving a checkpoint whose blocks stay on disk (:mod:`~.streaming`).

Tensors are found under the names that transformers gives them. What it would do to them while
loading beyond that (merging, casting some parts otherwise) is refused, as is a model that looks
ahead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qbench.errors import QBenchError
from qbench.models import files
from qbench.models.blocks import find_blocks, first_tensor
from qbench.models.bypass import Call, blocks_replaced, bypass_of
from qbench.models.checks import check_causal, check_tensors, quiet
from qbench.models.streaming import Stream, attach_, resident, stream_of, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.models.checkpoints import Checkpoint


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
    if checkpoint.gptq is not None:
        return f"{checkpoint.name} is a GPTQ checkpoint, which loads whole"
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
    attach_(model, stream)
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
