"""Tables of costs: beside scores, of one model, and of published numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_fixtures import add, cells, numbers, quantization
from typer.testing import CliRunner

from qbench.cli import app
from qbench.comparison.run_costs import COST_COLUMNS, cost_columns
from qbench.errors import QBenchError
from qbench.models.dimensions import dimensions
from qbench.record import LayerReport, QuantizationRecord
from qbench.study.store import Store
from qbench.tables.costs import costs
from qbench.tables.costs_table import joules_text
from qbench.tables.published_costs import comparable
from qbench.tables.table import table
from qbench.testing import tiny_checkpoint, tiny_model


def record(scheme: str = "W16A16", baseline: str = "none", **fields) -> QuantizationRecord:
    """A tiny Llama whose matrices are all stored at the scheme's plain width."""
    model = tiny_model("llama")
    parameters = sum(p.numel() for p in model.parameters())
    kept = dimensions(model)
    bits = float(scheme[1 : scheme.index("A")])
    layers = [
        LayerReport(
            name=f"{m.out_features}x{m.in_features}.{i}", shape=(m.out_features, m.in_features),
            scheme=scheme, relative_error=0.1, stored_bits=bits * m.out_features * m.in_features,
        )
        for m in kept.matrices
        for i in range(m.count)
    ]  # fmt: skip
    found = quantization("tiny", baseline, scheme, parameters=parameters, **fields)
    found.layers = [] if bits == 16 else layers
    found.dimensions = kept
    found.effective_bits = None if bits == 16 else bits
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    for scheme, baseline, accuracy in (
        ("W16A16", "none", 0.8),
        ("W4A16", "rtn", 0.7),
        ("W4A8KV4", "rtn", 0.69),
    ):
        scores = {"piqa": accuracy, "arc_easy": accuracy}
        add(store, record(scheme, baseline), scores, {"text@documents-128": 1 / accuracy})
    return store


def by_label(text: str) -> dict[str, dict[str, str]]:
    return {row["W/A"]: row for row in cells(text)}


# --- beside scores -------------------------------------------------------------------------------


def test_the_layout_has_every_cost_beside_the_scores(store):
    rows = by_label(table(store, "costs"))
    assert list(rows["W16A16"]) == [
        *("Checkpoint", "W/A", "Method", "Scheme", "Bits/weight quantized"),
        *("Bits/weight whole model", "Size", "Energy INT8 acc.", "Energy INT32 acc."),
        *("KV cache 512 tokens", "Latency", "PPL text documents-128", "Avg"),
    ]
    whole, low = rows["W16A16"], rows["W4A16"]
    assert (whole["Bits/weight quantized"], whole["Bits/weight whole model"]) == ("16.00", "16.00")
    assert low["Bits/weight quantized"] == "4.00" and float(low["Bits/weight whole model"]) > 4
    assert low["Energy INT8 acc."] == low["Energy INT32 acc."] == whole["Energy INT8 acc."]
    assert rows["W4A8KV4"]["Energy INT8 acc."] != rows["W4A8KV4"]["Energy INT32 acc."]
    assert {row["Latency"] for row in rows.values()} == {"–"}
    assert whole["Avg"].startswith("80.0 ±")


def test_the_cache_is_that_of_512_tokens_at_the_runs_own_width(store):
    rows = by_label(table(store, "costs"))
    # two blocks, two heads of 16 channels, keys and values: 65,536 numbers
    assert rows["W4A16"]["KV cache 512 tokens"] == "131 kB"
    assert rows["W4A8KV4"]["KV cache 512 tokens"] == "41.0 kB"  # 32,768 bytes and 4,096 scales


def test_the_layout_says_what_it_counts(store):
    text = table(store, "costs")
    for told in ("arithmetic only", "Latency: not measured", "Weight-only schemes compute in FP16"):
        assert told in text


def test_a_run_without_dimensions_keeps_bits_and_bytes_and_says_why_it_lacks_the_rest(store):
    old = record("W2A16", "rtn")
    old.dimensions = None
    add(store, old, {"piqa": 0.5})
    text = table(store, "costs")
    row = by_label(text)["W2A16"]
    assert row["Bits/weight quantized"] == "2.00" and row["Size"].endswith("kB")
    assert row["Energy INT8 acc."] == row["KV cache 512 tokens"] == "–"
    assert "recorded without the model's dimensions" in text


def test_a_run_that_failed_has_no_costs():
    failed = record("W4A16", "rtn", status="failed", error="broke")
    failed.layers, failed.dimensions = [], None
    assert set(cost_columns(failed).values()) == {None}
    assert list(cost_columns(failed)) == list(COST_COLUMNS)


@pytest.mark.parametrize("format", ["md", "latex", "html", "terminal", "csv"])
def test_the_layout_prints_in_every_format(store, format):
    assert "tiny" in table(store, "costs", format=format)


def test_the_csv_has_every_cost_of_its_row_in_full(store):
    (row, *_) = [r for r in numbers(table(store, "costs", format="csv")) if r["label"] == "W4A8KV4"]
    expected = cost_columns(record("W4A8KV4", "rtn"))
    assert {name: float(row[name]) for name in COST_COLUMNS} == expected


@pytest.mark.parametrize(
    ("joules", "text"),
    [(1.6834, "1.68 J"), (12.04, "12.0 J"), (0.0578, "57.8 mJ"), (2.134e-4, "213 µJ"),
     (0.99996, "1.00 J"), (9.996e-3, "10.0 mJ"), (5e-8, "0.05 µJ"), (1234.5, "1234 J")],
)  # fmt: skip
def test_energies_read_like_energies(joules, text):
    assert joules_text(joules) == text


# --- one model -----------------------------------------------------------------------------------


def lines(text: str) -> dict[str, list[str]]:
    """A Markdown table of costs by its first column."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *values = (part.strip() for part in line.strip("|").split("|"))
            found.setdefault(name, values)
    return found


def test_the_shape_of_bitnet_6_7b_saves_what_the_paper_prints():
    found = lines(costs("bitnet-6.7B", ["W1A8"], format="md"))
    assert found["Energy (arithmetic only), 7 nm: both, INT8"] == [
        "1.68 J",
        "57.8 mJ (29.1x less)",
    ]  # Fig. 1
    assert found["Energy (arithmetic only), 7 nm: additions, integers in INT32"][1] == "110 mJ"
    assert found["Bits per weight, matrices of the blocks"] == ["16.000", "1.000"]


def test_a_weight_only_scheme_takes_as_much_energy_as_full_precision():
    found = lines(costs("b158-3B", ["W4A16g128"], format="md"))
    whole, low = found["Energy (arithmetic only), 7 nm: both, INT8"]
    assert low == f"{whole} (as much)"
    assert found["Memory"][1].endswith("x less)")


def test_longer_and_more_sequences_take_more_cache():
    once = lines(costs("bitnet-6.7B", seqlen=1024, format="md"))["KV cache"]
    assert once == ["537 MB", "537 MB"]  # 2 x 32 blocks x 4096 channels x 1024 tokens x 2 bytes
    assert lines(costs("bitnet-6.7B", seqlen=512, batch=2, format="md"))["KV cache"] == once


def test_a_stored_run_has_the_bits_that_it_recorded(store):
    text = costs("tiny/W4A8KV4/rtn", results=store.root, format="md")
    found = lines(text)
    assert found["Bits per weight, matrices of the blocks"] == ["16.000", "4.000"]
    assert "W4A8KV4 rtn" in text and "Costs of tiny for one sequence of 512 tokens" in text


def test_a_trained_run_is_headed_by_its_training_and_not_by_no_method(store):
    trained = record("W1A8", trained=True)
    trained.checkpoint = "ternary"
    store.save_quantization(trained)
    assert "W1A8 trained" in costs("ternary/W1A8", results=store.root, format="md")


def test_the_beginning_of_several_runs_is_refused_before_anybody_is_asked(store):
    with pytest.raises(QBenchError, match="names 2 runs"):
        costs("tiny/W4A", results=store.root)


def test_a_stored_run_without_dimensions_names_the_checkpoint_to_take(store):
    old = record("W2A16", "rtn")
    old.dimensions = None
    add(store, old)
    with pytest.raises(QBenchError, match="name the checkpoint tiny and --scheme W2A16"):
        costs("tiny/W2A16/rtn", results=store.root)


def test_a_checkpoint_needs_its_configuration_alone(tmp_path, no_model):
    folder = tiny_checkpoint(tmp_path / "with-weights")
    whole = lines(costs(str(folder), ["W4A16"], results=tmp_path, format="md"))
    assert "Files of the checkpoint" in whole
    (tmp_path / "config-only").mkdir()
    config = (folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config-only" / "config.json").write_text(config, encoding="utf-8")
    alone = lines(costs(str(tmp_path / "config-only"), ["W4A16"], results=tmp_path, format="md"))
    del whole["Files of the checkpoint"]
    assert alone == whole


def test_a_trained_checkpoint_is_counted_at_the_width_of_its_training(no_model):
    text = costs("bundled:b158-2m", format="md")
    found = lines(text)
    assert "W1.58A8" in text and "Costs of b158-2m" in text
    assert found["Bits per weight, matrices of the blocks"][1] == "1.585"
    assert found["Size with codes in whole bits"][1] == "845 kB"


def test_a_quantized_configuration_without_weights_counts_as_what_it_was_made_from(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "q").mkdir()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = lines(costs(str(tmp_path / "q"), results=tmp_path, format="md"))
    assert found["Bits per weight, whole model"] == ["16.000"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (None, {}, "name one of both"),
        ("bitnet-6.7B", {"against": "bitnet-table1"}, "name one of both"),
        (None, {"against": "bitnet-table1", "batch": 2}, "its own schemes and batch"),
        (None, {"against": "quip-opt-125m"}, "take one of .*bitnet-table1"),
        (None, {"against": "bitnet-table11"}, "unknown published table"),
        (None, {"against": "b158-table1", "seqlen": 0}, "at least one"),
        ("bitnet-7B", {}, "did you mean"),
        ("bitnet-6.7B", {"seqlen": 0}, "at least one"),
        ("bitnet-6.7B", {"format": "pdf"}, "unknown format 'pdf'"),
        ("bitnet-6.7B", {"schemes": ["W4A16;x=W8A16"]}, "leave its overrides out"),
        ("bitnet-6.7B", {"schemes": ["W4"]}, "cannot read scheme"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_a_line(model, options, message):
    with pytest.raises(QBenchError, match=message):
        costs(model, **options)


# --- published -----------------------------------------------------------------------------------


def test_these_tables_can_be_computed():
    assert set(comparable()) >= {
        *("bitnet-table1", "bitnet-fig1", "bitnet-scaling", "b158-table1", "b158-table3"),
        *("b158-fig2", "b158-fig3"),
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bitnet-table1", "34 of 36 numbers come out as printed"),
        ("bitnet-fig1", "7 of 8 numbers come out as printed"),
        ("b158-fig3", "6 of 6 numbers come out as printed"),
        ("bitnet-scaling", "14 of 14 numbers come out as printed, to 0.25 %"),
    ],
)
def test_energies_are_compared_number_by_number(name, told):
    assert told in costs(None, against=name, format="md")


def test_the_two_cells_of_table_1_that_the_formulas_do_not_give_are_marked():
    rows = cells(costs(None, against="bitnet-table1", format="md"))
    off = [(r["Model"], r["Node"], r["Quantity"]) for r in rows if r["Agrees"].startswith("✗")]
    assert off == [("6.7B", "7nm", "additions (J)"), ("30B", "7nm", "additions (J)")]
    first = next(r for r in rows if r["Agrees"].startswith("✗"))
    assert (first["Printed"], first["Computed"], first["INT32"]) == ("0.04", "0.0341", "0.1099")


def test_figure_3_says_that_its_3b_model_has_another_models_shape():
    text = costs(None, against="b158-fig3", format="md")
    assert "the 3B model's own gives 25.2" in text
    first = cells(text)[0]
    assert (first["Computed"], first["INT32"]) == ("71.429", "16.667")


def test_memory_of_table_1_is_explained_up_to_what_a_runtime_takes():
    rows = cells(costs(None, against="b158-table1", format="md"))
    assert [row["Printed (GB)"] for row in rows] == [
        *("2.08", "0.80", "3.34", "1.14", "7.89", "2.22", "2.38"),
    ]
    assert all(0.1 < float(row["Left over"]) < 0.4 for row in rows)
    assert (
        rows[0]["Weights (GB)"] == "1.56"
    )  # (4 x 1536² + 3 x 1536 x 4096) x 24 + 2 x 32000 x 1536


def test_a_longer_cache_leaves_less_over():
    short, long = (
        cells(costs(None, against="b158-table1", seqlen=n, format="md"))[0] for n in (512, 2048)
    )
    assert float(short["Left over"]) > float(long["Left over"])


def test_the_batch_of_llama_70b_is_what_fits_and_that_of_b158_does_not_follow():
    llama, low = cells(costs(None, against="b158-table3", format="md"))
    full, half = "Cache of 64 heads, 16 bits", "Cache of 64 heads, 8 bits"
    assert (llama["Printed batch"], llama[full]) == ("16", "16")
    assert int(low[full]) < int(low["Printed batch"]) == 176 < int(low[half])


def test_the_command_prints_a_table_and_a_mistake_in_one_line(store):
    run = CliRunner().invoke(app, ["costs", "--against", "bitnet-fig1"])
    assert run.exit_code == 0 and "38.856" in run.output
    wrong = CliRunner().invoke(app, ["costs", "bitnet-7B"])
    assert wrong.exit_code == 2 and "unknown shape 'bitnet-7B'" in wrong.output
    layout = CliRunner().invoke(
        app, ["table", "--layout", "costs", "--format", "md", "--results", str(store.root)]
    )
    assert layout.exit_code == 0 and "Costs beside accuracy" in layout.output
