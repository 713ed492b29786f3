"""A finished table as LaTeX that compiles as printed: booktabs, ASCII, no wider than the text.

Columns of details (schemes) leave the body and become lettered notes; neighbours whose headings
begin alike stand under one rule. Needs booktabs, amssymb and graphicx. Characters that plain LaTeX
does not have are written by their code (U+6A21). Left out: tables that break over pages.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qbench.tables.sheet import MISSING, Cell, Column, Sheet, marks

_SPECIAL = {
    **{char: "\\" + char for char in "&%$#_{}"},
    **{char: f"{{{char}}}" for char in "[]*`"},  # arguments after \\, and ligatures
    **{char: f"${char}$" for char in "<>|"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "−": "$-$", "Δ": r"$\Delta$", "∞": r"$\infty$", "†": r"\dag{}"},
    **{"▼": r"$\blacktriangledown$", "▲": r"$\blacktriangle$"},
    **{"–": "--", "—": "---", "✓": r"\checkmark{}", "✗": r"$\times$", "×": r"$\times$"},
    **{"µ": r"$\mu$", "μ": r"$\mu$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$"},
    **{"→": r"$\rightarrow$", "≈": r"$\approx$", "°": r"$^\circ$", "…": r"\ldots{}"},
    **{"²": "$^2$", "³": "$^3$", "‖": r"$\|$", "√": r"$\surd$", "ß": r"\ss{}", "ø": r"\o{}"},
    **{"α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "ε": r"$\epsilon$", "σ": r"$\sigma$"},
    **{"“": "``", "”": "''", "‘": "`", "’": "'", "ł": r"\l{}", "æ": r"\ae{}", "Ø": r"\O{}"},
}
_ACCENTS = {
    **{"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u"},
    **{"\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c"},
}
_SPREAD = re.compile(r"(?<=\d) (\(sd [^)]*\))")
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex(sheet: Sheet) -> str:
    """A table environment with its caption and notes."""
    columns, details = _details(sheet.columns)
    letters = {text: _letter(number) for number, text in enumerate(_texts(details))}
    sheet = replace(sheet, columns=columns)
    footnotes = sheet.footnotes()

    def marked(text: str, found: Sequence[str]) -> str:
        return text + (rf"\textsuperscript{{{','.join(map(escaped, found))}}}" if found else "")

    def cell(row: int, column: int) -> str:
        it = columns[column].cells[row]
        text = _SPREAD.sub(r" {\\scriptsize\1}", escaped(it.text))
        text = rf"\textbf{{{text}}}" if it.best else text
        own = [letters[d.cells[row].text] for d in details.get(column, []) if _told(d.cells[row])]
        return marked(text, [*own, *marks(it.notes, footnotes)])

    def heading(column: Column, first: int = 0) -> str:
        lines = [escaped(line) for line in column.heading[first:]]
        lines[-1] = marked(lines[-1], marks(column.notes, footnotes))
        text = r" \\ ".join(lines)
        return rf"\shortstack{{{text}}}" if len(lines) > 1 else text

    body = [*_headed(columns, heading), r"\midrule"]
    for row in range(len(sheet.facts)):
        body += [r"\midrule"] if row in sheet.rules else []
        body.append(" & ".join(cell(row, column) for column in range(len(columns))) + r" \\")
    below = [line.replace("Best:", "Best, in bold:") for line in sheet.remarks]
    below = [rf"{escaped(line)}\par" for line in below]
    notes = [
        rf"\textsuperscript{{{escaped(mark)}}}~{escaped(note.removeprefix('†').strip())}"
        for note, mark in [*letters.items(), *footnotes.items()]
    ]
    below += ["\\quad\n".join(notes) + r"\par"] if notes else []
    lines = [
        r"% Needs \usepackage{booktabs}, \usepackage{amssymb} and \usepackage{graphicx}.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(sheet.title)}}}",
        r"\medskip",
        _FITTED,
        rf"\begin{{tabular}}{{{''.join('r' if c.numeric else 'l' for c in columns)}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *([r"\par\smallskip", r"{\footnotesize\raggedright", *below, "}"] if below else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Any text as plain LaTeX in ASCII, on one line."""
    line = " ".join(text.split()).replace("--", "-\0-")  # no dashes out of two hyphens
    return "".join(map(_escaped, line)).replace("\0", "{}")


def _escaped(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if char.isascii():
        return char
    base, *accents = list(unicodedata.normalize("NFD", char))
    if not accents and unicodedata.normalize("NFKD", char).isascii():
        return "".join(map(_escaped, unicodedata.normalize("NFKD", char)))
    if len(accents) == 1 and accents[0] in _ACCENTS and base.isascii():
        return rf"\{_ACCENTS[accents[0]]}{{{base}}}"
    return f"U+{ord(char):04X}"


def _headed(columns: Sequence[Column], heading: Callable[[Column, int], str]) -> list[str]:
    """The lines of the heading: neighbours that begin alike share their first line."""
    groups = [
        list(group)
        for _, group in itertools.groupby(
            enumerate(columns),
            key=lambda pair: pair[1].heading[0] if len(pair[1].heading) > 1 else str(pair[0]),
        )
    ]
    if all(len(group) == 1 for group in groups):
        return [" & ".join(heading(column, 0) for column in columns) + r" \\"]
    above, rules, below = [], [], []
    for group in groups:
        start, end = group[0][0] + 1, group[-1][0] + 1
        if len(group) == 1:
            above.append("")
        else:
            first = escaped(group[0][1].heading[0])
            above.append(rf"\multicolumn{{{len(group)}}}{{c}}{{{first}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{end}}}")
        below += [heading(column, int(len(group) > 1)) for _, column in group]
    return [" & ".join(above) + r" \\", " ".join(rules), " & ".join(below) + r" \\"]


def _details(columns: Sequence[Column]) -> tuple[list[Column], dict[int, list[Column]]]:
    """The columns without details, and the details of the column that each follows."""
    kept: list[Column] = []
    details: dict[int, list[Column]] = defaultdict(list)
    for column in columns:
        if column.detail and kept:
            details[len(kept) - 1].append(column)
        else:
            kept.append(column)
    return kept, details


def _texts(details: Mapping[int, Sequence[Column]]) -> dict[str, None]:
    """Every detail, in order of the rows."""
    columns = [column for group in details.values() for column in group]
    rows = zip(*(column.cells for column in columns), strict=True)
    return {cell.text: None for row in rows for cell in row if _told(cell)}


def _told(cell: Cell) -> bool:
    return cell.text not in ("", MISSING)


def _letter(number: int) -> str:
    """The letter of a note: a to z, aa, ab, ..."""
    head = _letter(number // 26 - 1) if number >= 26 else ""
    return head + chr(ord("a") + number % 26)
