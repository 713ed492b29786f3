"""The layouts of BitNet's Table 4 and of b1.58's Table 1: columns, ratios, printed rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_fixtures import BITNET_TASKS, add, bitnet_store, cells, numbers, quantization

from qbench.errors import QBenchError
from qbench.record import Dimensions, LayerReport
from qbench.study.store import Store
from qbench.tables.table import table

SHAPE = Dimensions(
    hidden_size=8,
    intermediate_size=16,
    n_blocks=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    vocabulary=10,
    tied_embeddings=False,
    embedding_parameters=80,
    head_parameters=80,
    matrices=[],
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


def test_table4_has_zero_shot_and_four_shot_side_by_side(store: Store) -> None:
    record = quantization()
    add(store, record, dict.fromkeys(BITNET_TASKS, 0.5), {"wikitext2@gptq-2048": 15.19})
    four = dict(zip(BITNET_TASKS, (0.6, 0.61, 0.62, 0.63), strict=True))
    add(store, record, four, num_fewshot=4)
    (row,) = cells(table(store, "bitnet-table4"))
    assert list(row) == [
        *("Checkpoint", "Methods", "(W/A)", "Scheme", "PPL wikitext2 gptq-2048"),
        *(f"0-shot {name}" for name in ("HS", "WGe", "WG", "SC", "Avg")),
        *(f"4-shot {name}" for name in ("HS", "WGe", "WG", "SC", "Avg")),
    ]
    assert [row[f"0-shot {name}"] for name in ("HS", "WGe", "WG", "SC", "Avg")] == ["50.0"] * 5
    shown = {name: row[f"4-shot {name}"] for name in ("WG", "WGe", "HS", "SC", "Avg")}
    assert shown == {"WG": "60.0", "WGe": "61.0", "HS": "62.0", "SC": "63.0", "Avg": "61.5"}
    rows = numbers(table(store, "bitnet-table4", format="csv"))
    assert sorted(line["num_fewshot"] for line in rows if line["task"] == "hellaswag") == ["0", "4"]


def test_table4_without_four_shot_results_keeps_its_columns(bitnet: Store) -> None:
    rows = cells(table(bitnet, "bitnet-table4"))
    assert len(rows) == 11
    assert {row["4-shot Avg"] for row in rows} == {"–"}


def test_table4_against_the_paper_has_the_papers_own_digits(bitnet: Store) -> None:
    """The printed averages, not the means of printed tasks: 52.45 would round to 52.4."""
    rows = cells(table(bitnet, "bitnet-table4", against="bitnet-table4"))
    printed = {row["Methods"].split(" (pub")[0]: row for row in rows if "publ" in row["Methods"]}
    assert list(printed) == [
        *("BitNet (Absmax+SubLN)", "Elastic+Pre-LN", "Absmax+Pre-LN", "Absmax+BMT"),
    ]
    own = printed["BitNet (Absmax+SubLN)"]
    assert [own[f"0-shot {n}"] for n in ("HS", "WGe", "WG", "SC", "Avg")] == [
        *("33.2", "52.1", "60.7", "63.2", "52.3"),
    ]
    assert [own[f"4-shot {n}"] for n in ("HS", "WGe", "WG", "SC", "Avg")] == [
        *("33.5", "50.4", "62.1", "63.8", "52.5"),
    ]
    assert printed["Elastic+Pre-LN"]["PPL validation bitnet-validation"] == "24.05"


def test_b158_table1_computes_memory_and_its_ratio_to_full_precision(store: Store) -> None:
    """6e9 parameters in 16 bits are 12 GB; with 5e9 of them in 2 bits (10 + 16) / 8 = 3.25 GB."""
    big = {"parameters": 6_000_000_000, "dimensions": SHAPE}
    add(store, quantization("llama", **big), None, {"wikitext2@gptq-2048": 5.0})
    scheme = "W1.58A8:grid=ternary"
    layer = LayerReport(
        name="0", shape=(50_000, 100_000), scheme=scheme, relative_error=0, stored_bits=10**10
    )
    trained = quantization("ternary", "bitnet", scheme, trained=True, layers=[layer], **big)
    add(store, trained, None, {"wikitext2@gptq-2048": 5.5})
    rows = cells(table(store, "b158-table1"))
    assert [row["Models"] for row in rows] == ["llama", "ternary"]
    assert [row["Memory (GB)"] for row in rows] == ["12.00 (1.00x)", "3.25 (3.69x)"]
    assert [row["Latency (ms)"] for row in rows] == ["–", "–"]
    assert rows[1]["PPL wikitext2 gptq-2048"] == "5.50"


def test_each_model_is_held_against_its_own_full_precision(store: Store) -> None:
    """Two models of 6B, of which one has twice the cache: 16 bits of each are 1.00x of itself."""
    scheme = "W8A16:grid=asym"
    for name, parameters, blocks in (("a", 6_000_000_000, 2), ("b", 6_010_000_000, 2_000_000)):
        dimensions = SHAPE.model_copy(update={"n_blocks": blocks})
        known = {"parameters": parameters, "dimensions": dimensions}
        layer = LayerReport(
            name="0", shape=(parameters, 1), scheme=scheme, relative_error=0,
            stored_bits=8 * parameters,
        )  # fmt: skip
        add(store, quantization(name, **known), {"piqa": 0.5})
        add(store, quantization(name, "rtn", scheme, layers=[layer], **known), {"piqa": 0.5})
    layer = LayerReport(
        name="0", shape=(6_000_000_001, 1), scheme="W1A8", relative_error=0, stored_bits=6e9
    )
    known = {"parameters": 6_000_000_001, "dimensions": SHAPE}
    trained = quantization("near a", scheme="W1A8", trained=True, layers=[layer], **known)
    add(store, trained, {"piqa": 0.5})
    rows = cells(table(store, "b158-table1"))
    memory = {(row["Models"], row["W/A"]): row["Memory (GB)"] for row in rows}
    cache = 2 * 2_000_000 * 2 * 4 * 512 * 2 / 1e9
    assert memory["a", "W16A16"] == "12.00 (1.00x)" and memory["a", "W8A16"] == "6.00 (2.00x)"
    whole, half = 12.02 + cache, 6.01 + cache
    assert memory["b", "W16A16"] == f"{whole:.2f} (1.00x)"
    assert memory["b", "W8A16"] == f"{half:.2f} ({whole / half:.2f}x)"
    assert memory["near a", "W1A8"].endswith("(16.00x)")


def test_b158_table1_against_the_paper_repeats_its_ratios(store: Store) -> None:
    add(store, quantization("llama"), None, {"wikitext2@gptq-2048": 5.0})
    rows = cells(table(store, "b158-table1", against="b158-table1"))
    printed = {row["Models"].split(" (BitNet")[0]: row for row in rows if "publ" in row["Methods"]}
    assert printed["BitNet b1.58 3.9B"]["Memory (GB)"] == "2.38 (3.32x)"
    assert printed["BitNet b1.58 3.9B"]["Latency (ms)"] == "2.11 (2.40x)"
    assert printed["BitNet b1.58 700M"]["Memory (GB)"] == "0.80 (2.60x)"
    assert printed["LLaMA LLM 1.3B"]["Latency (ms)"] == "1.62 (1.00x)"
    assert [row["Memory (GB)"] for row in rows if row["Models"] == "llama"] == ["–"]


def test_models_that_read_the_same_size_stand_together_full_precision_first(store: Store) -> None:
    for name, parameters, trained in (
        ("b1", 1_966_272, True),
        ("fp", 1_967_808, False),
        ("small", 541_536, False),
        ("b158", 1_970_624, True),
    ):
        scheme = "W1A8:grid=sign" if trained else "W16A16"
        record = quantization(name, scheme=scheme, trained=trained, parameters=parameters)
        add(store, record, {"piqa": 0.5})
    models = [row["Models"] for row in cells(table(store, "b158-table1"))]
    assert models == ["small", "fp", "b1", "b158"]


@pytest.mark.parametrize("name", ["bitnet-table1", "bitnet-table2", "b158-table3", "b158-fig3"])
def test_published_costs_are_no_rows_of_a_table_of_scores(bitnet: Store, name: str) -> None:
    with pytest.raises(QBenchError, match=f"qbench table --published {name}"):
        table(bitnet, against=name)


def test_a_note_says_which_accuracy_was_published(bitnet: Store) -> None:
    text = table(bitnet, "bitnet-table3", against="bitnet-table3")
    assert "what to expect and not what to reach; accuracies are acc\\_token" in text
    text = table(bitnet, "bitnet-table3", metric="acc_token", against="bitnet-table3")
    assert "accuracies are" not in text


def test_a_misprinted_number_says_so_beside_measured_ones(bitnet: Store) -> None:
    text = table(bitnet, against="quip-opt-13b")
    assert "printed error: identical to the row of OPT-30b" in text
