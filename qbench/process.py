"""What a process says to the libraries below it, before torch is loaded, and to its collector.

An OpenMP thread that reaches a barrier spins there by default. With as many threads as cores, one
other busy process is enough that the thread waited for has no core to run on: solvers then take two
to thirty times as long. Passive waiting costs a wake-up at each barrier.

Tensors come and go in pages of 4 KiB by default, each of them cleared by the kernel when it is
first touched; in large pages that takes a third of the time.

While much is imported or read, the garbage collector looks through all of it again and again and
finds nothing; :func:`uncollected` is for that.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",  # GNU's runtime, in torch's wheels
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's allocator on Linux: transparent huge pages
    "TOKENIZERS_PARALLELISM": "false",  # its threads and forked workers warn of each other
}


_AT_ONCE = 1 << 20
"""Bytes from which on freed memory goes back to the system at once."""
_MALLOPT = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1}


def give_memory_back() -> None:
    """From now on return freed memory to the system, where the C library is GNU's.

    It keeps blocks of up to 32 MiB for later otherwise, which is faster, and a tenth of a gigabyte
    where matrices come and go.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter in _MALLOPT.values():
            mallopt(parameter, _AT_ONCE)


def set_up() -> None:
    """Set what the user has not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within this no garbage is collected, so import and read, and do not compute."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
