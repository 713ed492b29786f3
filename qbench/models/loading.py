"""Load a checkpoint that transformers has a class for: every tensor accounted for and finite.

Left out: BitNet formats, which have a loader of their own (:mod:`qbench.models.bitnet.loading`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from qbench.errors import QBenchError
from qbench.models.checks import check_causal, check_finite, check_tensors, quiet
from qbench.models.files import first_line
from qbench.models.gptq_loading import mark_stored_, state_dict
from qbench.process import uncollected

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.models.checkpoints import Checkpoint


def load(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """The model in eval mode.

    Raises:
        QBenchError: for missing or unknown tensors, non-finite weights, an unreadable file.
    """
    try:
        with quiet(), uncollected():
            model, info = _from_codes(checkpoint, dtype) or _from_files(checkpoint, dtype)
    except QBenchError:
        raise
    except pickle.UnpicklingError as error:
        raise QBenchError(
            f"the .bin files of {checkpoint.name} hold more than tensors, which could run code "
            "when opened; convert them to safetensors where you trust them"
        ) from error
    except Exception as error:  # a corrupt file surfaces as many kinds
        raise QBenchError(f"cannot load {checkpoint.name}: {first_line(error)}") from error
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    check_tensors(checkpoint.name, *(_names(info.get(kind) or ()) for kind in kinds))
    for name, parameter in model.named_parameters():
        check_finite(checkpoint.name, name, parameter)
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    check_causal(checkpoint.name, model)
    return model


def _from_files(checkpoint: Checkpoint, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=getattr(torch, dtype),
        use_safetensors=not checkpoint.pickled,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported above, in one line
        trust_remote_code=False,
    )


def _from_codes(checkpoint: Checkpoint, dtype: str) -> Any:
    """Model and loading report of a GPTQ checkpoint; None for one of another kind."""
    if checkpoint.gptq is None:
        return None
    kind, state = state_dict(checkpoint, dtype)
    found: Any = kind.from_pretrained(  # type: ignore[attr-defined]
        None,
        config=checkpoint.load_config(),
        state_dict=state,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    mark_stored_(found[0], checkpoint.gptq)
    return found


def _names(keys: Iterable[Any]) -> list[str]:
    """Names of tensors in transformers' loading report; with a mismatch come its shapes."""
    return [key if isinstance(key, str) else str(key[0]) for key in keys]
