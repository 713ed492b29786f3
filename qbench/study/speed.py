"""How fast this machine is, from a second of trying it: what a plan's times are made of.

Left out: the network, and how much slower a machine gets when others use it too.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SECONDS = 0.15
"""For each thing that is tried."""
_CHUNK = 1 << 24
_MOST_READ = 1 << 28
_WIDEST = 2048
"""Products are no faster on wider matrices, and take longer to try."""


@dataclass(frozen=True)
class Speed:
    """Rates of one machine; every one is per second."""

    products: float
    """FLOP of products with weights in the run's dtype."""
    products32: float
    """FLOP of matrix products in float32, which hessians and solvers take."""
    rounding: float
    """Weights scaled, rounded and scaled back."""
    read: float
    """Bytes of the checkpoint's files, as warm as they are."""
    hashed: float
    """Bytes through SHA-256."""
    threads: int


def measure(width: int, dtype: str, device: str, files: Sequence[Path]) -> Speed:
    """Try the machine for about a second.

    Args:
        width: of the model's hidden states.
        dtype: of the run, by its name in torch.
        device: of the run.
        files: with the checkpoint's weights.
    """
    import torch

    from qbench.models.products import fast_linear

    width = max(64, min(width, _WIDEST))
    return Speed(
        products=_products(width, dtype, device, fast_linear),
        products32=_products(width, "float32", device, torch.matmul),
        rounding=_rounding(device),
        read=_reading(files),
        hashed=_hashing(),
        threads=torch.get_num_threads(),
    )


@cache
def _products(width: int, dtype: str, device: str, multiply: Callable[..., Any]) -> float:
    import torch

    rows = 512
    left = torch.ones(rows, width, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(width, width, dtype=left.dtype, device=device)
    with torch.no_grad():
        return 2 * rows * width**2 / _fastest(lambda: multiply(left, right), device)


@cache
def _rounding(device: str) -> float:
    import torch

    weights = torch.ones(1 << 20, device=device)
    return len(weights) / _fastest(
        lambda: weights.mul(3.0).round_().clamp_(-7, 7).mul_(0.3).sub_(weights).square_().sum(),
        device,
    )


@cache
def _hashing() -> float:
    data = bytes(1 << 22)
    return len(data) / _fastest(lambda: hashlib.sha256(data).digest(), "cpu")


def _reading(files: Sequence[Path]) -> float:
    """Bytes a second from the middle of the files, which no header was read from: the median."""
    rates: list[float] = []
    began = before = time.perf_counter()
    for chunk in _chunks(files):
        now = time.perf_counter()
        rates.append(len(chunk) / max(now - before, 1e-9))
        before = now
        if len(rates) * _CHUNK >= _MOST_READ or now - began > 2 * _SECONDS:
            break
    return sorted(rates)[len(rates) // 2] if rates else float("inf")


def _chunks(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.seek(path.stat().st_size // 2)
            while chunk := file.read(_CHUNK):
                yield chunk


def _fastest(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of several rounds: the one that was disturbed least."""
    import torch

    on_gpu = device.startswith("cuda")
    best, until = float("inf"), time.perf_counter() + _SECONDS
    work()
    while True:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= until:
            return max(best, 1e-9)


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that a process could still take, None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
                return min([free, *_left_in_group()])
    except OSError:
        pass
    return None


def _left_in_group() -> list[int]:
    """What a control group (a container, a batch job) leaves of the machine's memory."""
    group, left = Path("/sys/fs/cgroup"), []
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left.append(int((group / most).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return left
