"""qbench compare: which runs are meant, what differs, and what is said of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cli_fixtures import DATA, qbench, refused
from items_fixtures import answers_of, measured, questions, save, windows
from study_fixtures import quantization

from qbench.comparison.finding import find_run
from qbench.comparison.statistics import holm, mcnemar_p, paired_bootstrap, sign_flips
from qbench.comparison.two_runs import compare
from qbench.errors import QBenchError
from qbench.evaluation.data import hash_json
from qbench.record import CalibrationSpec, Metric
from qbench.study.store import Store
from qbench.tables.two_runs import compare_text

C4 = CalibrationSpec(source="c4", tokens="x" * 64)
FP16 = quantization()
GPTQ = quantization(
    baseline="gptq",
    scheme="W4A16:w=channel,grid=asym",
    calibration=C4,
    parameters_of={"percdamp": 0.01},
)
ACT_ORDER = quantization(
    baseline="gptq",
    scheme="W4A16:w=channel,grid=asym",
    calibration=C4.model_copy(update={"nsamples": 32}),
    parameters_of={"percdamp": 0.01, "act_order": True},
)
LOSSES = np.random.default_rng(2).normal(60, 5, 30)


@pytest.fixture
def store(tmp_path) -> Store:
    """FP16 loses 2 of 50 questions, gptq 6 others and windows grow by a nat each."""
    found = Store(tmp_path)
    save(found, FP16, {"piqa": answers_of(50, [0, 1]), "wikitext2": windows(LOSSES)})
    changed = {"piqa": answers_of(50, range(1, 8)), "wikitext2": windows(LOSSES + 1)}
    save(found, GPTQ, changed)
    return found


def sides(store: Store, *names: str):
    return [find_run(store.root, name) for name in names]


def test_a_run_is_found_by_any_of_its_names(store):
    gptq = next(r for r in store.runs() if r.quantization.key.baseline.name == "gptq")
    relative = gptq.path.relative_to(store.root).as_posix()
    for name in (
        *(str(gptq.path), relative, gptq.path.name, gptq.path.name[:7], relative[:15]),
        *("opt-6.7b/W4A16/gptq", "opt-6.7b/W4A16:w=channel,grid=asym/gptq", "opt-6.7b/W4"),
    ):
        assert find_run(store.root, name).run.path == gptq.path, name


def test_a_folder_of_another_store_brings_its_store(store, tmp_path):
    other = Store(tmp_path / "elsewhere")
    save(other, GPTQ, {"piqa": answers_of(50, [])})
    folder = next(other.runs()).path
    assert find_run(store.root, str(folder)).store.root == other.root


def test_a_name_of_several_runs_or_of_none_is_refused(store):
    save(store, ACT_ORDER, {"piqa": answers_of(50, [])})
    with pytest.raises(QBenchError, match=r"'gptq' names 2 runs \(.*\); say more"):
        find_run(store.root, "gptq")
    with pytest.raises(QBenchError, match="unknown run 'opt-6.7b/W4A16/gptk'; did you mean"):
        find_run(store.root, "opt-6.7b/W4A16/gptk")
    with pytest.raises(QBenchError, match="no results under"):
        find_run(store.root / "nothing", "gptq")


def test_an_exact_name_wins_over_a_longer_one_that_begins_with_it(store):
    save(store, quantization(baseline="gptq-plus", scheme="W4A16"), {"piqa": answers_of(50, [])})
    found = find_run(store.root, "opt-6.7b/W4A16/gptq")
    assert found.run.quantization.key.baseline.name == "gptq"


def test_settings_that_differ_are_listed_and_others_are_not(store):
    save(store, ACT_ORDER, {"piqa": answers_of(50, [])})
    a, b = (find_run(store.root, str(store.folder(r.checkpoint, r.key))) for r in (GPTQ, ACT_ORDER))
    found = {s.name: (s.a, s.b) for s in compare(a, b).settings}
    assert found == {
        "baseline.act_order": ("–", "true"),
        "calibration.nsamples": ("128", "32"),
    }


def test_numbers_are_tested_on_the_common_items_and_corrected_together(store):
    a, b = sides(store, "opt-6.7b/W16A16", "gptq")
    accuracy, loss = compare(a, b).changes
    assert (accuracy.n, accuracy.difference, accuracy.p) == (50, -0.1, mcnemar_p(1, 6))
    spread = paired_bootstrap(LOSSES, LOSSES + 1, np.full(30, 31))
    assert loss.difference == pytest.approx(math.exp(1 / 31) - 1)
    assert (loss.low, loss.high) == pytest.approx((math.expm1(spread.low), math.expm1(spread.high)))
    assert loss.p == sign_flips(np.ones(30))
    assert [accuracy.adjusted, loss.adjusted] == holm([accuracy.p, loss.p])


def test_what_cannot_be_tested_keeps_its_numbers_and_says_why(store):
    other = quantization(baseline="rtn", scheme="W4A16:w=channel,grid=asym")
    save(store, other, {"piqa": answers_of(50, [1])}, data="another file")
    a, b = sides(store, "opt-6.7b/W16A16", "rtn")
    (change,) = compare(a, b).changes
    assert (change.p, change.reason) == (None, "measured differently: another data")
    assert (change.a.value, change.b.value) == (0.96, 0.98)
    text = compare_text(store.root, "opt-6.7b/W16A16", "rtn")
    assert "not tested: measured differently: another data" in text
    assert "Only A was measured on: wikitext2@documents-32." in text


def test_of_several_measurements_of_a_task_those_made_alike_are_compared(store):
    of = measured(FP16, "piqa", answers_of(10, []), limit=10)
    store.save_task(FP16.checkpoint, FP16.key, of, answers_of(10, []))
    of = measured(GPTQ, "piqa", answers_of(10, [0]), limit=10)
    store.save_task(GPTQ.checkpoint, GPTQ.key, of, answers_of(10, [0]))
    found = compare(*sides(store, "opt-6.7b/W16A16", "gptq"), tasks=["piqa"]).changes
    assert sorted(change.n for change in found) == [10, 50]
    assert all(not change.notes for change in found)


def test_several_measurements_of_a_task_are_told_apart(store):
    """0-shot alike, 4-shot in another encoding, and 8-shot that one run alone has."""
    items = answers_of(50, [3])
    for record, shots, encoding in (
        *((FP16, 4, "joint"), (GPTQ, 4, "lmeval03"), (GPTQ, 8, "joint")),
    ):
        of = measured(record, "piqa", items, num_fewshot=shots, encoding=encoding, seed=1234)
        store.save_task(record.checkpoint, record.key, of, items)
    found = compare(*sides(store, "opt-6.7b/W16A16", "gptq"), tasks=["piqa"])
    assert [change.told for change in found.changes] == ["0-shot", "4-shot"]
    assert [flipped.told for flipped in found.flips] == ["0-shot"]
    assert found.only_b == ["piqa (8-shot)"]
    settings = {row.name: (row.a, row.b) for row in found.settings}
    assert settings["piqa (4-shot).encoding"] == ("joint", "lmeval03")
    text = compare_text(store.root, "opt-6.7b/W16A16", "gptq", tasks=["piqa"])
    assert "piqa (0-shot): of 50 questions" in text


def test_answers_that_are_all_alike_have_no_interval(store):
    other = quantization(baseline="rtn", scheme="W4A16:w=channel,grid=asym")
    save(store, other, {"piqa": answers_of(50, [0, 1]), "wikitext2": windows(LOSSES)})
    found = compare(*sides(store, "opt-6.7b/W16A16", "rtn")).changes
    assert [(c.difference, c.low, c.high, c.p) for c in found] == [(0.0, None, None, 1.0)] * 2


def test_where_the_interval_leaves_out_zero_and_the_test_does_not_the_test_is_believed(store):
    """Five questions lost and none gained: p = 2/32, and the bootstrap's interval is too short."""
    other = quantization(baseline="rtn", scheme="W4A16:w=channel,grid=asym")
    save(store, other, {"piqa": answers_of(50, range(7))})
    (change,) = compare(*sides(store, "opt-6.7b/W16A16", "rtn"), tasks=["piqa"]).changes
    assert change.high < 0 and change.p == 0.0625
    assert "believe p" in compare_text(store.root, "opt-6.7b/W16A16", "rtn", tasks=["piqa"])
    text = compare_text(store.root, "opt-6.7b/W16A16", "gptq", tasks=["wikitext2"])
    assert "believe p" not in text


def test_a_distance_from_full_precision_is_tested_between_quantized_runs_alone(store):
    kl = np.abs(np.random.default_rng(1).normal(0.3, 0.1, 30))
    for record, size in ((FP16, 0), (GPTQ, 1), (ACT_ORDER, 2)):
        items = windows(LOSSES) | {"kl": size * kl, "n_agreeing": np.full(30, 31 - 2 * size)}
        of = measured(record, "wikitext2", items, protocol="agreement-32")
        of.metrics = {"kl_divergence": Metric.of(size * kl.sum() / 930)}
        of.metrics["top1_agreement"] = Metric.of(1 - 2 * size / 31)
        store.save_quantization(record)
        store.save_task(record.checkpoint, record.key, of, items)
    names = [str(store.folder(r.checkpoint, r.key)) for r in (FP16, GPTQ, ACT_ORDER)]

    def of_two(a, b):
        changes = compare(*sides(store, a, b), tasks=["wikitext2"]).changes
        return [(c.p is not None, c.reason) for c in changes if c.protocol == "agreement-32"]

    assert of_two(*names[1:]) == [(True, "")] * 2
    assert of_two(*names[:2]) == [(False, "it is a distance from full precision already")] * 2


def test_a_perplexity_beyond_all_numbers_is_no_crash(store):
    other = quantization(baseline="rtn", scheme="W4A16:w=channel,grid=asym")
    with np.errstate(over="ignore"):
        save(store, other, {"wikitext2": windows(LOSSES + 31 * 800.0)})
    (loss,) = compare(*sides(store, "opt-6.7b/W16A16", "rtn")).changes
    assert loss.difference == pytest.approx(math.exp(709.0))


def test_changed_answers_come_with_the_largest_change_first(store):
    items = answers_of(50, range(1, 8))
    items["loglikelihood"][4 * 5 + 1] = -0.1  # the wrong answer to question 5 is surer
    save(store, GPTQ, {"piqa": items})
    (flips,) = compare(*sides(store, "opt-6.7b/W16A16", "gptq")).flips
    assert flips.counts == {"right->wrong": 6, "wrong->right": 1}
    assert flips.items["doc_id"].iloc[0] == 5
    text = compare_text(store.root, "opt-6.7b/W16A16", "gptq", items=2)
    assert "piqa: of 50 questions 6 right → wrong, 1 wrong → right" in text
    assert "5 more: --items 7 shows them." in text


def test_tasks_metrics_and_the_same_run_twice_are_checked(store):
    a, b = sides(store, "opt-6.7b/W16A16", "gptq")
    with pytest.raises(QBenchError, match="unknown task 'pika'; did you mean 'piqa'"):
        compare(a, b, tasks=["pika"])
    with pytest.raises(QBenchError, match="unknown metric 'accuracy'"):
        compare(a, b, metric="accuracy")
    with pytest.raises(QBenchError, match="named twice"):
        compare(a, a)


def test_a_diverged_run_is_compared_without_a_test(store):
    broken = quantization(baseline="rtn", scheme="W1A16")
    save(store, broken, {"wikitext2": windows([math.inf] * 30)})
    text = compare_text(store.root, "opt-6.7b/W16A16", "rtn")
    assert "inf (diverged)" in text
    assert "not tested: not every number is finite" in text


def test_a_run_that_was_calibrated_on_its_test_text_is_told(store):
    items = answers_of(50, [3])
    record = measured(ACT_ORDER, "piqa", items, details={"calibration_overlap": 0.25})
    store.save_quantization(ACT_ORDER)
    store.save_task(ACT_ORDER.checkpoint, ACT_ORDER.key, record, items)
    folder = store.folder(ACT_ORDER.checkpoint, ACT_ORDER.key)
    text = compare_text(store.root, "opt-6.7b/W16A16", str(folder))
    assert "25% of the tested text stands in the calibration text of B" in text


def test_the_command_shows_texts_from_the_data_folder_and_leaves_out_changed_ones(tmp_path):
    """The rows of tests/data, by their hashes; one question has another text by now."""
    import json

    rows = [json.loads(line) for line in (DATA / "tasks/piqa/validation.jsonl").open()]
    store = Store(tmp_path)
    for record, answer in ((FP16, 0), (GPTQ, 1)):
        items = questions([answer] * 2, n_options=2)
        hashes = [hash_json([row])[:16] for row in rows[:2]]
        items["doc_hash"] = np.repeat([hashes[0], "edited"], 2)
        save(store, record, {"piqa": items})
    done = qbench(*("compare", "opt-6.7b/W16A16", "gptq", "--data", DATA, "--results", store.root))
    assert rows[0]["goal"] in done.stdout
    assert f"0 {rows[0]['sol1']}" in done.stdout
    assert "<- gold, A" in done.stdout and "<- B" in done.stdout
    assert "1: its text has changed since it was scored, or is gone." in done.stdout
    assert rows[1]["goal"] not in done.stdout


def test_the_command_refuses_an_unknown_run_in_one_line(store):
    assert "unknown run" in refused("compare", "nope", "gptq", "--results", store.root)
