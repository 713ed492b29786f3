"""Published tables as data, to print beside measured ones.

Each file under ``results/reference`` holds one table in tidy form, one number per line, with its
paper, unit, protocol and whatever the paper leaves open. The numbers were measured on other
weights and other data than yours: they show what to expect, not what to reach.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from qbench.comparison.entries import Entry, Key, Measured
from qbench.comparison.headings import short_name
from qbench.errors import unknown

if TYPE_CHECKING:
    from pandas import DataFrame

_PREDICTIONS = ("perplexity", "loss")


def names() -> list[str]:
    """The published tables there are: "b158-table2", "bitnet-scaling", "bitnet-table3"."""
    folder = files("qbench_results") / "reference"
    found = [path.name for path in folder.iterdir() if path.name.endswith(".csv")]
    return sorted(name.removesuffix(".csv").replace("_", "-") for name in found)


def load(name: str) -> DataFrame:
    """A published table, one number per row.

    Raises:
        QBenchError: for a name that is not there.
    """
    import pandas

    if name not in names():
        raise unknown("published table", name, names())
    path = files("qbench_results") / "reference" / f"{name.replace('-', '_')}.csv"
    with path.open(encoding="utf-8") as file:
        return pandas.read_csv(file, keep_default_na=False, na_values={"value": [""]})


def entries(name: str, keys: list[Key]) -> list[Entry]:
    """The rows of a published table, their accuracies under the columns of the same short name.

    Args:
        name: which table.
        keys: the accuracy columns of the measured table.
    """
    found = []
    for _, rows in load(name).groupby("row", sort=True):
        lines = [{str(k): v for k, v in line.items()} for line in rows.to_dict("records")]
        cells: dict[Key, Measured] = {}
        for line in lines:
            for key in _columns(line, keys):
                cells[key] = _measured(line)
        first = lines[0]
        if first["method"] == "Random":  # the caller computes chance for its own tasks
            continue
        found.append(Entry(_facts(first), first["method"], cells, source="published"))
    return found


def _columns(line: dict[str, Any], keys: list[Key]) -> list[Key]:
    if line["metric"] in _PREDICTIONS:
        return [(line["task"], line["protocol"])]
    matching = [key for key in keys if short_name(key[0]) == short_name(line["task"])]
    return matching or [(line["task"], "")]


def _measured(line: dict[str, Any]) -> Measured:
    value = float(line["value"])
    if line["metric"] == "loss":  # in bits per token
        return Measured(line["task"], "perplexity", "perplexity", 2**value)
    if line["metric"] == "perplexity":
        return Measured(line["task"], "perplexity", "perplexity", value)
    percent = line["unit"] == "percent"
    return Measured(line["task"], "accuracy", line["metric"], value / (100 if percent else 1))


def _facts(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint": f"{line['model']} ({line['paper']})",
        "baseline": line["baseline"],
        "label": line["label"],
        "wbits": float(line["wbits"]),
        "abits": int(line["abits"]),
        "parameters": int(line["parameters"]),
        "trained": line["trained"] == "yes",
        "status": "ok",
        "fitted": line.get("fitted") != "no",  # whether the paper's own curve was fitted on it
        "reference": f"{line['paper']}, arXiv {line['arxiv']}, {line['table']}",
    }
