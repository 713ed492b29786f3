"""Published tables, recomputed: what follows from other printed numbers must follow.

Averages, ratios, PPL = 2^loss, energies and shares of whole questions are computed anew from what
else is printed. Every number that fails is marked in its table (``printed_error``), and every
marked number fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pandas import DataFrame
from typer.testing import CliRunner

from qbench.cli import app
from qbench.comparison import reference
from qbench.study import listing
from qbench.tables.published import published_sheet
from qbench.tables.table import published_table

Cell = tuple[str, int]
"""A number: its table and its line."""

METRICS = {
    **dict.fromkeys(("perplexity", "word_perplexity"), {"perplexity"}),
    "loss": {"bits per token"},
    **dict.fromkeys(("acc", "acc_norm", "acc_token", "acc_mean"), {"percent"}),
    "score": {"percent", "points of 10"},
    "memory": {"GB"},
    "latency": {"ms"},
    "throughput": {"tokens/s"},
    "max_batch": {"sequences"},
    "energy": {"J"},
    "op_energy": {"pJ"},
    **dict.fromkeys(("memory_ratio", "speedup", "throughput_ratio", "max_batch_ratio"), {"x"}),
    "energy_ratio": {"x"},
}
AVERAGED = {  # table -> how many tasks an average is the plain mean of
    **{"bitnet-table3": 4, "bitnet-table4": 4, "b158-table2": 7, "b158-table4": 5, "1bitllm": 7},
    **{"smoothquant-opt-175b": 7, "bitnet-2b4t": 16},
}
QUESTIONS = {  # lm-eval's splits: counts follow from published pairs of accuracy and its error
    **{"arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "winogrande": 1267, "wsc285": 285},
    **{"storycloze_2018": 1571, "openbookqa": 500, "gsm8k": 1319},
}
SHAPES = {  # BitNet, appendix A: hidden size, blocks; 70B is Llama's
    **{"125M": (768, 12), "350M": (1024, 24), "760M": (1536, 24), "1.3B": (2048, 24)},
    **{"2.7B": (2560, 32), "3B": (2560, 32), "6.7B": (4096, 32), "7B": (4096, 32)},
    **{"13B": (5120, 40), "30B": (7168, 48), "70B": (8192, 80)},
}


@cache
def load(name: str) -> DataFrame:
    return reference.load(name)


def half_unit(printed: str) -> float:
    """Half a unit of the last digit: what rounding may have taken."""
    mantissa, _, exponent = printed.replace(",", "").partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) * (1 + 1e-9)


def follows(value: float, printed: str) -> bool:
    return abs(float(printed) - value) <= half_unit(printed) + 1e-9


def wrong_averages() -> Iterator[Cell]:
    for name, n_tasks in AVERAGED.items():
        table = load(name)
        scores = table[table["unit"].isin(["percent", "points of 10"])]
        for _, row in scores.groupby(["row", "protocol", "table"]):
            parts, own = row[row["task"] != "average"], row[row["task"] == "average"]
            if own.empty or len(parts) != n_tasks:
                continue
            if not follows(parts["value"].mean(), own["printed"].item()):
                yield name, own.index[0]


def test_every_average_that_can_be_is_recomputed() -> None:
    """As many rows as the tables have: a renamed task would make the check above pass over them."""
    for name, n_tasks in AVERAGED.items():
        table = load(name)
        scores = table[table["unit"].isin(["percent", "points of 10"])]
        groups = scores.groupby(["row", "protocol", "table"])["task"].agg(list)
        complete = [tasks for tasks in groups if "average" in tasks and len(tasks) == n_tasks + 1]
        wanted = {"bitnet-table4": 8, "smoothquant-opt-175b": 2, "bitnet-2b4t": 6, "1bitllm": 3}
        rows = {"bitnet-table3": 12, "b158-table2": 7, "b158-table4": 2} | wanted
        assert len(complete) == rows[name]


def energy(size: str, wbits: float, node: str, first: int = 1) -> dict[str, float]:
    """BitNet's equations 16 to 18 over the linears, and the attention matmuls in FP16; joules.

    512 tokens; ``first`` is 1 where the sum of n terms takes n - 1 additions, as equation 16 says.
    """
    tokens = 512
    table = load("bitnet-table2").set_index(["model", "task", "protocol"])["value"] * 1e-12
    width, blocks = SHAPES[size]
    linears = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    attention = [(tokens, width, tokens), (tokens, tokens, width)]  # QKᵀ, and weights times V

    def added(shapes: list[tuple[int, int, int]]) -> int:
        return blocks * sum(m * (n - first) * p for m, n, p in shapes)

    def multiplied(shapes: list[tuple[int, int, int]]) -> int:
        return blocks * sum(m * n * p for m, n, p in shapes)

    in_linears = [(tokens, n, p) for n, p in linears]
    wide = "FP32" if wbits == 32 else "FP16"
    add, mul = table[wide, "addition", node], table[wide, "multiplication", node]
    if wbits >= 16:
        return {
            "additions": added(in_linears + attention) * add,
            "multiplications": multiplied(in_linears + attention) * mul,
        }
    scalings = blocks * sum(tokens * p + tokens * n for n, p in linears)
    low = table["INT8", "addition", node]
    return {
        "additions": added(in_linears) * low + added(attention) * add,
        "multiplications": (scalings + multiplied(attention)) * mul,
    }


def wrong_energies() -> Iterator[Cell]:
    """Table 1, and the ratios of two figures.

    Three of the ratios lie within 0.001 of where rounding turns, so that it matters whether the sum
    of n terms takes n or n - 1 additions: the printed ones are roundings of something between.
    """
    for line in load("bitnet-table1").itertuples():
        if not follows(energy(line.model, line.wbits, line.protocol)[line.task], line.printed):
            yield "bitnet-table1", line.Index
    operations = load("bitnet-table2").set_index(["model", "task", "protocol"])["value"]
    fp16 = operations["FP16", "multiplication", "7nm"] + operations["FP16", "addition", "7nm"]
    for name in ("bitnet-fig1", "b158-fig3"):
        table = load(name)
        for line in table[table["metric"] == "energy_ratio"].itertuples():
            ratios = [fp16 / operations["INT8", "addition", "7nm"]]
            if line.task != "multiply-add":
                size = line.model.split()[-1]
                ratios = [
                    sum(energy(size, 16, "7nm", first).values())
                    / sum(energy(size, 1, "7nm", first).values())
                    for first in (0, 1)
                ]
            slack = half_unit(line.printed)
            if not min(ratios) - slack <= line.value <= max(ratios) + slack:
                yield name, line.Index


def wrong_ratios() -> Iterator[Cell]:
    """A ratio of printed numbers, each of which may be off by half a unit."""
    of = {"memory_ratio": "memory", "speedup": "latency"}
    inverse = {"throughput_ratio": "throughput", "max_batch_ratio": "max_batch"}
    for name in ("b158-table1", "b158-table3"):
        table = load(name)
        printed = table.set_index(["model", "metric"])["printed"]
        for line in table[table["unit"] == "x"].itertuples():
            size = line.model.split()[-1].replace("3.9B", "3B")
            metric = (of | inverse)[line.metric]
            full, low = printed[f"LLaMA LLM {size}", metric], printed[line.model, metric]
            over, under = (low, full) if line.metric in inverse else (full, low)
            least = (float(over) - half_unit(over)) / (float(under) + half_unit(under))
            most = (float(over) + half_unit(over)) / (float(under) - half_unit(under))
            slack = half_unit(line.printed)
            if not least - slack <= line.value <= most + slack:
                yield name, line.Index


def wrong_repetitions() -> Iterator[Cell]:
    """What a figure repeats of a table: b1.58 Fig. 2 of Table 1, BitNet Fig. 1 of Table 3."""
    table = load("b158-table1").set_index(["model", "metric"])["printed"].to_dict()
    for line in load("b158-fig2").itertuples():
        if table.get((line.model, line.metric), line.printed) != line.printed:
            yield "b158-fig2", line.Index
    rows = load("bitnet-table3")
    means = rows[rows["task"] == "average"].set_index(["method", "label"])["printed"]
    figure = load("bitnet-fig1")
    for line in figure[figure["task"] == "average"].itertuples():
        if line.method != "Random" and means[line.method, line.label] != line.printed:
            yield "bitnet-fig1", line.Index


def wrong_guessing() -> Iterator[Cell]:
    """Guessing on two tasks of two options, HellaSwag's four and two again: 43.75."""
    for name in reference.names():
        table = load(name)
        for line in table[
            (table["method"] == "Random") & (table["task"] == "average")
        ].itertuples():
            if not follows((50 + 50 + 25 + 50) / 4, line.printed):
                yield name, line.Index


def impossible_shares() -> Iterator[Cell]:
    """Accuracies that no number of right answers rounds to."""
    for name in reference.names():
        for line in load(name).itertuples():
            n = QUESTIONS.get(line.task, 0) * (2 if line.metric == "acc_mean" else 1)
            if line.task == "winogrande":
                n = QUESTIONS[line.task]  # has no acc_norm to take a mean with
            if not n or line.unit != "percent" or line.method == "Random":
                continue
            near = {math.floor(line.value / 100 * n), math.ceil(line.value / 100 * n)}
            if not any(follows(100 * count / n, line.printed) for count in near):
                yield name, line.Index


def impossible_gains() -> Iterator[Cell]:
    """Quantized models far above full precision: three points are three standard errors here."""
    for name in reference.names():
        table = load(name)
        table = table[(table["unit"] == "percent") & (table["protocol"] == "0-shot")]
        whole = table[table["baseline"] == "none"].set_index(["model", "task"])["value"].to_dict()
        for line in table[table["ptq"] == "yes"].itertuples():
            if line.value - whole.get((line.model, line.task), math.inf) > 3:
                yield name, line.Index


def repeated_rows() -> Iterator[Cell]:
    """Rows of four accuracies that another model's table has to the last digit.

    Of the two, the row that leaves its own full precision behind is wrong: at 4 bits OPT-13b's, by
    up to 3 points, while OPT-30b's stay within half a point.
    """
    seen: dict[tuple[str, ...], list[tuple[str, DataFrame]]] = {}
    for name in reference.names():
        if not name.startswith("quip-opt-"):
            continue
        table = load(name)
        for _, row in table[table["unit"] == "percent"].groupby("row"):
            seen.setdefault(tuple(row["printed"]), []).append((name, row))
    for rows in seen.values():
        if len(rows) > 1:
            assert sorted(name for name, _ in rows) == ["quip-opt-13b", "quip-opt-30b"]
            wrong = next(row for name, row in rows if name == "quip-opt-13b")
            yield from (("quip-opt-13b", index) for index in wrong.index)


CHECKS = (
    *(wrong_averages, wrong_energies, wrong_ratios, wrong_repetitions, wrong_guessing),
    *(impossible_shares, impossible_gains, repeated_rows),
)


def test_the_numbers_that_do_not_follow_are_those_marked_as_printed_errors() -> None:
    failing = {cell for check in CHECKS for cell in check()}
    marked = {
        (name, int(index))
        for name in reference.names()
        for index in load(name).index[load(name)["printed_error"] != ""]
    }

    def told(cells: set[Cell]) -> list[str]:
        return [f"{n}: {load(n).loc[i, ['model', 'method', 'task']].tolist()}" for n, i in cells]

    assert not told(failing - marked)
    assert not told(marked - failing)
    # by table: BitNet 1, Fig. 6 (three sizes, two shots); 2B4T; GPTQ; QuIP (three rows of four)
    assert len(marked) == 2 + 6 + 5 + 5 + 12 + 1 + 1


def test_printed_perplexities_are_two_to_the_loss_that_was_read_from_the_figure() -> None:
    loss = load("bitnet-scaling").query("metric == 'loss'").set_index(["model", "method"])["value"]
    for name, method, label, size in (
        ("bitnet-table3", "Transformer", "W16A16", "6.7B"),
        ("bitnet-table3", "BitNet", "W1A8", "6.7B"),
        ("bitnet-table4", "BitNet (Absmax+SubLN)", "W1A8", "1.3B"),
    ):
        table = load(name)
        rows = table[(table["method"] == method) & (table["label"] == label)]
        printed = rows.loc[rows["metric"] == "perplexity", "printed"].item()
        assert 2 ** loss[size, method.split()[0]] == pytest.approx(float(printed), abs=0.006)


def test_energies_read_from_figure_3_are_those_of_the_equations() -> None:
    """The drawing is good to a few thousandths."""
    table = load("bitnet-scaling")
    for line in table[table["metric"] == "energy"].itertuples():
        computed = sum(energy(line.model, line.wbits, "7nm").values())
        assert line.value == pytest.approx(computed, rel=2e-3)


def test_averages_read_from_figures_agree_with_each_other_and_with_the_tables() -> None:
    figure = load("bitnet-fig6").query("method != 'Random'")
    figure = figure.set_index(["model", "method", "protocol"])["value"]
    curves = load("bitnet-scaling").query("metric == 'acc_token'")
    curves = curves.set_index(["model", "method", "protocol"])["value"]
    shared = figure.index.intersection(curves.index)
    assert len(shared) == 3 * 2 * 2
    for key in shared:
        assert figure[key] == pytest.approx(curves[key], abs=0.011)
    rows = load("bitnet-table3").query("task == 'average'").set_index(["method", "label"])["value"]
    labels = {"QuIP": "W2A16", "SmoothQuant": "W4A4", "GPTQ": "W2A16", "BitNet": "W1A8"}
    for method, label in ({"Transformer": "W16A16"} | labels).items():
        assert figure["6.7B", method, "0-shot"] == pytest.approx(rows[method, label], abs=0.06)


def test_gptq_and_quip_agree_on_full_precision() -> None:
    """Two papers, one protocol: perplexities to the last digit but one, accuracies to 0.4."""
    gptq = load("gptq-opt").query("baseline == 'none'").set_index(["model", "task"])["value"]
    count = 0
    for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b"):
        for line in load(f"quip-opt-{size}").query("baseline == 'none'").itertuples():
            other = gptq.get((f"OPT-{size.upper()}", line.task))
            if other is not None:
                count += 1
                assert line.value == pytest.approx(
                    other, abs=0.02 if line.metric == "perplexity" else 0.4
                )
    assert count == 7 * 3 + 6 * 3  # GPTQ's accuracies end at 13B


@pytest.mark.parametrize("name", reference.names())
def test_every_number_is_complete_and_says_where_it_comes_from(name: str) -> None:
    table = load(name)
    for column in ("paper", "source", "table", "method", "baseline", "task", "protocol", "printed"):
        assert (table[column] != "").all(), column
    assert not table["value"].isna().any()
    for line in table.itertuples():
        assert float(line.printed.replace(",", "")) == line.value
        assert line.unit in METRICS[line.metric]
        assert line.ptq in ("yes", "no") and line.trained in ("yes", "no")
        assert line.origin in ("printed", "drawing")
        assert (line.origin == "drawing") == ("read from the figure" in line.note)
    keys = ["row", "task", "metric", "protocol"]
    assert not table.duplicated(keys).any()
    of_row = ["model", "method", "baseline", "label", "ptq", "trained"]
    assert (table.groupby("row")[of_row].nunique() == 1).all(axis=None)
    assert sorted(set(table["row"])) == list(range(table["row"].nunique()))


def test_a_published_table_is_printed_with_the_papers_digits() -> None:
    sheet = published_sheet("bitnet-table3")
    assert [" ".join(column.heading) for column in sheet.columns] == [
        *("Model", "W/A", "Method", "PPL validation", "WG", "WGe", "HS", "SC", "Avg"),
    ]
    rows = {(row[2].text, row[1].text): [cell.text for cell in row[3:]] for row in sheet.rows()}
    assert rows["Absmax", "W1A8"] == ["3.5e23", "49.8", "50.0", "24.8", "53.6", "44.6"]
    assert rows["Random", "–"] == ["–", "50.0", "50.0", "25.0", "50.0", "43.8"]


def test_a_table_of_sizes_has_a_column_per_model_and_a_block_per_printed_table() -> None:
    sheet = published_sheet("gptq-opt")
    headings = [" ".join(column.heading) for column in sheet.columns]
    assert headings[:5] == ["Table", "Numbers", "W/A", "Group", "Method"]
    assert headings[5] == "OPT-125M" and headings[-1] == "OPT-175B"
    tables = [cell.text for cell in sheet.columns[0].cells]
    assert len(sheet.rules) == sum(a != b for a, b in itertools.pairwise(tables)) + 3  # Table 5
    whole = [row for row in sheet.rows() if row[2].text == "W16A16"]
    assert [row[5].text for row in whole[:3]] == ["27.65", "38.99", "26.56"]


def test_a_misprint_has_its_footnote_and_nothing_else_has() -> None:
    sheet = published_sheet("bitnet-table1")
    wrong = {
        (row[0].text, row[1].text, cell.text)
        for row in sheet.rows()
        for cell in row
        if any(note.startswith("printed error") for note in cell.notes)
    }
    assert wrong == {("6.7B", "W1A8", "0.04"), ("30B", "W1A8", "0.14")}


@pytest.mark.parametrize("name", reference.names())
def test_every_published_number_is_in_its_sheet_once(name: str) -> None:
    printed = sorted(load(name)["printed"])
    sheet = published_sheet(name)
    assert printed == sorted(
        cell.text
        for column in sheet.columns
        if column.numeric
        for cell in column.cells
        if cell.text != "–"
    )


def test_published_tables_are_listed_and_printed_without_any_results(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    listed = list(listing.lines("published", missing))
    assert [line.split()[0] for line in listed] == reference.names()
    assert any("112 numbers, 12 marked as misprinted" in line for line in listed)
    result = CliRunner().invoke(app, ["table", "--published", "bitnet-table2", "--format", "md"])
    assert result.exit_code == 0 and "| FP16 | 0.4 | 0.16 | 1.1 | 0.34 |" in result.output
    unknown = CliRunner().invoke(app, ["table", "--published", "bitnet-table9"])
    assert unknown.exit_code == 2


def test_a_published_table_as_csv_is_the_file() -> None:
    lines = published_table("bitnet-table2", "csv").splitlines()
    assert len(lines) == 1 + 12 and lines[0].startswith("paper,arxiv,source,table,row,model")
