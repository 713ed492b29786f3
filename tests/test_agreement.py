"""Agreement with full precision against brute force: whole windows, one softmax, float64."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_fixtures import qbench, records
from study_fixtures import add, cells, quantization, task
from transformers import AutoConfig, AutoModelForCausalLM

from qbench import quantize_model
from qbench.comparison.panels import agreement_panels
from qbench.errors import QBenchError
from qbench.evaluation import agreement, forward
from qbench.evaluation.agreement import aligned, divergence
from qbench.evaluation.evaluate import evaluate, prepare_task
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.models.checkpoints import find_checkpoint
from qbench.plots.against_bits import draw_agreement
from qbench.plots.wanted import Wanted
from qbench.study.cells import Settings
from qbench.study.runner import Workbench
from qbench.study.store import Store
from qbench.tables.table import stored_entries, table
from qbench.testing import tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data"
COMMON = {
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
TIED = ("bloom", "gemma")
AFTER_THE_HEAD = {  # what the model does with the head's output
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def other(architecture, **fields):
    config = AutoConfig.for_model(architecture, **{**COMMON, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shaken(model, seed=0, size=0.3):
    """A copy with noise on every matrix: stands in for a quantized model."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in copied.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * size * parameter.data.std())
    return copied


def windows(tokenizer, seqlen, count):
    rows = (json.loads(line)["text"] for line in (DATA / "tasks/wikitext2/test.jsonl").open())
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)][:count]


def brute(reference, model, ids):
    """KL and agreement at every position of one window, from whole logits."""
    with torch.no_grad():
        p, q = (
            m(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1).numpy()
            for m in (reference, model)
        )
    kl = [
        math.fsum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True))
        for rows in zip(p, q, strict=True)
    ]
    return np.array(kl), p.argmax(-1) == q.argmax(-1)


def run(reference, model, tokenizer, task="wikitext2@agreement-20", **options):
    (result,) = evaluate(
        model, tokenizer, [task], data_dir=DATA, reference=reference, **options
    ).values()
    return result


def check_against_brute_force(reference, model, tokenizer, count=3, seqlen=20, **options):
    result = run(reference, model, tokenizer, limit=count, **options)
    expected = [brute(reference, model, ids) for ids in windows(tokenizer, seqlen, count)]
    kl = np.array([own.mean() for own, _ in expected])
    same = np.array([own.mean() for _, own in expected])
    assert kl.mean() > 1e-4  # there is something to see
    # random models with tied embeddings repeat the last token, whatever the noise
    assert same.mean() == 1 if reference.config.model_type in TIED else 0 < same.mean() < 1
    found = result.metrics
    assert found["kl_divergence"].value == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_divergence"].stderr == pytest.approx(
        kl.std(ddof=1) / math.sqrt(count), rel=1e-3
    )
    assert found["top1_agreement"].value == pytest.approx(same.mean(), abs=1e-12)
    assert found["top1_agreement"].stderr == pytest.approx(same.std(ddof=1) / math.sqrt(count))
    every = np.concatenate([own for own, _ in expected])
    assert result.details["kl_max"] == pytest.approx(every.max(), rel=1e-3)
    assert result.details["kl_p99"] == pytest.approx(np.quantile(every, 0.99), rel=1e-3)
    assert result.items["kl"] == pytest.approx([own.sum() for own, _ in expected], rel=1e-4)
    assert result.items["n_agreeing"].tolist() == [own.sum() for _, own in expected]
    assert result.items["n_tokens"].tolist() == [seqlen - 1] * count
    return result


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "bloom", "gemma"])
def test_every_position_is_as_by_brute_force(architecture, tokenizer):
    model = tiny_model(architecture)
    check_against_brute_force(model, shaken(model), tokenizer)


@pytest.mark.parametrize("architecture", AFTER_THE_HEAD)
def test_what_a_model_does_after_its_head_counts(architecture, tokenizer):
    fields = AFTER_THE_HEAD[architecture]
    model, plain = other(architecture, **fields), other(architecture, **dict.fromkeys(fields, 1.0))
    ids = torch.tensor([windows(tokenizer, 20, 1)[0]])
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-2)
    check_against_brute_force(model, shaken(model), tokenizer)


@pytest.mark.parametrize("batching", ["padded", "unshared", "one row"])
def test_batches_change_nothing(batching, tokenizer):
    model = tiny_model()
    check_against_brute_force(model, shaken(model), tokenizer, batching=batching, batch_tokens=50)


def test_scales_per_tensor_see_one_window_each(tokenizer):
    model = tiny_model()
    quantized = copy.deepcopy(model)
    quantize_model(quantized, "absmax", "W8A4:w=tensor,a=tensor")
    result = check_against_brute_force(model, quantized, tokenizer, batch_tokens=200)
    assert result.details["batching"] == "unshared"


def test_logits_come_in_parts_and_are_never_whole(tokenizer, monkeypatch):
    model = tiny_model()
    whole = run(model, shaken(model), tokenizer)
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 7 * 512)
    sizes, plain = [], agreement.divergence

    def noted(one, two):
        sizes.append(one.shape)
        return plain(one, two)

    monkeypatch.setattr(agreement, "divergence", noted)
    parted = run(model, shaken(model), tokenizer)
    assert max(rows for rows, _ in sizes) == 7
    assert sum(rows for rows, _ in sizes) == 16 * 19
    assert parted.items["kl"] == pytest.approx(whole.items["kl"], rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_full_precision_agrees_with_itself_exactly(architecture, tokenizer):
    model = tiny_model(architecture)
    result = run(model, model, tokenizer)
    assert result.metrics["kl_divergence"].value == 0.0
    assert result.metrics["top1_agreement"].value == 1.0
    assert result.details["kl_max"] == 0.0
    assert result.n_items == agreement.WINDOWS == 16


def test_the_reference_is_run_once_and_left_as_it_was(tokenizer):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    task = prepare_task(
        TaskSpec("wikitext2", protocol="agreement-20"), tokenizer, 512, EvaluationOptions(DATA)
    )
    reference = task.refer(model)
    assert reference.for_several  # tried out once
    once = len(calls)
    assert once > 1
    results = [task.against(reference).run(shaken(model, seed)) for seed in (0, 1)]
    handle.remove()
    batches = len(task.rows.batches("padded", reference.batch_tokens, pairs=True))
    assert len(calls) == once + 2 * batches  # the copies inherit the counting hook
    assert results[0].metrics != results[1].metrics
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks and not model.lm_head._forward_pre_hooks


def test_a_model_that_cannot_be_run_around_its_blocks_runs_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(agreement, "_bypass", lambda model: None)
    model = tiny_model()
    check_against_brute_force(model, shaken(model), tokenizer)


def test_a_forward_that_runs_out_of_memory_is_repeated_in_smaller_batches(tokenizer):
    model = tiny_model()
    narrow = shaken(model)
    inner = narrow.model.layers[0].mlp.forward

    def scarce(hidden):
        if hidden.shape[0] > 2:
            raise MemoryError
        return inner(hidden)

    narrow.model.layers[0].mlp.forward = scarce
    result = run(model, narrow, tokenizer)
    assert result.details["oom_halvings"] > 0
    assert result.items["kl"] == pytest.approx(
        run(model, shaken(model), tokenizer).items["kl"], rel=1e-5
    )


def test_without_a_reference_it_is_refused(tokenizer):
    with pytest.raises(QBenchError, match="reference="):
        evaluate(tiny_model(), tokenizer, ["wikitext2@agreement-20"], data_dir=DATA)


def test_a_mean_of_corpora_has_no_agreement(tokenizer):
    with pytest.raises(QBenchError, match="ask it of a corpus"):
        prepare_task("b158@agreement", tokenizer, 512, EvaluationOptions(DATA))


def test_the_usual_number_of_windows_said_again_is_the_same_measurement(tokenizer):
    def keys(limit):
        spec = TaskSpec("wikitext2", limit=limit, protocol="agreement-20")
        return prepare_task(spec, tokenizer, 512, EvaluationOptions(DATA)).key_fields

    assert keys(None) == keys(16) != keys(4)
    assert keys(None)["protocol"] == "agreement-20"


def test_the_tokens_that_are_compared_can_be_looked_at(tokenizer):
    task = prepare_task("wikitext2@agreement-20", tokenizer, 512, EvaluationOptions(DATA))
    assert [list(row) for row in task.token_rows()] == windows(tokenizer, 20, 16)


def test_divergence_of_two_coins_is_its_closed_form():
    """KL(0.75 || 0.5) = 0.75 ln 1.5 + 0.25 ln 0.5."""
    one, two = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    (kl,), (same,) = divergence(one, two)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    (back,), _ = divergence(two, one)
    assert back.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    assert kl.dtype == torch.float64


def test_what_is_impossible_in_one_model_and_not_in_the_other():
    ruled_out = torch.tensor([[0.0, float("-inf")]])
    open_ = torch.tensor([[0.0, 0.0]])
    assert divergence(open_, ruled_out)[0].item() == math.inf
    assert divergence(ruled_out, open_)[0].item() == pytest.approx(math.log(2))
    assert divergence(ruled_out, ruled_out)[0].item() == 0


def test_nan_logits_are_neither_near_nor_agreeing():
    broken = torch.tensor([[float("nan"), 1.0]])
    sound = torch.tensor([[1.0, 0.0]])
    (kl,), (same,) = divergence(sound, broken)
    assert kl.isnan() and not same


def test_a_broken_model_has_no_number_and_says_so(tokenizer):
    model = tiny_model()
    broken = shaken(model)
    broken.lm_head.weight.data[5] = float("nan")
    result = run(model, broken, tokenizer)
    assert result.metrics["kl_divergence"].non_finite == "nan"
    assert result.metrics["top1_agreement"].value == 0.0
    assert result.details["kl_max"] == "nan"
    json.dumps(result.details, allow_nan=False)


def test_parts_of_other_sizes_are_cut_alike():
    rows = torch.arange(14.0).reshape(7, 2)
    pairs = list(aligned(rows.split([3, 4]), rows.split([2, 2, 3])))
    assert [len(a) for a, _ in pairs] == [2, 1, 1, 3]
    assert torch.equal(torch.cat([a for a, _ in pairs]), rows)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="different numbers"):
        list(aligned([rows], [rows[:5]]))


def agreement_run(checkpoint, text, results, *more):
    options = ["--calibration", text, "--nsamples", 2, "--seqlen", 16, "--limit", 3]
    options += ["--tasks", f"{text}@agreement-16,{text}@gptq-16", "--results", results]
    qbench("run", checkpoint, *options, *more)
    return {path: timeless(record) for path, record in records(results).items()}


def timeless(record):
    """What two runs that measured the same thing share."""
    own = {"wall_seconds", "peak_memory_bytes", "created", "layers"}
    return {name: value for name, value in record.items() if name not in own}


def test_a_streamed_run_agrees_to_the_last_bit_with_one_in_memory(tiny, text, tmp_path):
    quantized = ["--baseline", "gptq", "--scheme", "W3A8"]
    whole = agreement_run(tiny, text, tmp_path / "memory", *quantized)
    streamed = agreement_run(tiny, text, tmp_path / "stream", "--stream", *quantized)
    assert whole == streamed and len(whole) == 3
    (found,) = [r["metrics"] for r in whole.values() if "kl_divergence" in r.get("metrics", {})]
    assert found["kl_divergence"]["value"] > 1e-5


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_the_full_precision_row_is_exact(how, tiny, text, tmp_path):
    (found,) = [
        record["metrics"]
        for record in agreement_run(tiny, text, tmp_path, how).values()
        if "kl_divergence" in record.get("metrics", {})
    ]
    assert found["kl_divergence"] == {"value": 0.0, "stderr": 0.0, "non_finite": None}
    assert found["top1_agreement"] == {"value": 1.0, "stderr": 0.0, "non_finite": None}


def test_full_precision_runs_once_for_all_cells_of_a_sweep(tiny, text, tmp_path, monkeypatch):
    made = []
    inner = agreement.AgreementTask.refer
    monkeypatch.setattr(
        agreement.AgreementTask, "refer", lambda *args: (made.append(1), inner(*args))[1]
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "checkpoints": [str(tiny)],
                "baselines": ["none", "rtn"],
                "schemes": ["W4A16", "W3A16", "W3A8"],
                "tasks": [f"{text}@agreement-16"],
                "results": str(tmp_path / "runs"),
            }
        )
    )
    qbench("sweep", path)
    measured = [r for r in records(tmp_path / "runs").values() if "metrics" in r]
    assert len(measured) == 4 and len(made) == 1
    kl = [record["metrics"]["kl_divergence"]["value"] for record in measured]
    assert len(set(kl)) == 4


def test_a_trained_model_has_nothing_to_agree_with(tmp_path):
    settings = Settings(
        (TaskSpec("world", protocol="agreement-32"), TaskSpec("world")),
        EvaluationOptions("bundled:world"),
    )
    bench = Workbench(find_checkpoint("bundled:b158-0.5m"), settings, Store(tmp_path))
    plan = bench.plan(*bench.cells([]))
    assert plan.pending == [TaskSpec("world")]
    (line,) = plan.left_out_lines()
    assert line.startswith("world@agreement-32: not applicable: ")


@pytest.fixture
def stored(tmp_path):
    """Full precision, two methods with agreements, and a trained model without."""
    store = Store(tmp_path)
    made = {"none": (0.0, 1.0), "rtn": (0.02, 0.9), "gptq": (0.01, 0.85)}
    for baseline, (kl, top) in made.items():
        scheme = "W16A16" if baseline == "none" else "W4A16:w=channel,grid=asym"
        record = add(store, quantization(baseline=baseline, scheme=scheme))
        metrics = {"kl_divergence": kl, "top1_agreement": top}
        measured = task(record, "wikitext2", metrics, n_items=16, protocol="agreement-2048")
        store.save_task(record.checkpoint, record.key, measured)
    trained = quantization("BitNet", scheme="W1A8:grid=sign,agrid=bitnet", trained=True)
    add(store, trained, perplexity={"wikitext2@gptq-2048": 17.0})
    return store


def test_tables_show_both_numbers_and_the_best_of_each(stored):
    rows = cells(table(stored))
    kl, top = (f"{name} wikitext2 agreement-2048" for name in ("KL", "top-1"))
    assert [(row[kl], row[top]) for row in rows] == [
        ("0", "100.0"),
        ("**0.0100**", "85.0"),
        ("0.0200", "**90.0**"),
        ("n/a", "n/a"),
    ]


def test_a_figure_of_the_divergence_leaves_full_precision_out_which_has_no_logarithm(stored):
    rows = stored_entries(stored)
    (panel,) = agreement_panels(rows, "wbits", top_1=False)
    assert panel.title.endswith("wikitext2, agreement-2048")
    assert {point.series: point.y for point in panel.points} == {
        "full precision": 0.0,
        "rtn": 0.02,
        "gptq": 0.01,
    }
    figure = draw_agreement(Wanted(stored, "agreement-vs-bits"))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    drawn = {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 1}
    assert drawn == {0.02, 0.01}


def test_a_figure_of_the_top_1_agreement_is_in_percent(stored):
    figure = draw_agreement(Wanted(stored, "agreement-vs-bits", "top1_agreement"))
    (axes,) = figure.axes
    drawn = {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 1}
    assert drawn == {100.0, 90.0, 85.0}
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "kl"}, "kl_divergence"),
        ({"against": "bitnet-table3"}, "no published points"),
        ({"tasks": ["wikitext2"], "baselines": ["trained"]}, "trained"),
    ],
)
def test_figures_that_cannot_be_are_refused(stored, fields, message):
    with pytest.raises(QBenchError, match=message):
        draw_agreement(Wanted(stored, "agreement-vs-bits", **fields))


def test_a_figure_of_no_agreement_says_how_one_is_measured(tmp_path):
    store = Store(tmp_path)
    add(store, quantization(), perplexity={"wikitext2@gptq-2048": 5.0})
    with pytest.raises(QBenchError, match="corpus@agreement"):
        draw_agreement(Wanted(store, "agreement-vs-bits"))
