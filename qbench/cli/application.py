"""The application, its exit codes, and the options that several commands share.

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
