"""What a person sees while something runs: a bar with an ETA, or plain lines off a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, int], None]
"""(done, total)"""
PLAIN_SECONDS = 30
"""How often a plain line says how far a step is."""


class Reporter:
    """Reports steps to standard error; results go to standard output and are not its business."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.on_terminal = sys.stderr.isatty()

    def line(self, text: str) -> None:
        """Say one thing."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def step(self, label: str) -> Iterator[Update]:
        """Show a bar while the block runs; it is handed a function to move it."""
        if self.quiet:
            yield lambda done, total: None
        elif self.on_terminal:
            with _bar(label) as update:
                yield update
        else:
            yield self._plain(label)

    def _plain(self, label: str) -> Update:
        """Off a terminal: a line every half minute, none for what is over sooner."""
        started = last = time.perf_counter()

        def update(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if 0 < done < total and now - last >= PLAIN_SECONDS:
                last = now
                left = (now - started) / done * (total - done)
                self.line(f"    {label}: {done / total:.0%}, about {left:.0f} s left")

        return update


@contextmanager
def _bar(label: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
