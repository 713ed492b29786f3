"""Published rows that were run again, as stored beside the runs, for the page.

Left out: the verdicts themselves (:mod:`qbench.reproduction.verdicts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qbench.errors import QBenchError
from qbench.report.sheets import shown
from qbench.reproduction.outcome import FOLDER, Outcome, read
from qbench.reproduction.printing import sheet


def reproductions(results: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The tables of every stored reproduction, and what could not be read of them."""
    found: list[dict[str, Any]] = []
    broken: list[str] = []
    for path in sorted((results / FOLDER).glob("*.json")):
        try:
            outcome = read(path)
            table = shown(sheet(outcome), {}, f"reproduction-{len(found) + 1}")
        except QBenchError as error:
            broken.append(str(error))
            continue
        found.append(table | {"lead": _lead(outcome)})
    return found, broken


def _lead(outcome: Outcome) -> str:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in outcome.counts().items())
    return f"{outcome.about.rstrip('.')}: {verdicts}."
