"""Checkpoints: find the files, fingerprint them, load model and tokenizer, refuse what would lie.

A checkpoint is a local folder or a Hub id. Its fingerprint covers the weights, the configuration
and the tokenizer, and neither path nor machine, so that results find each other. What would run
but give wrong numbers (missing or unknown tensors, NaN weights, attention that looks ahead) is
refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
DTYPES = ("float32", "bfloat16", "float16")
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a causal language model in it, not loaded yet."""

    name: str
    """How tables call it: the folder's name, or the Hub id."""
    folder: Path
    pickled: bool = False
    """Weights are in ``.bin`` files, which are loaded without running code."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return _read_json(self.folder / "config.json")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files transformers reads: one, or the shards that the index names.

        Other copies of the weights in the folder (``consolidated.safetensors``) are none of them.
        """
        name = "pytorch_model.bin" if self.pickled else "model.safetensors"
        index = self.folder / f"{name}.index.json"
        if (self.folder / name).is_file() or not index.is_file():
            return [path for path in [self.folder / name] if path.is_file()]
        shards = _read_json(index).get("weight_map") or {}
        return sorted({self.folder / str(shard) for shard in shards.values()})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration and tokenizer; independent of path and machine."""
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in [*self.weight_files, *(self.folder / n for n in _TOKENIZER_FILES)]:
            if path.is_file():
                digest.update(path.name.encode())
                digest.update(_file_sha256(path))
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of stored weights, from the headers of the safetensors files."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every stored tensor; empty for pickles, whose headers cannot be read alone."""
        found: dict[str, list[int]] = {}
        for path in [] if self.pickled else self.weight_files:
            found |= {name: entry["shape"] for name, entry in _header(path).items()}
        return found

    @cached_property
    def row_lengths(self) -> dict[str, int]:
        """Inputs of every matrix in the decoder blocks by its name, without reading any weight.

        0 for experts that share one tensor: which way they lie shows only when the block runs.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        from qbench.models.blocks import find_blocks

        with torch.device("meta"), _quiet():
            model = AutoModelForCausalLM.from_config(self.load_config())
        found = {}
        for block_name, block in find_blocks(model):
            for name, module in block.named_modules():
                if isinstance(module, (torch.nn.Linear, Conv1D)):
                    rows = module.weight.shape
                    found[f"{block_name}.{name}"] = rows[0 if isinstance(module, Conv1D) else 1]
            for name, parameter in block.named_parameters():
                experts = range(parameter.shape[0] if parameter.ndim == 3 else 0)
                found |= {f"{block_name}.{name}.{expert}": 0 for expert in experts}
        return found

    def load_config(self) -> PretrainedConfig:
        """The configuration as transformers understands it.

        Raises:
            QBenchError: for an architecture that this transformers does not know.
        """
        from transformers import AutoConfig

        try:
            with _quiet():
                return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a configuration it rejects
            raise QBenchError(
                f"transformers cannot read the config.json of {self.name} ({_first_line(error)})"
            ) from error

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer.

        Raises:
            QBenchError: if it has none that transformers can read.
        """
        from transformers import AutoTokenizer

        try:
            with _quiet():
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a broken tokenizer
            raise QBenchError(
                f"{self.name} has no tokenizer that can be read ({_first_line(error)}); "
                f"put tokenizer.json into {self.folder}"
            ) from error

    def load_model(self, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode, every tensor accounted for and finite.

        Raises:
            QBenchError: for missing or unknown tensors, non-finite weights, an unreadable file, an
                unknown dtype or device.
        """
        import pickle

        import torch
        from transformers import AutoModelForCausalLM

        check_dtype(dtype)
        check_device(device)
        try:
            with _quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    dtype=getattr(torch, dtype),
                    use_safetensors=not self.pickled,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, in one line
                    trust_remote_code=False,
                )
        except pickle.UnpicklingError as error:
            raise QBenchError(
                f"the .bin files of {self.name} hold more than tensors, which could run code when "
                "opened; convert them to safetensors where you trust them"
            ) from error
        except Exception as error:  # a corrupt file surfaces as many kinds
            raise QBenchError(f"cannot load {self.name}: {_first_line(error)}") from error
        model, info = loaded
        self._check_loaded(model, info)
        model = model.to(torch.device(device)).eval().requires_grad_(False)
        self._check_causal(model)
        return model

    def _check_loaded(self, model: torch.nn.Module, info: dict[str, Any]) -> None:
        import torch

        for kind, why in (
            ("missing_keys", "lacks tensors, which would be left random"),
            ("mismatched_keys", "has tensors of another shape than its config.json says"),
            ("unexpected_keys", "has tensors its model class ignores, so it would run without"),
        ):
            names = sorted(k if isinstance(k, str) else str(k[0]) for k in info.get(kind) or ())
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
                raise QBenchError(f"{self.name} {why}: {shown}")
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise QBenchError(f"{self.name}: {name} contains NaN or infinite weights")

    def _check_causal(self, model: PreTrainedModel) -> None:
        """Refuse a model in which a later token changes what is said about earlier ones."""
        import torch

        last = model.get_input_embeddings().num_embeddings - 1  # type: ignore[operator]
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device).clamp(max=last)
        try:
            with torch.no_grad():
                ahead, other = model(input_ids=ids).logits[:, :-1].float()
        except Exception as error:  # whatever a model raises that does not fit its own weights
            raise QBenchError(f"{self.name} does not run: {_first_line(error)}") from error
        tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
        if (ahead - other).abs().max() > tolerance * ahead.abs().max():
            raise QBenchError(
                f"{self.name} ({type(model).__name__}) is no causal language model: its attention "
                "looks ahead; qbench measures next-token prediction"
            )


def find_checkpoint(name: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Locate a checkpoint by folder or Hub id and check that it can be run.

    Args:
        name: a folder, or a Hub id such as ``facebook/opt-125m``.
        allow_pickle: accept ``.bin`` weights, loaded with ``weights_only=True``.

    Raises:
        QBenchError: naming what is missing and where it was looked for.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local:
        if folder.exists():
            raise QBenchError(f"{name} is a file; give the folder that holds config.json")
        folder = _download(name, allow_pickle)
    checkpoint = Checkpoint(folder.resolve().name if local else name, folder)
    if not (folder / "config.json").is_file():
        raise QBenchError(f"{folder} is no checkpoint: it has no config.json")
    _check_architecture(checkpoint)
    if not checkpoint.weight_files:
        checkpoint = _pickled(checkpoint, allow_pickle)
    _check_files(checkpoint)
    return checkpoint


def load_checkpoint(
    name: str, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint, checked.

    Raises:
        QBenchError: see :func:`find_checkpoint` and :meth:`Checkpoint.load_model`.
    """
    checkpoint = find_checkpoint(name)
    return checkpoint.load_model(dtype, device), checkpoint.load_tokenizer()


def check_dtype(dtype: str) -> None:
    """Raise a QBenchError for a compute dtype that is not offered."""
    if dtype not in DTYPES:
        raise QBenchError(f"dtype {dtype!r} is not offered; choose one of {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Raise a QBenchError for a device that this machine, or this torch, does not have."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        have += ["mps"] if torch.backends.mps.is_available() else []
        raise QBenchError(
            f"cannot use device {device!r}; this machine and this torch have {', '.join(have)}"
        ) from error


def _pickled(checkpoint: Checkpoint, allow_pickle: bool) -> Checkpoint:
    """The same checkpoint read from its ``.bin`` files, where that is allowed."""
    folder = checkpoint.folder
    pickled = Checkpoint(checkpoint.name, folder, pickled=True)
    if not pickled.weight_files:
        raise QBenchError(
            f"{folder} holds no weights (looked for model.safetensors and its index)"
            + ("" if allow_pickle else "; weights in .bin files need --allow-pickle")
        )
    if not allow_pickle:
        raise QBenchError(
            f"{checkpoint.name} has pickled weights only ({pickled.weight_files[0].name}), which "
            "can run code when opened; convert them to safetensors, or pass --allow-pickle to "
            "read tensors alone"
        )
    return pickled


def _check_files(checkpoint: Checkpoint) -> None:
    """Refuse missing shards and damaged safetensors before anything takes time."""
    for path in checkpoint.weight_files:
        if not path.is_file():
            raise QBenchError(f"{path} is missing, though the index beside it names it")
    checkpoint.shapes()


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file holds: tensor name -> dtype, shape and place in the file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 10**8 else {}
        header.pop("__metadata__", None)
        promised = 8 + size + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QBenchError(
            f"{path} cannot be read as safetensors; it is damaged or cut short, fetch it again"
        ) from error
    if path.stat().st_size != promised:
        raise QBenchError(
            f"{path} has {path.stat().st_size} bytes where its header promises {promised}; it is "
            "cut short or damaged, fetch it again"
        )
    return header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QBenchError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise QBenchError(f"cannot read {path}: it holds no JSON object")
    return found


def _check_architecture(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    names = config.get("architectures") or []
    if names and not any(str(n).endswith(CAUSAL) for n in names):
        raise QBenchError(
            f"{checkpoint.name} is a {names[0]}, not a causal language model; qbench measures "
            "next-token prediction"
        )
    quantized = config.get("quantization_config") or {}
    if quantized:
        raise QBenchError(
            f"{checkpoint.name} is quantized already "
            f"(quant_method={quantized.get('quant_method', 'unknown')}); give its full-precision "
            "original"
        )


def _download(name: str, allow_pickle: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model"]
    patterns += ["*.bin"] if allow_pickle else []
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
            f"no folder {name!r} here, and the Hub does not give it ({_first_line(error)})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from explaining at length what qbench then says in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _file_sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
