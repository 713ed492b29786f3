"""The report page: everything stored is in it, nothing is fetched, no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cli_fixtures import qbench, refused
from report_fixtures import (
    HOSTILE,
    N,
    Page,
    data_folder,
    known_store,
    loads_torch,
    plain,
    planted_difference,
    run_of,
)
from study_fixtures import add, bitnet_store, quantization

from qbench.comparison import significance
from qbench.errors import QBenchError, RunFailed
from qbench.record import Metric
from qbench.report import sheets
from qbench.report.page import json_text
from qbench.report.report import Choices, html_of, write
from qbench.report.snapshot import anchors
from qbench.reproduction.outcome import Gate, Number, Outcome, OutcomeRow, save
from qbench.study.store import Store
from qbench.tables.sheet import Cell, Column, Sheet
from qbench.tables.table import stored_entries, table


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return known_store(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def page(store, data) -> Page:
    return Page(html_of(store, Choices(data=data)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("hostile")
    choices = Choices(data=data_folder(root / "data", hostile=True))
    return Page(html_of(known_store(root / "results", hostile=True), choices))


# --- the table -----------------------------------------------------------------------------------


def test_the_table_is_in_the_html_itself_with_every_cell_of_qbench_table(store):
    """The cells are those of the Markdown table, which is written by other code."""
    page = Page(html_of(store, Choices(significance="off")))
    lines = [line for line in table(store).splitlines() if line.startswith("|")]
    expected = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    marks = r"\*\*|\\| ?\[\d+\\?\]| (?=†)"
    ours = [[re.sub(r"\d+$", "", c) if "quip" in c else c for c in row] for row in page.rows[1:]]
    theirs = [[re.sub(marks, "", cell) for cell in row] for row in expected]
    assert [[plain(c) for c in row] for row in ours] == theirs
    assert len(ours) == 7


def test_numbers_are_sorted_by_their_full_value_not_by_their_text(page):
    cells = [attributes for attributes in page.named("td") if "data-v" in attributes]
    values = {attributes["data-v"] for attributes in cells}
    assert f"{48 / N:.6g}" in values
    assert "Infinity" in values  # the perplexity that diverged
    assert "" in values  # a run that failed has none, and is sorted last


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("18,687", "18687"), ("1.3e3", "1300"), ("309.", "309"), ("−0.31", "-0.31")),
        *(("±0.19", "0.19"), ("inf (diverged)", "Infinity"), ("–", ""), ("failed", "")),
    ],
)
def test_a_printed_number_is_sorted_by_its_value(text, value):
    column = Column(("Published",), [Cell(text)])
    sheet = Sheet(title="", columns=[column], facts=[{}])
    assert sheets.shown(sheet, {}, "x")["rows"][0]["cells"][0]["value"] == value


def test_headings_have_scopes_and_rows_say_what_they_can_be_filtered_by(page):
    assert {a.get("scope") for a in page.named("th")} == {"col", "row"}
    rows = [a for a in page.named("tr") if "data-method" in a]
    assert {a["data-checkpoint"] for a in rows} == {"model", "twin"}
    assert {a["data-width"] for a in rows} == {"W16A16", "W4A16", "W2A16", "W1A8"}


def test_significance_is_marked_in_the_table_unless_it_is_turned_off(store, page):
    assert "▼ significantly worse" in page.text
    row = next(row for row in page.rows if "gptq" in row[2] and row[1] == "W2A16")
    assert any("▼" in cell for cell in row)  # 24 of 60 lost, none won: p = 2^-23
    off = Page(html_of(store, Choices(significance="off")))
    assert not any("▼" in cell for row in off.rows for cell in row)


def test_a_table_with_too_many_numbers_is_not_tested_and_says_so(store, monkeypatch):
    monkeypatch.setattr("qbench.report.report.MOST_TESTED", 8)
    page = Page(html_of(store))
    assert not any("▼" in cell for row in page.rows for cell in row)
    assert "Not tested for significance: 9 numbers in one table are more than 8" in page.text


def test_a_published_table_stands_beside_in_the_papers_layout(tmp_path):
    page = Page(html_of(bitnet_store(tmp_path), Choices(against="bitnet-table3")))
    assert "Beside published numbers" in page.text
    assert "SmoothQuant (published)" in page.text
    assert [a["id"] for a in page.named("table")] == ["table-rows", "published-rows"]


def outcome(**changes) -> Outcome:
    number = Number(
        title="wikitext2 gptq-2048",
        task="wikitext2",
        metric="perplexity",
        unit="perplexity",
        published=27.66,
        printed="27.66",
        source="Table 1",
        reproduced=Metric.of(27.65, 0.1),
        difference=-0.01,
        noise=0.02,
        verdict="within noise",
    )
    row = OutcomeRow(name="full", baseline="none", scheme="W16A16", numbers=[number])
    fields = {
        "preset": "gptq-opt-125m",
        "paper": "GPTQ",
        "about": "perplexities of OPT",
        "weights": "released",
        "hub": "facebook/opt-125m",
        "checkpoint": "facebook/opt-125m",
        "gate": Gate(state="passed", sentence="as published"),
        "rows": [row],
        "created": "2026-01-01T00:00:00",
    }
    return Outcome(**(fields | changes))


def test_stored_reproductions_are_shown_and_a_broken_one_is_a_warning(tmp_path):
    store = planted_difference(tmp_path, 3, 3)
    save(outcome(), tmp_path)
    (tmp_path / "reproductions" / "other.json").write_text("{")
    page = Page(html_of(store))
    text = plain(page.text)
    assert "gptq-opt-125m: GPTQ, on facebook/opt-125m" in text
    assert "perplexities of OPT: 1 within noise." in text
    assert "27.66 27.65" in re.sub(r"(27\.66)(27\.65)", r"\1 \2", text)
    assert "other.json is no stored reproduction" in text


# --- one file, nothing fetched, nothing run ------------------------------------------------------


def test_nothing_in_the_page_refers_to_anything_outside_it(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    style = Path("qbench/report/page.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_every_link_leads_to_a_place_in_the_page(page):
    places = {a["id"] for _, a in page.elements if "id" in a} | set(page.data["runs"])
    links = {a["href"][1:] for a in page.named("a") if a.get("href")}
    assert links <= places
    assert set(page.data["runs"]) <= links  # every run can be reached


def test_the_policy_allows_the_two_scripts_by_hash_and_no_connection(page):
    (policy,) = [
        a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    running = [text for a, text in page.scripts if not a.get("type")]
    assert len(running) == 1
    digest = base64.b64encode(hashlib.sha256(running[0].encode()).digest()).decode()
    assert rules["script-src"].split()[0] == f"'sha256-{digest}'"
    assert "unsafe-inline" not in rules["script-src"] and "connect-src" not in rules


def test_no_element_has_a_handler_of_its_own(page, hostile):
    for shown in (page, hostile):
        assert not [n for _, a in shown.elements for n in a if n.startswith("on")]


def test_planted_markup_in_names_and_questions_stays_text(hostile):
    assert not hostile.named("img")
    assert hostile.text.count(HOSTILE) > 5  # the names are shown, as they are
    assert len([text for a, text in hostile.scripts if not a.get("type")]) == 1
    run = next(run for run in map(hostile.block, hostile.data["runs"]) if "2A16" in run["title"])
    assert HOSTILE in run["checkpoint"] and HOSTILE in run["title"]
    texts = hostile.block(hostile.data["texts"][0])
    assert all(HOSTILE in question for question, _ in texts.values())


def test_plots_get_names_in_which_plotly_reads_no_tag(hostile):
    figures = hostile.data["figures"]
    assert figures
    for figure in figures:
        for trace in figure["figure"]["data"]:
            assert "<img" not in trace["name"] and "<script" not in "".join(trace.get("text", ""))


def test_json_in_the_page_cannot_end_its_script():
    text = json_text({"a": "</script><!--\u2028&", "b": [float("inf"), float("nan"), 1.5]})
    assert not set("<>&\u2028") & set(text)
    assert text.endswith('"b":["inf","nan",1.5]}')


# --- findings and warnings -----------------------------------------------------------------------


def sentences(page: Page) -> str:
    return plain(page.text)


def test_the_findings_name_the_best_row_of_each_width_with_what_it_keeps(page):
    """48/60 = 80.0 %, gptq keeps it all: 48 right; absmax has 46: 76.7 %; guessing 50 %."""
    text = sentences(page)
    assert "Full precision answers 80.0 % right on piqa; guessing gives 50.0 %." in text
    assert "W4A16: gptq 80.0 % (+0.0 points; 100 % kept of what is above guessing" in text
    assert "Next, absmax 76.7 %, is not told apart" in text
    assert "W2A16: gptq 40.0 % (−40.0 points; 0 % kept of what is above guessing; sign" in text
    assert "The narrowest post-training width at which no loss is found is W4A16 (gptq)." in text
    assert "twin, trained at 1 bit: 70.0 % (−10.0 points" in text


def test_a_perplexity_is_told_with_its_ratio(page):
    assert "10.00 in full precision; best of each width: gptq W4A16 10.50 (×1.05)" in page.text


@pytest.mark.parametrize(
    ("lost", "won", "verdict"),
    # McNemar's exact p: 2 * 2^-9 = 0.0039 for 9 lost and none won; 0.0386 * 2 > 0.05 for 12 and 6
    [(9, 0, "significant, p = 0.004"), (12, 6, "no difference found, p = 0.24")],
)
def test_a_difference_of_a_few_points_is_told_by_its_paired_test(tmp_path, lost, won, verdict):
    page = Page(html_of(planted_difference(tmp_path, lost, won)))
    assert verdict in sentences(page)


def test_a_correction_does_not_make_it_easier_to_say_that_nothing_is_lost(tmp_path, monkeypatch):
    """p = 0.0126 alone, 0.19 after Holm's correction over fifteen: no evidence of no loss."""
    verdict = significance.Verdict(
        n=300, difference=-0.02, better=False, test="t", p=0.0126, adjusted=0.189
    )
    monkeypatch.setattr(
        significance.Tester, "family", lambda self, numbers: [verdict for _ in numbers]
    )
    store = planted_difference(tmp_path, 12, 6)
    text = sentences(Page(html_of(store, Choices(significance="off"))))
    assert "no difference found, p = 0.19" in text
    assert "no loss is found" not in text


def test_a_model_that_guesses_is_said_to_show_no_loss(tmp_path):
    """154 of 300 is 51.3 %, the made-up standard error 2 points, and guessing 50 %."""
    text = sentences(Page(html_of(planted_difference(tmp_path, 3, 146, right=154))))
    assert "That is within two standard errors of guessing: these tasks show no loss here." in text
    assert "no loss is found" not in text


def test_warnings_name_what_failed_fell_back_or_diverged(page):
    text = sentences(page)
    assert "Failed (the hessian is not finite): quip W2A16 on model." in text
    assert "Not applicable (QuIP quantizes weights only): quip W1A8 on model." in text
    assert "rounded to nearest, because the method could not run on them: gptq W4A16" in text
    assert "Diverged: no finite number (wikitext2): gptq W2A16" in text


def test_a_broken_record_is_a_warning_of_the_page(tmp_path):
    store = known_store(tmp_path)
    next(tmp_path.glob("model/*/absmax-*/piqa-*.json")).write_text("{")
    text = sentences(Page(html_of(store)))
    assert text.count("A record could not be read") == 1
    assert "is damaged" in text


def test_a_page_without_trouble_says_so(tmp_path):
    store = planted_difference(tmp_path, 3, 3)
    assert "None: nothing failed, fell back or diverged" in Page(html_of(store)).text


# --- pages of runs -------------------------------------------------------------------------------


def test_a_run_has_its_settings_environment_and_what_every_matrix_went_through(page):
    run = run_of(page, "gptq W4A16")
    groups = {heading: dict(pairs) for heading, pairs in run["groups"]}
    assert groups["Method"]["percdamp"] == "0.01"
    assert groups["Calibration"]["nsamples"] == "8"
    assert groups["Calibration"]["seed"] == "0"
    assert groups["Environment"] == {"qbench": "0.1.0", "torch": "2.13.0", "device": "cpu"}
    assert groups["Precision"]["weights"] == "4 bits, channel, asym"
    layers = run["layers"]
    assert layers["name"][2] == "model.layers.1.up"
    assert layers["proxy loss"] == [0.0001, 0.0001, 0.0002, 0.0002, 0.0003, 0.0003]
    assert layers["bits per weight"] == [4.5] * 6
    assert [bool(reason) for reason in layers["fallback"]] == [0, 0, 1, 0, 0, 0]
    assert "scheme" not in layers  # all alike
    assert run["fallbacks"] == 1


def test_a_run_shows_its_numbers_beside_those_of_full_precision(page):
    measured = {one["task"]: one for one in run_of(page, "absmax W4A16")["measurements"]}
    assert measured["piqa"]["full"] == "80.0"
    assert measured["piqa"]["difference"] == "−3.3"
    assert measured["wikitext2"]["value"] == "12.00"
    assert measured["wikitext2"]["difference"] == "+2.00"


def test_answers_that_changed_are_counted_by_kind(page):
    (found,) = run_of(page, "gptq W4A16")["answers"]["tasks"]
    assert found["n"] == N
    assert found["kinds"] == {"right->wrong": 1, "wrong->right": 1}
    (found,) = run_of(page, "gptq W2A16")["answers"]["tasks"]
    assert found["kinds"] == {"right->wrong": 24}
    assert len(found["items"]) == 12 and found["rest"] == 12


def test_a_changed_answer_has_both_choices_the_right_one_and_margins(page):
    """Question 0 is lost and 48 won: both margins are 1 + i / 100 nats, with opposite signs."""
    (found,) = run_of(page, "gptq W4A16")["answers"]["tasks"]
    shown = {item[0]: item for item in found["items"]}
    assert shown[0] == [0, "right->wrong", [0], 0, 1, [1, -1], [[-10, -11], [-11, -10]]]
    assert shown[48][:6] == [48, "wrong->right", [0], 1, 0, [-1.48, 1.48]]


def test_the_questions_whose_margins_moved_most_are_shown(page):
    (found,) = run_of(page, "gptq W2A16")["answers"]["tasks"]
    assert [item[0] for item in found["items"]] == list(range(47, 35, -1))


def test_texts_are_those_of_the_data_folder(page):
    (found,) = run_of(page, "gptq W4A16")["answers"]["tasks"]
    question, options = page.block(found["texts"])["48"]
    assert question.startswith("Question: How is thing 48 done?")
    assert options == ["As it should be, 48 times. ", "Otherwise, 48 times."]


def test_full_precision_and_trained_rows_say_why_they_have_no_answers(page):
    assert "others are compared with" in run_of(page, "full precision W16A16")["answers"]["why"]
    assert "No full-precision row" in run_of(page, "trained W1A8")["answers"]["why"]


def test_rows_without_items_say_so(tmp_path):
    page = Page(html_of(bitnet_store(tmp_path)))
    (found,) = [t for t in run_of(page, "gptq W4A16")["answers"]["tasks"] if t["task"] == "wsc285"]
    assert found["why"] == "its items are not stored for both rows"


def test_pages_of_many_runs_show_fewer_questions_each(store, monkeypatch):
    entries = stored_entries(store)
    compared = sum(len(entry.cells) for entry in entries if not entry.full_precision)
    monkeypatch.setattr("qbench.report.answers.MOST", 4 * compared)
    (found,) = run_of(Page(html_of(store)), "gptq W2A16")["answers"]["tasks"]
    assert len(found["items"]) == 4 and found["rest"] == 20


# --- texts ---------------------------------------------------------------------------------------


def test_without_a_data_folder_there_are_no_texts_and_torch_is_not_loaded(store, tmp_path):
    page = Page(html_of(store))
    assert page.data["texts"] == []
    assert "--data DIR" in next(iter(page.data["missing"].values()))
    make = (
        "from qbench.report.report import html_of\nfrom qbench.study.store import Store\n"
        f"html_of(Store({str(store.root)!r}))"
    )
    assert not loads_torch(make)


def test_texts_of_a_set_can_be_left_out_by_name(store, data):
    page = Page(html_of(store, Choices(data=data, without_texts=("piq*",))))
    assert page.data["texts"] == []
    assert set(page.data["missing"].values()) == {
        "Texts of piqa were left out when this page was made."
    }
    assert "thing 48" not in str([page.block(anchor) for anchor in page.data["runs"]])


def test_a_text_that_changed_since_is_not_shown_and_said(store, data, tmp_path):
    path = tmp_path / "tasks" / "piqa" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    lines = (data / "tasks" / "piqa" / "validation.jsonl").read_text().splitlines()
    lines[48] = lines[48].replace("thing 48", "another thing")
    path.write_text("\n".join(lines) + "\n")
    page = Page(html_of(store, Choices(data=tmp_path)))
    (name,) = page.data["texts"]
    assert "48" not in page.block(name) and "0" in page.block(name)
    assert page.data["missing"][name].startswith("1 texts of piqa are not shown")


def test_a_data_folder_without_the_task_costs_only_the_texts(store, tmp_path):
    page = Page(html_of(store, Choices(data=tmp_path)))
    assert "cannot be read" in next(iter(page.data["missing"].values()))
    (found,) = run_of(page, "gptq W4A16")["answers"]["tasks"]
    assert found["kinds"] == {"right->wrong": 1, "wrong->right": 1}


# --- plots ---------------------------------------------------------------------------------------


def test_every_figure_is_one_that_plotly_accepts(page):
    from plotly.graph_objects import Figure

    assert [f["label"] for f in page.data["figures"]] == [
        "model: mean acc",
        "model: mean acc",
        "model · wikitext2, gptq-2048: perplexity",
        "model · wikitext2, gptq-2048: perplexity",
    ]
    for figure in page.data["figures"]:
        Figure(figure["figure"])  # unknown properties and values raise


def test_a_point_knows_its_value_and_the_page_of_its_run(page):
    traces = {t["name"]: t for t in page.data["figures"][0]["figure"]["data"]}
    gptq = traces["gptq"]
    assert sorted(gptq["y"]) == [40.0, 80.0]
    assert all(anchor in page.data["runs"] for anchor in gptq["customdata"])
    assert {"circle", "circle-open"} >= set(traces["absmax"]["marker"]["symbol"])
    assert "twin (trained)" in traces


def test_a_diverged_perplexity_is_drawn_at_the_top_and_said(page):
    figure = page.data["figures"][2]["figure"]
    gptq = next(trace for trace in figure["data"] if trace["name"] == "gptq")
    assert max(gptq["y"]) == 4 * 12.0  # above every finite one
    assert any("inf (diverged)" in text for text in gptq["text"])
    assert "diverged" in [note["text"] for note in figure["layout"]["annotations"]]


# --- choosing, writing, refusing -----------------------------------------------------------------


def test_filters_leave_out_runs_and_their_pages(store):
    page = Page(html_of(store, Choices(baselines=["none", "absmax"], schemes=["W16A16", "W4A16"])))
    assert len(page.rows) == 3
    assert len(page.data["runs"]) == 2


def test_runs_that_differ_in_their_seed_are_one_row_with_a_page_each(tmp_path):
    store = Store(tmp_path)
    add(store, quantization("model", parameters=10), {"piqa": 0.8})
    for seed in (0, 1, 2):
        record = quantization("model", "quip", "W2A16:w=channel,grid=rms", seed=seed, parameters=10)
        add(store, record, {"piqa": 0.6 + seed / 100})
    page = Page(html_of(store))
    assert len(page.rows) == 3
    runs = [page.block(anchor) for anchor in page.data["runs"]]
    assert len(runs) == 4
    assert sorted(len(run["seeds"]) for run in runs) == [0, 3, 3, 3]


def test_folders_of_one_name_get_anchors_that_differ():
    found = anchors(["a/W4/gptq-1", "b/W4/gptq-1", "a/W4/quip-2"])
    assert found == {
        "a/W4/gptq-1": "run-a_W4_gptq-1",
        "b/W4/gptq-1": "run-b_W4_gptq-1",
        "a/W4/quip-2": "run-quip-2",
    }


def test_the_command_writes_the_page_and_says_how_large_it_is(store, tmp_path):
    output = tmp_path / "new" / "report.html"
    told = qbench("report", "-o", output, "--results", store.root).stdout
    assert re.fullmatch(rf"{re.escape(str(output))} \(\d\.\d MB\)\n", told)
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.html"]


def test_the_command_names_what_it_cannot_do(store, tmp_path):
    results = ("--results", store.root)
    empty = refused("report", "-o", tmp_path / "a.html", "--results", tmp_path)
    assert empty.startswith("no results are stored in")
    assert "must end in .html" in refused("report", "-o", tmp_path / "a.pdf", *results)
    assert "did you mean" in refused(
        "report", "-o", tmp_path / "a.html", "--against", "bitnet-table33", *results
    )
    assert "unknown baseline" in refused(
        "report", "-o", tmp_path / "a.html", "--baseline", "gtpq", *results
    )


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    old = tmp_path / "report.html"
    old.write_text("old")
    with monkeypatch.context() as patched, pytest.raises(RunFailed, match="No space left"):
        full = OSError(28, "No space left on device")
        patched.setattr("os.replace", lambda *a: (_ for _ in ()).throw(full))
        write(old, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="cannot write"):
        write(tmp_path / "file" / "report.html", "text")
    with pytest.raises(QBenchError, match=r"must end in \.html"):
        write(tmp_path / "report", "text")


def test_the_same_store_gives_the_same_page(store, data):
    choices = Choices(data=data)
    assert html_of(store, choices) == html_of(store, replace(choices))
