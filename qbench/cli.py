"""The command line: options, exit codes, and nothing else.

Heavy imports stay inside the commands, so that ``qbench --help``, ``list``, ``table`` and ``plot``
answer at once. Exit codes: 0 done, 1 a run failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qbench.errors import QBenchError
from qbench.process import set_up


class _Commands(TyperGroup):
    """The commands; a user's mistake is one line on standard error, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                return super().invoke(ctx)
        except QBenchError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:  # caught here, because typer would say nothing
            print("interrupted; what was finished is stored, run the same again", file=sys.stderr)
            raise typer.Exit(130) from None


def _show_warning(message: Warning | str, *place: Any) -> None:
    """One line, without the place in the code that Python would show."""
    print(f"warning: {message}", file=sys.stderr)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compare post-training quantization methods: checkpoints x baselines x bits x tasks.",
)

Results = Annotated[Path, typer.Option("--results", help="Folder of stored results.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Root with tasks/, corpora/; or bundled:world."),
]
Names = Annotated[list[str], typer.Option(help="Keep these only; repeat it or use patterns.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Repeat stored failures.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights (tensors only).")
]
DEFAULT_RESULTS = Path("results/runs")


def main() -> None:
    """Run the command line."""
    set_up()
    for stream in (sys.stdout, sys.stderr):  # a terminal without ± gets a question mark
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="baselines, tasks, corpora, runs or checkpoints")],
    results: Results = DEFAULT_RESULTS,
) -> None:
    """List baselines, tasks, corpora, runs or checkpoints."""
    from qbench.study import listing

    for line in listing.lines(what, results):
        print(line)


@app.command()
def run(
    checkpoint: Annotated[str, typer.Argument(help="Folder, bundled:NAME or Hub id.")],
    baseline: Annotated[str, typer.Option(help="Name, or file.py:Class.")] = "none",
    scheme: Annotated[str, typer.Option(help="Such as W4A16g128 or W8A8:w=tensor.")] = "W16A16",
    set_: Annotated[list[str], typer.Option("--set", help="field=value of the baseline.")] = [],  # noqa: B006
    tasks: Annotated[str, typer.Option(help="Comma-separated; corpus@protocol too.")] = "wikitext2",
    num_fewshot: Annotated[int, typer.Option(help="Examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(help="First N items of each task.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    encoding: Annotated[str, typer.Option(help="joint+bos, joint or lmeval03.")] = "joint+bos",
    calibration: Annotated[str, typer.Option(help="Corpus or text file.")] = "c4",
    nsamples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of calibration and rotations.")] = 0,
    data: Data = None,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    results: Results = DEFAULT_RESULTS,
    save: Annotated[Path | None, typer.Option(help="Write the quantized model.")] = None,
    retry_failed: RetryFailed = False,
    allow_pickle: AllowPickle = False,
    latent: Annotated[
        bool, typer.Option("--latent", help="A BitNet's latent weights, as an ordinary model.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(help="One decoder block in memory at a time.", show_default="if it must be"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and do nothing.")
    ] = False,
) -> None:
    """Quantize one checkpoint with one baseline and measure it."""
    from qbench.study.imports import import_models

    import_models()
    from qbench.evaluation.tasks import EvaluationOptions
    from qbench.record import CalibrationSpec
    from qbench.study import commands
    from qbench.study.cells import Settings
    from qbench.study.sweep import task_spec

    settings = Settings(
        tasks=tuple(task_spec(t, num_fewshot, limit) for t in tasks.split(",") if t.strip()),
        options=EvaluationOptions(data_dir=data, max_length=max_length, encoding=encoding),
        calibration=CalibrationSpec(
            source=calibration, nsamples=nsamples, seqlen=seqlen, seed=seed
        ),
        seed=seed,
        dtype=dtype,
        device=device,
        retry_failed=retry_failed,
        stream=stream,
    )
    chosen = commands.Run(
        checkpoint, baseline, tuple(set_), scheme, save, allow_pickle, latent, dry_run
    )
    sys.exit(commands.run(chosen, settings, results))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML; see the README.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    retry_failed: RetryFailed = False,
    data: Data = None,
    results: Annotated[Path | None, typer.Option(help="Overrides the file's.")] = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Run every cell of a sweep file that is not stored yet."""
    from qbench.study.imports import import_models

    import_models()
    from qbench.study import commands

    sys.exit(commands.sweep(file, data, results, dry_run, retry_failed, allow_pickle))


@app.command()
def table(
    layout: Annotated[
        str, typer.Option(help="comparison, sizes, bitnet-table3, b158-table2")
    ] = "comparison",
    metric: Annotated[
        str, typer.Option(help="acc, acc_norm or acc_token; in sizes bits_per_byte too")
    ] = "acc",
    format: Annotated[str, typer.Option(help="terminal, md, latex, csv or html")] = "terminal",
    against: Annotated[str | None, typer.Option(help="A published table.")] = None,
    delta: Annotated[bool, typer.Option(help="Difference to full precision.")] = False,
    checkpoint: Names = [],  # noqa: B006
    baseline: Names = [],  # noqa: B006
    scheme: Names = [],  # noqa: B006
    task: Names = [],  # noqa: B006
    num_fewshot: Annotated[int | None, typer.Option()] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print everything stored as a table."""
    import shutil

    from qbench.study.store import Store
    from qbench.study.tables import table as make

    text = make(
        Store(results),
        layout,
        metric=metric,
        against=against,
        delta=delta,
        format=format,
        width=max(shutil.get_terminal_size((120, 24)).columns, 60),
        checkpoints=checkpoint or None,
        baselines=baseline or None,
        schemes=scheme or None,
        tasks=task or None,
        num_fewshot=num_fewshot,
    )
    if output is None:
        print(text)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise QBenchError(f"cannot write {output}: {error.strerror}") from error
    print(output)


@app.command()
def plot(
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf")],
    kind: Annotated[
        str | None,
        typer.Option(help="accuracy-vs-bits, perplexity-vs-bits, accuracy-vs-size, loss-vs-size"),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="acc, acc_norm, acc_token, perplexity or bits_per_byte")
    ] = "acc",
    x: Annotated[str, typer.Option(help="wbits or effective_bits")] = "wbits",
    against: Annotated[
        str | None, typer.Option(help="A published table; against size only.")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Inches.")] = None,
    checkpoint: Names = [],  # noqa: B006
    baseline: Names = [],  # noqa: B006
    scheme: Names = [],  # noqa: B006
    task: Names = [],  # noqa: B006
    num_fewshot: Annotated[int | None, typer.Option()] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Draw accuracy or perplexity against bits, or accuracy or loss against model size.

    Against size, full-precision and trained rows are there, and quantized ones where --baseline or
    --scheme names them.
    """
    from qbench.study.imports import uncollected
    from qbench.study.plots import plot as draw
    from qbench.study.store import Store

    with uncollected():  # pandas and matplotlib are imported in there
        path = draw(
            Store(results),
            kind,
            output=output,
            x=x,
            metric=metric,
            against=against,
            width_in=width,
            checkpoints=checkpoint or None,
            baselines=baseline or None,
            schemes=scheme or None,
            tasks=task or None,
            num_fewshot=num_fewshot,
        )
    print(path)


@app.command()
def check(
    baseline: Annotated[str, typer.Argument(help="Name, or file.py:Class.")],
    set_: Annotated[list[str], typer.Option("--set", help="field=value of the baseline.")] = [],  # noqa: B006
) -> None:
    """Test a baseline against the contract of one."""
    from qbench.study import commands

    sys.exit(commands.check(baseline, tuple(set_)))


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
def doctor(data: Data = None, results: Results = DEFAULT_RESULTS) -> None:
    """Say what this machine has and what it lacks."""
    from qbench.study import commands

    sys.exit(commands.doctor(data, results))


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="All items instead of a sample.")] = False,
    results: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "results/runs/demo"
    ),
) -> None:
    """Show the main job on a small model: sweep, table, figure."""
    from qbench.study.imports import import_models

    import_models()
    from qbench.study.demo import demo as run_demo

    sys.exit(run_demo(results, full))


@app.command()
def world(folder: Annotated[Path, typer.Argument(help="Where to; a data folder.")]) -> None:
    """Write the bundled world: the twins' whole training corpus, tokenizer and questions."""
    from qbench.world.build import write_world

    write_world(folder)
    print(folder)


if __name__ == "__main__":
    main()
