"""Where and with what a measurement was made: in every record, never in a key."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("qbench", "torch", "transformers", "lm_eval", "datasets", "tokenizers", "numpy")


def environment(device: str = "cpu", model: PreTrainedModel | None = None) -> dict[str, str]:
    """Versions, processor and torch's threads while a model runs, as text.

    Batches of an evaluation side by side (``batches_at_once`` of its details) share the threads; of
    a small model each has the one.
    """
    found = dict(_installation())
    found["cpus"] = str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
    found["device"] = device
    if "torch" in sys.modules:
        import torch

        from qbench.models.products import fast_products

        with nullcontext() if model is None else fast_products(model):
            found["threads"] = str(torch.get_num_threads())
        if device.startswith("cuda"):
            found["gpu"] = torch.cuda.get_device_name(device)
    return found


@cache
def _installation() -> Mapping[str, str]:
    """What does not change while a process runs."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"cpu": _processor()}


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[dict[str, int]]:
    """Yield a dict that holds ``bytes``, the peak while the block ran, once it has ended.

    On Linux this is the process's own peak, reset at the start; elsewhere the peak since the
    process began. On a GPU it is what torch allocated there.
    """
    peak: dict[str, int] = {}
    on_gpu = device.startswith("cuda")
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    try:
        yield peak
    finally:
        if on_gpu:
            import torch

            peak["bytes"] = int(torch.cuda.max_memory_allocated(device))
        else:
            peak["bytes"] = _peak()


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak then covers the whole process


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
