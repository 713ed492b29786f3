"""Start-up: commands that read results, and what a run spends before its first block.

Every repeat is a fresh process on a warm disk (one run beforehand does not count). ``list``,
``table`` and ``plot`` read a folder of results made here. For ``run``, a baseline stops the process
at its first block (first_block.py): what is timed are imports, loading the checkpoint, drawing
calibration windows, preparing the task, and the pass that finds what enters the first block.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Report, Table, Times
from benchmarks.models import LLAMA_100M, make_checkpoint

COMMAND_BAR, RUN_BAR = 1.5, 5.0
PLUGIN = Path(__file__).parent / "first_block.py"
WORLD = ("--data", "bundled:world")
BUNDLED = "bundled:fp16-2m"


def once(arguments: list[str], threads: int, mark: Path | None = None) -> float:
    """Seconds of one process, to its end or to its mark.

    Raises:
        RuntimeError: with the command's own last words.
    """
    variables = common.child_environment(threads)
    if mark is not None:
        mark.unlink(missing_ok=True)
        variables["QBENCH_MARK"] = str(mark)
    command = [*common.qbench_command(), *arguments]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=common.ROOT)
    ended = time.monotonic()
    if done.returncode or (mark is not None and not mark.is_file()):
        words = [x for x in (done.stderr + done.stdout).splitlines() if x.strip()]
        raise RuntimeError(f"qbench {' '.join(arguments[:2])}: {(words or ['no message'])[-1]}")
    return (ended if mark is None else float(mark.read_text())) - started


def commands(results: Path, folder: Path) -> dict[str, list[str]]:
    """What is timed, by the words shown."""
    stored = ["--results", str(results)]
    return {
        "qbench --help": ["--help"],
        "qbench list baselines": ["list", "baselines"],
        "qbench list tasks": ["list", "tasks"],
        "qbench list runs": ["list", "runs", *stored],
        "qbench table": ["table", *stored],
        "qbench plot": ["plot", *stored, "-o", str(folder / "plot.png")],
    }


def runs(options: Any, folder: Path) -> dict[str, list[str]]:
    """Runs that end at their first block, by the checkpoint shown."""
    results = ["--results", str(folder / "stopped")]
    method = ["--baseline", f"{PLUGIN}:FirstBlock", "--scheme", "W4A16"]
    small = ["--calibration", "world", "--nsamples", "64", "--seqlen", "128", *WORLD]
    wanted = {
        "2 M parameters (bundled), 64 x 128 tokens": ["run", BUNDLED, *small, "--tasks", "world"]
    }
    if not options.quick:
        checkpoint = make_checkpoint(options.work, "llama-100m", LLAMA_100M, options.data)
        few = ["--calibration", "world", "--nsamples", "8", "--seqlen", "512", *WORLD]
        name = "110 M parameters, 8 x 512 tokens"
        wanted[name] = ["run", str(checkpoint), *few, "--tasks", "world", "--limit", "32"]
    return {name: [*arguments, *method, *results] for name, arguments in wanted.items()}


def measure(options: Any, report: Report) -> None:
    """Both tables."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        results = folder / "results"
        for scheme in ("W8A16", "W4A16", "W3A16"):
            made = ["run", BUNDLED, "--baseline", "rtn", "--scheme", scheme, *WORLD]
            made += ["--tasks", "world,piqa", "--limit", "4", "--results", str(results)]
            once(made, options.threads)
        table = Table("Commands that read", ["", "wall", "bar"])
        for name, arguments in commands(results, folder).items():
            add_row(report, table, name, COMMAND_BAR, repeat(options, arguments))
        report.add(table)
        table = Table(
            "`qbench run` until its first block", ["checkpoint, calibration", "wall", "bar"]
        )
        for name, arguments in runs(options, folder).items():
            add_row(report, table, name, RUN_BAR, repeat(options, arguments, folder / "mark"))
        report.add(table)


def repeat(options: Any, arguments: list[str], mark: Path | None = None) -> Times | str:
    """All repeats of one command after one that does not count; or why there are none."""
    try:
        once(arguments, options.threads, mark)
        return Times([once(arguments, options.threads, mark) for _ in range(options.repeats)])
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return str(problem)


def add_row(report: Report, table: Table, name: str, bar: float, times: Times | str) -> None:
    """A row held to its bar."""
    if isinstance(times, str):
        table.rows.append([name, f"failed: {times}", ""])
        return
    verdict = f"< {bar:g} s {'met' if times.median < bar else 'missed'}"
    table.rows.append([name, str(times), verdict])
    report.measurements[name] = times.seconds


def main() -> None:
    options = common.parser(__doc__ or "").parse_args()
    report = Report("startup", "Start-up", str(options.threads))
    measure(options, report)
    report.save(options)


if __name__ == "__main__":
    main()
