"""LaTeX of every layout and every published table: it compiles as printed, or at least adds up."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from study_fixtures import add, bitnet_store, quantization

from qbench.comparison import reference
from qbench.study.store import Store
from qbench.tables.latex import escaped, latex
from qbench.tables.layouts import LAYOUTS
from qbench.tables.sheet import Cell, Column, Sheet
from qbench.tables.table import published_table, table

HOSTILE = '50%_of #1 {a} ~x^y \\z $ [b] & <|> ±−Δ∞†–✓✗ ü é ñ 模型 🙂 --x `q\' "w" µ·≤→ ﬁ'
PREAMBLE = r"""\documentclass{article}
\usepackage{booktabs}\usepackage{amssymb}\usepackage{graphicx}
\begin{document}
"""


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("hostile"))
    add(store, quantization(HOSTILE), {"piqa": 0.5, "boolq": 0.5})
    add(store, quantization("b", status="failed", error=HOSTILE), {"piqa": 0.5})
    return store


@pytest.fixture(scope="module")
def texts(bitnet: Store, hostile: Store) -> dict[str, str]:
    """Every layout with published rows beside, a hostile one, and every published table."""
    against = {name: name for name in LAYOUTS if name in reference.names()}
    against |= {"comparison": "gptq-opt", "sizes": "bitnet-scaling"}
    found = {
        f"layout {name}": table(bitnet, name, against=against.get(name), format="latex")
        for name in LAYOUTS
    }
    found |= {"hostile names": table(hostile, format="latex")}
    return found | {name: published_table(name, "latex") for name in reference.names()}


def cells(line: str) -> int:
    """How many columns a line of the body fills."""
    spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
    return 1 + len(re.findall(r"(?<!\\)&", line)) + spanned


def test_every_line_fills_every_column_and_braces_close(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
        assert columns is not None
        body = text.split("\\toprule")[1].split("\\bottomrule")[0]
        lines = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(lines) >= 2, name
        assert {cells(line) for line in lines} == {len(columns[1])}, name
        plain = re.sub(r"\\\\|\\[{}]", "", text)
        assert plain.count("{") == plain.count("}"), name
        begun, ended = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
        assert begun == ["table", "tabular"] and ended == ["tabular", "table"], name


def test_no_special_character_is_bare(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        assert text.isascii(), name
        commands = text.replace("{%\n\\begin{tabular}", "").removeprefix("% Needs ")
        commands = re.sub(r"\$(\\[a-zA-Z]+|[<>|\-]|\^[23]|\^\\circ)\$", "", commands)  # our own
        assert not re.search(r"(?<!\\)[%$#_^~](?!\{)", commands.replace("}~", "")), name


def test_names_that_mean_something_to_latex_are_spelled_out() -> None:
    assert escaped("50%_of #1 & {a}") == r"50\%\_of \#1 \& \{a\}"
    assert escaped("a~b^c\\d") == r"a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d"
    assert escaped("±−Δ✓†") == r"$\pm$$-$$\Delta$\checkmark{}\dag{}"
    assert escaped("müller café señor Čapek") == r"m\"{u}ller caf\'{e} se\~{n}or \v{C}apek"
    assert escaped("模") == "U+6A21" and escaped("ﬁ") == "fi"
    assert escaped("two\nlines  and -- hyphens") == "two lines and -{}- hyphens"


def test_schemes_become_lettered_notes_so_that_the_table_fits(bitnet: Store) -> None:
    text = table(bitnet, "bitnet-table3", format="latex")
    body, below = text.split("\\end{tabular}")
    assert "Scheme" not in body and "grid=" not in body
    letters = dict(re.findall(r"\\textsuperscript\{([a-z])\}~(\S+?)(?:\\quad|\\par)$", below, re.M))
    assert letters["a"] == "grid=restricted,agrid=restricted"
    (gptq,) = [line for line in body.splitlines() if "gptq" in line and "W4A16" in line]
    letter = re.search(r"W4A16\\textsuperscript\{(\w)\}", gptq)
    assert letter is not None and letters[letter[1]] == "w=channel,grid=asym"


def test_neighbours_that_begin_alike_share_a_heading() -> None:
    def column(*heading: str) -> Column:
        return Column(heading, [Cell("1")])

    both = [column("0-shot", "HS"), column("0-shot", "WG")]
    sheet = Sheet("T", [column("Model"), *both, column("4-shot", "HS")], [{}])
    head = latex(sheet).split("\\toprule\n")[1].split("\\midrule")[0].splitlines()
    assert head[0] == r" & \multicolumn{2}{c}{0-shot} &  \\"
    assert head[1] == r"\cmidrule(lr){2-3}"
    assert head[2] == r"Model & HS & WG & \shortstack{4-shot \\ HS} \\"


def test_pdflatex_compiles_it_without_complaint(texts: dict[str, str], tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("pdflatex is not installed (apt-get install texlive-latex-recommended)")
    source = tmp_path / "all.tex"
    pages = "\n\\clearpage\n".join(texts.values())
    source.write_text(f"{PREAMBLE}{pages}\n\\end{{document}}\n", encoding="ascii")
    command = [program, "-interaction=nonstopmode", "-halt-on-error", source.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    log = done.stdout
    assert done.returncode == 0, log[-2000:]
    assert f"({len(texts)} pages" in log.replace("\n", "")
    tables = re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\) in paragraph", log)
    assert not [width for width in tables if float(width) > 1], "a table is wider than the text"
