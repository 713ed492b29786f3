"""What a training runs in: versions for its record, and a process left as it was found."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
from transformers.utils import logging

from qbench.models.checks import quiet


def environment(device: str) -> dict[str, str]:
    """Versions, device and threads, as text."""
    found = {name: version(name) for name in ("qbench", "torch", "transformers", "accelerate")}
    found |= {"python": platform.python_version(), "device": device}
    found["threads"] = str(torch.get_num_threads())
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@contextmanager
def silence() -> Iterator[None]:
    """No bars and no remarks by transformers: there is one bar already."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def random_left_alone() -> Iterator[None]:
    """The Trainer seeds every global generator there is; put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
