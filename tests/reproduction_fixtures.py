"""Tiny stand-ins for the checkpoints and texts of presets: same architecture, same files, seconds.

Settings shrink (fewer, shorter calibration windows, a context of 64); methods, rows, grids and
protocols are the preset's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bitnet_fixtures import microsoft, one_bit_llm
from cli_fixtures import DATA, LINES, edit_config

from qbench.models.checkpoints import Checkpoint
from qbench.reproduction.presets import Preset, checkpoints
from qbench.testing import tiny_checkpoint, tiny_tokenizer

CONTEXT = 64
_WIDE = {"llama": {"hidden_size": 128, "intermediate_size": 256}, "bloom": {"hidden_size": 128}}
"""Kinds that are rounded in groups of 128."""
_XGLM = {
    "d_model": 64,
    "ffn_dim": 96,
    "num_layers": 2,
    "attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": CONTEXT,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def stand_in(folder: Path, kind: str) -> Path:
    """A tiny checkpoint of a kind of model (``model_type``, or a Hub id of a BitNet)."""
    if folder.is_dir():
        return folder
    if kind.startswith("1bitLLM/"):
        return edit_config(one_bit_llm(folder), max_position_embeddings=CONTEXT)
    if kind.startswith("microsoft/"):
        return edit_config(microsoft(folder, packed=True), max_position_embeddings=CONTEXT)
    if kind == "xglm":
        return _xglm(folder)
    changes: dict[str, Any] = {} if kind == "bloom" else {"max_position_embeddings": CONTEXT}
    return tiny_checkpoint(folder, kind, **changes, **_WIDE.get(kind, {}))


def kind_of(preset: Preset) -> str:
    """Which stand-in a preset needs."""
    assert preset.facts is not None and preset.target.hub is not None
    return preset.target.hub if preset.is_trained else preset.facts.model_type


def small(preset: Preset, **changes: Any) -> Preset:
    """The same preset with short windows, so that a tiny model is done in a moment."""
    calibration = preset.family.calibration.model_copy(update={"nsamples": 6, "seqlen": 40})
    update = {"calibration": calibration, "seeds": 1, "max_length": CONTEXT, **changes}
    return Preset(family=preset.family.model_copy(update=update), target=preset.target)


def same_size(monkeypatch: pytest.MonkeyPatch, preset: Preset, folder: Path) -> None:
    """Let the paper's checkpoint have as many weights as the stand-in."""
    assert preset.facts is not None and preset.target.hub is not None
    size = Checkpoint("stand-in", folder).parameters / 1e6
    facts = preset.facts.model_copy(update={"parameters": size})
    monkeypatch.setitem(checkpoints(), preset.target.hub, facts)


def texts(folder: Path) -> Path:
    """A data folder with every task and corpus that presets name."""
    shutil.copytree(DATA / "tasks", folder / "tasks")
    documents = ["".join(LINES[i:] + LINES[:i]) for i in range(12)]
    files = {
        "wikitext2": ("train", "test"),
        "ptb": ("train", "test"),
        "c4": ("train", "validation"),
        "pile-val": ("validation",),
    }
    for name, splits in files.items():
        for number, split in enumerate(splits):
            path = folder / "tasks" / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = [{"text": text} for text in documents[number::2] + LINES]
            path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _xglm(folder: Path) -> Path:
    """XGLM, which fairseq's dense models are stored as."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xglm", **_XGLM))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
