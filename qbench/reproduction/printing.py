"""A reproduction as a table: published | reproduced | difference | verdict; and the presets' list.

Torch-free. Left out: how a table is written in a format (:mod:`qbench.tables.render`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator

from qbench.comparison.headings import MISSING
from qbench.errors import QBenchError, unknown
from qbench.reproduction.outcome import Number, Outcome, OutcomeRow
from qbench.reproduction.presets import Preset, presets
from qbench.reproduction.verdicts import DIFFERS, WITHIN
from qbench.tables.sheet import Cell, Column, Sheet

FORMATS = ("terminal", "md", "latex", "csv", "html")
_NOISE = (
    "Noise: half a unit of the last printed digit, and the largest of the preset's tolerance (for "
    "dtype, kernels, library versions), for calibrated rows 1.96 paired standard errors of the "
    "difference from the full-precision row, and the 95 % interval of one further seed."
)


def render(outcome: Outcome, form: str, width: int = 100) -> str:
    """The table in a format.

    Raises:
        QBenchError: for an unknown format.
    """
    from qbench.tables.render import terminal
    from qbench.tables.table import FORMATS as writers

    check_format(form)
    if form == "csv":
        return tidy_csv(outcome)
    return terminal(sheet(outcome), width) if form == "terminal" else writers[form](sheet(outcome))


def check_format(form: str) -> None:
    """Refuse a format there is not, before anything is measured.

    Raises:
        QBenchError: naming those there are.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)


def sheet(outcome: Outcome) -> Sheet:
    """The table: a line per number, a rule between the rows of the paper."""
    lines = [(row, number) for row in outcome.rows for number in row.numbers]
    if not lines:
        raise QBenchError(f"{outcome.preset}: nothing was published in the columns asked for")
    first = [i == 0 or lines[i - 1][0] is not row for i, (row, _) in enumerate(lines)]
    names = zip(lines, first, strict=True)
    columns = [
        Column(("Row",), [Cell(row.name if new else "") for (row, _), new in names], False),
        Column(("Measure",), [Cell(n.title) for _, n in lines], False),
        Column(("Published",), [Cell(n.printed, _printed_notes(n)) for _, n in lines]),
        Column(("Reproduced",), [Cell(reproduced_text(n), _seed_notes(n)) for _, n in lines]),
        Column(("Difference",), [Cell(_signed(n)) for _, n in lines]),
        Column(("Noise",), [Cell(_noise_text(n)) for _, n in lines]),
        Column(("Verdict",), [_verdict_cell(n) for _, n in lines], False),
    ]
    return Sheet(
        title=f"{outcome.preset}: {outcome.paper}, on {outcome.checkpoint}",
        columns=columns,
        facts=[{} for _ in lines],
        rules=frozenset(i for i, new in enumerate(first) if new and i),
        remarks=list(_remarks(outcome)),
    )


def tidy_csv(outcome: Outcome) -> str:
    """One line per number, for machines."""
    text = io.StringIO()
    names = (
        *("preset", "checkpoint", "hub", "row", "baseline", "scheme", "task", "metric", "title"),
        *("unit", "published", "printed", "reproduced", "stderr", "difference", "noise"),
        *("verdict", "seeds", "limit", "gate", "reasons", "source"),
    )
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in outcome.rows:
        for number in row.numbers:
            writer.writerow(_csv_line(outcome, row, number))
    return text.getvalue()


def print_list() -> None:
    """Print the presets there are."""
    print("\n".join(list_lines(presets())).strip("\n"))


def list_lines(known: dict[str, Preset]) -> Iterator[str]:
    """The presets, a heading per table."""
    width = max(map(len, known))
    before = None
    for name, preset in known.items():
        if preset.family is not before:
            before = preset.family
            yield ""
            yield f"{before.paper}"
            yield f"  {before.about}"
        yield f"  {name:{width}}  {_weights(preset)}".rstrip()


def reproduced_text(number: Number) -> str:
    """A reproduced number with the digits of the published one: 27.66, 48.1, 1.3e3."""
    if number.reproduced is None:
        return MISSING
    return _like(number.reproduced.as_float(), number.printed)


def _like(value: float, printed: str) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf (diverged)"
    if abs(value) >= 10_000:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    digits = len(printed.partition(".")[2]) if "e" not in printed else 0
    return f"{value:.{min(max(digits, 1 if value < 1000 else 0), 4)}f}"


def _signed(number: Number) -> str:
    if number.difference is None:
        return MISSING
    text = _like(abs(number.difference), number.printed)
    return ("−" if number.difference < 0 else "+") + text


def _noise_text(number: Number) -> str:
    if number.noise is None or number.reproduced is None:
        return MISSING
    return f"±{number.noise:.2g}" if number.noise < 1e4 else f"±{number.noise:.0e}"


def _verdict_cell(number: Number) -> Cell:
    notes = tuple(f"May differ because {reason}" for reason in number.reasons)
    notes += (f"Says little: {number.caveat}",) if number.caveat else ()
    verdict = number.verdict
    for kind in ("not measured", "not applicable", "failed", "no verdict"):
        if verdict.startswith(f"{kind}: "):
            return Cell(kind, (verdict,))
    return Cell(verdict, notes)


def _printed_notes(number: Number) -> tuple[str, ...]:
    return (f"In the paper: {number.printed_error}",) if number.printed_error else ()


def _seed_notes(number: Number) -> tuple[str, ...]:
    if not number.seeds:
        return ()
    mean = "geometric mean" if number.unit == "perplexity" else "mean"
    values = ", ".join(_like(seed.as_float(), number.printed) for seed in number.seeds)
    return (f"{mean} of {len(number.seeds)} seeds: {values}",)


def _remarks(outcome: Outcome) -> Iterator[str]:
    told = ", ".join(f"{count} {_kind(name)}" for name, count in _kinds(outcome).items())
    yield f"{told}."
    yield f"Gate {outcome.gate.state}: {outcome.gate.sentence}."
    if outcome.departures:
        yield f"Not as in the paper: {'; '.join(outcome.departures)}."
    for open_point in outcome.ambiguous:
        yield f"Left open by the paper: {open_point}."
    for row in outcome.not_expressed:
        yield f"Not here: {row}."
    yield _NOISE


def _kinds(outcome: Outcome) -> dict[str, int]:
    found: dict[str, int] = {}
    for verdict, count in outcome.counts().items():
        kind = verdict.partition(":")[0]
        found[kind] = found.get(kind, 0) + count
    return found


def _kind(name: str) -> str:
    return {WITHIN: "within noise", DIFFERS: "that differ", "no verdict": "without verdict"}.get(
        name, name
    )


def _weights(preset: Preset) -> str:
    facts = preset.facts
    if facts is None:
        return "weights never released; --checkpoint, or the bundled twins"
    size = facts.parameters
    count = f"{size / 1000:.3g} B" if size >= 1000 else f"{size:.0f} M"
    marks = [preset.target.hub or "", count]
    marks += ["gated"] if facts.gated else []
    marks += ["the nearest public weights"] if preset.family.weights == "nearest" else []
    return ", ".join(marks)


def _csv_line(outcome: Outcome, row: OutcomeRow, number: Number) -> dict[str, object]:
    found = number.reproduced
    return {
        "preset": outcome.preset,
        "checkpoint": outcome.checkpoint,
        "hub": outcome.hub,
        "row": row.name,
        "baseline": row.baseline,
        "scheme": row.scheme,
        "task": number.task,
        "metric": number.metric,
        "title": number.title,
        "unit": number.unit,
        "published": number.published,
        "printed": number.printed,
        "reproduced": None if found is None else found.as_float(),
        "stderr": None if found is None else found.stderr,
        "difference": number.difference,
        "noise": number.noise,
        "verdict": number.verdict,
        "seeds": " ".join(str(seed.as_float()) for seed in number.seeds),
        "limit": outcome.limit,
        "gate": outcome.gate.state,
        "reasons": "; ".join(number.reasons),
        "source": number.source,
    }
