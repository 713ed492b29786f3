"""Fixtures of several test files: a tiny checkpoint and a text for it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import LINES

from qbench.models.checkpoints import Checkpoint
from qbench.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny Llama checkpoint; copy it before changing it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path) -> Path:
    """A text of a few hundred tokens."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


@pytest.fixture
def copy_of(tiny, tmp_path) -> Callable[[str], Path]:
    """Makes a copy of the tiny checkpoint under another name."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny, tmp_path / name))

    return make


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Whatever loads a model fails the test."""

    def load(self, *args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Checkpoint, "load_model", load)
