"""Preparing and running evaluations: names, keys, options, and the known answers on real sets.

With QBENCH_DATA set to a folder that has ``tasks/`` and ``models/stories260K``, scores are compared
with lm-eval's own on the real sets, and perplexities with the known ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig

from qbench.errors import QBenchError
from qbench.evaluation import data, zeroshot
from qbench.evaluation.evaluate import context_length, evaluate, prepare_task
from qbench.evaluation.scoring import score_rows
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec, known_tasks
from qbench.quantization.quantize import quantize_model
from qbench.record import TaskKey
from qbench.testing import tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prepare(task, tokenizer, max_length=512, data_dir=DATA, **options):
    options = EvaluationOptions(data_dir=data_dir, max_length=max_length, **options)
    return prepare_task(task, tokenizer, 512, options)


def arguments(questions):
    return [request.args for question in questions for request in question.requests]


@pytest.mark.parametrize(
    ("text", "name", "protocol"),
    [
        ("piqa", "piqa", None),
        ("wikitext2", "wikitext2", None),
        ("wikitext2@documents", "wikitext2", "documents"),
        ("my.txt@gptq-512", "my.txt", "gptq-512"),
        ("me@home/text.txt", "me@home/text.txt", None),
        ("me@home/text.txt@documents", "me@home/text.txt", "documents"),
    ],
)
def test_a_task_reads_back_from_its_text(text, name, protocol):
    spec = TaskSpec.parse(text)
    assert (spec.name, spec.protocol, str(spec)) == (name, protocol, text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSpec.parse("wikitext2@strided"), "unknown protocol 'strided'"),
        (lambda: TaskSpec.parse("piqa@documents"), "'piqa' is not a corpus"),
        (lambda: TaskSpec("wikitext2", num_fewshot=1), "takes no few-shot examples"),
        (lambda: TaskSpec("piqa", num_fewshot=-1), "give 0 or more"),
        (lambda: TaskSpec("piqa", limit=0), "leaves nothing to measure"),
        (lambda: EvaluationOptions(encoding="bos"), "unknown encoding 'bos'; choose one of"),
        (lambda: EvaluationOptions(max_length=1), "at least 2"),
        (lambda: EvaluationOptions(batch_tokens=0), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(make, message):
    with pytest.raises(QBenchError, match=message):
        make()


def test_listing_tasks_imports_neither_torch_nor_lm_eval():
    code = (
        "import sys; from qbench.evaluation.tasks import known_tasks; tasks = known_tasks();"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    tasks = known_tasks()
    assert {"wikitext2", "b158", "wsc273", "wsc285", "storycloze_2018", "piqa"} <= set(tasks)
    assert all(line and len(line) < 100 for line in tasks.values())


def test_several_tasks_are_measured_in_one_call(model, tokenizer):
    seen = []
    results = evaluate(
        model,
        tokenizer,
        ["piqa", "tinystories@documents-64", TaskSpec("boolq", num_fewshot=1)],
        limit=2,
        data_dir=DATA,
        progress=lambda done, total: seen.append(done / total),
    )
    assert list(results) == ["piqa", "tinystories@documents-64", "boolq"]
    assert [r.n_items for r in results.values()] == [2, 2, 3]
    assert {"acc", "acc_norm", "acc_token"} == set(results["piqa"].metrics)
    assert seen.count(1.0) == 3
    for result in results.values():
        assert len({len(column) for column in result.items.values()}) == 1


def test_the_key_of_a_task_changes_with_everything_that_changes_a_number(tokenizer, tmp_path):
    (tmp_path / "tasks").symlink_to(DATA / "tasks")
    keys = [
        prepare("boolq", tokenizer),
        prepare(TaskSpec("boolq", num_fewshot=1), tokenizer),
        prepare(TaskSpec("boolq", num_fewshot=1), tokenizer, seed=1),
        prepare(TaskSpec("boolq", limit=2), tokenizer),
        prepare("boolq", tokenizer, encoding="joint"),
        prepare("boolq", tokenizer, max_length=100),
        prepare("piqa", tokenizer),
    ]
    digests = [TaskKey(quantization="q", **p.key_fields).digest() for p in keys]
    assert len(set(digests)) == len(digests)
    elsewhere = prepare("boolq", tokenizer, data_dir=tmp_path, batch_tokens=64, seed=99)
    assert elsewhere.key_fields == keys[0].key_fields
    assert set(keys[0].key_fields) == set(TaskKey.model_fields) - {"quantization", "dtype"}


def test_a_models_context_is_found_whatever_its_name():
    assert context_length(tiny_model("gpt2").config) == 512
    assert context_length(tiny_model("llama").config) == 512
    assert context_length(AutoConfig.for_model("mamba")) is None


def catalogue(monkeypatch, *folders):
    """Let a small part of lm-eval's catalogue stand for the whole, which takes 7 s to read."""
    root = Path(lm_eval.__file__).parent / "tasks"

    def manager(include_path=None, include_defaults=True):
        paths = [str(root / folder) for folder in folders] if include_defaults else include_path
        return TaskManager(include_path=paths, include_defaults=False)

    monkeypatch.setattr(zeroshot, "TaskManager", manager)


def test_any_other_task_of_lm_eval_runs_by_name(model, tokenizer, monkeypatch, tmp_path):
    catalogue(monkeypatch, "copal_id", "sciq")
    (tmp_path / "tasks/sciq").mkdir(parents=True)
    row = {"support": "Ice is cold.", "question": "What is ice?", "correct_answer": "cold"}
    row |= {"distractor1": "hot", "distractor2": "loud", "distractor3": "wet"}
    (tmp_path / "tasks/sciq/test.jsonl").write_text(json.dumps(row))
    prepared = prepare("sciq", tokenizer, data_dir=tmp_path)
    assert arguments(prepared.questions)[3] == (
        "Ice is cold.\nQuestion: What is ice?\nAnswer:",
        " cold",
    )
    assert "acc_token" in prepared.run(model).metrics


def test_an_unknown_task_is_named_with_the_nearest_known_one(tokenizer, monkeypatch):
    catalogue(monkeypatch, "sciq")
    with pytest.raises(QBenchError, match="unknown task 'piqqa'; did you mean 'piqa'"):
        prepare("piqqa", tokenizer)
    with pytest.raises(QBenchError, match="does not exist"):
        prepare("nowhere.yaml", tokenizer)


def test_a_group_of_tasks_is_refused_with_its_members(tokenizer, monkeypatch):
    catalogue(monkeypatch, "blimp")
    with pytest.raises(QBenchError, match="'blimp' is a group"):
        prepare("blimp", tokenizer)


def test_questions_that_are_nowhere_name_the_places_looked_for(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "hub_answers", lambda: False)
    with pytest.raises(QBenchError) as error:
        prepare("storycloze_2016", tokenizer, data_dir=tmp_path)
    assert "storycloze_2016/test.jsonl" in str(error.value)
    assert "cloze_test_test__spring2016*.csv" in str(error.value)
    assert "LSDSem/story_cloze" in str(error.value)


def test_a_model_of_nan_has_no_accuracy(tokenizer):
    broken = tiny_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    metrics = prepare("piqa", tokenizer).run(broken).metrics
    assert {m.non_finite for m in metrics.values()} == {"nan"} and "acc" in metrics


def test_one_row_at_a_time_gives_every_row_its_own_forward(model, tokenizer, monkeypatch):
    shapes = []
    inner = model.forward

    def forward(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    prepared = prepare("arc_easy", tokenizer)
    result = prepared.run(model, batching="one row")
    distinct = {tuple(row.tokens[:-1]) for rows in prepared.rows for row in rows}
    assert [height for height, _ in shapes] == [1] * len(distinct)
    assert result.details["batching"] == "one row"


def test_a_quantized_head_is_not_tied_back_to_the_embedding(tokenizer):
    """HFLM calls tie_weights(), which would replace a head that was given weights of its own."""
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    result = prepare("piqa", tokenizer).run(model)
    per_token = result.items["loglikelihood"] / result.items["n_tokens"]
    np.testing.assert_allclose(per_token, -np.log(512), rtol=1e-5)
    assert model.tie_weights.__func__ is type(model).tie_weights


def test_the_users_tokenizer_is_left_alone(model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    prepare("piqa", tokenizer).run(model)
    assert tokenizer.pad_token is None


def test_a_task_from_a_file_of_ones_own_runs_with_functions_beside_it(model, tokenizer, tmp_path):
    folder = tmp_path / "tasks" / "colours"
    folder.mkdir(parents=True)
    rows = [
        {"q": "The sky is", "a": ["blue", "loud"], "y": 0},
        {"q": "Grass is", "a": ["wet", "up"], "y": 0},
    ]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "helper.py").write_text("def ask(doc):\n    return doc['q']\n")
    (tmp_path / "colours.yaml").write_text(
        "task: colours\ndataset_path: nobody/colours\noutput_type: multiple_choice\n"
        "validation_split: dev\ndoc_to_text: !function helper.ask\ndoc_to_target: y\n"
        "doc_to_choice: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    task = str(tmp_path / "colours.yaml")
    prepared = prepare(task, tokenizer, data_dir=tmp_path)
    assert arguments(prepared.questions)[0] == ("The sky is", " blue")
    assert prepared.key_fields["task"] == "colours"
    assert {"acc", "acc_norm", "acc_token"} == set(prepared.run(model).metrics)
    (tmp_path / "helper.py").write_text("def ask(doc):\n    return doc['q'] + ' '\n")
    changed = prepare(task, tokenizer, data_dir=tmp_path).key_fields
    assert changed["definition"] != prepared.key_fields["definition"]
    assert changed["data"] == prepared.key_fields["data"]


def test_a_task_that_generates_runs_through_its_filters(model, tokenizer, tmp_path):
    folder = tmp_path / "tasks" / "echo"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"q": "The old man", "y": "never said"}\n')
    (tmp_path / "echo.yaml").write_text(
        "task: echo\ndataset_path: nobody/echo\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{y}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    prepared = prepare(str(tmp_path / "echo.yaml"), tokenizer, data_dir=tmp_path)
    for _ in range(2):
        assert prepared.run(model).metrics["exact_match"].as_float() == 0.0


def test_the_same_preparation_runs_on_many_models(tokenizer):
    prepared = prepare("boolq", tokenizer)
    first, other, again = (prepared.run(tiny_model(seed=s)).items for s in (0, 1, 0))
    np.testing.assert_array_equal(first["loglikelihood"], again["loglikelihood"])
    assert not np.allclose(first["loglikelihood"], other["loglikelihood"])
    assert first["doc_hash"].tolist() == other["doc_hash"].tolist()


REAL = os.environ.get("QBENCH_DATA")
real = pytest.mark.skipif(
    not REAL, reason="set QBENCH_DATA to a folder with tasks/ and models/stories260K"
)


@real
@pytest.mark.parametrize(
    "task",
    "wsc273 wsc273_lmeval winogrande hellaswag arc_easy arc_challenge boolq openbookqa "
    "piqa".split(),
)
def test_scores_on_real_sets_equal_lm_evals_own(task):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(REAL) / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    spec = TaskSpec(task, limit=50)
    prepared = prepare(spec, tokenizer, max_length=2048, data_dir=Path(REAL))
    requests = [r for q in prepared.questions for r in q.requests]
    assert prepared.counts == {"truncated": 0, "windowed": 0, "spanning": 0}
    theirs = HFLM(
        model,
        tokenizer=tokenizer,
        batch_size=1,
        logits_cache=False,
        add_bos_token=True,
        softmax_dtype="float32",
        max_length=2048,
    )
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    items = prepared.run(model).items
    np.testing.assert_allclose(items["loglikelihood"], [e[0] for e in expected], atol=1e-4)
    assert items["is_greedy"].tolist() == [e[1] for e in expected]


@real
@pytest.mark.parametrize(
    ("name", "limit", "perplexity", "tokens", "bits"),
    [("stories260K", 56, 3.7870, 20236, 0.935), ("babyllama-105", 79, 1.9226, 20145, None)],
)
def test_the_perplexity_of_real_checkpoints_is_the_known_one(name, limit, perplexity, tokens, bits):
    """Known answers: an independent computation in float32, each story alone from <s>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(REAL) / "models" / name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    result = evaluate(model, tokenizer, "tinystories", limit=limit, data_dir=REAL)["tinystories"]
    assert result.metrics["perplexity"].as_float() == pytest.approx(perplexity, abs=5e-5)
    assert result.details["n_tokens"] == tokens
    if bits is not None:
        assert result.metrics["bits_per_byte"].as_float() == pytest.approx(bits, abs=5e-4)


def test_scoring_nothing_is_nothing(model):
    assert score_rows(model, []) == []


def test_rows_of_a_model_with_scales_per_tensor_get_what_each_gets_alone(tokenizer):
    """Dynamic per-tensor activation scales depend on the batch; the model says how it was made."""
    model = tiny_model()
    quantize_model(model, "absmax", "W8A4")
    options = {"data_dir": DATA, "limit": 4}
    result = evaluate(model, tokenizer, "arc_easy", **options)["arc_easy"]
    alone = evaluate(model, tokenizer, "arc_easy", batching="one row", **options)["arc_easy"]
    assert result.details["batching"] == "unshared"
    assert alone.details["batching"] == "one row"
    found, expected = (r.items["loglikelihood"] for r in (result, alone))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    padded = evaluate(model, tokenizer, "arc_easy", batching="padded", **options)["arc_easy"]
    assert abs(padded.items["loglikelihood"] - expected).max() > 1e-2
    per_token = tiny_model()
    quantize_model(per_token, "rtn", "W8A4")
    batched = evaluate(per_token, tokenizer, "arc_easy", **options)["arc_easy"]
    assert batched.details["batching"] == "shared"
