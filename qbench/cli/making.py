"""``qbench train``, ``curves`` and ``world``: twins and what they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qbench.cli.application import Data, app
from qbench.errors import QBenchError


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML; see the README.")] = None,
    twin: Annotated[list[str], typer.Option(help="fp16, b1 or b158 only; repeat it.")] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Overrides the file's.")] = (
        None
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    data: Data = None,
    presets: Annotated[
        bool, typer.Option("--list", help="List the published recipes that a file can start from.")
    ] = False,
) -> None:
    """Train matched FP16, BitNet and BitNet b1.58 models; what was killed continues."""
    from qbench.training import commands

    if presets:
        print("\n".join(commands.presets()))
        return
    if recipe is None:
        raise QBenchError("name a recipe file, or --list the published ones")
    from qbench.models.files import data_folder
    from qbench.training.recipe import Recipe
    from qbench.world.build import held_out_corpus, training_corpus

    corpora: commands.Corpora = {
        "bundled:world/train": training_corpus,
        "bundled:world/validation": held_out_corpus,
    }
    commands.train(
        Recipe.read(recipe),
        twins=twin,
        output=output,
        device=device,
        corpora=corpora,
        data_dir=data_folder(data),
    )


@app.command()
def curves(
    twins: Annotated[list[Path], typer.Argument(help="Folders that qbench train wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf")],
) -> None:
    """Draw the loss curves of trained models in one figure."""
    from qbench.training import commands

    print(commands.draw_folders(twins, output))


@app.command()
def world(folder: Annotated[Path, typer.Argument(help="Where to; a data folder.")]) -> None:
    """Write the bundled world: the twins' whole training corpus, tokenizer and questions."""
    from qbench.world.build import write_world

    write_world(folder)
    print(folder)
