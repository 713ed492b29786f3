"""Published tables as data, to print beside measured ones.

Each file under ``results/reference`` holds one table or figure in tidy form, one number per line,
with its source, unit, protocol, the number as printed, and whatever the paper leaves open or gets
wrong (``printed_error``). The numbers were measured on other weights and other data than yours:
they show what to expect, not what to reach.
"""

from __future__ import annotations

import fnmatch
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry, Key, Measured
from qbench.comparison.headings import short_name
from qbench.errors import unknown

if TYPE_CHECKING:
    from pandas import DataFrame

_PREDICTIONS = ("perplexity", "word_perplexity", "loss")
_COSTS = ("inference", "arithmetic")
"""Tasks of one number per metric; others (a table of additions and multiplications) are no rows."""
_TEXT = (
    *(
        "paper",
        "arxiv",
        "source",
        "table",
        "model",
        "method",
        "baseline",
        "label",
        "ptq",
        "trained",
    ),
    *("task", "metric", "printed", "unit", "protocol", "origin", "note", "printed_error", "fitted"),
)
_INTEGERS = ("abits", "parameters", "group_size", "seqlen")


def names() -> list[str]:
    """The published tables there are: "b158-table2", "bitnet-table3", "gptq-opt"."""
    folder = files("qbench_results") / "reference"
    found = [path.name for path in folder.iterdir() if path.name.endswith(".csv")]
    return sorted(name.removesuffix(".csv").replace("_", "-") for name in found)


def load(name: str) -> DataFrame:
    """A published table, one number per row.

    Widths, sizes and lengths that the source leaves open are missing; text is never missing.

    Raises:
        QBenchError: for a name that is not there.
    """
    import pandas

    if name not in names():
        raise unknown("published table", name, names())
    path = files("qbench_results") / "reference" / f"{name.replace('-', '_')}.csv"
    types: dict[str, Any] = dict.fromkeys(_TEXT, "object") | dict.fromkeys(_INTEGERS, "Int64")
    types |= {"row": "int64", "wbits": "float64", "value": "float64"}
    absent = {column: [""] for column in (*_INTEGERS, "wbits", "value")}
    with path.open(encoding="utf-8") as file:
        return pandas.read_csv(file, dtype=types, keep_default_na=False, na_values=absent)


def entries(name: str, keys: list[Key], num_fewshot: int = 0) -> list[Entry]:
    """The rows of a published table, their accuracies under the columns of the same short name.

    What running the model costs stands under ``facts["costs"]`` as metric -> value.

    Args:
        name: which table, or a part of one: ``gptq-opt:OPT-125M`` keeps the rows of this model;
            after the colon stands a shell-style pattern.
        keys: the accuracy columns of the measured table.
        num_fewshot: accuracies with another number of examples are left out.

    Raises:
        QBenchError: for a table or a model that is not there.
    """
    found = []
    name, _, pattern = name.partition(":")
    table = load(name)
    if pattern:
        models = list(dict.fromkeys(table["model"]))
        kept = [model for model in models if fnmatch.fnmatch(model.lower(), pattern.lower())]
        if not kept:
            raise unknown(f"model of {name}", pattern, models)
        table = table[table["model"].isin(kept)]
    for _, rows in table.groupby("row", sort=True):
        lines = [{str(k): v for k, v in line.items()} for line in rows.to_dict("records")]
        cells: dict[Key, Measured] = {}
        costs: dict[str, float] = {}
        for line in lines:
            if line["metric"] not in _PREDICTIONS and line["unit"] != "percent":
                if line["task"] in _COSTS:
                    costs[line["metric"]] = line["value"]
            elif line["protocol"] == f"{num_fewshot}-shot" or not line["protocol"].endswith(
                "-shot"
            ):
                for key in _columns(line, keys):
                    cells[key] = _measured(line)
        first = lines[0]
        if first["method"] == "Random" or not (cells or costs):
            continue  # the caller computes chance for its own tasks
        facts = _facts(first, lines) | {"costs": costs, "published_row": f"{name} {first['row']}"}
        found.append(Entry(facts, first["method"], cells, source="published"))
    return found


def _columns(line: dict[str, Any], keys: list[Key]) -> list[Key]:
    if line["metric"] in _PREDICTIONS:
        return [(line["task"], line["protocol"])]
    matching = [key for key in keys if short_name(key[0]) == short_name(line["task"])]
    return matching or [(line["task"], "")]


def _measured(line: dict[str, Any]) -> Measured:
    value = line["value"]
    notes = (f"printed error: {line['printed_error']}",) if line["printed_error"] else ()
    if line["metric"] == "loss":  # in bits per token
        return Measured(line["task"], "perplexity", "perplexity", 2**value, notes=notes)
    if line["metric"] in _PREDICTIONS:
        return Measured(line["task"], "perplexity", line["metric"], value, notes=notes)
    return Measured(line["task"], "accuracy", line["metric"], value / 100, notes=notes)


def _facts(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    import pandas

    tables = dict.fromkeys(other["table"] for other in lines if other["task"] not in _COSTS)
    where = next(iter(tables), line["table"]) + (" and others" if len(tables) > 1 else "")

    def number(column: str) -> int | None:
        return None if pandas.isna(line[column]) else int(line[column])

    return {
        "checkpoint": f"{line['model']} ({line['paper']})",
        "baseline": line["baseline"],
        "label": line["label"],
        "wbits": float("inf") if pandas.isna(line["wbits"]) else line["wbits"],
        "abits": number("abits") or 16,
        "group_size": number("group_size"),
        "parameters": number("parameters"),
        "trained": line["trained"] == "yes",
        "status": "ok",
        "fitted": line["fitted"] != "no",  # whether the paper's own curve was fitted on it
        "reference": f"{line['paper']}, {line['source']}, {where}",
    }
