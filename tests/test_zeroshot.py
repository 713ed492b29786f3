"""Zero-shot tasks: prompts against lm-eval's own files, scores against HFLM, traps one by one.

What running a prepared task does besides is in test_evaluate, with the same on real sets.
"""

import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qbench.errors import QBenchError
from qbench.evaluation.definitions import pinned_tasks, read_definition
from qbench.evaluation.encoding import Encoder, own_bos, pair_rows, rolling_rows
from qbench.evaluation.evaluate import prepare_task
from qbench.evaluation.lm import QBenchLM
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.testing import tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data"
TASKS = sorted(pinned_tasks())
LM_EVAL_FOLDERS = {
    "wsc273_lmeval": "wsc273/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "storycloze_2016": "storycloze/storycloze_2016.yaml",
    "storycloze_2018": "storycloze/storycloze_2018.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prepare(task, tokenizer, max_length=512, data_dir=DATA, **options):
    spec = task if isinstance(task, TaskSpec) else TaskSpec.parse(task)
    options = EvaluationOptions(data_dir=data_dir, max_length=max_length, **options)
    return prepare_task(spec, tokenizer, 512, options)


def arguments(questions):
    return [request.args for question in questions for request in question.requests]


def reference(model, tokenizer, **changes):
    """lm-eval's own scoring at its most careful."""
    fields = {"batch_size": 1, "logits_cache": False, "add_bos_token": True, "max_length": 512}
    return HFLM(model, tokenizer=tokenizer, softmax_dtype="float32", **fields | changes)


def continuations(*pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("task", sorted(LM_EVAL_FOLDERS))
def test_a_pinned_task_asks_word_for_word_what_lm_evals_own_file_asks(task, tokenizer):
    ours = prepare(task, tokenizer)
    path = Path(lm_eval.__file__).parent / "tasks" / LM_EVAL_FOLDERS[task]
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    (rows,) = ours.task.dataset.values()
    changes = {
        "task": task.removesuffix("_lmeval"),
        "custom_dataset": lambda **_: {"rows": rows},
        "test_split": "rows",
        "validation_split": None,
        "training_split": None,
        "dataset_kwargs": None,
    }
    (theirs,) = manager.load({"group": "g", "task": [changes]})["tasks"].values()
    theirs.build_all_requests()
    assert arguments(ours.questions) == [request.args for request in theirs.instances]
    assert ours.task.OUTPUT_TYPE == theirs.OUTPUT_TYPE


@pytest.mark.parametrize("task", [task for task in TASKS if task != "wikitext"])
def test_scores_equal_lm_evals_own_item_by_item(task, model, tokenizer):
    prepared = prepare(task, tokenizer)
    items = prepared.run(model).items
    expected = reference(model, tokenizer).loglikelihood(
        [r for q in prepared.questions for r in q.requests], disable_tqdm=True
    )
    np.testing.assert_allclose(items["loglikelihood"], [e[0] for e in expected], atol=1e-4)
    assert items["is_greedy"].tolist() == [e[1] for e in expected]


@pytest.mark.parametrize("task", ["arc_easy", "winogrande", "lambada_openai", "boolq", "hellaswag"])
def test_metrics_and_their_errors_equal_lm_evals_own(task, model, tokenizer):
    prepared = prepare(task, tokenizer)
    ours = prepared.run(model).metrics
    theirs = lm_evaluate(
        reference(model, tokenizer), {task: prepared.task}, bootstrap_iters=10, limit=None
    )["results"][task]
    compared = 0
    for name, metric in ours.items():
        if f"{name},none" in theirs:
            assert metric.as_float() == pytest.approx(theirs[f"{name},none"], rel=1e-5)
            compared += 1
            if name.startswith("acc"):
                assert metric.stderr == pytest.approx(theirs[f"{name}_stderr,none"], rel=1e-9)
    assert compared == len(prepared.task.config.metric_list)


@pytest.mark.parametrize("batching", [None, "padded", "one row"])
def test_lm_eval_itself_runs_the_model_that_qbench_gives_it(model, tokenizer, batching):
    prepared = prepare("openbookqa", tokenizer)
    lm = QBenchLM(model, tokenizer, max_length=512, batching=batching)
    found = lm_evaluate(lm, {"openbookqa": prepared.task}, limit=None, log_samples=True)
    ours = prepared.run(model)
    assert ours.details["batching"] == "shared"
    scores = [pair[0] for s in found["samples"]["openbookqa"] for pair in s["filtered_resps"]]
    np.testing.assert_allclose(scores, ours.items["loglikelihood"], atol=1e-4)
    for name in ("acc", "acc_norm"):
        expected = found["results"]["openbookqa"][f"{name},none"]
        assert ours.metrics[name].as_float() == pytest.approx(expected)


def test_acc_token_is_the_mean_log_probability_per_token(model, tokenizer):
    result = prepare("arc_easy", tokenizer).run(model)
    columns = {name: np.array(column) for name, column in result.items.items()}
    right = []
    for doc in np.unique(columns["doc_id"]):
        own = columns["doc_id"] == doc
        score = columns["loglikelihood"][own] / columns["n_tokens"][own]
        right.append(columns["gold"][own][score.argmax()])
    assert result.metrics["acc_token"].as_float() == np.mean(right)
    assert columns["gold"].sum() == result.n_items == 5
    assert not any("text" in str(column.dtype) for column in columns.values())


def test_trap_1_wsc273_has_one_blank_and_wsc273_lmeval_two(tokenizer):
    mended, kept = (arguments(prepare(t, tokenizer).questions) for t in ("wsc273", "wsc273_lmeval"))
    assert mended[0] == ("The baker gave the boy a roll because the baker", " was hungry.")
    assert kept[0] == ("The baker gave the boy a roll because the baker", "  was hungry.")
    assert mended[4] == ("Anna called Mary before Anna's", " train left. The phone was in her bag.")
    # two blanks in front of the pronoun: lm-eval squeezes them but leaves the position, and cuts
    # the sentence one letter late
    assert mended[8] == ("The dog chased the cat until the dog", " was tired.")
    assert kept[8] == ("The dog chased the cat until ithe dog", " was tired.")


def test_trap_2_two_splits_of_one_text_do_not_get_each_others_logits(model, tokenizer):
    lm = QBenchLM(model, tokenizer, max_length=512)
    requests = continuations(("The old man sold", " the boat"), ("The old", " man sold the boat"))
    together = lm.loglikelihood(requests)
    alone = [lm.loglikelihood([request])[0] for request in requests]
    assert [t[0] for t in together] == pytest.approx([a[0] for a in alone], abs=1e-4)
    assert together[0][0] - together[1][0] > 1


def test_trap_3_a_rolling_text_starts_from_one_bos(model, tokenizer):
    text = "Anna found the letter in the kitchen. " * 8
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    for length in (16, 512):
        (ours,) = QBenchLM(model, tokenizer, max_length=length).loglikelihood_rolling(request)
        single = reference(model, tokenizer, max_length=length, add_bos_token=False)
        double = reference(model, tokenizer, max_length=length)
        assert ours == pytest.approx(single.loglikelihood_rolling(request)[0], abs=1e-3)
        assert abs(ours - double.loglikelihood_rolling(request)[0]) > 0.1


def test_trap_4_each_encoding_is_the_one_it_says(tokenizer):
    def both(encoding, context, continuation):
        pair = Encoder(tokenizer, encoding).pair(context, continuation)
        return pair.context, pair.continuation

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    context, continuation, bos, eos = "The old man ", " sold", 1, 2
    assert both("joint", context, continuation) == (
        ids("The old man"),
        ids("The old man  sold")[3:],
    )
    assert both("joint+bos", context, continuation) == (
        [bos, *ids("The old man")],
        ids("The old man  sold")[len(ids("The old man")) :],
    )
    assert both("lmeval03", context, continuation) == ([bos, *ids("The old man")], ids("sold"))
    assert both("lmeval03", " ", continuation) == ([eos], ids("sold"))
    assert both("joint", "", continuation) == ([bos], ids(" sold"))
    assert both("joint+bos", "", continuation) == ([bos], ids(" sold"))


def test_trap_4_encodings_differ_in_key_and_number(model, tokenizer):
    encodings = ("joint+bos", "joint", "lmeval03")
    prepared = [prepare("piqa", tokenizer, encoding=encoding) for encoding in encodings]
    assert len({p.key_fields["encoding"] for p in prepared}) == 3
    sums = [p.run(model).items["loglikelihood"].sum() for p in prepared]
    assert len(set(np.round(sums, 3))) == 3


def test_trap_5_a_token_across_the_join_is_scored_with_the_continuation(model, tokenizer):
    words = [t for t in tokenizer.get_vocab() if len(t) > 4 and t.isalpha() and t.isascii()]
    word = next(w for w in words if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1)
    pair = Encoder(tokenizer, "joint+bos").pair(word[:-1], word[-1])
    assert pair.spanning and len(pair.continuation) == 1 and pair.context == [1]
    request = continuations((word[:-1], word[-1]))
    (found,) = QBenchLM(model, tokenizer, max_length=512).loglikelihood(request)
    (expected,) = reference(model, tokenizer).loglikelihood(continuations(("", word)))
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(AssertionError):
        reference(model, tokenizer).loglikelihood(request)
    without_bos = Encoder(tokenizer, "joint").pair(word[:-1], word[-1])
    assert without_bos.context == [1] and without_bos.continuation == pair.continuation


def test_trap_6_every_metric_of_every_pinned_task_names_its_aggregation():
    for path in pinned_tasks().values():
        for metric in read_definition(path)["metric_list"]:
            assert {"metric", "aggregation", "higher_is_better"} <= set(metric), path.name


def test_trap_7_a_bos_the_tokenizer_does_not_add_itself_is_not_added(tokenizer):
    from tokenizers import processors

    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert own_bos(tokenizer) == 1 and own_bos(bare) is None and bare.bos_token_id == 1
    assert Encoder(bare, "joint+bos").pair("The", " old") == Encoder(bare, "joint").pair(
        "The", " old"
    )


@pytest.mark.parametrize("length", [6, 9, 20])
def test_a_context_too_long_loses_tokens_on_the_left_as_in_lm_eval(model, tokenizer, length):
    request = continuations(("The old man carried the green box near the river", " in the boat"))
    (ours,) = QBenchLM(model, tokenizer, max_length=length).loglikelihood(request)
    (theirs,) = reference(model, tokenizer, max_length=length).loglikelihood(request)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_continuation_longer_than_the_context_is_scored_in_windows(model, tokenizer):
    pair = Encoder(tokenizer, "joint+bos").pair("The old man", " carried the green box home" * 3)
    rows = pair_rows(pair, max_length=7)
    tokens = [pair.context[-1], *pair.continuation]
    scored = [t for row in rows for t in row.tokens[len(row.tokens) - row.n_scored :]]
    assert scored == pair.continuation and all(len(row.tokens) <= 8 for row in rows)
    assert [row.tokens[0] for row in rows] == tokens[:-1:7]
    prepared = prepare("piqa", tokenizer, max_length=7)
    result = prepared.run(model)
    assert 0 < result.details["windowed"] <= result.details["truncated"] == 6
    assert np.isfinite(result.items["loglikelihood"]).all()


def test_rolling_rows_score_every_token_once_and_are_lm_evals_windows():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for n in (1, 5, 6, 7, 11, 12, 13):
        tokens = list(range(10, 10 + n))
        theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 1, 6, 1))
        expected = [([*context, *scored], len(scored)) for context, scored in theirs]
        rows = rolling_rows(tokens, 1, 6)
        assert [(list(row.tokens), row.n_scored) for row in rows] == expected


def test_an_empty_continuation_scores_zero(model, tokenizer):
    lm = QBenchLM(model, tokenizer, max_length=512)
    assert lm.loglikelihood(continuations(("The old man", ""))) == [(0.0, True)]


def test_few_shot_examples_are_drawn_from_the_training_split_with_the_seed(tokenizer):
    def context(seed, task="arc_easy"):
        spec = TaskSpec(task, num_fewshot=2, limit=1)
        prepared = prepare(spec, tokenizer, seed=seed)
        return arguments(prepared.questions)[0][0], prepared.key_fields["seed"]

    (first, seed), (again, _), (other, _) = context(1234), context(1234), context(5)
    assert first == again != other and seed == 1234
    assert first.count("Question:") == 3 and "dropped ball" in first + other
    train = {json.loads(line)["question"] for line in (DATA / "tasks/arc_easy/train.jsonl").open()}
    shots = first.split("\n\n")[:-1]
    assert all(shot.split("\n")[0].removeprefix("Question: ") in train for shot in shots)
    assert prepare("arc_easy", tokenizer).key_fields["seed"] == 0


def test_few_shot_prompts_equal_those_of_lm_eval(tokenizer):
    """lm-eval builds them itself on the same rows, all four splits named as in its own file."""
    path = Path(lm_eval.__file__).parent / "tasks/winogrande"
    manager = TaskManager(include_path=str(path), include_defaults=False)
    rows = {
        split: Dataset.from_json(str(DATA / f"tasks/winogrande/{split}.jsonl"))
        for split in ("train", "validation")
    }
    changes = {"task": "winogrande", "custom_dataset": lambda **_: rows, "num_fewshot": 2}
    (theirs,) = manager.load({"group": "g", "task": [changes]})["tasks"].values()
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests()
    ours = prepare(TaskSpec("winogrande", num_fewshot=2), tokenizer)
    assert arguments(ours.questions) == [request.args for request in theirs.instances]


def test_a_question_is_never_its_own_example(tokenizer):
    for task, shots in (("wsc273", 4), ("storycloze_2018", 3)):
        prepared = prepare(TaskSpec(task, num_fewshot=shots), tokenizer)
        for question in prepared.questions:
            context, continuation = question.requests[min(question.gold)].args
            *examples, own = context.split("\n\n")
            assert len(examples) == shots
            assert own + continuation not in examples


def test_too_few_examples_for_the_shots_is_an_error(tokenizer):
    with pytest.raises(
        QBenchError, match="asks for 5 few-shot examples, its train split has 3 rows"
    ):
        prepare(TaskSpec("boolq", num_fewshot=5), tokenizer)


def test_the_training_split_is_not_read_without_few_shot_examples(tokenizer, tmp_path):
    folder = tmp_path / "tasks" / "boolq"
    folder.mkdir(parents=True)
    source = (DATA / "tasks/boolq/validation.jsonl").read_text()
    (folder / "validation.jsonl").write_text(source)
    assert len(prepare("boolq", tokenizer, data_dir=tmp_path).questions) == 3


def test_the_authors_story_cloze_files_are_read_as_they_come(tokenizer):
    asked = arguments(prepare("storycloze_2016", tokenizer).questions)
    assert asked[0] == (
        "Nora planted a bean. She watered it every day. After a week a leaf came out. "
        "She ran to tell her father.",
        " He came to look at it.",
    )
    golds = [sorted(q.gold) for q in prepare("storycloze_2018", tokenizer).questions]
    assert golds == [[0], [1], [0], [1]]


def test_a_story_cloze_file_without_answers_is_refused(tokenizer, tmp_path):
    folder = tmp_path / "tasks" / "storycloze_2018"
    folder.mkdir(parents=True)
    header = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    (folder / "cloze_test_val__winter2018.csv").write_text(
        header + "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2\na,b,c,d,e,f,g\n"
    )
    with pytest.raises(QBenchError, match="AnswerRightEnding"):
        prepare("storycloze_2018", tokenizer, data_dir=tmp_path)


def test_the_winograd_collection_is_read_with_single_blanks(tokenizer):
    prepared = prepare("wsc285", tokenizer)
    assert arguments(prepared.questions) == [
        ("The baker gave the boy a roll because the baker", " was hungry."),
        ("The baker gave the boy a roll because the boy", " was hungry."),
        ("Anna thanked Mary, since without Anna's", " help nothing would have been done."),
        ("Anna thanked Mary, since without Mary's", " help nothing would have been done."),
        ("The kettle is on the stove; the kettle", " 's about to boil."),
        ("The kettle is on the stove; the stove", " 's about to boil."),
    ]
    assert [sorted(q.gold) for q in prepared.questions] == [[1], [1], [0]]
    row = prepared.task.dataset["test"][2]
    assert row["text"][row["pronoun_loc"] :] == "it's about to boil."


def test_hellaswag_marks_are_undone(tokenizer):
    asked = arguments(prepare("hellaswag", tokenizer).questions)
    assert asked[4] == (
        "How to fold a letter: How to fold a letter. Lay the paper flat. Use a clean table.",
        "  Bring the lower edge up. Press along the fold.",
    )
    assert asked[0][0].endswith("She kneads dough. She")
