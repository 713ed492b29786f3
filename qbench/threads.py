"""How threads wait for each other; to be said before torch is loaded.

An OpenMP thread that reaches a barrier spins there by default. With as many threads as cores, one
other busy process is enough that the thread waited for has no core to run on: solvers then take two
to thirty times as long. Passive waiting costs a wake-up at each barrier.
"""

from __future__ import annotations

import os

PASSIVE = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",  # GNU's runtime, in torch's wheels
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's
}


def wait_passively() -> None:
    """Set what the user has not set."""
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
