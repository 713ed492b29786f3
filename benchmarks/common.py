"""What every benchmark shares: options, interleaved timing, child processes, tables, reports.

Both sides of a comparison run under the same conditions: the same number of threads, set before
torch is imported, in the same process or in processes of the same kind, taking turns (A B, B A,
A B, ...) because machines are noisy. What is shown is the median with smallest and largest.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qbench.process import SETTINGS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
QUICK = Path(__file__).parent / "quick"
MODELS = Path(__file__).parent / ".models"
LONG = 60.0
"""Seconds from which a repeat is long, so that three must do."""
_SMALL = "Small sizes, to see that it works: no figures to quote, no bars to hold them to."
_PACKAGES = ("torch", "numpy", "numba", "transformers", "lm_eval")


def parser(description: str, repeats: int = 5, threads: int | None = None) -> Any:
    """The options every script has.

    Args:
        description: the script's docstring.
        repeats: of every measurement that takes under a minute.
        threads: of both sides; None is the number of cores.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--threads", type=int, default=threads or os.cpu_count() or 1)
    made.add_argument(
        "--data",
        type=_whole,
        default=_whole(os.environ["QBENCH_DATA"]) if os.environ.get("QBENCH_DATA") else None,
        help="folder with tasks/<task>/<split>.jsonl and corpora/ (or QBENCH_DATA)",
    )
    made.add_argument("--output", type=_whole, help="folder of the report (benchmarks/results)")
    made.add_argument("--work", type=_whole, default=MODELS, help="folder of models that are made")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def _whole(text: str) -> Path:
    """A path that means the same in every folder a child runs in."""
    return Path(text).expanduser().resolve()


def output_folder(options: Any) -> Path:
    """Where a report goes: a quick run never overwrites a full one."""
    return options.output or (QUICK if options.quick else RESULTS)


@dataclass
class Times:
    """Seconds of repeats of one side."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Processor seconds of all threads, where they were taken."""

    @property
    def median(self) -> float:
        """The middle repeat."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """``1.23 s (1.20..1.31, n=5)``."""
        low, high = (_seconds(f(self.seconds)) for f in (min, max))
        return f"{_seconds(self.median)} s ({low}..{high}, n={len(self.seconds)})"


def _seconds(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def ratio(peer: Times, ours: Times) -> tuple[float, str]:
    """How many times longer the peer takes: by medians, and the range over turns."""
    middle = peer.median / ours.median
    turns = [p / o for p, o in zip(peer.seconds, ours.seconds, strict=False)]
    return middle, f"{middle:.2f}x ({min(turns):.2f}..{max(turns):.2f})"


def cpu_ratio(peer: Times, ours: Times) -> str:
    """The same by processor seconds of all threads, which other programs disturb less."""
    return f"{statistics.median(peer.cpu) / statistics.median(ours.cpu):.2f}x"


def against(value: float, bar: float) -> str:
    """A ratio held to its bar."""
    return f"{bar:g}x {'met' if value >= bar else 'missed'}"


def take_turns(
    sides: Mapping[str, Callable[[], Callable[[], Any]]], repeats: int, fewer: int = 3
) -> tuple[dict[str, Times], dict[str, Any]]:
    """Time sides in turns.

    Args:
        sides: by name, a function that prepares a repeat and returns what is timed.
        repeats: of each side.
        fewer: repeats if one takes over a minute.

    Returns:
        Times and the last value of every side.
    """
    times = {name: Times() for name in sides}
    values: dict[str, Any] = {}
    turn, wanted = 0, repeats
    while turn < wanted:
        for name in list(sides) if turn % 2 == 0 else list(reversed(list(sides))):
            work = sides[name]()
            gc.collect()
            started, cpu = time.perf_counter(), time.process_time()
            values[name] = work()
            times[name].seconds.append(time.perf_counter() - started)
            times[name].cpu.append(time.process_time() - cpu)
            del work
        turn += 1
        if any(t.seconds[0] > LONG for t in times.values()):
            wanted = min(repeats, fewer)
    return times, values


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process that computes with so many threads.

    Both sides get what qbench's command line sets for itself, unless the environment says
    otherwise: waiting threads sleep instead of spinning, which costs up to ten times where cores
    are shared, and torch takes its memory in large pages.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    settings = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    return dict.fromkeys(names, str(threads)) | {
        **settings,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }


def child_environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the threads of :func:`thread_variables`."""
    return {**os.environ, **thread_variables(threads), **(more or {})}


def child(
    command: Sequence[str],
    threads: int,
    variables: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> dict[str, Any]:
    """Run a process in a folder; the last line of JSON it prints is its answer.

    Raises:
        RuntimeError: with the end of what it said on standard error.
    """
    given = child_environment(threads, variables)
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {words[-1]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def own_child(module: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a module of this folder in a process of its own (:func:`child`)."""
    return child([sys.executable, "-m", f"benchmarks.{module}", *arguments], threads)


def qbench_command() -> list[str]:
    """What starts the command line, with this interpreter."""
    script = Path(sys.executable).parent / "qbench"
    inline = [sys.executable, "-c", "from qbench.cli import main; main()"]
    return [str(script)] if script.is_file() else inline


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes (0 where Linux does not say)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, str]:
    """The machine and the versions, without names or paths."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "processor": _from_file("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": _gigabytes(_from_file("/proc/meminfo", "MemTotal")),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _from_file(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")


def _gigabytes(text: str) -> str:
    return f"{int(text.split()[0]) / 2**20:.0f} GB" if text else ""


def load_average() -> str:
    """Of one, five and fifteen minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


@dataclass
class Table:
    """Cells as text; a note is a sentence."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """A heading in bold, the table, the notes."""
        lines = [f"**{self.title}**", "", _line(self.columns)]
        lines.append(_line(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def text(self) -> str:
        """Aligned columns for a terminal."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *lines, *self.notes])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass
class Report:
    """What one script found."""

    name: str
    title: str
    threads: str
    tables: list[Table] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    measurements: dict[str, Any] = field(default_factory=dict)
    """The numbers behind the tables."""
    environment: dict[str, str] = field(default_factory=machine)
    load_before: str = field(default_factory=load_average)
    load_after: str = ""
    quick: bool = False

    def add(self, table: Table) -> None:
        """Keep a table and print it at once."""
        self.tables.append(table)
        print(f"\n{table.text()}", flush=True)

    def save(self, options: Any) -> Path:
        """Write NAME.json and NAME.md, and say where."""
        self.load_after, self.quick = load_average(), options.quick
        folder = output_folder(options)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        small = f"\n{_SMALL}" if self.quick else ""
        print(f"\n{self.conditions()}{small}\nwritten: {shown}")
        return path

    def conditions(self) -> str:
        """One line about the machine."""
        facts = self.environment
        versions = ", ".join(f"{n} {facts[n]}" for n in ("python", *_PACKAGES) if n in facts)
        return (
            f"{facts['processor']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}; "
            f"{versions}; threads: {self.threads}; load average {self.load_before} before, "
            f"{self.load_after} after."
        )

    def markdown(self) -> str:
        """The section of the page."""
        quick = [_SMALL] if self.quick else []
        parts = [f"## {self.title}", *quick, *(table.markdown() for table in self.tables)]
        return "\n\n".join([*parts, self.conditions()])

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read NAME.json back."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["tables"] = [Table(**table) for table in fields["tables"]]
        return cls(**fields)


def missing(options: Any, files: Sequence[str], script: str) -> str | None:
    """One line about data that are not there, or None."""
    if options.data is None:
        return f"{script} needs real data: pass --data DIR (or QBENCH_DATA) with {files[0]}, ..."
    absent = [name for name in files if not (options.data / name).is_file()]
    return f"{script}: {options.data} lacks {', '.join(absent)}" if absent else None
