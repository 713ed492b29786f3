"""Checkpoints: find the files, fingerprint them, load model and tokenizer, refuse what would lie.

A checkpoint is a local folder or a Hub id. Its fingerprint covers the weights, the configuration
and the tokenizer, and neither path nor machine, so that results find each other. What would run
but give wrong numbers (missing or unknown tensors, NaN weights, an architecture that is no causal
language model) is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QBenchError(f"cannot read {path}: {error}") from error

    @property
    def weight_files(self) -> list[Path]:
        """Safetensors files (or pickles, where allowed), by name."""
        pattern = "pytorch_model*.bin" if self.pickled else "*.safetensors"
        return sorted(self.folder.glob(pattern))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration and tokenizer; independent of path and machine."""
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in [*self.weight_files, *(self.folder / n for n in _TOKENIZER_FILES)]:
            if path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of stored weights, from the headers of the safetensors files."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every stored tensor; empty for pickles, whose headers cannot be read alone."""
        found: dict[str, list[int]] = {}
        for path in [] if self.pickled else self.weight_files:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < 10**8 else {}
            found |= {k: v["shape"] for k, v in header.items() if k != "__metadata__"}
        return found

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer.

        Raises:
            QBenchError: if it has none that transformers can read.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
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
        import torch
        from transformers import AutoModelForCausalLM

        if dtype not in DTYPES:
            raise QBenchError(f"dtype {dtype!r} is not offered; choose one of {', '.join(DTYPES)}")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=getattr(torch, dtype),
                use_safetensors=not self.pickled,
                output_loading_info=True,
            )
        except Exception as error:  # a corrupt file surfaces as many kinds
            raise QBenchError(f"cannot load {self.name}: {_first_line(error)}") from error
        model, info = loaded
        self._check_loaded(model, info)
        try:
            return model.to(torch.device(device)).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise QBenchError(f"cannot use device {device!r}: {_first_line(error)}") from error

    def _check_loaded(self, model: torch.nn.Module, info: dict[str, Any]) -> None:
        import torch

        for kind, why in (
            ("missing_keys", "lacks tensors, which would be left random"),
            ("mismatched_keys", "has tensors of another shape than its config.json says"),
            ("unexpected_keys", "has tensors its model class ignores, so it would run without"),
        ):
            names = sorted(str(k) for k in info.get(kind) or ())
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
                raise QBenchError(f"{self.name} {why}: {shown}")
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise QBenchError(f"{self.name}: {name} contains NaN or infinite weights")


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
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if not pickles:
            raise QBenchError(f"{folder} holds no weights (looked for *.safetensors)")
        if not allow_pickle:
            raise QBenchError(
                f"{name} has pickled weights only ({pickles[0]}), which can run code when opened; "
                "convert them to safetensors, or pass --allow-pickle to read tensors alone"
            )
        checkpoint = Checkpoint(checkpoint.name, folder, pickled=True)
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model"]
    patterns += ["*.bin"] if allow_pickle else []
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise QBenchError(f"no such checkpoint folder: {name}") from None
    except Exception as error:  # the Hub client raises many kinds, all meaning "not to be had"
        raise QBenchError(
            f"no folder {name!r} here, and the Hub does not give it ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
