"""A finished table as Markdown, LaTeX (:mod:`qbench.tables.latex`), HTML, CSV or terminal text.

Four of them show the same cells; the CSV is for machines: one line per number with the full value,
the facts of its row and how it was measured, and no marks inside the numbers.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qbench.comparison.run_costs import COST_COLUMNS
from qbench.comparison.seeds import spread
from qbench.tables.latex import latex as latex
from qbench.tables.sheet import Cell, Column, Sheet

if TYPE_CHECKING:
    from rich.table import Table

_FACTS = (
    *("source", "checkpoint", "scheme", "label", "wbits", "abits", "kvbits", "group_size"),
    *("grid", "agrid", "w_granularity", "a_granularity", "method", "baseline", "hyperparameters"),
    *(
        "trained",
        "status",
        "error",
        "parameters",
        "effective_bits",
        "n_layers",
        "fallbacks",
        "seed",
        "quantization_dtype",
    ),
    *("calibration_source", "calibration_nsamples", "calibration_seqlen", "calibration_seed"),
    *COST_COLUMNS,
)
_CONDITIONS = ("protocol", "num_fewshot", "limit", "encoding", "dtype", "max_length")
_HEADER = (*_FACTS, "task", "metric", *_CONDITIONS)
_TESTED = ("low", "high", "test", "p", "p_holm", "verdict")
_NUMBERS = ("n_items", "value", "stderr", "sd", "n_seeds", "best", *_TESTED, "notes")

_CSS = """
.qbench-table table { border-collapse: collapse; font: 14px/1.4 system-ui, sans-serif }
.qbench-table caption { text-align: left; font-weight: 600; padding: 4px 8px }
.qbench-table th, .qbench-table td { padding: 3px 8px; text-align: left; white-space: nowrap }
.qbench-table .number { text-align: right; font-variant-numeric: tabular-nums }
.qbench-table thead th { border-top: 2px solid; border-bottom: 1px solid; vertical-align: bottom }
.qbench-table tr.rule td { border-top: 1px solid #999 }
.qbench-table tbody tr:last-child td { border-bottom: 2px solid }
.qbench-table p { font: 12px/1.4 system-ui, sans-serif; margin: 4px 8px }
"""


def markdown(sheet: Sheet) -> str:
    """A GitHub table with the best rows in bold."""
    footnotes = sheet.footnotes()

    def cell(text: str, notes: tuple[str, ...], best: bool = False) -> str:
        text = f"**{_markdown(text)}**" if best else _markdown(text)
        return "".join([text, *(f" {_bracket(mark)}" for mark in _marks(notes, footnotes))])

    lines = [
        [cell(" ".join(column.heading), column.notes) for column in sheet.columns],
        ["---:" if column.numeric else "---" for column in sheet.columns],
        *([cell(c.text, c.notes, c.best) for c in row] for row in sheet.rows()),
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    below = [_markdown(line) for line in _below(sheet, "in bold")]
    return "\n\n".join([f"**{_markdown(sheet.title)}**", table, *below]) + "\n"


def html_page(sheet: Sheet) -> str:
    """A page of its own around :func:`html_fragment`."""
    title = html.escape(sheet.title)
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
    return f"{head}{html_fragment(sheet)}</html>\n"


def html_fragment(sheet: Sheet) -> str:
    """A self-contained section with its own style, to be put into any page."""
    footnotes = sheet.footnotes()

    def cell(tag: str, column: Column, text: str, notes: tuple[str, ...]) -> str:
        kind = ' class="number"' if column.numeric else ""
        mark = _superscript(_marks(notes, footnotes), "<sup>%s</sup>", html.escape)
        return f"<{tag}{kind}>{text}{mark}</{tag}>"

    def bold(text: str, best: bool) -> str:
        return f"<b>{html.escape(text)}</b>" if best else html.escape(text)

    heads = [
        cell("th", c, "<br>".join(map(html.escape, c.heading)), c.notes) for c in sheet.columns
    ]
    lines = ['<section class="qbench-table">', f"<style>{_CSS}</style>", "<table>"]
    lines += [f"<caption>{html.escape(sheet.title)}</caption>"]
    lines += ["<thead>", f"<tr>{''.join(heads)}</tr>", "</thead>", "<tbody>"]
    for index, row in enumerate(sheet.rows()):
        cells = zip(sheet.columns, row, strict=True)
        text = "".join(cell("td", col, bold(c.text, c.best), c.notes) for col, c in cells)
        rule = ' class="rule"' if index in sheet.rules else ""
        lines.append(f"<tr{rule}>{text}</tr>")
    lines += ["</tbody>", "</table>"]
    lines += [f"<p>{html.escape(line)}</p>" for line in _remarks(sheet, "in bold")]
    for note, mark in footnotes.items():
        lines.append(f"<p><sup>{mark}</sup> {html.escape(_body(note))}</p>")
    return "\n".join([*lines, "</section>"]) + "\n"


def tidy_csv(sheet: Sheet) -> str:
    """One line per number (or per row without any), with everything needed to filter it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_HEADER, *_NUMBERS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for facts, row in zip(sheet.facts, sheet.rows(), strict=True):
        of_row = _facts(facts)
        notes = [note for cell in row if cell.measured is None for note in cell.notes]
        numbers = [cell for cell in row if cell.measured is not None]
        if not numbers:
            writer.writerow(of_row | {"notes": "; ".join(notes)})
        for cell in numbers:
            number = cell.measured
            assert number is not None
            values = {name: getattr(number, name) for name in ("task", "metric", "n_items")}
            values |= {name: number.conditions.get(name) for name in _CONDITIONS}
            values |= {"value": number.value, "stderr": number.stderr, "best": cell.best}
            values |= {"sd": spread(number), "n_seeds": len(number.draws) or None}
            values |= _tested(cell)
            values["notes"] = "; ".join([*notes, *cell.notes])
            writer.writerow((of_row if cell.facts is None else _facts(cell.facts)) | values)
    return text.getvalue()


def _tested(cell: Cell) -> dict[str, Any]:
    """The interval and the paired test of a number, where they were asked for."""
    low, high = cell.interval or (None, None)
    verdict = cell.verdict
    if verdict is None:
        return {"low": low, "high": high}
    word = "not significant" if verdict.p is not None else "not tested"
    if verdict.significant:
        word = "better" if verdict.better else "worse"
    tested = {"test": verdict.test, "p": verdict.p, "p_holm": verdict.adjusted, "verdict": word}
    return {"low": low, "high": high, **tested}


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: "" if facts.get(name) is None else facts[name] for name in _FACTS}


def terminal(sheet: Sheet, width: int = 100) -> str:
    """Plain text; a table too wide for the terminal continues below, its row names repeated.

    Details of the rows fold at their commas, so that numbers keep most of the width.
    """
    from rich.console import Console
    from rich.text import Text

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False)
    console.print(Text(sheet.title))
    for columns in _pieces(_folded(sheet.columns, width), width):
        console.print()
        console.print(_rich_table(sheet, columns))
    console.print()
    for line in _below(sheet, "marked *"):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _rich_table(sheet: Sheet, columns: list[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    footnotes = sheet.footnotes()

    def marked(text: str, notes: tuple[str, ...]) -> Text:
        return Text(" ".join([text, *map(_bracket, _marks(notes, footnotes))]))

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            marked("\n".join(column.heading), column.notes),
            justify="right" if column.numeric else "left",
            overflow="fold",
        )
    rows = list(zip(*(column.cells for column in columns), strict=True))
    for index, row in enumerate(rows):
        cells = [marked(c.text + "*" * c.best, c.notes) for c in row]
        table.add_row(*cells, end_section=index + 1 in sheet.rules)
    return table


def _folded(columns: list[Column], width: int) -> list[Column]:
    """The same columns with details folded as far as the others need the room."""
    others = sum(_width(column) for column in columns if not (column.numeric or column.detail))
    widest = max((_width(column) for column in columns if column.numeric), default=0)
    room = max(18, min(width // 3, width - others - widest - 2))  # holds "agrid=restricted"

    def folded(column: Column) -> Column:
        cells = [replace(cell, text=_fold(cell.text, room)) for cell in column.cells]
        return replace(column, cells=cells) if column.detail else column

    return [folded(column) for column in columns]


def _fold(text: str, width: int) -> str:
    lines = [""]
    for part in re.split(r"(?<=[,; ])", text):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _pieces(everything: list[Column], width: int) -> list[list[Column]]:
    """Columns in pieces that fit the width; every piece begins with the columns that name rows."""
    names = [column for column in everything if not column.numeric]
    pieces = [names]
    left = width - sum(map(_width, names))
    for column in (column for column in everything if column.numeric):
        if _width(column) > left and len(pieces[-1]) > len(names):
            names = _repeated(names)
            pieces.append(names)
            left = width - sum(map(_width, names))
        pieces[-1] = [*pieces[-1], column]
        left -= _width(column)
    return [[column for column in everything if column in piece] for piece in pieces]


def _repeated(names: list[Column]) -> list[Column]:
    """The name columns that a further piece repeats: no details where the others are enough."""

    def told_apart(columns: list[Column]) -> int:
        return len(set(zip(*([cell.text for cell in c.cells] for c in columns), strict=True)))

    fewer = [column for column in names if not column.detail]
    return fewer if told_apart(fewer) == told_apart(names) else names


def _width(column: Column) -> int:
    """Upper bound of a column's width in the terminal: marks and padding included."""
    heading = [len(line) for line in column.heading]
    heading[-1] += 4 * len(column.notes)
    cells = [
        max(map(len, cell.text.split("\n"))) + cell.best + 4 * len(cell.notes)
        for cell in column.cells
    ]
    return max([*heading, *cells]) + 2


def _below(sheet: Sheet, best: str) -> list[str]:
    """The lines under a table: what holds for all of it, then the footnotes."""
    notes = [f"{_bracket(mark)} {_body(note)}" for note, mark in sheet.footnotes().items()]
    return [*_remarks(sheet, best), *notes]


def _remarks(sheet: Sheet, best: str) -> list[str]:
    return [line.replace("Best:", f"Best, {best}:") for line in sheet.remarks]


def _body(note: str) -> str:
    return note.removeprefix("†").strip()


def _marks(notes: tuple[str, ...], footnotes: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(footnotes[note] for note in notes))


def _bracket(mark: str) -> str:
    return mark if mark == "†" else f"[{mark}]"


def _superscript(found: list[str], form: str, escape: Callable[[str], str]) -> str:
    return form % ",".join(map(escape, found)) if found else ""


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", " ".join(text.split()))
