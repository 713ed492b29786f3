"""``qbench list``, ``table``, ``plot``, ``report`` and ``compare``: what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qbench.cli.application import DEFAULT_RESULTS, Data, Names, Results, app
from qbench.errors import QBenchError

Layout = Annotated[
    str,
    typer.Option(
        help="comparison, costs, sizes, bitnet-table3, bitnet-table4, b158-table1, b158-table2"
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        help="accuracy-vs-bits, perplexity-vs-bits, agreement-vs-bits, accuracy-vs-size, "
        "loss-vs-size, heatmap, layer-errors, bitnet-fig1, bitnet-fig3, bitnet-fig6, b158-fig2, "
        "b158-fig3, accuracy-vs-cost, perplexity-vs-cost"
    ),
]
PlotMetric = Annotated[
    str,
    typer.Option(
        help="acc, acc_norm, acc_token, perplexity or bits_per_byte; of layer-errors, "
        "relative_error or proxy_loss; of agreement-vs-bits, kl_divergence or top1_agreement"
    ),
]
Flips = Annotated[
    bool, typer.Option("--flips", help="Share of answers that differ from full precision's.")
]
EachSeed = Annotated[bool, typer.Option("--each-seed", help="A row per seed, not mean and spread.")]


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="baselines, tasks, corpora, runs, checkpoints or published")
    ],
    results: Results = DEFAULT_RESULTS,
) -> None:
    """List baselines, tasks, corpora, runs, checkpoints or published tables."""
    from qbench.study import listing

    for line in listing.lines(what, results):
        print(line)


@app.command()
def table(
    layout: Layout = "comparison",
    metric: Annotated[
        str, typer.Option(help="acc, acc_norm or acc_token; in sizes bits_per_byte too")
    ] = "acc",
    format: Annotated[str, typer.Option(help="terminal, md, latex, csv or html")] = "terminal",
    against: Annotated[
        str | None, typer.Option(help="A published table, or its rows of one model: NAME:MODEL.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="Print this published table alone; see list published.")
    ] = None,
    delta: Annotated[bool, typer.Option(help="Difference to full precision.")] = False,
    checkpoint: Names = [],  # noqa: B006
    baseline: Names = [],  # noqa: B006
    scheme: Names = [],  # noqa: B006
    task: Names = [],  # noqa: B006
    num_fewshot: Annotated[int | None, typer.Option()] = None,
    flips: Flips = False,
    each_seed: EachSeed = False,
    significance: Annotated[
        str, typer.Option(help="off, fp16 (differs from full precision?) or best (really best?)")
    ] = "off",
    interval: Annotated[bool, typer.Option("--interval", help="95 % Wilson intervals.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Print everything stored as a table, or a published one."""
    import shutil

    from qbench.study.store import Store
    from qbench.tables.table import published_table
    from qbench.tables.table import table as make

    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    text = (
        published_table(published, format, width)
        if published
        else make(
            Store(results),
            layout,
            metric=metric,
            against=against,
            delta=delta,
            format=format,
            width=width,
            checkpoints=checkpoint or None,
            baselines=baseline or None,
            schemes=scheme or None,
            tasks=task or None,
            num_fewshot=num_fewshot,
            each_seed=each_seed,
            flips=flips,
            significance=significance,
            interval=interval,
        )
    )
    _give(text, output)


def _give(text: str, output: Path | None) -> None:
    """Print a table, or write it and print where."""
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
    kind: Kind = None,
    metric: PlotMetric = "acc",
    x: Annotated[
        str,
        typer.Option(
            help="wbits or effective_bits; against cost: size, energy, energy_int32 or "
            "effective_bits, of the whole model"
        ),
    ] = "wbits",
    against: Annotated[
        str | None, typer.Option(help="A published table: against size, the papers' own figures.")
    ] = None,
    width: Annotated[
        str | None, typer.Option(help="3.25in (a column of a page), 8cm, 234pt.")
    ] = None,
    checkpoint: Names = [],  # noqa: B006
    baseline: Names = [],  # noqa: B006
    scheme: Names = [],  # noqa: B006
    task: Names = [],  # noqa: B006
    num_fewshot: Annotated[int | None, typer.Option()] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Draw what is stored: against bits, against model size, or one of the papers' own figures.

    Against size, full-precision and trained rows are there, and quantized ones where --baseline or
    --scheme names them.
    """
    from qbench.plots.plot import plot as draw
    from qbench.plots.style import inches
    from qbench.process import uncollected
    from qbench.study.store import Store

    with uncollected():  # pandas and matplotlib are imported in there
        path = draw(
            Store(results),
            kind,
            output=output,
            x=x,
            metric=metric,
            against=against,
            width_in=None if width is None else inches(width),
            checkpoints=checkpoint or None,
            baselines=baseline or None,
            schemes=scheme or None,
            tasks=task or None,
            num_fewshot=num_fewshot,
        )
    print(path)


@app.command()
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="A name ending in .html")],
    data: Data = None,
    no_texts: Annotated[bool, typer.Option("--no-texts", help="Leave all questions out.")] = False,
    no_texts_of: Annotated[
        list[str], typer.Option(help="Leave a task's questions out; repeat it or use patterns.")
    ] = [],  # noqa: B006
    metric: Annotated[str, typer.Option(help="acc, acc_norm or acc_token")] = "acc",
    against: Annotated[str | None, typer.Option(help="A published table.")] = None,
    significance: Annotated[
        str, typer.Option(help="Marks in the table: fp16, best or off")
    ] = "fp16",
    checkpoint: Names = [],  # noqa: B006
    baseline: Names = [],  # noqa: B006
    scheme: Names = [],  # noqa: B006
    task: Names = [],  # noqa: B006
    num_fewshot: Annotated[int | None, typer.Option()] = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Write everything stored as one HTML page that needs no network.

    With --data the page shows the questions that were answered otherwise than in full precision.
    """
    from qbench.process import uncollected
    from qbench.report.report import Choices
    from qbench.report.report import report as make
    from qbench.study.store import Store

    choices = Choices(
        metric=metric,
        against=against,
        significance=significance,
        data=None if no_texts else data,
        without_texts=tuple(no_texts_of),
        checkpoints=checkpoint or None,
        baselines=baseline or None,
        schemes=scheme or None,
        tasks=task or None,
        num_fewshot=num_fewshot,
    )
    with uncollected():  # pandas is imported in there
        path = make(Store(results), output, choices)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command()
def costs(
    model: Annotated[
        str | None,
        typer.Argument(help="A shape such as bitnet-6.7B, a stored run, or a checkpoint."),
    ] = None,
    scheme: Annotated[list[str], typer.Option(help="Beside W16A16; repeat it.")] = [],  # noqa: B006
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a sequence; 512.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    against: Annotated[
        str | None, typer.Option(help="A published table, such as bitnet-table1: cell by cell.")
    ] = None,
    format: Annotated[str, typer.Option(help="terminal, md, latex or html")] = "terminal",
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Say what a model takes: bits per weight, bytes, memory, energy of its arithmetic.

    Nothing is run; of a checkpoint the configuration is enough.
    """
    import shutil

    from qbench.tables.costs import costs as make

    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    text = make(
        model,
        scheme,
        seqlen=seqlen,
        batch=batch,
        against=against,
        results=results,
        format=format,
        width=width,
    )
    print(text, end="")


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="Folder, checkpoint/scheme/baseline, or beginning.")],
    run_b: Annotated[str, typer.Argument(help="The other run: differences are B less A.")],
    metric: Annotated[str, typer.Option(help="acc, acc_norm or acc_token")] = "acc",
    task: Annotated[list[str], typer.Option(help="Keep this task only; repeat it.")] = [],  # noqa: B006
    items: Annotated[int, typer.Option(min=0, help="Changed answers shown per task.")] = 10,
    data: Data = None,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Compare two stored runs: settings, tested differences, and answers that changed.

    With --data the texts of these questions are read from there and shown.
    """
    import shutil

    from qbench.tables.two_runs import compare_text

    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    text = compare_text(
        results, run_a, run_b, metric=metric, tasks=task, items=items, data=data, width=width
    )
    print(text, end="")
