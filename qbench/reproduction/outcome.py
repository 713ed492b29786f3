"""The outcome of a reproduction, stored beside the runs.

``<results>/reproductions/<preset>.json`` (``<preset>--<checkpoint>.json`` for other weights than
the paper's, ``...--first-N.json`` for a part of the items): what was published, what came out, and
the verdict, number by number. :func:`stored` reads all of them. A file is written whole or not at
all, and is made again from the runs whenever ``qbench reproduce`` is given the same command:
what is measured is found in the store.

Torch-free. Left out: the numbers' items; the records named in ``records`` have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qbench.errors import RunFailed
from qbench.record import Metric
from qbench.study.store import slug, write_whole

FOLDER = "reproductions"
OUTCOME_FORMAT = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Number(_Strict):
    """One cell of the published table."""

    title: str
    """The column: "wikitext2 gptq-2048"."""
    task: str
    metric: str
    unit: Literal["perplexity", "percent"]
    published: float
    printed: str
    """As the paper prints it."""
    source: str
    printed_error: str = ""
    measured_as: str = ""
    """The protocol it was measured by; "" where it was not measured."""
    reproduced: Metric | None = None
    """In the same unit; None where it was not measured. Over several seeds: their mean."""
    seeds: list[Metric] = []
    """What each seed gave, where there are several."""
    difference: float | None = None
    """Reproduced minus published; None where one of them is not finite."""
    noise: float | None = None
    """How much difference is allowed, the rounding of the published number included."""
    verdict: str
    """``within noise``, ``differs``, or why there is none."""
    reasons: list[str] = []
    """Why it may differ, as far as the preset knows."""
    caveat: str = ""
    """What makes ``within noise`` say less than it seems to."""
    records: list[str] = []
    """The records it was made from, relative to the results folder."""


class OutcomeRow(_Strict):
    """One row of the published table."""

    name: str
    baseline: str
    parameters: dict[str, Any] = {}
    scheme: str
    """As it was resolved."""
    numbers: list[Number] = []


class Gate(_Strict):
    """Whether the full-precision row came out as published, before anything was quantized."""

    state: Literal["passed", "failed", "none"]
    """none: the table has no full-precision row, or other weights were published on."""
    sentence: str


class Outcome(_Strict):
    """One reproduction."""

    format: int = OUTCOME_FORMAT
    preset: str
    paper: str
    about: str
    weights: Literal["released", "nearest", "unreleased"]
    hub: str | None
    """What the paper's weights are called on the Hub."""
    checkpoint: str
    """What was measured."""
    limit: int | None = None
    departures: list[str] = []
    """What is not as in the paper."""
    gate: Gate
    rows: list[OutcomeRow] = []
    ambiguous: list[str] = []
    not_expressed: list[str] = []
    environment: dict[str, str] = {}
    created: str

    @property
    def is_stand_in(self) -> bool:
        """Whether other weights than the Hub's were named."""
        return self.checkpoint != self.hub

    def path(self, results: Path) -> Path:
        """Where it is stored."""
        parts = [self.preset]
        parts += [slug(self.checkpoint)] if self.is_stand_in else []
        parts += [] if self.limit is None else [f"first-{self.limit}"]
        return results / FOLDER / f"{'--'.join(parts)}.json"

    def counts(self) -> dict[str, int]:
        """How many numbers have which verdict, the most frequent first."""
        found: dict[str, int] = {}
        for number in (number for row in self.rows for number in row.numbers):
            found[number.verdict] = found.get(number.verdict, 0) + 1
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def joined(outcome: Outcome, results: Path, rows: Sequence[str], titles: Sequence[str]) -> Outcome:
    """An outcome with the rows and columns that an earlier one of the same kind has beside it.

    So a reproduction can be run a few rows at a time. What was stored under other conditions
    (other departures, another gate) is not carried on.

    Args:
        outcome: the new one, whose numbers replace the old.
        results: where an earlier one may be.
        rows: the preset's rows in order.
        titles: its columns in order.
    """
    path = outcome.path(results)
    try:
        before = read(path) if path.is_file() else None
    except RunFailed:  # damaged, or another format: it is made again
        before = None
    if before is None or (before.departures, before.gate.state) != (
        outcome.departures,
        outcome.gate.state,
    ):
        return outcome
    kept = {row.name: row for row in before.rows if row.name in rows}
    for row in outcome.rows:
        old = kept.get(row.name)
        if old is not None and (old.parameters, old.scheme) == (row.parameters, row.scheme):
            numbers = {n.title: n for n in (*old.numbers, *row.numbers) if n.title in titles}
            row = row.model_copy(
                update={"numbers": sorted(numbers.values(), key=lambda n: titles.index(n.title))}
            )
        kept[row.name] = row
    ordered = sorted(kept.values(), key=lambda row: rows.index(row.name))
    return outcome.model_copy(update={"rows": ordered})


def save(outcome: Outcome, results: Path) -> Path:
    """Write (or replace) an outcome.

    Raises:
        RunFailed: if it cannot be written; an earlier one is then still whole.
    """
    text = outcome.model_dump_json(indent=1) + "\n"
    return write_whole(outcome.path(results), lambda file: file.write(text.encode()))


def read(path: Path) -> Outcome:
    """A stored outcome.

    Raises:
        RunFailed: for a file that is none, or of a newer format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format", 0) > OUTCOME_FORMAT:
            raise RunFailed(f"{path} was written by a newer qbench; upgrade")
        return Outcome.model_validate(data)
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(
            f"{path} is no stored reproduction ({reason}); delete it and reproduce again"
        ) from error


def stored(results: Path) -> Iterator[Outcome]:
    """Every outcome stored beside the runs of a results folder, by name."""
    return (read(path) for path in sorted((results / FOLDER).glob("*.json")))
