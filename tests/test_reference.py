"""Published tables: the numbers as printed, and their averages recomputed."""

from __future__ import annotations

import pytest

from qbench.comparison import reference
from qbench.errors import QBenchError


def test_the_papers_tables_and_figures_are_there() -> None:
    assert {
        *("bitnet-table1", "bitnet-table2", "bitnet-table3", "bitnet-table4", "bitnet-fig1"),
        *("bitnet-scaling", "bitnet-fig5", "bitnet-fig6", "b158-table1", "b158-table2"),
        *("b158-table3", "b158-table4", "b158-fig2", "b158-fig3", "1bitllm", "bitnet-2b4t"),
        *("llmint8-table1", "gptq-opt", "gptq-bloom", "quip-llama2-70b"),
        *(f"quip-opt-{size}" for size in "125m 350m 1.3b 2.7b 6.7b 13b 30b".split()),
        *("smoothquant-table1", "smoothquant-opt-175b", "smoothquant-readme"),
    } <= set(reference.names())


def test_an_unknown_table_names_the_known_ones() -> None:
    with pytest.raises(QBenchError, match="bitnet-table3"):
        reference.load("bitnet-table5")


@pytest.mark.parametrize(
    ("name", "n_rows", "n_tasks"), [("bitnet-table3", 12, 4), ("b158-table2", 7, 7)]
)
def test_printed_averages_are_the_plain_means_of_their_tasks(
    name: str, n_rows: int, n_tasks: int
) -> None:
    table = reference.load(name)
    scores = table[table["unit"] == "percent"]
    assert table["row"].nunique() == n_rows
    for _, row in scores.groupby("row"):
        printed = row.loc[row["task"] == "average", "value"].item()
        tasks = row.loc[row["task"] != "average", "value"]
        assert len(tasks) == n_tasks
        # printed with one decimal, of tasks rounded to one decimal themselves
        assert abs(printed - tasks.mean()) <= 0.05 + 0.05 + 1e-9


def test_some_cells_are_as_the_papers_print_them() -> None:
    bitnet = reference.load("bitnet-table3").set_index(["method", "label", "task"])["value"]
    assert bitnet["Absmax", "W1A8", "validation"] == 3.5e23
    assert bitnet["GPTQ", "W2A16", "validation"] == 1032
    assert bitnet["BitNet", "W1A8", "wsc285"] == 66.3
    b158 = reference.load("b158-table2").set_index(["model", "task"])["value"]
    assert b158["BitNet b1.58 3B", "b158"] == 9.91
    assert b158["LLaMA LLM 3B", "winogrande"] == 58.2


def test_bitnet_pairs_of_weight_and_activation_bits_agree_with_their_label() -> None:
    for name in reference.names():
        table = reference.load(name)
        for _, row in table[table["label"] != ""].iterrows():
            assert row["label"] == f"W{row['wbits']:g}A{row['abits']}"


def test_published_accuracies_stand_under_the_measured_task_of_the_same_name() -> None:
    entries = reference.entries("bitnet-table3", [("wsc273", ""), ("piqa", "")])
    bitnet = entries[-1]
    assert bitnet.method == "BitNet" and bitnet.source == "published" and not bitnet.ptq
    assert bitnet.cells["wsc273", ""].value == pytest.approx(0.663)
    assert ("piqa", "") not in bitnet.cells
    assert bitnet.cells["validation", "bitnet-validation"].value == 17.07


def test_the_scaling_curves_end_in_the_row_of_table_3() -> None:
    """6.7B is in both: perplexity = 2^loss to the printed digits, and the average of four tasks."""
    scaling = reference.load("bitnet-scaling")
    table3 = reference.load("bitnet-table3")
    for method, label in (("Transformer", "W16A16"), ("BitNet", "W1A8")):
        own = scaling[(scaling["method"] == method) & (scaling["parameters"] == 6_700_000_000)]
        own = own[own["protocol"] != "4-shot"]
        other = table3[(table3["method"] == method) & (table3["label"] == label)]
        loss = own.loc[own["metric"] == "loss", "value"].item()
        printed = other.loc[other["metric"] == "perplexity", "value"].item()
        assert 2**loss == pytest.approx(printed, abs=0.006)
        average = own.loc[own["metric"] == "acc_token", "value"].item()
        assert average == pytest.approx(
            other.loc[other["task"] == "average", "value"].item(), abs=0.06
        )


def test_the_scaling_curves_have_six_transformers_and_eight_bitnets_in_order() -> None:
    table = reference.load("bitnet-scaling")
    for metric, sign in (("loss", -1), ("acc_token", 1)):
        for method, count in (("Transformer", 6), ("BitNet", 8)):
            rows = table[(table["metric"] == metric) & (table["method"] == method)]
            rows = rows[rows["protocol"] != "4-shot"]
            assert len(rows) == count and rows["parameters"].is_monotonic_increasing
            assert (sign * rows["value"]).is_monotonic_increasing


def test_a_published_loss_is_a_perplexity_and_says_whether_the_papers_curve_has_it() -> None:
    entries = reference.entries("bitnet-scaling", [])
    own = {(e.method, e.facts["parameters"]): e for e in entries}
    bitnet = own["BitNet", 1_300_000_000]
    # 20.34 is the perplexity the paper prints for its 1.3B BitNet
    number = bitnet.cells["validation", "bitnet-validation"]
    assert number.kind == "perplexity" and number.value == pytest.approx(20.34, abs=0.005)
    assert bitnet.cells["average", ""].value == pytest.approx(0.523)
    assert [e.facts["parameters"] for e in entries if not e.facts["fitted"]] == [
        *(13_000_000_000, 30_000_000_000),
    ]
    assert all(entry.facts["fitted"] for entry in reference.entries("bitnet-table3", []))


def test_a_part_of_a_published_table_is_named_by_its_model() -> None:
    rows = reference.entries("gptq-opt:opt-125m", [])
    assert len(rows) == 5 and {row.facts["parameters"] for row in rows} == {125_000_000}
    assert len(reference.entries("gptq-opt:OPT-1*B", [])) == 5 + 5 + 11  # 1.3B, 13B, 175B
    with pytest.raises(QBenchError, match="unknown model of gptq-opt 'OPT-2B'; did you mean"):
        reference.entries("gptq-opt:OPT-2B", [])


def test_published_costs_are_facts_of_their_row() -> None:
    rows = reference.entries("b158-table1", [])
    assert rows[1].facts["costs"] == {
        **{"memory": 0.80, "memory_ratio": 2.60, "latency": 0.96, "speedup": 1.23},
    }
    assert rows[1].cells["b158", "b158-2048"].value == 12.87
    assert reference.entries("bitnet-table1", []) == []  # energies of four kinds, no single cost


def test_few_shot_accuracies_are_asked_for_by_their_number() -> None:
    zero, four = (reference.entries("bitnet-table4", [], n)[0] for n in (0, 4))
    assert zero.cells["hellaswag", ""].value == pytest.approx(0.332)
    assert four.cells["hellaswag", ""].value == pytest.approx(0.335)


def test_a_misprint_is_a_note_of_its_number() -> None:
    (row,) = [e for e in reference.entries("gptq-opt:OPT-1.3B", []) if e.method == "GPTQ"][:1]
    assert row.cells["arc_easy", ""].notes[0].startswith("printed error: 9 points above")
    assert row.cells["piqa", ""].notes == ()
