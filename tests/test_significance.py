"""Marks of significance: which rows are compared, what a table says, and that noise is no win."""

from __future__ import annotations

import math

import numpy as np
import pytest
from items_fixtures import questions, save, windows
from study_fixtures import add, bitnet_store, cells, numbers, quantization, task

from qbench.comparison import significance
from qbench.comparison.entries import entries
from qbench.comparison.frame import frame
from qbench.comparison.significance import MCNEMAR, RANDOMIZATION, Number
from qbench.comparison.statistics import holm, mcnemar_p, sign_flips, wilson
from qbench.errors import QBenchError
from qbench.record import CalibrationSpec
from qbench.study.store import Store
from qbench.tables.table import table

W4 = "W4A16:w=channel,grid=asym"
FP16 = quantization()
RTN = quantization(baseline="rtn", scheme=W4)
GPTQ = quantization(baseline="gptq", scheme=W4, calibration=CalibrationSpec(tokens="c4"))
QUIP = quantization(baseline="quip", scheme=W4, calibration=CalibrationSpec(tokens="c4"))


def answers(wrong: int, n: int = 300, first: int = 0) -> dict[str, np.ndarray]:
    """Questions answered right but for ``wrong`` in a row from the number ``first``."""
    return questions([int(first <= number < first + wrong) for number in range(n)])


def number_of(store: Store, baseline: str, task: str = "piqa") -> Number:
    for entry in entries(frame(store)):
        if entry.facts["baseline"] == baseline:
            cell = next(cell for key, cell in entry.cells.items() if key[0] == task)
            return Number((entry.facts["run"],), cell)
    raise AssertionError(baseline)


@pytest.fixture
def store(tmp_path) -> Store:
    """FP16 60 wrong of 300; rtn loses 6 more, gptq 3 more, quip 20 more."""
    found = Store(tmp_path)
    for record, wrong in ((FP16, 60), (RTN, 66), (GPTQ, 63), (QUIP, 80)):
        nll = 60.0 + np.random.default_rng(1).normal(0, 5, 40)
        nll += np.random.default_rng(wrong).normal((wrong - 60) / 10, 1, 40) * (record is not FP16)
        save(found, record, {"piqa": answers(wrong), "wikitext2": windows(nll)})
    return found


def test_an_accuracy_is_tested_by_mcnemar_and_a_loss_by_the_randomization_test(store):
    tester = significance.Tester(store)  # a class called Tester is no test
    pairs = [
        (number_of(store, "none", task), number_of(store, "rtn", task))
        for task in ("piqa", "wikitext2")
    ]
    accuracy, loss = tester.family(pairs)
    assert (accuracy.test, accuracy.n, accuracy.p) == (MCNEMAR, 300, mcnemar_p(0, 6))
    assert accuracy.difference == pytest.approx(-0.02)
    assert accuracy.better is False
    assert (loss.test, loss.n, loss.better) == (RANDOMIZATION, 40, False)
    runs = {run.quantization.key.baseline.name: run for run in store.runs()}
    text = {
        name: store.items(run, next(t for t in run.tasks if t.key.task == "wikitext2"))
        for name, run in runs.items()
    }
    gap = (text["rtn"]["nll"] - text["none"]["nll"]).to_numpy()
    assert loss.p == pytest.approx(sign_flips(gap / (31 * 40)))
    assert loss.difference == pytest.approx(gap.sum() / (31 * 40))
    assert [accuracy.adjusted, loss.adjusted] == holm([accuracy.p, loss.p])


def test_marks_against_full_precision_stand_at_what_survives_the_correction(store):
    text = table(store, significance="fp16")
    rows = {row["Method"]: row for row in cells(text)}
    # one table, 6 comparisons: 6 lost answers of 6 changed have p = 0.031, too much for Holm
    assert rows["full precision"]["piqa"] == "80.0 ± 2.3"
    assert rows["rtn"]["piqa"] == "78.0 ± 2.4"
    assert rows["quip"]["piqa"] == "73.3 ± 2.6 ▼"
    assert rows["quip"]["PPL wikitext2 documents-32"].endswith(" ▼")
    assert "**" not in text.split("| Checkpoint")[1].split("\n\n")[0]  # nobody is called the best
    assert "the 6 comparisons of this table (3 by McNemar's exact test, 3 by the random" in text
    assert "Best" not in text


def test_alone_in_its_table_the_same_difference_is_significant(store):
    text = table(store, significance="fp16", tasks=["piqa"], baselines=["none", "rtn"])
    assert {row["Method"]: row["piqa"] for row in cells(text)}["rtn"] == "78.0 ± 2.4 ▼"
    assert "Holm's correction over the only comparison of this table" in text


def test_a_better_row_is_marked_the_other_way(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(60)})
    save(store, RTN, {"piqa": answers(40)})
    assert cells(table(store, significance="fp16"))[1]["piqa"].endswith("▲")


def test_a_lead_that_may_be_chance_is_shared(store):
    """By value gptq leads; rtn is 3 answers behind, quip 17: p = 0.25 and 1.5e-5."""
    plain = {row["Method"]: row["piqa"] for row in cells(table(store, tasks=["piqa"]))}
    assert [name for name, text in plain.items() if text.startswith("**")] == ["gptq"]
    text = table(store, tasks=["piqa"], significance="best")
    tested = {row["Method"]: row["piqa"] for row in cells(text)}
    assert [name for name, cell in tested.items() if cell.startswith("**")] == ["gptq", "rtn"]
    assert "same W/A, and those that are not significantly worse; none is" in text
    assert "the 2 comparisons of this table (2 by McNemar's exact test)" in text


def test_without_tests_a_table_says_that_its_best_rows_lead_by_value_alone(store):
    assert "By value alone, not tested: see --significance." in table(store)
    assert "By value alone" not in table(store, significance="best")


def test_noise_is_never_called_a_win(tmp_path):
    """Four methods that answer at random alike: somebody leads, and nobody is marked."""
    store = Store(tmp_path)
    draw = np.random.default_rng(5)
    for baseline in ("a", "b", "c", "d"):
        record = quantization(baseline=baseline, scheme=W4)
        save(store, record, {"piqa": questions(draw.integers(0, 2, 400).tolist())})
    plain, tested = (
        [row["piqa"] for row in cells(table(store, significance=mode))] for mode in ("off", "best")
    )
    assert len(set(plain)) == 4  # they do differ
    assert sum(text.startswith("**") for text in plain) == 1
    assert not any(text.startswith("**") for text in tested)


def test_the_mean_over_tasks_is_tested_over_all_their_questions(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(10, 100), "boolq": answers(40, 400)})
    save(store, RTN, {"piqa": answers(15, 100), "boolq": answers(50, 400)})
    fields = numbers(table(store, significance="fp16", format="csv"))
    mean = next(f for f in fields if f["task"].startswith("mean") and f["baseline"] == "rtn")
    changes = np.array([-1 / 100 / 2] * 5 + [-1 / 400 / 2] * 10)
    assert float(mean["p"]) == pytest.approx(sign_flips(changes), abs=2e-4)
    assert mean["test"] == RANDOMIZATION


def test_what_cannot_be_paired_has_a_footnote_and_no_mark(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(0)})
    save(store, RTN, {"piqa": answers(150)}, data="another file")
    add(store, GPTQ, {"piqa": 0.2})  # measured, but its items are gone
    text = table(store, significance="fp16")
    rows = {row["Method"]: row["piqa"] for row in cells(text)}
    assert "▼" not in rows["rtn"] + rows["gptq"]
    assert "measured differently: other data" in text
    assert "not tested against the full-precision row of the same checkpoint: no items" in text
    assert "No comparison could be tested." in text


def test_a_measurement_that_is_not_finite_is_not_tested_and_says_so(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"wikitext2": windows([60.0] * 20)})
    save(store, RTN, {"wikitext2": windows([61.0] * 19 + [math.inf])})
    broken = answers(3)
    broken["loglikelihood"][0] = math.nan
    save(store, FP16, {"piqa": answers(0)})
    save(store, RTN, {"piqa": broken})
    text = table(store, significance="fp16")
    rows = {row["Method"]: row for row in cells(text)}
    assert rows["rtn"]["PPL wikitext2 documents-32"].startswith("inf (diverged)")
    assert "▼" not in "".join(rows["rtn"].values())
    assert "not every number is finite" in text
    assert "some log-probabilities are NaN" in text


def test_another_limit_or_software_is_tested_and_told(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(0)})
    record = quantization(baseline="rtn", scheme=W4)
    save(store, record, {"piqa": answers(50, n=100)}, limit=100)
    text = table(store, significance="fp16")
    assert "in spite of all items and limit=100: compared on the items both have" in text
    assert cells(text)[1]["piqa"].split(" [")[0] == "50.0 ± 5.0 ▼"


def test_a_checkpoint_without_its_full_precision_row_is_not_tested(store):
    text = table(store, significance="fp16", baselines=["rtn", "gptq"])
    assert "Not tested, as no full-precision row of it is shown: opt-6.7b." in text
    assert "No comparison could be tested." in text


def test_distances_from_full_precision_are_not_tested_against_it(tmp_path):
    store = Store(tmp_path)
    for record, kl in ((FP16, 0.0), (RTN, 0.3), (GPTQ, 0.1)):
        draw = np.random.default_rng(3).normal(10 * kl, kl / 10, 16)
        items = windows(60 + draw) | {"kl": draw, "n_agreeing": np.full(16, 31 - round(10 * kl))}
        save(store, record, {"wikitext2": items})
        found = {"kl_divergence": draw.sum() / 496, "top1_agreement": 1 - round(10 * kl) / 31}
        agreement = task(record, "wikitext2", found, n_items=16, protocol="agreement-32")
        store.save_task(record.checkpoint, record.key, agreement, items)
    text = table(store, significance="fp16")
    assert "the 2 comparisons of this table" in text  # the perplexities
    assert "are distances from that row themselves, and are not tested" in text
    rows = cells(text)
    assert not any("▼" in row[name] for row in rows for name in row if "agreement" in name)
    best = cells(table(store, significance="best"))
    assert [row["KL wikitext2 agreement-32"][:2] for row in best] == ["0", "**", "0."]


def test_other_weights_of_the_same_name_are_no_reference(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(0), "boolq": answers(0)})
    other = RTN.model_copy(update={"key": RTN.key.model_copy(update={"weights": "f" * 64})})
    save(store, other, {"piqa": answers(60), "boolq": answers(60)})
    text = table(store, significance="fp16")
    assert "No comparison could be tested." in text
    assert f"no full-precision row of it is shown: {FP16.checkpoint}." in text
    save(store, GPTQ, {"piqa": answers(30), "boolq": answers(30)})
    plain = cells(table(store, delta=True, flips=True))
    assert not any("**" in row["piqa"] for row in plain)  # nor are they rivals
    (name,) = [name for name in plain[0] if "Δ" in name]
    found = {row["Method"]: (row[name], row["Flips"]) for row in plain}
    assert found == {"full precision": ("–", "–"), "gptq": ("−10.0", "10.0"), "rtn": ("–", "–")}


def test_the_csv_has_p_before_and_after_the_correction(store):
    fields = numbers(table(store, significance="fp16", format="csv", tasks=["piqa"]))
    by_method = {line["baseline"]: line for line in fields}
    raw = [mcnemar_p(0, 3), mcnemar_p(0, 6), mcnemar_p(0, 20)]
    for name, p, adjusted in zip(("gptq", "rtn", "quip"), raw, holm(raw), strict=True):
        assert float(by_method[name]["p"]) == pytest.approx(p)
        assert float(by_method[name]["p_holm"]) == pytest.approx(adjusted)
    verdicts = {name: line["verdict"] for name, line in by_method.items()}
    assert verdicts == {"none": "", "gptq": "not significant", "rtn": "not significant"} | {
        "quip": "worse"
    }


@pytest.mark.parametrize(
    ("format", "mark"),
    [("md", "▼"), ("latex", r"$\blacktriangledown$"), ("html", "▼"), ("terminal", "▼")],
)
def test_marks_are_legible_in_every_format(store, format, mark):
    text = table(store, significance="fp16", format=format)
    assert text.count(mark) >= 2
    assert "Holm" in text


def test_rows_of_several_seeds_are_tested_on_the_mean_of_each_item(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": answers(0, 50)})
    for seed, wrong in enumerate((4, 8)):
        spec = CalibrationSpec(seed=seed, tokens=str(seed))
        record = quantization(baseline="gptq", scheme=W4, calibration=spec, seed=seed)
        save(store, record, {"piqa": answers(wrong, 50)})
    line = numbers(table(store, significance="fp16", format="csv"))[-1]
    assert line["test"] == RANDOMIZATION
    # four questions are lost by both seeds, four by one of them
    assert float(line["p"]) == pytest.approx(sign_flips([-1.0] * 4 + [-0.5] * 4))


def test_intervals_are_wilsons_and_means_keep_their_error(store):
    text = table(store, interval=True, tasks=["piqa"])
    low, high = wilson(240, 300)
    assert rf"| 80.0 \[{100 * low:.1f}, {100 * high:.1f}\] |" in text
    assert "Tasks: acc in percent with its 95% Wilson interval, higher" in text
    line = numbers(table(store, interval=True, tasks=["piqa"], format="csv"))[0]
    assert (float(line["low"]), float(line["high"])) == pytest.approx((low, high))


def test_published_rows_have_no_items_and_no_mark(tmp_path):
    text = table(bitnet_store(tmp_path), against="bitnet-table3", significance="fp16")
    assert "▼" not in "".join("".join(row.values()) for row in cells(text))


def test_unknown_modes_and_tables_of_several_runs_a_row_are_refused(store):
    with pytest.raises(QBenchError, match="unknown significance 'fp8'"):
        table(store, significance="fp8")
    with pytest.raises(QBenchError, match="several runs in a row"):
        table(store, layout="sizes", significance="best")
