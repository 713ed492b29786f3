"""Shared by the tests of the command line: the command itself, and ways to break a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qbench.cli import app

DATA = Path(__file__).parent / "data"
"""A few rows of every pinned task, in the Hub's columns."""
LINES = [
    f"{who} {did} the {what} near the river because it was late.\n"
    for who in ("Anna", "The old man", "My sister")
    for did in ("carried", "found", "painted")
    for what in ("green box", "bread", "boat")
]


def qbench(*arguments: object, code: int = 0):
    """Run the command in this process; an exception that reaches the user fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object, code: int = 2) -> str:
    """Run the command, which must end with one error line; returns that line."""
    result = qbench(*arguments, code=code)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if " · " not in line]  # the head line
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


def edit_config(folder: Path, **changes: object) -> Path:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Apply ``change`` to the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def records(results: Path) -> dict[str, dict]:
    """Every record on disk by its path."""
    paths = sorted(results.rglob("*.json"))
    return {str(p.relative_to(results)): json.loads(p.read_text()) for p in paths}
