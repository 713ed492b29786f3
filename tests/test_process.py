"""The environment of threads: defaults, and a user's own word."""

from __future__ import annotations

import os

from qbench.process import SETTINGS, set_up


def test_threads_set_up_unless_the_user_said_otherwise(monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    set_up()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["GOMP_SPINCOUNT"] == "0"
