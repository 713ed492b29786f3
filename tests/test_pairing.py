"""Which items of two stored measurements belong together, and what became of each."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from items_fixtures import measured, questions, save, windows
from study_fixtures import quantization

from qbench.comparison.pairing import Measurement, NotPaired, flips, pair, right
from qbench.errors import QBenchError
from qbench.record import CalibrationSpec, Metric
from qbench.study.store import Store

FP16 = quantization()
RTN = quantization(baseline="rtn", scheme="W4A16:w=channel,grid=asym")


def of(items, name="piqa", model=FP16, environment=None, **key) -> Measurement:
    record = measured(model, name, items, **key)
    record.environment = environment or {}
    return Measurement(model, record, pandas.DataFrame(items))


def test_items_come_from_the_store_and_are_paired_in_one_order(tmp_path):
    store = Store(tmp_path)
    save(store, FP16, {"piqa": questions([0, 1, 0])})
    shuffled = pandas.DataFrame(questions([0, 0, 2])).iloc[::-1]
    save(store, RTN, {"piqa": {name: shuffled[name].to_numpy() for name in shuffled}})
    a, b = [Measurement.read(store, run, run.tasks[0]) for run in store.runs()]
    paired = pair(a, b)
    keys = ["doc_id", "doc_hash", "option"]
    assert paired.a[keys].equals(paired.b[keys])
    assert paired.notes == ()
    assert not paired.of_windows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_fewshot": 5}, "number of examples 0 and 5"),
        ({"seed": 3}, "few-shot seed 0 and 3"),
        ({"definition": "d"}, "another task definition"),
        ({"data": "d"}, "another data"),
        ({"encoding": "lmeval03"}, "encoding joint and lmeval03"),
        ({"max_length": 512}, "context 2048 and 512"),
        ({"version": 2}, "version of the scoring 1 and 2"),
    ],
)
def test_what_makes_another_measurement_is_refused_with_the_reason(change, reason):
    with pytest.raises(NotPaired) as error:
        pair(of(questions([0, 1])), of(questions([0, 1]), **change))
    assert str(error.value) == f"measured differently: {reason}"


def test_another_protocol_or_task_is_refused():
    text = windows([3.0, 4.0])
    with pytest.raises(NotPaired, match="protocol documents-32 and gptq-32"):
        pair(of(text, "wikitext2"), of(text, "wikitext2", protocol="gptq-32"))
    with pytest.raises(NotPaired, match="task piqa and boolq"):
        pair(of(questions([0])), of(questions([0]), "boolq"))


def test_a_failed_measurement_is_refused():
    failed = of(questions([0]))
    failed.task.status = "failed"
    with pytest.raises(NotPaired, match="piqa failed"):
        pair(failed, of(questions([0])))


def test_another_limit_leaves_the_items_both_have_and_is_told():
    paired = pair(of(questions([0, 1, 0, 2])), of(questions([0, 0]), limit=2))
    assert len(paired.a) == len(paired.b) == 8
    assert paired.notes == ("all items and limit=2: compared on the items both have",)


def test_measurements_without_a_common_item_are_refused():
    with pytest.raises(NotPaired, match="no item in common"):
        pair(of(questions([0, 1])), of(questions([0, 1], first=2)))


def test_a_question_of_the_same_number_with_another_text_is_another_question():
    other = questions([0, 1])
    other["doc_hash"] = np.where(other["doc_id"] == 1, "edited", other["doc_hash"])
    assert set(pair(of(questions([0, 1])), of(other)).a["doc_id"]) == {0}


def test_questions_with_other_options_or_answers_are_refused():
    with pytest.raises(NotPaired, match="other options"):
        pair(of(questions([0, 1])), of(questions([0, 1], n_options=3)))
    with pytest.raises(NotPaired, match="right answers"):
        pair(of(questions([0, 1])), of(questions([0, 1], gold=2)))


def test_windows_of_another_tokenizer_are_refused():
    with pytest.raises(NotPaired, match="tokenizers"):
        pair(of(windows([3.0, 4.0]), "t"), of(windows([3.0, 4.0], n_tokens=30), "t"))


def test_windows_of_two_corpora_are_told_apart_by_their_corpus():
    both = windows([1.0, 2.0, 3.0, 4.0]) | {
        "window": np.array([0, 1, 0, 1]),
        "corpus": np.array(["c4", "c4", "wikitext2", "wikitext2"]),
    }
    turned = {name: np.roll(values, 2) for name, values in both.items()}
    paired = pair(of(both, "b158"), of(turned, "b158"))
    assert paired.a["nll"].tolist() == paired.b["nll"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_another_calibration_is_told_and_none_is_no_difference():
    c4 = CalibrationSpec(source="c4", tokens="x")
    gptq = quantization(baseline="gptq", scheme="W4A16", calibration=c4)
    other = c4.model_copy(update={"source": "wikitext2", "nsamples": 32, "tokens": "y"})
    quip = quantization(baseline="quip", scheme="W4A16", calibration=other)
    items = questions([0, 1])
    told = pair(of(items, model=gptq), of(items, model=quip)).notes
    assert told == ("other calibration: source c4 and wikitext2, nsamples 128 and 32",)
    assert pair(of(items, model=FP16), of(items, model=gptq)).notes == ()
    silent = quantization(
        baseline="quip", scheme="W4A16", calibration=c4.model_copy(update={"tokens": "z"})
    )
    told = pair(of(items, model=gptq), of(items, model=silent)).notes
    assert told == ("other calibration: another text of that name",)


def test_software_device_and_dtype_are_told_but_processors_and_threads_are_not():
    items = questions([0, 1])
    one = {"torch": "2.6", "transformers": "5.0", "threads": "2", "cpu": "A", "device": "cpu"}
    two = one | {"torch": "2.7", "device": "cuda", "gpu": "H200", "threads": "8", "cpu": "B"}
    told = pair(of(items, environment=one), of(items, environment=two)).notes
    assert told == ("other environment: torch 2.6 and 2.7, device cpu and cuda, gpu none and H200",)
    assert pair(of(items, environment=one), of(items, environment=one | {"cpu": "B"})).notes == ()
    told = pair(of(items), of(items, dtype="bfloat16")).notes
    assert told == ("evaluated in float32 and bfloat16",)
    half = quantization(baseline="rtn", scheme="W4A16", dtype="float16")
    assert pair(of(items), of(items, model=half)).notes == ("quantized in float32 and float16",)


def test_right_follows_the_accuracy_that_is_asked_for():
    items = pandas.DataFrame(questions([1, 0], n_options=2))
    items["n_characters"] = [1, 10, 1, 1]  # -3/1 against -1/10; option 0 stays first
    items["loglikelihood"] = [-3.0, -4.0, -1.0, -2.0]
    items["n_tokens"] = [1, 2, 1, 1]
    assert right(items, "acc").tolist() == [True, True]
    assert right(items, "acc_norm").tolist() == [False, True]
    assert right(items, "acc_token").tolist() == [False, True]
    with pytest.raises(QBenchError, match="unknown metric 'accuracy'"):
        right(items, "accuracy")


def test_of_two_options_with_one_score_the_first_is_the_answer():
    items = pandas.DataFrame(questions([0, 0], n_options=2))
    items["loglikelihood"] = [-2.0, -2.0, -1.0, -1.0]
    assert right(items).tolist() == [True, True]
    items["gold"] = ~items["gold"]
    assert right(items).tolist() == [False, False]


def test_a_question_without_options_is_right_where_its_text_is_the_greedy_one():
    items = pandas.DataFrame(questions([0, 0, 0], n_options=1, gold=-1))
    items["is_greedy"] = [True, False, True]
    assert right(items).tolist() == [True, False, True]
    with pytest.raises(NotPaired, match="without options"):
        flips(items, items)


def test_an_accuracy_of_a_task_that_counts_otherwise_is_not_paired():
    """LAMBADA by another rule, and TruthfulQA's mc2, whose acc is a share of probability."""
    without_options = questions([0, 0, 0], n_options=1, gold=-1)
    without_options["is_greedy"] = np.array([True, False, True])
    for items, stored in ((without_options, 2 / 3), (questions([0, 1, 0]), 2 / 3)):
        record, other = of(items), of(items)
        for measurement, value in ((record, stored), (other, 0.41)):
            measurement.task.metrics = {"acc": Metric.of(value)}
        with pytest.raises(NotPaired, match="does not follow from the stored items"):
            pair(record, other)
        assert len(pair(record, record).a) == len(items["option"])


def test_a_nan_log_probability_is_no_answer():
    items = questions([0, 1])
    items["loglikelihood"][3] = np.nan
    with pytest.raises(NotPaired, match="NaN"):
        right(pandas.DataFrame(items))


def test_every_question_says_what_became_of_its_answer_and_by_what_margin():
    a = pandas.DataFrame(questions([0, 0, 1, 1, 3]))
    b = pandas.DataFrame(questions([0, 2, 0, 2, 3]))
    found = flips(a, b)
    assert found["kind"].tolist() == [
        *("right", "right->wrong", "wrong->right", "wrong->other wrong", "wrong")
    ]
    assert found["chosen_a"].tolist() == [0, 0, 1, 1, 3]
    assert found["chosen_b"].tolist() == [0, 2, 0, 2, 3]
    assert found["gold"].tolist() == [(0,)] * 5
    # scores: the answer -1, option k else -3 - k; option 0 is right
    assert found["margin_a"].tolist() == [-1 + 4, -1 + 4, -3 + 1, -3 + 1, -3 + 1]
    assert found["margin_b"].tolist() == [3, -2, 3, -2, -2]
    assert found["doc_hash"].tolist() == [f"hash {n}" for n in range(5)]


def test_a_question_with_two_right_answers_may_change_between_them():
    a, b = (pandas.DataFrame(questions([answer])) for answer in (0, 1))
    for items in (a, b):
        items["gold"] = items["option"] < 2
    found = flips(a, b)
    assert found["kind"].tolist() == ["right->other right"]
    assert found["gold"].tolist() == [(0, 1)]


def test_options_that_are_both_impossible_are_no_distance_apart():
    items = pandas.DataFrame(questions([0], n_options=2))
    items["loglikelihood"] = -np.inf
    assert flips(items, items)["margin_a"].tolist() == [0.0]
