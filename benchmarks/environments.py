"""The peers' own environments under benchmarks/.venvs, made from PyPI by ``pip``.

    python -m benchmarks.environments            make all that are missing (minutes, 3 GB)

auto-gptq does not import under today's transformers and does not have to: its inner classes need
torch alone, so its wheel is unpacked without dependencies and they run in the project's own
environment. llm-compressor and gptqmodel want other versions of transformers and numpy, and get an
environment each, with the torch of constraints.txt. On Linux plain PyPI serves the CUDA build of
torch; ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` takes the CPU's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / ".venvs"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


@dataclass(frozen=True)
class Peer:
    """A package that is measured against."""

    name: str
    version: str
    steps: tuple[tuple[str, ...], ...]
    """Arguments of ``pip install``, one call each; {torch} is the project's version."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables while installing and running."""
    probe: str = ""
    """A statement that works once the environment does."""

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


AUTO_GPTQ = Peer("auto-gptq", "0.7.1", (("--no-deps", "auto-gptq==0.7.1"),))
LLM_COMPRESSOR = Peer(
    "llm-compressor",
    "0.14.0.1",
    (("torch=={torch}", "transformers==5.17.0", "llmcompressor==0.14.0.1"),),
    probe="from llmcompressor import oneshot",
)
GPTQMODEL = Peer(
    "gptqmodel",
    "7.6.0",  # 7.7 needs a newer torch than the project's
    (
        ("torch=={torch}", "transformers==5.23.0", "numpy==2.2.6")
        + ("setuptools", "wheel", "ninja", "packaging"),
        ("--no-build-isolation", "gptqmodel==7.6.0", "torch=={torch}", "transformers==5.23.0"),
    ),
    # without the second, two workers are asked of a pool of one on a machine of two cores
    {"BUILD_CUDA_EXT": "0", "GPTQMODEL_CPU_WORKERS": "2"},
    probe="import gptqmodel",
)
PEERS = (AUTO_GPTQ, LLM_COMPRESSOR, GPTQMODEL)


class Unavailable(RuntimeError):
    """A peer cannot be measured here; the message is shown in its place."""


def ensure(peer: Peer) -> Path:
    """Install a peer unless it is there; returns its folder.

    Raises:
        Unavailable: with pip's own last words.
    """
    done = peer.folder / ".installed"
    if done.exists() and done.read_text() == str(peer.steps):
        return peer.folder
    print(f"installing {peer.name} {peer.version} into {peer.folder.name} ...", file=sys.stderr)
    shutil.rmtree(peer.folder, ignore_errors=True)
    if peer.probe:
        _checked(peer, [sys.executable, "-m", "venv", str(peer.folder)])
        install = [str(peer.python), "-m", "pip", "install", "--quiet"]
    else:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(peer.folder)]
    for step in peer.steps:
        _checked(peer, [*install, *(word.format(torch=_torch_version()) for word in step)])
    if peer.probe:
        _checked(peer, [str(peer.python), "-c", peer.probe])
    done.write_text(str(peer.steps))
    return peer.folder


def _torch_version() -> str:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith("torch=="))


def _checked(peer: Peer, command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **peer.variables}
    )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise Unavailable(f"{peer.name} {peer.version} cannot be installed: {words[-1][:200]}")


def import_auto_gptq() -> tuple[Any, Any]:
    """auto-gptq's ``GPTQ`` and ``Quantizer`` without the package's own ``__init__``.

    Its loop synchronizes CUDA once a matrix; where there is none, that call is made to do nothing.
    """
    import torch

    package = types.ModuleType("auto_gptq")
    package.__path__ = [str(ensure(AUTO_GPTQ) / "auto_gptq")]
    sys.modules["auto_gptq"] = package
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
    from auto_gptq.quantization.gptq import GPTQ
    from auto_gptq.quantization.quantizer import Quantizer

    return GPTQ, Quantizer


if __name__ == "__main__":
    for wanted in PEERS:
        try:
            ensure(wanted)
            print(f"{wanted.name} {wanted.version}: ready")
        except Unavailable as problem:
            print(problem)
