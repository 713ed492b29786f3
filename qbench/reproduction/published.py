"""What was published for a row of a preset: the number, as it was printed, with its rounding.

Numbers come from the tables under ``results/reference``; a preset only says which of their lines
are its own. Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from qbench.comparison import reference
from qbench.errors import QBenchError
from qbench.reproduction.presets import Measure, Preset, Row

UNUSABLE = "do not use"
"""In the note of a printed number that cannot be the row's own."""


@dataclass(frozen=True)
class Published:
    """One printed number."""

    value: float
    """As printed: a perplexity, or percent."""
    printed: str
    error: str = ""
    """Where the paper contradicts itself, or prints what cannot be."""
    source: str = ""
    """Paper and table."""

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit: 0.005 of "27.65", 50 of "1.3e3"."""
        return half_unit(self.printed)


def half_unit(printed: str) -> float:
    """Half a unit of the last digit of a number as a paper prints it.

    Raises:
        QBenchError: for a text that is no number.
    """
    match = re.fullmatch(
        r"[+-]?(\d+)(?:\.(\d*))?(?:e([+-]?\d+))?", printed.replace(",", "").strip()
    )
    if not match:
        raise QBenchError(f"{printed!r} is no printed number, as in 27.65, 1.3e3 or 18,687")
    return 0.5 * 10.0 ** (int(match[3] or 0) - len(match[2] or ""))


def number(preset: Preset, row: Row, measure: Measure) -> Published | None:
    """What was published for a row and a column; None where the paper has no such number.

    Raises:
        QBenchError: if more than one line of the table answers.
    """
    wanted = {**row.published, **measure.where}
    table = _lines(preset.reference)
    if unknown := wanted.keys() - table[0].keys():
        raise QBenchError(f"{preset.reference} has no column {', '.join(sorted(unknown))}")
    found = [line for line in table if all(line[name] == wanted[name] for name in wanted)]
    if len(found) > 1:
        raise QBenchError(f"{preset.name}: {len(found)} lines of {preset.reference} have {wanted}")
    if not found:
        return None
    line = found[0]
    source = f"{line['paper']}, {line['table']}"
    return Published(
        float(line["value"]), line["printed"] or line["value"], line["printed_error"], source
    )


def numbers(preset: Preset, row: Row) -> list[tuple[Measure, Published]]:
    """The columns that have a published number in a row."""
    found = ((measure, number(preset, row, measure)) for measure in preset.measures)
    return [(measure, published) for measure, published in found if published is not None]


@cache
def _lines(name: str) -> tuple[dict[str, str], ...]:
    """The lines of a table, every entry as text and empty where it is missing."""
    table: Any = reference.load(name)
    text = table.astype("string").fillna("")
    return tuple({str(k): str(v) for k, v in line.items()} for line in text.to_dict("records"))
