"""The dimensions of a model that its costs depend on, read from its modules and configuration.

Works on a model in memory, a streamed one and one on the meta device alike: only shapes are looked
at. The number of key and value heads is in no tensor's shape, so it comes from the configuration.

Left out: caches that are smaller than one key and one value per head and token (latent attention,
sliding windows); learned positions, which count as neither embedding nor head.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError
from qbench.models import files
from qbench.models.blocks import find_blocks
from qbench.models.checks import quiet
from qbench.record import Dimensions, MatrixShape

if TYPE_CHECKING:
    from torch import nn

    from qbench.models.checkpoints import Checkpoint

_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def dimensions(model: Any, stored_bytes: int | None = None) -> Dimensions:
    """The dimensions of a causal language model.

    Args:
        model: any of transformers, with or without content in its tensors.
        stored_bytes: size of the files it came from.

    Raises:
        QBenchError: for a model without a list of decoder blocks.
    """
    text = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    tied = tied or getattr(text, "tie_word_embeddings", False) is True
    n_heads = int(getattr(text, "num_attention_heads", 0))  # none in a state-space model
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(n_heads, 1)
    blocks = [block for _, block in find_blocks(model)]
    return Dimensions(
        hidden_size=int(text.hidden_size),
        intermediate_size=_first(text, _INTERMEDIATE),
        n_blocks=len(blocks),
        n_heads=n_heads,
        n_kv_heads=_kv_heads(text, n_heads),
        head_dim=int(head_dim),
        vocabulary=int(text.vocab_size) if head is None else int(head.weight.shape[0]),
        tied_embeddings=tied,
        embedding_parameters=embedding.weight.numel(),
        head_parameters=0 if tied else head.weight.numel(),
        matrices=_matrices(blocks, active_share(text)),
        stored_bytes=stored_bytes,
    )


def checkpoint_dimensions(checkpoint: Checkpoint) -> Dimensions:
    """The dimensions of a checkpoint's model; no weight is read.

    Raises:
        QBenchError: for a configuration that transformers rejects.
    """
    return dimensions(checkpoint._skeleton(), stored_bytes(checkpoint))


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Size of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in checkpoint.weight_files)


def active_share(config: Any) -> float:
    """Share of a mixture's experts that one token meets; 1 for any other model."""
    used, held = getattr(config, "num_experts_per_tok", None), _first(config, _EXPERTS)
    return min(1.0, used / held) if used and held else 1.0


def _matrices(blocks: list[nn.Module], share: float) -> list[MatrixShape]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    counts: Counter[tuple[int, int]] = Counter()
    active: Counter[tuple[int, int]] = Counter()
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, (nn.Linear, Conv1D)):
            rows, columns = module.weight.shape
            shape = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
            counts[shape] += 1
            active[shape] += 1
    for parameter in (p for block in blocks for p in block.parameters() if p.ndim == 3):
        experts, rows, columns = parameter.shape  # the common order; both give the same costs
        counts[rows, columns] += experts
        active[rows, columns] += experts * share  # type: ignore[assignment]
    return [
        MatrixShape(out_features=rows, in_features=columns, count=n, active=active[rows, columns])
        for (rows, columns), n in counts.items()
    ]


def _kv_heads(config: Any, n_heads: int) -> int:
    """Heads of keys and values; a configuration with ``multi_query`` has one.

    A field that the architecture does not declare may stand in its file and means nothing.
    """
    grouped = getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and not grouped:
        return 1
    declared = tuple(name for name in _KV_HEADS if hasattr(type(config), name))
    return _first(config, declared) or n_heads


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if isinstance(value, int) and value), None)


def find_dimensions(name: str) -> tuple[Dimensions, int, str | None]:
    """The dimensions of a checkpoint that may have no weights here: its configuration is enough.

    Args:
        name: a folder with config.json, ``bundled:NAME``, or a Hub id, of which config.json alone
            is fetched.

    Returns:
        dimensions, number of parameters, and the scheme its weights are stored at (None for full
        precision).

    Raises:
        QBenchError: if there is no such configuration, or transformers rejects it.
    """
    from qbench.models.checkpoints import Checkpoint

    folder = Path(name).expanduser()
    if name.startswith(files.BUNDLED):
        folder = files.bundled_checkpoint(name)
    elif not folder.is_dir():
        folder = files.download_config(name)
    checkpoint = Checkpoint(name, folder)
    files.read_json(folder / "config.json")
    weights = checkpoint.weight_files
    if weights and all(path.is_file() for path in weights):
        own = checkpoint.own_scheme
        found = checkpoint_dimensions(checkpoint)
        return found, checkpoint.parameters, None if own is None else str(own.scheme)
    model = _from_configuration(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return dimensions(model), parameters, None


def _from_configuration(folder: Path) -> Any:
    """A model on the meta device; of a quantized checkpoint, the one it was made from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"), quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds for a configuration it rejects
        raise QBenchError(
            f"transformers cannot read the config.json in {folder} ({files.first_line(error)})"
        ) from error
