"""What a process says to the libraries below it; to be said before torch is loaded.

An OpenMP thread that reaches a barrier spins there by default. With as many threads as cores, one
other busy process is enough that the thread waited for has no core to run on: solvers then take two
to thirty times as long. Passive waiting costs a wake-up at each barrier.

Tensors come and go in pages of 4 KiB by default, each of them cleared by the kernel when it is
first touched; in large pages that takes a third of the time.
"""

from __future__ import annotations

import os

SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",  # GNU's runtime, in torch's wheels
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's allocator on Linux: transparent huge pages
    "TOKENIZERS_PARALLELISM": "false",  # its threads and forked workers warn of each other
}


def set_up() -> None:
    """Set what the user has not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
