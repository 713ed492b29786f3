"""Tables as Markdown, LaTeX, HTML, CSV and terminal text: nothing breaks or gets lost."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study_fixtures import BITNET_TASKS, add, bitnet_store, numbers, quantization

from qbench.study.store import Store
from qbench.tables.table import FORMATS, table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


def test_latex_is_a_booktabs_table_with_equal_rows_and_escaped_names(store: Store) -> None:
    add(store, quantization("50%_of #1 {a} ~x^y \\z $ [b]"), {"piqa": 0.5, "boolq": 0.5})
    add(store, quantization("other", "rtn", "W4A16:grid=asym"), {"piqa": 0.5, "boolq": 0.25})
    text = table(store, format="latex")
    assert text.startswith("% Needs \\usepackage{booktabs}")
    body = text.split("\\toprule")[1].split("\\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {5}
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None and len(columns[1]) == 6  # schemes are notes
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


def test_the_terminal_folds_schemes_at_commas_and_says_them_once(bitnet: Store) -> None:
    text = table(bitnet, format="terminal", width=100)
    assert text.count("agrid=restricted") == 4 and "grid=restricted," in text
    assert text.count("Scheme") == 1 and text.count("Checkpoint") > 1


def test_the_terminal_repeats_schemes_that_tell_rows_apart(store: Store) -> None:
    scores = dict.fromkeys((*BITNET_TASKS, "lambada_openai", "arc_challenge"), 0.5)
    for grid in ("asym", "gptq_sym"):
        add(store, quantization(baseline="rtn", scheme=f"W4A16:grid={grid}"), scores)
    text = table(store, format="terminal", width=100)
    assert text.count("grid=gptq_sym") == text.count("Scheme") == 2


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
