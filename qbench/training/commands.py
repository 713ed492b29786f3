"""What ``qbench train`` and ``qbench curves`` do: material, twins in turn, figure, words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import QBenchError, RunFailed, unknown
from qbench.models.files import BUNDLED, data_folder
from qbench.progress import Reporter
from qbench.training import curves
from qbench.training.folders import RECORD_FILE, TwinFolder
from qbench.training.presets import known_presets
from qbench.training.recipe import Recipe, TwinRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qbench.training.trainer import Material

Corpora = Mapping[str, Callable[[], Sequence[str]]]
"""Texts that are no file, by the name a recipe gives them."""


def train(
    recipe: Recipe,
    *,
    twins: Sequence[str] = (),
    output: Path | None = None,
    device: str = "cpu",
    corpora: Corpora | None = None,
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Train the twins of a recipe that are not trained yet, draw their curves, print what is there.

    Args:
        recipe: what to train.
        twins: kinds to keep; none keeps all.
        output: instead of the recipe's.
        device: "cpu", or a GPU.
        corpora: texts that a recipe may name beside files and the known corpora.
        data_dir: root with ``corpora/``, for known corpora without the network.
        reporter: where progress is said.

    Returns:
        The record of each training, with its ``name``.

    Raises:
        QBenchError: for a mistake in the recipe or a folder that belongs to another one.
        RunFailed: for a training that diverged, unless the recipe compares learning rates.
    """
    from qbench.models.checks import check_device
    from qbench.training.trainer import Session, train_twin

    check_device(device)
    if ":" in device:
        raise QBenchError(f"device {device!r}: give cuda, and CUDA_VISIBLE_DEVICES to choose one")
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun's, with several GPUs
    reporter = reporter or Reporter(quiet=not is_main)
    output = output or recipe.output
    for kind in twins:
        if kind not in recipe.twins:
            raise unknown("twin", kind, recipe.twins)
    runs = [run for run in recipe.runs() if not twins or run.kind in twins]
    material = _material(recipe, _Texts(corpora or {}, data_dir), reporter)
    records = []
    for run in runs:
        before = " (trained before)" if TwinFolder(output / run.name).final.exists() else ""
        record = train_twin(run, material, output, Session(device, reporter))
        records.append({"name": run.name, **record})
        if is_main:
            print(summary(records[-1]) + before, flush=True)
            figure = draw_recipe(recipe, output)
        if record["status"] == "diverged" and recipe.learning_rates is None:
            raise RunFailed(
                f"{run.name}: the loss became {record['loss']} at step {record['step']}; lower "
                f"learning_rate ({run.peaks[0]:g}) or set clip, and delete "
                f"{TwinFolder(output / run.name).work}"
            )
    if is_main and figure is not None:
        print(figure)
    return records


def draw_recipe(recipe: Recipe, output: Path) -> Path | None:
    """Draw the curves of a recipe's trainings, those that run included, into the output folder.

    Returns:
        The figure's path; None where no training has a loss to draw, as after an early divergence.
    """
    found = [curve for run in recipe.runs() if (curve := _curve(run, output)) is not None]
    if not any(curve.rows for curve in found):
        return None
    path = output / f"loss-{recipe.name}.png"
    title = f"{recipe.name}: one line per peak learning rate" if recipe.learning_rates else ""
    curves.save(curves.draw(found, title or recipe.name), path)
    return path


def draw_folders(folders: Iterable[Path], output: Path) -> Path:
    """Draw the curves of finished twins, given their folders.

    Raises:
        QBenchError: for a folder that is none, naming it.
    """
    found = []
    for folder in folders:
        path = folder / RECORD_FILE
        if not path.is_file():
            raise QBenchError(f"{folder} is no trained twin: it has no {RECORD_FILE}")
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = curves.read_curve(folder / curves.CURVE_FILE)
        diverged = record.get("step") if record["status"] == "diverged" else None
        found.append(curves.Curve(record["recipe"]["kind"], folder.name, rows, diverged))
    curves.save(curves.draw(found), output)
    return output


def presets() -> list[str]:
    """One line per preset."""
    known = known_presets()
    width = max(map(len, known))
    return [f"{name:{width}}  {text}" for name, text in known.items()]


def summary(record: dict[str, Any]) -> str:
    """One line about a training."""
    if record["status"] == "diverged":
        return f"{record['name']}: diverged, loss {record['loss']} at step {record['step']}"
    held_out = record.get("eval_loss")
    return (
        f"{record['name']}: {record['parameters']:,} parameters, {record['steps']} steps, "
        f"{record['tokens']:,} tokens, loss {record['train_loss']:.3f}"
        + (f", held out {held_out:.3f}" if held_out is not None else "")
        + f" nats per token, {record['seconds']:.0f} s"
    )


def _curve(run: TwinRun, output: Path) -> curves.Curve | None:
    folder = TwinFolder(output / run.name)
    record = folder.record()
    if record is None or not folder.curve.is_file():
        return None
    note = f", rate {run.peaks[0]:g}" if run.recipe.learning_rates else ""
    diverged = record["step"] if record["status"] == "diverged" else None
    rows = curves.read_curve(folder.curve)
    return curves.Curve(run.kind, curves.label(run.kind, note), rows, diverged)


@dataclass(frozen=True)
class _Texts:
    corpora: Corpora
    data_dir: Path | None

    def documents(self, name: str, purpose: str) -> Sequence[str]:
        from qbench.training.data import read_documents

        if name in self.corpora:
            return self.corpora[name]()
        if name.startswith(BUNDLED):
            raise unknown("bundled corpus", name, self.corpora)
        return read_documents(name, purpose, self.data_dir)


def _material(recipe: Recipe, texts: _Texts, reporter: Reporter) -> Material:
    from qbench.training.data import pack
    from qbench.training.trainer import Material

    tokenizer = _tokenizer(recipe.tokenizer)
    documents = texts.documents(recipe.corpus, "calibration")
    with reporter.step("tokens") as progress:
        windows = pack(documents, tokenizer, recipe.seqlen, progress)
    passes = recipe.steps * recipe.tokens_per_step / windows.numel()
    reporter.line(
        f"{recipe.corpus} · {len(documents):,} documents · {windows.numel():,} tokens in windows "
        f"of {recipe.seqlen} · {recipe.steps} steps see them {passes:.1f} times"
    )
    held_out = None
    if recipe.held_out is not None:
        held_out = pack(texts.documents(recipe.held_out, "evaluation"), tokenizer, recipe.seqlen)
    return Material(tokenizer, windows, held_out)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from qbench.models.checks import quiet

    root = data_folder(name) if name.startswith(BUNDLED) else None
    folder = root / "tokenizer" if root else Path(name)
    if not folder.is_dir():
        raise QBenchError(f"no tokenizer at {folder}; name a folder with tokenizer.json")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise QBenchError(f"cannot read the tokenizer in {folder}: {reason}") from error
