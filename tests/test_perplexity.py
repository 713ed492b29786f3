"""Perplexity protocols against brute force: one window at a time, one log-softmax, float64."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from qbench.errors import QBenchError
from qbench.evaluation import estimates
from qbench.evaluation.evaluate import evaluate, prepare_task
from qbench.evaluation.packing import Row
from qbench.evaluation.scoring import score_rows
from qbench.evaluation.tasks import EvaluationOptions, Protocol, TaskSpec
from qbench.testing import ARCHITECTURES, tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def texts(name, split, column="text"):
    return [json.loads(line)[column] for line in (DATA / f"tasks/{name}/{split}.jsonl").open()]


def brute(model, tokens, n_scored=None):
    """Loss of the last tokens of one sequence, in float64."""
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return float(losses[-(n_scored or len(losses)) :].sum())


def run(model, tokenizer, task, **options):
    (result,) = evaluate(model, tokenizer, [task], data_dir=DATA, **options).values()
    return result


def value(result, name="perplexity"):
    return result.metrics[name].as_float()


@pytest.mark.parametrize(
    ("task", "split", "column", "joiner"),
    [
        ("wikitext2", "test", "text", "\n\n"),
        ("ptb", "validation", "sentence", "\n\n"),
        ("ptb-new", "test", "sentence", " "),
        ("c4-new", "validation", "text", " "),
    ],
)
def test_gptq_is_the_exponential_of_the_mean_over_windows(
    model, tokenizer, task, split, column, joiner
):
    result = run(model, tokenizer, f"{task}@gptq-20")
    ids = tokenizer(joiner.join(texts(task.split("-")[0], split, column)))["input_ids"]
    windows = [ids[i : i + 20] for i in range(0, len(ids) - 19, 20)]
    means = [brute(model, window) / 19 for window in windows]
    assert value(result) == pytest.approx(math.exp(np.mean(means)), rel=1e-6)
    assert result.n_items == len(windows) == len(ids) // 20
    assert result.details["n_tokens"] == 19 * len(windows)
    stderr = np.std(means, ddof=1) / math.sqrt(len(means))
    assert result.metrics["perplexity"].stderr == pytest.approx(value(result) * stderr, rel=1e-5)


def test_c4_reads_256_windows_drawn_with_seed_0(model, tokenizer):
    import random

    prepared = prepare_task("c4@gptq-40", tokenizer, 512, EvaluationOptions(data_dir=DATA))
    documents = [tokenizer(text)["input_ids"] for text in texts("c4", "validation")]
    draws, expected = random.Random(0), []
    while len(expected) < 256:
        ids = documents[draws.randint(0, len(documents) - 1)]
        if len(ids) > 40:
            start = draws.randint(0, len(ids) - 41)
            expected.append(ids[start : start + 40])
    (part,) = prepared.parts
    assert [window.row.tokens for window in part.windows] == expected


def test_documents_are_scored_alone_from_bos_and_cut(model, tokenizer):
    result = run(model, tokenizer, "tinystories@documents-30")
    losses, count, size = 0.0, 0, 0
    for text in texts("tinystories", "validation"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:29]
        losses += brute(model, [tokenizer.bos_token_id, *ids])
        count += len(ids)
        size += len(tokenizer.decode(ids).encode())
    assert value(result) == pytest.approx(math.exp(losses / count), rel=1e-6)
    assert value(result, "bits_per_byte") == pytest.approx(losses / math.log(2) / size, rel=1e-6)
    assert result.details["n_tokens"] == count and result.details["n_bytes"] == size


def pack(items, tokenizer, seqlen):
    """1bitLLM's packing, told another way: give each item the pack it falls into."""
    packs = [[]]
    for item in items:
        ids = tokenizer(item, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= seqlen:
            if 1 + len(packs[-1]) + len(ids) > seqlen:
                packs.append([])
            packs[-1] += ids
    return [[tokenizer.bos_token_id, *p] for p in packs if p and len(p) < seqlen]


def test_b158_is_the_mean_of_two_packed_perplexities(model, tokenizer):
    result = run(model, tokenizer, "b158", max_length=96)
    lines = [x for x in "".join(texts("wikitext2", "test")).split("\n") if x != ""]
    found = []
    for name, items in (("c4", texts("c4", "validation")), ("wikitext2", lines)):
        packs = pack(items, tokenizer, 96)
        loss = sum(brute(model, p) for p in packs) / sum(len(p) - 1 for p in packs)
        found.append(math.exp(loss))
        assert value(result, f"{name}_perplexity") == pytest.approx(found[-1], rel=1e-6)
        alone = run(model, tokenizer, f"{name}@b158-96")
        assert value(alone) == pytest.approx(found[-1], rel=1e-6)
    assert value(result) == pytest.approx(sum(found) / 2, rel=1e-6)
    assert set(result.items["corpus"]) == {"c4", "wikitext2"}
    stderrs = [result.metrics[f"{n}_perplexity"].stderr for n in ("c4", "wikitext2")]
    assert result.metrics["perplexity"].stderr == pytest.approx(math.hypot(*stderrs) / 2)


def test_a_corpus_rolled_as_lm_eval_does_agrees_with_lm_eval_but_for_the_second_bos(
    model, tokenizer
):
    """The reference is HFLM with add_bos_token=False, which rolls from a single BOS."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    documents = texts("tinystories", "validation")
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(documents)
    ]
    reference = HFLM(model, tokenizer=tokenizer, add_bos_token=False, max_length=24, batch_size=1)
    total = sum(reference.loglikelihood_rolling(requests, disable_tqdm=True))
    result = run(model, tokenizer, "tinystories@lm-eval-24")
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    size = sum(len(text.encode()) for text in documents)
    assert -result.items["nll"].sum() == pytest.approx(total, rel=1e-6)
    assert value(result, "word_perplexity") == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert value(result, "byte_perplexity") == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert result.details["n_bytes"] == size


def test_the_window_is_the_least_of_protocol_option_and_context(tokenizer):
    def protocol(task, context=512, **options):
        options = EvaluationOptions(data_dir=DATA, **options)
        return prepare_task(task, tokenizer, context, options).key_fields["protocol"]

    assert protocol("tinystories") == "documents-512"
    assert protocol("tinystories", context=None) == "documents-2048"
    assert protocol("tinystories", max_length=64) == "documents-64"
    assert protocol("tinystories@gptq-32", max_length=64) == "gptq-32"


def test_a_limit_takes_the_first_windows(model, tokenizer):
    whole = run(model, tokenizer, "wikitext2@gptq-20")
    some = run(model, tokenizer, "wikitext2@gptq-20", limit=3)
    np.testing.assert_allclose(some.items["nll"], whole.items["nll"][:3], rtol=1e-6)
    assert some.n_items == 3


def test_the_key_names_what_changes_a_number_and_no_path(tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("Once there was a fox. " * 20)

    def key(task, limit=None):
        options = EvaluationOptions(data_dir=DATA, max_length=32)
        spec = TaskSpec(
            *task.split("@")[:1], limit=limit, protocol=(task.split("@")[1:] or [None])[0]
        )
        return prepare_task(spec, tokenizer, 512, options).key_fields

    keys = [
        key("ptb"),
        key("ptb-new"),
        key("c4@documents"),
        key("c4"),
        key("c4-new"),
        key("c4", limit=2),
        key(str(tmp_path / "mine.txt")),
    ]
    assert len({json.dumps(k, sort_keys=True) for k in keys}) == len(keys)
    assert keys[-1]["task"] == "mine.txt" and str(tmp_path) not in json.dumps(keys)
    from qbench.record import TaskKey

    assert all(TaskKey(quantization="q", **k).digest() for k in keys)
    assert set(keys[0]) == set(TaskKey.model_fields) - {"quantization", "dtype"}


def test_a_text_too_short_for_one_window_is_an_error(tokenizer):
    with pytest.raises(QBenchError, match="too few for a window of 2048"):
        prepare_task("ptb", tokenizer, 4096, EvaluationOptions(data_dir=DATA))


def test_bytes_of_windows_add_up_where_characters_have_several(tokenizer, model, tmp_path):
    text = "Ein Käse für 3 € – “ja”, 𝄞!\n" * 6
    (tmp_path / "mine.txt").write_text(text)
    rolled = run(model, tokenizer, f"{tmp_path / 'mine.txt'}@lm-eval-16")
    assert rolled.details["n_bytes"] == len(text.encode())
    assert (rolled.items["n_bytes"] > 0).all()


def test_a_model_of_infinite_or_undefined_loss_gives_a_metric_that_says_so(tokenizer):
    for factor, kind in ((1e6, "inf"), (float("nan"), "nan")):
        broken = tiny_model(tie_word_embeddings=False)
        broken.lm_head.weight.data.mul_(factor)
        metric = run(broken, tokenizer, "tinystories").metrics["perplexity"]
        assert metric.value is None and metric.non_finite == kind


def test_the_ratio_estimator_is_the_mean_where_counts_are_equal():
    values = np.array([1.0, 4.0, 2.5, 3.0])
    mean, stderr = estimates.ratio(values * 7, np.full(4, 7))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / 2)
    assert estimates.ratio([1.0], [2]) == (0.5, None)
    assert estimates.exponential(1e4, 1.0).non_finite == "inf"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_scores_do_not_depend_on_the_batch(architecture):
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, n_scored in ((40, 39), (9, 1), (40, 5), (2, 1), (23, 10), (5, 0)):
        tokens = torch.randint(3, 512, (length,), generator=generator).tolist()
        rows.append(Row(tokens, n_scored))
    together = score_rows(model, rows, batch_tokens=10_000)
    alone = score_rows(model, rows, batching="one row")
    for row, one, other in zip(rows, together, alone, strict=True):
        expected = -brute(model, row.tokens, row.n_scored) if row.n_scored else 0.0
        assert one.loglikelihood == pytest.approx(expected, abs=1e-4)
        assert other.loglikelihood == pytest.approx(expected, abs=1e-4)
        assert one.is_greedy == other.is_greedy


def test_no_batch_is_larger_than_the_budget_and_none_is_left_out(model, monkeypatch):
    shapes = []
    inner = model.forward

    def forward(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        assert kwargs["use_cache"] is False
        return inner(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    seen = []
    rows = [Row(list(range(3 * n, 4 * n)), 1) for n in (5, 30, 8, 12, 3, 6)]
    score_rows(model, rows, 24, "padded", progress=lambda done, total: seen.append((done, total)))
    assert all(height * width <= 24 or height == 1 for height, width in shapes)
    assert sum(height for height, _ in shapes) == len(rows)
    assert seen[-1] == (64, 64)


def test_half_precision_models_get_float32_log_probabilities(tokenizer):
    model = tiny_model().bfloat16()
    row = Row(list(range(5, 25)), 19)
    with torch.no_grad():
        logits = model(torch.tensor([row.tokens[:-1]])).logits[0]
    expected = -torch.nn.functional.cross_entropy(
        logits.double(), torch.tensor(row.tokens[1:]), reduction="sum"
    )
    found = score_rows(model, [row])[0].loglikelihood
    assert found == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("text", ["gptq-1", "gptq2048", "strided"])
def test_a_protocol_nobody_knows_is_an_error(text):
    with pytest.raises(QBenchError, match="protocol"):
        Protocol.parse(text)
