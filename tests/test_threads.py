"""The environment of threads: defaults, and a user's own word."""

from __future__ import annotations

import os

from qbench.threads import PASSIVE, wait_passively


def test_threads_wait_passively_unless_the_user_said_otherwise(monkeypatch):
    for name in PASSIVE:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["GOMP_SPINCOUNT"] == "0"
