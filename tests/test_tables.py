"""Tables: what stands in a cell, what is noted, what never shares a column."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from study_fixtures import BITNET_TASKS, add, bitnet_store, cells, numbers, quantization, task

from qbench.comparison.frame import frame
from qbench.comparison.headings import size_text
from qbench.errors import QBenchError
from qbench.record import CalibrationSpec
from qbench.study.store import Store
from qbench.tables.sheet import accuracy_text, difference_text, perplexity_text
from qbench.tables.table import table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


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
    # as the names of models have it
    assert [
        size_text(n) for n in (500_000, 512_384, 1_996_800, 99_000, 999_999, 30_000_000_000)
    ] == [
        *("0.5M", "0.51M", "2M", "99K", "1M", "30B"),
    ]


def test_an_empty_store_says_what_to_run(store: Store) -> None:
    with pytest.raises(QBenchError, match="no results are stored in .*qbench run"):
        table(store)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layout": "bitnet-table2"}, "did you mean .*'bitnet-table3'"),
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
        *("Checkpoint", "WBits", "Methods", "(W/A)", "Scheme", "PTQ", "PPL wikitext2 gptq-2048"),
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


def test_the_best_ptq_row_of_each_label_is_bold_and_trained_rows_do_not_compete(
    bitnet: Store,
) -> None:
    text = table(bitnet, "bitnet-table3")
    bold = [(r["(W/A)"], r["Methods"].split()[0]) for r in cells(text) if "**" in r["Avg"]]
    # Table 3's averages: 56.7 and 52.9; 46.2 and 45.1; 45.2 and 49.0; 44.6 and 44.4; one W4A16
    assert bold == [
        *(("W8A8", "smoothquant"), ("W4A4", "absmax"), ("W2A16", "quip"), ("W1A8", "absmax")),
    ]
    assert "rows of one checkpoint with the same W/A." in text


def test_a_row_with_per_layer_overrides_is_never_best(store: Store) -> None:
    for name, score in (("a", 0.5), ("b", 0.6)):
        add(store, quantization(baseline=name, scheme="W4A16"), {"piqa": score})
    add(store, quantization(baseline="c", scheme="W4A16;*.fc1=W8A16"), {"piqa": 0.9})
    text = table(store)
    assert [row["Method"] for row in cells(text) if "**" in row["piqa"]] == ["b"]
    assert "with the same W/A, without per-layer overrides." in text


@pytest.mark.parametrize(
    ("scheme", "shown"),
    [
        ("W4A16:w=channel,grid=asym", "w=channel,grid=asym"),
        ("W8A8:w=tensor,a=tensor,static,bmm", "w=tensor,a=tensor,static,bmm"),
        ("W4A16KV4g128:grid=asym,agrid=restricted", "grid=asym,agrid=restricted"),
        ("W4A16;*.down_proj=W8A16:grid=asym", "*.down_proj=W8A16:grid=asym"),
        ("W16A16;a.*=W8A16", "a.*=W8A16"),
        ("W4A16", "–"),
        ("W16A16", "–"),
    ],
)
def test_every_layout_prints_the_scheme_beside_the_widths(
    store: Store, scheme: str, shown: str
) -> None:
    add(store, quantization(baseline="a", scheme=scheme), {"piqa": 0.5})
    for layout in ("comparison", "bitnet-table3", "b158-table2"):
        row = cells(table(store, layout))[-1]
        assert row["Scheme"].replace("\\", "") == shown
    assert numbers(table(store, format="csv"))[0]["scheme"] == scheme


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
    for dtype in ("bfloat16", "float32"):
        add(store, quantization(baseline="rtn", scheme="W3A16", dtype=dtype))
    rows = [(row["Method"], row["Scheme"]) for row in cells(table(store, each_seed=True))]
    assert rows == [
        *(("sq alpha=0.5", "–"), ("sq alpha=0.8", "–")),
        *(("gptq calibration.seed=0", "–"), ("gptq calibration.seed=1", "–")),
        *(("rtn", "w=channel,a=token"), ("rtn", "w=tensor,a=token")),
        *(("rtn dtype=bfloat16", "–"), ("rtn dtype=float32", "–")),
    ]
    stored = {row["quantization_dtype"] for row in numbers(table(store, format="csv"))}
    assert stored == {"bfloat16", "float32"}


def test_what_tells_rows_apart_is_cut_only_where_they_still_differ(store: Store) -> None:
    end = "the same end of both paths"
    for start in ("one", "two"):
        add(store, quantization(baseline="a", scheme="W4A16", weights=f"{start}/{end}"))
    for start in ("one", "two"):
        add(store, quantization(baseline="b", scheme="W4A16", weights="0" * 61 + start))
    assert [row["Method"] for row in cells(table(store))] == [
        *(f"a weights={start}/{end}" for start in ("one", "two")),
        *(f"b weights={'0' * 21}{start}" for start in ("one", "two")),  # 24 characters
    ]


def test_a_note_names_the_scheme_where_the_widths_do_not_tell_rows_apart(store: Store) -> None:
    for grid, fallbacks in (("asym", 1), ("rms", 2)):
        scheme = f"W4A16:grid={grid}"
        add(store, quantization(baseline="rtn", scheme=scheme, fallbacks=fallbacks), {"piqa": 0.5})
    text = table(store)
    assert "rtn W4A16:grid=asym on opt-6.7b: 1 of 4 layers" in text
    assert "rtn W4A16:grid=rms on opt-6.7b: 2 of 4 layers" in text


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


def test_published_rows_and_chance_are_complete_where_nobody_measured(store: Store) -> None:
    add(store, quantization(), {"hellaswag": 0.5})
    random, own, *published = cells(table(store, "bitnet-table3", against="bitnet-table3"))
    scores = ("WG", "WGe", "HS", "SC", "Avg")
    assert [random[name] for name in scores] == ["50.0", "50.0", "25.0", "50.0", "43.8"]
    assert [own[name] for name in scores] == ["–", "–", "50.0", "–", "–"]
    transformer = published[0]  # Table 3: 66.7, 54.3, 42.9, 67.4, mean 57.8
    assert [transformer[name] for name in scores] == ["66.7", "54.3", "42.9", "67.4", "57.8"]
    assert transformer["Scheme"] == "–"
    rows = cells(table(store, "b158-table2", against="b158-table2"))
    assert all(row["ARCe"] != "–" and row["Avg"] != "–" for row in rows if row["HS"] != "50.0")
