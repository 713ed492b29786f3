"""What a loaded model is asked before it is measured, and what a run may ask of the machine.

Each question has a silent wrong answer behind it: tensors left random or dropped, NaN weights,
attention that looks ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qbench.errors import QBenchError
from qbench.models.files import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


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


def check_tensors(
    checkpoint: str,
    missing: Iterable[str] = (),
    mismatched: Iterable[str] = (),
    unexpected: Iterable[str] = (),
) -> None:
    """Refuse a checkpoint whose tensors are not those of its model class.

    Raises:
        QBenchError: naming the first of them.
    """
    for found, why in (
        (missing, "lacks tensors, which would be left random"),
        (mismatched, "has tensors of another shape than its config.json says"),
        (unexpected, "has tensors its model class ignores, so it would run without"),
    ):
        names = sorted(found)
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise QBenchError(f"{checkpoint} {why}: {shown}")


def check_finite(checkpoint: str, name: str, tensor: Tensor) -> None:
    """Raise a QBenchError for a tensor with NaN or infinite values."""
    if not is_finite(tensor):
        raise QBenchError(f"{checkpoint}: {name} contains NaN or infinite weights")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN or infinite value; its extremes tell, without a copy of it."""
    import torch

    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_causal(checkpoint: str, model: PreTrainedModel) -> None:
    """Refuse a model in which a later token changes what is said about earlier ones.

    Raises:
        QBenchError: also for one that does not run at all.
    """
    import torch

    last = model.get_input_embeddings().num_embeddings - 1  # type: ignore[operator]
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device).clamp(max=last)
    try:
        with torch.no_grad():
            ahead, other = model(input_ids=ids).logits[:, :-1].float()
    except Exception as error:  # whatever a model raises that does not fit its own weights
        raise QBenchError(f"{checkpoint} does not run: {first_line(error)}") from error
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if (ahead - other).abs().max() > tolerance * ahead.abs().max():
        raise QBenchError(
            f"{checkpoint} ({type(model).__name__}) is no causal language model: its attention "
            "looks ahead; qbench measures next-token prediction"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from explaining at length what qbench then says in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
