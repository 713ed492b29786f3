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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError
from qbench.models import files, gptq_format
from qbench.models.acceptance import check_architecture, check_quantization
from qbench.models.bitnet.formats import BitNetFormat, Stored, detect, once
from qbench.models.bitnet.report import LoadReport
from qbench.models.checks import check_causal, check_device, check_dtype, quiet
from qbench.models.files import first_line
from qbench.models.gptq_format import GPTQFormat
from qbench.models.own_scheme import OwnScheme, trained_at
from qbench.process import uncollected
from qbench.scheme import Scheme

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qbench.record import LayerReport

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
    latent: bool = False
    """The latent weights of a BitNet checkpoint, as an ordinary full-precision model."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return files.read_json(self.folder / "config.json")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files transformers reads, or AutoGPTQ's under names of its own."""
        found = files.weight_files(self.folder, self.pickled)
        if found or self.pickled or self._gptq_entry is None:
            return found
        return gptq_format.weight_files(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration and tokenizer; independent of path and machine."""
        digest = hashlib.sha256(b"latent" if self.latent else b"")
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
        said = [gptq_format.CONFIG] if self._gptq_entry is not None else []
        others = (self.folder / name for name in (*said, *_TOKENIZER_FILES))
        for path in [*self.weight_files, *others]:
            if path.is_file():
                digest.update(path.name.encode())
                digest.update(files.sha256(path))
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the tokenizer's files."""
        digest = hashlib.sha256()
        for path in (self.folder / name for name in _TOKENIZER_FILES):
            if path.is_file():
                digest.update(path.name.encode() + files.sha256(path))
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of weights, from the headers of the safetensors files."""
        if self.bitnet is not None:
            return self.bitnet.parameters(self.tensors)
        tied = self.config.get("tie_word_embeddings") is True
        if self.gptq is not None:
            return self.gptq.parameters(self.tensors, tied)
        return sum(math.prod(stored.shape) for stored in once(self.tensors, tied).values())

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Every stored tensor; empty for pickles, whose headers cannot be read alone."""
        found: dict[str, Stored] = {}
        for path in [] if self.pickled else self.weight_files:
            for name, entry in files.header(path).items():
                found[name] = Stored(tuple(entry["shape"]), entry["dtype"])
        return found

    @cached_property
    def bitnet(self) -> BitNetFormat | None:
        """How a BitNet checkpoint stores its weights; None for a checkpoint of another kind.

        Raises:
            QBenchError: for one that would not run as it was trained.
        """
        return detect(self.name, self.config, self.tensors)

    @cached_property
    def _gptq_entry(self) -> dict[str, Any] | None:
        """What the configuration says of a GPTQ checkpoint."""
        entry = gptq_format.entry_of(self.config, self.folder)
        return None if entry is None else dict(entry)

    @cached_property
    def gptq(self) -> GPTQFormat | None:
        """How a checkpoint in the GPTQ format stores its weights; None for another kind.

        Raises:
            QBenchError: for a packing that is not read.
        """
        return gptq_format.detect(self.name, self._gptq_entry, self.tensors)

    @property
    def own_scheme(self) -> OwnScheme | None:
        """The scheme of weights that were trained at low width, or quantized elsewhere."""
        if self.gptq is not None:
            return self.gptq.own_scheme
        trained = self.trained_scheme
        return None if trained is None else trained_at(trained)

    @property
    def trained_scheme(self) -> Scheme | None:
        """The scheme a BitNet checkpoint was trained at; None where weights are full precision."""
        return None if self.bitnet is None or self.latent else self.bitnet.scheme

    @property
    def why_not_quantized(self) -> str | None:
        """One sentence why a checkpoint cannot be quantized afterwards; None if it can."""
        if self.gptq is not None:
            return (
                f"{self.name} is quantized already, {self.own_scheme}; quantize its "
                "full-precision original"
            )
        if self.bitnet is None or self.latent:
            return None
        latent = (
            "--latent (latent: true in a sweep) quantizes its latent weights"
            if self.bitnet.is_latent
            else "it holds ternary codes and no latent weights to quantize"
        )
        return f"{self.name} is trained at {self.bitnet.scheme.label}; {latent}"

    @property
    def why_not_saved(self) -> str | None:
        """One sentence why its quantized model is no checkpoint of transformers; None if it is."""
        if self.bitnet is None or not (self.latent and self.bitnet.has_input_norms):
            return None
        return f"{self.name} has norms inside its linears, for which transformers has no class"

    @property
    def load_report(self) -> list[str]:
        """What was decided about low-width weights, a line each; empty for any other."""
        if self.gptq is not None:
            return self.gptq.lines()
        return [] if self.bitnet is None else LoadReport.of(self.bitnet, self.latent).lines()

    def layer_reports(self, model: nn.Module) -> list[LayerReport]:
        """What a record says of the matrices of weights that bring their own scheme."""
        from qbench.models.bitnet import trained
        from qbench.models.gptq_loading import layer_reports

        if self.gptq is not None:
            return layer_reports(self, model)
        own = self.own_scheme
        return [] if own is None else trained.layer_reports(model, own.scheme)

    @cached_property
    def row_lengths(self) -> dict[str, int]:
        """Inputs of every matrix in the decoder blocks by its name, without reading any weight.

        0 for experts that share one tensor: which way they lie shows only when the block runs.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        from qbench.models.blocks import find_blocks

        model, found = self._skeleton(), {}
        for block_name, block in find_blocks(model):
            for name, module in block.named_modules():
                if isinstance(module, (torch.nn.Linear, Conv1D)):
                    rows = module.weight.shape
                    found[f"{block_name}.{name}"] = rows[0 if isinstance(module, Conv1D) else 1]
            for name, parameter in block.named_parameters():
                experts = range(parameter.shape[0] if parameter.ndim == 3 else 0)
                found |= {f"{block_name}.{name}.{expert}": 0 for expert in experts}
        return found

    def _skeleton(self) -> PreTrainedModel:
        """The model with its tensors on the meta device."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.bitnet is not None:
            from qbench.models.bitnet.loading import skeleton

            return skeleton(self, "latent" if self.latent else "frozen")
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(self.load_config())

    def load_config(self) -> PretrainedConfig:
        """The configuration as transformers understands it.

        Raises:
            QBenchError: for an architecture that this transformers does not know.
        """
        from transformers import AutoConfig

        if self.bitnet is not None:
            from qbench.models.bitnet.architecture import register

            register()
        try:
            with quiet():
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a configuration it rejects
            raise QBenchError(
                f"transformers cannot read the config.json of {self.name} ({first_line(error)})"
            ) from error
        if self.gptq is not None:  # its weights are plain once they are loaded
            config.__dict__.pop("quantization_config", None)
        return config

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer.

        Raises:
            QBenchError: if it has none that transformers can read.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            with quiet(), uncollected():  # it copies every token and merge
                if (self.folder / "tokenizer.json").is_file() and self._names_tokenizer_code:
                    return PreTrainedTokenizerFast.from_pretrained(self.folder)  # no code is run
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a broken tokenizer
            need = "put tokenizer.json into"
            if (self.folder / "tokenizer.model").is_file():
                need = "install sentencepiece for its tokenizer.model, or put tokenizer.json into"
            raise QBenchError(
                f"{self.name} has no tokenizer that can be read ({first_line(error)}); "
                f"{need} {self.folder}"
            ) from error

    @property
    def _names_tokenizer_code(self) -> bool:
        """Whether the tokenizer is to be read by code that lies beside it."""
        path = self.folder / "tokenizer_config.json"
        return path.is_file() and "AutoTokenizer" in (files.read_json(path).get("auto_map") or {})

    def load_model(self, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode, every tensor accounted for and finite.

        Raises:
            QBenchError: for missing or unknown tensors, non-finite weights, an unreadable file, an
                unknown dtype or device.
        """
        from qbench.models import loading

        check_dtype(dtype)
        check_device(device)
        if self.bitnet is None:
            return loading.load(self, dtype, device)
        from qbench.models.bitnet.loading import load

        bitnet = load(self, "latent" if self.latent else "frozen", dtype, device)
        check_causal(self.name, bitnet)
        return bitnet


def find_checkpoint(name: str, *, allow_pickle: bool = False, latent: bool = False) -> Checkpoint:
    """Locate a checkpoint by folder, bundled name or Hub id and check that it can be run.

    Args:
        name: a folder, ``bundled:NAME``, or a Hub id such as ``facebook/opt-125m``.
        allow_pickle: accept ``.bin`` weights, loaded with ``weights_only=True``.
        latent: the latent weights of a BitNet checkpoint, as an ordinary model; tables call it
            ``NAME-latent``.

    Raises:
        QBenchError: naming what is missing and where it was looked for.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir() or name.startswith(files.BUNDLED)
    if name.startswith(files.BUNDLED):
        folder = files.bundled_checkpoint(name)
    elif not local:
        if folder.exists():
            raise QBenchError(f"{name} is a file; give the folder that holds config.json")
        folder = files.download(name, allow_pickle)
    checkpoint = Checkpoint(folder.resolve().name if local else name, folder)
    if not (folder / "config.json").is_file():
        raise QBenchError(f"{folder} is no checkpoint: it has no config.json")
    check_architecture(checkpoint)
    if not checkpoint.weight_files:
        checkpoint = _pickled(checkpoint, allow_pickle)
    files.check_present(checkpoint.weight_files)
    _ = checkpoint.tensors  # refuses damaged safetensors before anything takes time
    check_quantization(checkpoint)
    return _latent(checkpoint) if latent else checkpoint


def _latent(checkpoint: Checkpoint) -> Checkpoint:
    """The latent weights of a BitNet checkpoint."""
    name = checkpoint.name
    if checkpoint.bitnet is None:
        raise QBenchError(
            f"{name} has no latent weights, it is no BitNet checkpoint; drop --latent"
        )
    if not checkpoint.bitnet.is_latent:
        raise QBenchError(
            f"{name} holds ternary codes and no latent weights; give the checkpoint it was made "
            "from, or drop --latent"
        )
    return replace(checkpoint, name=f"{name}-latent", latent=True)


def load_checkpoint(
    name: str, dtype: str = "float32", device: str = "cpu", *, latent: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint, checked.

    Raises:
        QBenchError: see :func:`find_checkpoint` and :meth:`Checkpoint.load_model`.
    """
    checkpoint = find_checkpoint(name, latent=latent)
    return checkpoint.load_model(dtype, device), checkpoint.load_tokenizer()


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
