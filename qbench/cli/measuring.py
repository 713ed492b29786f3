"""``qbench run``, ``sweep``, ``reproduce``, ``demo``, ``check`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qbench.cli.application import DEFAULT_RESULTS, AllowPickle, Data, Results, RetryFailed, app

Stream = Annotated[
    bool | None,
    typer.Option(help="One decoder block in memory at a time.", show_default="if it must be"),
]


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
    from qbench.demo import demo as run_demo

    sys.exit(run_demo(results, full))


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
    stream: Stream = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and do nothing.")
    ] = False,
) -> None:
    """Quantize one checkpoint with one baseline and measure it."""
    from qbench.models.files import begin_hashing
    from qbench.study.imports import import_models

    if not dry_run:
        begin_hashing(checkpoint)
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
def reproduce(
    preset: Annotated[str | None, typer.Argument(help="As in the list.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    checkpoint: Annotated[
        list[str], typer.Option(help="Local weights in place of the Hub's.")
    ] = [],  # noqa: B006
    rows: Annotated[list[str], typer.Option(help="Only these (patterns); repeat it.")] = [],  # noqa: B006
    tasks: Annotated[str, typer.Option(help="Only these, comma-separated (patterns).")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Of methods that draw.")] = None,
    limit: Annotated[int | None, typer.Option(help="First N items of each task.")] = None,
    data: Data = None,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.", show_default="the paper's, CPU: float32"
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="terminal, md, latex, csv or html")] = "terminal",
    results: Results = DEFAULT_RESULTS,
    ignore_gate: Annotated[
        bool, typer.Option("--ignore-gate", help="Go on where full precision is off; no verdicts.")
    ] = False,
    retry_failed: RetryFailed = False,
    allow_pickle: AllowPickle = False,
    stream: Stream = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would download and take.")
    ] = False,
) -> None:
    """Measure a published table again, and say number by number whether it comes out."""
    if preset is None or list_:
        from qbench.reproduction.printing import print_list

        print_list()
        return
    from qbench.study.imports import import_models

    import_models()
    from qbench.reproduction.commands import reproduce as run_preset
    from qbench.reproduction.running import Request

    request = Request(
        results,
        rows=tuple(rows),
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        limit=limit,
        data=data,
        device=device,
        dtype=dtype,
        seeds=seeds,
        ignore_gate=ignore_gate,
        allow_pickle=allow_pickle,
        retry_failed=retry_failed,
        stream=stream,
    )
    sys.exit(run_preset(preset, request, checkpoint, format, dry_run))


@app.command()
def check(
    baseline: Annotated[str, typer.Argument(help="Name, or file.py:Class.")],
    set_: Annotated[list[str], typer.Option("--set", help="field=value of the baseline.")] = [],  # noqa: B006
) -> None:
    """Test a baseline against the contract of one."""
    from qbench.study import commands

    sys.exit(commands.check(baseline, tuple(set_)))


@app.command()
def doctor(
    data: Data = None,
    results: Results = DEFAULT_RESULTS,
    hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the Hub answers.")] = False,
) -> None:
    """Say what this machine has and what it lacks; exit code 1 if a run would fail of it."""
    from qbench.study import commands

    sys.exit(commands.doctor(data, results, hub))
