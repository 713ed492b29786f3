"""Tables: what stands in a cell, what is noted, what never shares a column."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study_fixtures import BITNET_TASKS, add, bitnet_store, quantization, task

from qbench.errors import QBenchError
from qbench.record import CalibrationSpec
from qbench.study.frame import frame
from qbench.study.sheet import accuracy_text, difference_text, perplexity_text, size_text
from qbench.study.store import Store
from qbench.study.tables import FORMATS, table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by heading, without footnote marks of the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    heading = [re.sub(r" \[\d+\]", "", name) for name in rows[0]]
    return [dict(zip(heading, row, strict=True)) for row in rows[2:]]


def numbers(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.468, "5.47"),
        (15.19, "15.19"),
        (1032.4, "1032"),
        (9999.4, "9999"),
        (48_000, "4.8e4"),
        (1.6e6, "1.6e6"),
        (3.5e23, "3.5e23"),
        (math.inf, "inf (diverged)"),
        (math.nan, "NaN"),
    ],
)
def test_perplexities_read_as_in_the_papers(value: float, text: str) -> None:
    assert perplexity_text(value) == text


def test_accuracies_are_percent_and_differences_signed() -> None:
    assert accuracy_text(0.6125, 0.0094) == "61.3 ± 0.9"
    assert accuracy_text(0.5) == "50.0"
    assert difference_text(-0.0312, percent=True) == "−3.1"
    assert difference_text(1.5, percent=False) == "+1.50"
    assert difference_text(math.inf, percent=False) == "+inf"
    assert difference_text(math.nan, percent=False) == "–"
    assert [size_text(n) for n in (125_000_000, 6_700_000_000, 2100, 12, None)] == [
        *("125M", "6.7B", "2.1K", "12", "–"),
    ]


def test_an_empty_store_says_what_to_run(store: Store) -> None:
    with pytest.raises(QBenchError, match="no results are stored in .*qbench run"):
        table(store)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layout": "bitnet-table2"}, "did you mean 'bitnet-table3'"),
        ({"format": "markdown"}, "unknown format"),
        ({"metric": "accuracy"}, "unknown metric"),
        ({"checkpoints": ["opt-6.7"]}, "unknown checkpoint 'opt-6.7'; did you mean 'opt-6.7b'"),
        ({"tasks": ["hellaswagg"]}, "did you mean 'hellaswag'"),
        ({"schemes": ["W5A16"]}, "unknown scheme"),
        ({"against": "gptq-table1"}, "unknown published table"),
        ({"num_fewshot": 4}, "nothing that is stored passes all filters"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(
    bitnet: Store, given: dict[str, object], said: str
) -> None:
    with pytest.raises(QBenchError, match=said):
        table(bitnet, **given)  # type: ignore[arg-type]


def test_the_long_table_has_one_row_per_run_task_and_metric(bitnet: Store) -> None:
    long = frame(bitnet)
    assert len(long) == 11 * (4 * 2 + 1)  # 11 runs, four tasks with acc and acc_norm, one text
    row = long[(long["baseline"] == "quip") & (long["task"] == "wsc285")].iloc[0]
    assert (row["label"], row["wbits"], row["abits"], row["grid"]) == ("W2A16", 2, 16, "rms")
    assert (row["calibration_source"], row["calibration_nsamples"]) == ("c4", 128)
    assert math.isinf(
        long.loc[long["label"].eq("W1A8") & long["metric"].eq("perplexity"), "value"].max()
    )


def test_two_limits_of_one_task_stay_two_rows_of_the_long_table(store: Store) -> None:
    model = add(store, quantization(), {"piqa": 0.6})
    add(store, model, {"piqa": 0.5}, limit=100)
    assert sorted(frame(store)["limit"].dropna()) == [100, 100]
    assert len(frame(store)) == 4


def test_an_empty_store_is_an_empty_long_table_with_its_columns(store: Store) -> None:
    assert frame(store).empty and "effective_bits" in frame(store).columns


def test_bitnet_table3_has_the_papers_columns_order_and_averages(bitnet: Store) -> None:
    rows = cells(table(bitnet, "bitnet-table3"))
    assert list(rows[0]) == [
        *("Checkpoint", "WBits", "Methods", "(W/A)", "PTQ", "PPL wikitext2 gptq-2048"),
        *("WG", "WGe", "HS", "SC", "Avg"),
    ]
    assert [row["WBits"] for row in rows] == ["–", *"16 8 8 4 4 4 2 2 1 1 1".split()]
    assert [row["(W/A)"] for row in rows[4:9]] == ["W4A16", "W4A4", "W4A4", "W2A16", "W2A16"]
    # the averages of the paper's Table 3, recomputed from its tasks and rounded half to even
    averages = [row["Avg"].strip("*") for row in rows]
    exact = (43.75, 57.825, 53.35, 56.725, 52.925, 46.2, 45.1, 45.225, 49.0, 44.55, 44.425, 55.875)
    for shown, value in zip(averages, exact, strict=True):
        assert abs(float(shown) - value) <= 0.0501
    assert [row["PTQ"] for row in rows] == [*"✗✗✓✓✓✓✓✓✓✓✓✗"]


def test_the_best_ptq_row_of_each_width_is_bold_and_trained_rows_do_not_compete(
    bitnet: Store,
) -> None:
    rows = cells(table(bitnet, "bitnet-table3"))
    bold = [(r["WBits"], r["Methods"].split()[0]) for r in rows if r["Avg"].startswith("**")]
    assert bold == [("8", "smoothquant"), ("4", "gptq"), ("2", "quip"), ("1", "absmax")]


def test_an_average_needs_all_its_tasks(store: Store) -> None:
    add(store, quantization(), dict.fromkeys(BITNET_TASKS, 0.5))
    add(store, quantization(baseline="rtn", scheme="W4A16:grid=asym"), {"hellaswag": 0.5})
    for layout in ("comparison", "bitnet-table3"):
        averages = [row["Avg"][:4] for row in cells(table(store, layout))]
        assert averages[-2:] == ["50.0", "–"]


def test_a_paper_column_that_was_not_measured_is_empty(store: Store) -> None:
    add(store, quantization(), {"hellaswag": 0.5})
    (row,) = cells(table(store, "b158-table2"))
    assert (row["HS"], row["ARCe"], row["Avg"], row["Size"]) == ("50.0", "–", "–", "6.7B")


def test_diverged_failed_and_inapplicable_cells_say_which_they_are(store: Store) -> None:
    add(store, quantization(), {"piqa": 0.7}, {"wikitext2@gptq-2048": 15.19})
    add(store, quantization(baseline="a", scheme="W4A4"), {}, {"wikitext2@gptq-2048": math.inf})
    add(store, quantization(baseline="b", scheme="W4A4"), {}, {"wikitext2@gptq-2048": math.nan})
    add(store, quantization(baseline="c", scheme="W4A4", status="failed", error="out of memory\nx"))
    sentence = "c rounds to at least 2 bits"
    add(store, quantization(baseline="d", scheme="W1A8", status="not_applicable", error=sentence))
    broken = add(store, quantization(baseline="e", scheme="W4A4"), {"piqa": 0.5})
    record = task(
        broken, "wikitext2", protocol="gptq-2048", status="failed", error="text too short"
    )
    store.save_task("opt-6.7b", broken.key, record)
    text = table(store)
    shown = {row["Method"].split()[0]: row["PPL wikitext2 gptq-2048"] for row in cells(text)}
    assert shown["a"] == "inf (diverged)" and shown["b"] == "NaN"
    assert shown["c"] == "failed" and shown["d"] == "n/a" and shown["e"].startswith("failed [")
    assert cells(text)[1]["piqa"] == "–"
    for said in ("failed: out of memory", f"not applicable: {sentence}", "text too short"):
        assert said in text
    assert "\nx" not in text


def test_fallbacks_are_daggered_with_their_number(bitnet: Store) -> None:
    text = table(bitnet)
    (row,) = [row for row in cells(text) if "†" in row["Method"]]
    assert (row["W/A"], row["Method"]) == ("W2A16", "gptq †")
    assert "† gptq W2A16 on opt-6.7b: 3 of 4 layers were rounded to nearest" in text


def test_perplexity_protocols_never_share_a_column(store: Store) -> None:
    add(store, quantization(), {}, {"wikitext2@gptq-2048": 5.47, "wikitext2@gptq-4096": 5.12})
    add(store, quantization(baseline="a", scheme="W4A16"), {}, {"wikitext2@documents-2048": 7.0})
    for layout in ("comparison", "bitnet-table3", "b158-table2"):
        columns = [name for name in cells(table(store, layout))[0] if "PPL" in name]
        assert columns == [
            f"PPL wikitext2 {p}" for p in ("documents-2048", "gptq-2048", "gptq-4096")
        ]


def test_a_row_measured_differently_is_noted_and_never_best(store: Store) -> None:
    add(store, quantization(), {"piqa": 0.7})
    for name, score in (("a", 0.5), ("b", 0.6)):
        add(store, quantization(baseline=name, scheme="W4A16"), {"piqa": score})
    add(store, quantization(baseline="c", scheme="W4A16"), {"piqa": 0.9}, limit=100)
    add(store, quantization(baseline="d", scheme="W4A16"), {"piqa": 0.8}, num_fewshot=4)
    text = table(store)
    shown = {row["Method"]: row["piqa"] for row in cells(text)}
    assert shown["c"].endswith("[1]") and shown["d"].endswith("[2]")
    assert "[1\\] measured differently: limit=100" in text
    assert "[2\\] measured differently: 4-shot" in text
    assert [name for name, cell in shown.items() if "**" in cell] == ["b"]


def test_of_several_measurements_the_largest_is_shown_and_the_other_told(store: Store) -> None:
    model = add(store, quantization(), {"piqa": 0.7})
    small = task(model, "piqa", {"acc": 0.9}, n_items=100, limit=100)
    store.save_task("opt-6.7b", model.key, small)
    text = table(store)
    assert cells(text)[0]["piqa"].startswith("70.0")
    assert "also stored for piqa, not shown: 0.9 (limit=100)" in text


def test_a_limit_that_holds_for_the_whole_column_is_told_at_its_heading(store: Store) -> None:
    add(store, quantization(), {"piqa": 0.7}, limit=100, num_fewshot=2)
    assert "piqa: 2-shot, limit=100" in table(store)


def test_a_task_without_the_metric_shows_acc_and_says_so(store: Store) -> None:
    model = add(store, quantization(), {"piqa": 0.7})
    store.save_task("opt-6.7b", model.key, task(model, "winogrande", {"acc": 0.6}))
    text = table(store, metric="acc_norm")
    row = cells(text)[0]
    assert row["piqa"].startswith("71.0") and row["winogrande"].startswith("60.0")
    assert "winogrande: metric acc" in text and "piqa: metric" not in text


def test_runs_that_differ_in_a_setting_are_told_apart(store: Store) -> None:
    for alpha in (0.5, 0.8):
        add(store, quantization(baseline="sq", scheme="W8A8", parameters_of={"alpha": alpha}))
    for seed in (0, 1):
        c4 = CalibrationSpec(seed=seed)
        add(store, quantization(baseline="gptq", scheme="W4A16", calibration=c4))
    for scheme in ("W4A8:w=channel,a=token", "W4A8:w=tensor,a=token"):
        add(store, quantization(baseline="rtn", scheme=scheme))
    methods = [row["Method"] for row in cells(table(store))]
    assert methods == [
        *("sq alpha=0.5", "sq alpha=0.8", "gptq calibration.seed=0", "gptq calibration.seed=1"),
        *("rtn w\\_granularity=channel", "rtn w\\_granularity=tensor"),
    ]


def test_differences_are_to_the_full_precision_row_of_the_same_checkpoint(store: Store) -> None:
    tasks = {"piqa": 0.7, "boolq": 0.6}
    add(store, quantization("one"), tasks, {"c4@gptq-2048": 10.0})
    add(store, quantization("two"), {"piqa": 0.9, "boolq": 0.9}, {"c4@gptq-2048": 5.0})
    lower = {"piqa": 0.5, "boolq": 0.5}
    add(store, quantization("one", "rtn", "W4A16"), lower, {"c4@gptq-2048": 12.5})
    rows = cells(table(store, delta=True))
    (row,) = [row for row in rows if row["Method"] == "rtn"]
    assert row["Δ c4 gptq-2048"] == "+2.50" and row["Δ Avg"] == "−15.0"
    assert rows[0]["Δ Avg"] == "–"


def test_published_rows_stand_beside_measured_ones_and_say_so(bitnet: Store) -> None:
    text = table(bitnet, "bitnet-table3", against="bitnet-table3")
    rows = cells(text)
    assert len(rows) == 12 + 11
    at = next(i for i, row in enumerate(rows) if row["Methods"].startswith("QuIP (published)"))
    assert rows[at - 1]["Methods"] == "quip" and rows[at]["WG"] == "56.1"
    assert rows[at]["PPL validation bitnet-validation"] == "70.43"
    assert rows[at]["PPL wikitext2 gptq-2048"] == "–"
    assert "arXiv 2310.11453v1, Table 3: other weights" in text


def test_latex_is_a_booktabs_table_with_equal_rows_and_escaped_names(store: Store) -> None:
    add(store, quantization("50%_of #1 {a} ~x^y \\z $ [b]"), {"piqa": 0.5, "boolq": 0.5})
    add(store, quantization("other", "rtn", "W4A16:grid=asym"), {"piqa": 0.5, "boolq": 0.25})
    text = table(store, format="latex")
    assert text.startswith("% Needs \\usepackage{booktabs}")
    body = text.split("\\toprule")[1].split("\\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {6}
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None and len(columns[1]) == 7
    name = r"50\%\_of \#1 \{a\} \textasciitilde{}x\textasciicircum{}y \textbackslash{}z \$ {[}b{]}"
    assert name in text
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert text.isascii()


def test_html_is_escaped_and_balanced(store: Store) -> None:
    hostile = "<script>alert('&')</script>"
    add(store, quantization(hostile, status="failed", error=hostile), {"piqa": 0.5})
    text = table(store, format="html")
    assert "<script" not in text and "&lt;script&gt;" in text
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(text)
    assert opened == []


def test_markdown_names_cannot_break_the_table(store: Store) -> None:
    add(store, quantization("a|b*c_d<e>`f`\nnext"), {"piqa": 0.5})
    (line,) = [line for line in table(store).splitlines() if "W16A16" in line]
    assert line.startswith("| a\\|b\\*c\\_d\\<e\\>\\`f\\` next | W16A16 |")


def test_csv_has_raw_numbers_one_per_line_and_no_marks(bitnet: Store) -> None:
    rows = numbers(table(bitnet, format="csv"))
    assert len(rows) == 11 * 6  # four tasks, their mean and one perplexity
    (quip,) = [r for r in rows if r["baseline"] == "quip" and r["task"] == "hellaswag"]
    assert float(quip["value"]) == 0.303 and quip["best"] == "True"
    assert (quip["n_items"], quip["protocol"], quip["limit"]) == ("1000", "lm-eval", "")
    assert json.loads(quip["hyperparameters"]) == {}
    absmax = [r for r in rows if r["baseline"] == "absmax" and r["metric"] == "perplexity"]
    assert [float(r["value"]) for r in absmax] == [21.43, 48000, math.inf]
    (gptq,) = [r for r in rows if r["label"] == "W2A16" and r["task"] == "wikitext2"][:1]
    assert (gptq["fallbacks"], gptq["n_layers"], gptq["method"]) == ("3", "4", "gptq")


def test_terminal_lines_fit_the_width_and_lose_no_column(bitnet: Store) -> None:
    for width in (60, 100, 140, 300):
        text = table(bitnet, format="terminal", width=width)
        assert max(map(len, text.splitlines())) <= width
        for heading in ("Checkpoint", "wsc285", "winogrande", "storycloze_2016", "Avg"):
            assert width == 60 or heading in text  # where it is that narrow, headings fold
    assert "56.7 ± 0.8*" in text and "\x1b" not in text


def test_terminal_prints_brackets_as_they_are(store: Store) -> None:
    add(store, quantization("[bold]x[/bold]"), {"piqa": 0.5})
    assert "[bold]x[/bold]" in table(store, format="terminal")


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_store_gives_the_same_text(bitnet: Store, format: str) -> None:
    first, second = (table(bitnet, "bitnet-table3", format=format) for _ in range(2))
    assert first == second


def test_a_store_with_nothing_but_failures_is_still_a_table(store: Store) -> None:
    add(store, quantization(baseline="a", scheme="W4A4", status="failed", error="boom"))
    for format in FORMATS:
        assert "boom" in table(store, format=format)
