"""What quantization leaves behind: a report, and the mark on a model that was worked on.

The mark is the report itself, so that a model in memory knows its scheme and how it may be
evaluated. Left out: the work (:mod:`~.quantize`), and records on disk (:mod:`qbench.record`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from qbench.errors import QBenchError
from qbench.models.bitnet.trained import check_not_trained
from qbench.models.blocks import Block
from qbench.models.gptq_loading import check_not_stored
from qbench.models.linear import Handle
from qbench.record import LayerReport
from qbench.scheme import Scheme

_MARK = "_qbench_quantization"
"""Attribute of a model that quantize_model has worked on."""


@dataclass
class Quantization:
    """What happened to a model."""

    scheme: Scheme
    """Resolved."""
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Matrices inside decoder blocks that stayed in full precision: name -> why."""
    notes: list[str] = field(default_factory=list)
    sees_sequences: bool = True
    """Whether every quantized input is (sequences, tokens, channels), none flattened or routed."""
    blocks: list[Block] = field(default_factory=list, repr=False)
    """As they were traced."""
    handles: list[Handle] = field(default_factory=list, repr=False)
    """Each undoes one hook of an activation quantizer."""

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight over all matrices of the decoder blocks."""
        total = sum(r.shape[0] * r.shape[1] for r in self.layers)
        return sum(r.stored_bits for r in self.layers) / total if total else 16.0

    @property
    def batching(self) -> str | None:
        """How rows may share a batch: a key of ``qbench.evaluation.tasks.BATCHING``.

        None where they may as they like. Scales over the whole input at run time are those of a
        sequence alone: whole sequences may share a batch, and where a linear's input has lost its
        sequences (routed experts) none may.
        """
        if not self.scheme.depends_on_batch:
            return None
        return "unshared" if self.sees_sequences else "one row"


def mark_(model: nn.Module, result: Quantization) -> None:
    """Note on a model, in place, what is being done to it."""
    setattr(model, _MARK, result)


def quantization_of(model: nn.Module) -> Quantization | None:
    """What was done to a model in memory, None for an untouched one."""
    found = getattr(model, _MARK, None)
    return found if isinstance(found, Quantization) else None


def quantized_scheme(model: nn.Module) -> Scheme | None:
    """The resolved scheme a model in memory was quantized at, None for an untouched one."""
    found = quantization_of(model)
    return None if found is None else found.scheme


def batching_of(model: nn.Module) -> str | None:
    """How rows may share a batch on this model: see :attr:`Quantization.batching`."""
    found = quantization_of(model)
    return None if found is None else found.batching


def check_arguments(model: nn.Module, calibration: Tensor | None) -> None:
    """Refuse a model in training, trained at low width or quantized, and misshapen calibration.

    Raises:
        QBenchError: naming what was given.
    """
    check_not_trained(model)
    check_not_stored(model)
    if model.training:
        raise QBenchError("the model is in training mode, where dropout is random; call .eval()")
    before = quantized_scheme(model)
    if before is not None:
        raise QBenchError(f"the model was quantized before, at {before}; start from a fresh copy")
    if calibration is not None and (calibration.ndim != 2 or not calibration.numel()):
        raise QBenchError(
            f"calibration of shape {tuple(calibration.shape)} cannot be used; pass token windows "
            "(nsamples, seqlen)"
        )
