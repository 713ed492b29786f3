"""A published table by itself, laid out as its paper does, with the digits printed there.

A row per model and method and a column per kind of number, or, where a paper compares sizes, a row
per method and a column per size. What the source leaves open stands below; a number that cannot be
right as printed has a footnote. Left out: measured rows (``--against`` of the layouts has both).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from qbench.comparison import reference
from qbench.comparison.headings import MISSING, short_name
from qbench.tables.sheet import Cell, Column, Sheet

_BY_MODEL = (
    *("gptq-opt", "gptq-bloom", "gptq-llama", "llmint8-table1", "bitnet-fig6", "bitnet-a48"),
    *("smoothquant-table1", "smoothquant-table4", "smoothquant-readme"),
)
"""Tables with a column per model."""
_METRICS = {
    **{"perplexity": "PPL", "word_perplexity": "word PPL", "loss": "Loss", "op_energy": "Energy"},
    **{"memory": "Memory", "latency": "Latency", "throughput": "Throughput", "energy": "Energy"},
    **{"memory_ratio": "Memory ratio", "throughput_ratio": "Throughput ratio"},
    **{"max_batch": "Batch", "max_batch_ratio": "Batch ratio", "energy_ratio": "Energy ratio"},
    **{"speedup": "Speed-up"},
}
_TASKS = {
    **{"multiplications": "MUL", "multiplication": "MUL", "additions": "ADD", "addition": "ADD"},
    **{"inference": "", "arithmetic": "", "average": "Avg"},
}

Line = dict[str, Any]
Heading = tuple[str, ...]


def published_sheet(name: str) -> Sheet:
    """One published table.

    Raises:
        QBenchError: for a name that is not there.
    """
    lines = [{str(k): v for k, v in line.items()} for line in _records(name)]
    by_model = name in _BY_MODEL

    def row_of(line: Line) -> tuple[Any, ...]:
        what = (_heading(line), line["method"], line["label"], line["group_size"])
        return (line["table"], *what) if by_model else (line["table"], line["row"])

    rows: dict[tuple[Any, ...], dict[Heading, Line]] = {}
    for line in lines:
        heading = (line["model"],) if by_model else _heading(line)
        rows.setdefault(row_of(line), {})[heading] = line
    groups = list(dict.fromkeys(key[:2] if by_model else key[:1] for key in rows))
    rows = dict(sorted(rows.items(), key=lambda row: groups.index(row[0][: len(groups[0])])))
    # in the order of the fullest rows, so that a row of guesses does not put its columns first
    headings = dict.fromkeys(h for row in sorted(rows.values(), key=len, reverse=True) for h in row)
    firsts = [next(iter(row.values())) for row in rows.values()]
    everywhere = _shared(lines)
    of_rows = [_shared(list(row.values()), everywhere) for row in rows.values()]
    columns = _row_names(firsts, by_model)
    cells = [replace(c, notes=n) for c, n in zip(columns[-1].cells, of_rows, strict=True)]
    columns[-1] = replace(columns[-1], cells=cells)
    for heading in headings:
        found = [row.get(heading) for row in rows.values()]
        columns.append(_numbers(heading, found, [[*everywhere, *own] for own in of_rows]))
    of = [key[: len(groups[0])] for key in rows]
    rules = frozenset(i for i in range(1, len(of)) if of[i] != of[i - 1])
    return Sheet(_title(lines), columns, [{} for _ in firsts], rules, _remarks(lines, everywhere))


def published_csv(name: str) -> str:
    """The file behind a published table, as it is.

    Raises:
        QBenchError: for a name that is not there.
    """
    reference.load(name)
    path = files("qbench_results") / "reference" / f"{name.replace('-', '_')}.csv"
    return path.read_text(encoding="utf-8")


def _records(name: str) -> list[Any]:
    return reference.load(name).to_dict("records")


def _title(lines: Sequence[Line]) -> str:
    tables = list(dict.fromkeys(line["table"] for line in lines))
    source = lines[0]["source"]
    where = ", ".join(tables) if len(tables) < 4 else f"{tables[0]} and {len(tables) - 1} others"
    return f"{lines[0]['paper']} ({source}), {where}"


def _remarks(lines: Sequence[Line], notes: Sequence[str]) -> list[str]:
    drawn = [line["origin"] == "drawing" for line in lines]
    remarks = []
    if any(drawn):
        every = "Numbers are" if all(drawn) else "Some numbers are"
        remarks.append(f"{every} read from the drawing of a figure.")
    protocols = {line["protocol"] for line in lines if line["task"] not in _TASKS}
    protocols = {name for name in protocols if not name.endswith("-shot")}
    if protocols:
        remarks.append(f"Protocols: {', '.join(sorted(protocols))}.")
    metrics = {line["metric"] for line in lines if line["metric"].startswith("acc")}
    if metrics:
        remarks.append(f"Tasks: {', '.join(sorted(metrics))} in percent.")
    return [*remarks, *(f"{note[0].upper()}{note[1:]}." for note in notes)]


def _heading(line: Line) -> Heading:
    """("PPL", "wikitext2"), ("WG", "4-shot"), ("Energy", "MUL 7nm", "(J)")."""
    task, metric, unit, protocol = (line[n] for n in ("task", "metric", "unit", "protocol"))
    if unit in ("perplexity", "bits per token"):
        return _METRICS[metric], _TASKS.get(task, task)
    name = _TASKS.get(task, short_name(task))
    if unit in ("percent", "points of 10"):
        return (name, protocol) if protocol == "4-shot" else (name,)
    what = " ".join(part for part in (name, protocol if protocol.endswith("nm") else "") if part)
    return (_METRICS[metric], *([what] if what else []), *([] if unit == "x" else [f"({unit})"]))


def _row_names(lines: Sequence[Line], by_model: bool) -> list[Column]:
    """The columns that say what a row is, without those that tell nothing; the method comes last.

    The method is left out where models are named after it.
    """
    named: dict[str, Callable[[Line], str]] = {
        "Table": lambda line: str(line["table"]),
        "Numbers" if by_model else "Model": (
            (lambda line: " ".join(_heading(line))) if by_model else (lambda line: line["model"])
        ),
        "W/A": lambda line: str(line["label"]),
        "Group": lambda line: "" if line["group_size"] is None else f"g{line['group_size']}",
        "Method": lambda line: str(line["method"]),
    }
    texts = {heading: [of(line) for line in lines] for heading, of in named.items()}
    if len(set(texts["Table"])) == 1:
        del texts["Table"]
    models = texts.get("Model", [""] * len(lines))
    if all(m.startswith(line["method"]) for m, line in zip(models, lines, strict=True)):
        del texts["Method"]
    return [
        Column((heading,), [Cell(text or MISSING) for text in column], numeric=False)
        for heading, column in texts.items()
        if any(column)
    ]


def _shared(lines: Sequence[Line], told: Sequence[str] = ()) -> tuple[str, ...]:
    """The notes that all of several numbers have and that are not told already."""
    counts = Counter(note for line in lines for note in _notes(line))
    shared = [note for note, count in counts.items() if count == len(lines)]
    return tuple(note for note in shared if note not in told) if len(lines) > 1 else ()


def _numbers(heading: Heading, lines: Sequence[Line | None], told: Sequence[list[str]]) -> Column:
    """Printed digits; what every number of the column has as a note stands at its heading."""
    found = [line for line in lines if line is not None and line["method"] != "Random"]
    common = _shared(found, [note for notes in told for note in notes])

    def cell(line: Line | None, known: list[str]) -> Cell:
        if line is None:
            return Cell(MISSING)
        own = [note for note in _notes(line) if note not in (*common, *known)]
        error = [f"printed error: {line['printed_error']}"] if line["printed_error"] else []
        return Cell(line["printed"], tuple(own + error))

    cells = [cell(line, known) for line, known in zip(lines, told, strict=True)]
    return Column(heading, cells, notes=common)


def _notes(line: Line) -> list[str]:
    """The parts of a note; that it was drawn is a remark of the table."""
    parts = [part.strip() for part in line["note"].split(";")]
    return [part for part in parts if part and not part.startswith("read from the figure")]
