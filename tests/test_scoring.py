"""From batches to scores: parts of the head, forwards of one's own, memory that is lacking."""

import numpy as np
import pytest
import torch
from test_sharing import EXACT, OTHERS, brute, build, questions

from qbench import quantize_model
from qbench.errors import QBenchError, RunFailed
from qbench.evaluation import forward as module
from qbench.evaluation import packing, scoring, sharing
from qbench.evaluation.forward import logits_of
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.scoring import score, score_rows
from qbench.models.products import on_threads
from qbench.testing import tiny_model


def windows(n=3, size=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 512, (n, size), generator=generator)
    return [Row(row.tolist(), size - 1) for row in ids]


def watch(monkeypatch, model):
    """Sizes of what the head gives, and how often the body runs."""
    sizes, runs = [], []
    head, body = model.get_output_embeddings(), model.base_model
    head.register_forward_hook(lambda m, i, output: sizes.append(output.numel()))
    layer = next(m for m in body.modules() if isinstance(m, torch.nn.ModuleList))[0]
    layer.register_forward_hook(lambda m, i, output: runs.append(1))
    return sizes, runs


EVERY = sorted({*EXACT, *OTHERS, "bloom"})
SOME = ("cohere", "gemma2", "gpt2", "llama", "mamba", "opt")


@pytest.mark.parametrize(
    "architecture", [a if a in SOME else pytest.param(a, marks=pytest.mark.slow) for a in EVERY]
)
def test_the_head_works_in_parts_and_the_body_once(architecture, monkeypatch):
    """Logit scaling (Cohere) and soft caps (Gemma 2) stand behind the head and work on parts."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 512 * 8)
    model, rows = build(architecture), windows()
    sizes, runs = watch(monkeypatch, model)
    found = score_rows(model, rows, batch_tokens=40, batching="padded")
    assert max(sizes) <= 512 * 8 and len(sizes) == 5 + 3  # 38 places, then 19
    assert len(runs) == 2
    assert "forward" not in model.base_model.__dict__
    for row, own in zip(rows, found, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model, row), abs=2e-4)


class WithoutHead(torch.nn.Module):
    """Multiplies with the head's weight by itself, so that no hook sees what the head is given."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model()
        self.config, self.device, self.dtype = (
            getattr(self.inner, name) for name in ("config", "device", "dtype")
        )
        self.calls = 0

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        self.calls += 1
        states = self.inner.model(**inputs).last_hidden_state
        weight = self.inner.lm_head.weight
        return type("Output", (), {"logits": torch.nn.functional.linear(states, weight)})


@pytest.mark.parametrize("at_once", [512 * 8, 1 << 24])
def test_a_model_that_never_calls_its_head_is_scored_from_all_its_logits(monkeypatch, at_once):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    model, rows = WithoutHead().eval(), windows()
    found = score_rows(model, rows, batching="padded")
    for row, own in zip(rows, found, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model.inner, row), abs=2e-4)
    assert model.calls == 1


class Bare(torch.nn.Module):
    """Blocks and a head in one module."""

    def __init__(self):
        super().__init__()
        inner = tiny_model("gpt2")
        self.config, self.device, self.dtype = inner.config, inner.device, inner.dtype
        self.embed, self.head, self.h = inner.transformer.wte, inner.lm_head, inner.transformer.h
        self.sizes = []
        self.head.register_forward_hook(lambda m, i, output: self.sizes.append(output.numel()))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        states = self.embed(input_ids)
        for block in self.h:
            states = block.mlp(block.ln_2(states)) + states
        return type("Output", (), {"logits": self.head(states)})


def test_a_model_without_a_body_of_its_own_runs_once_with_the_whole_head(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 512 * 8)
    model, rows = Bare().eval(), windows()
    found = score_rows(model, rows, batching="padded")
    assert model.sizes == [3 * 19 * 512]
    assert found[2].loglikelihood == pytest.approx(brute(model, rows[2]), abs=2e-4)


def test_greedy_is_the_first_of_equals():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    first, other = score_rows(model, [Row([5, 6, 0], 1), Row([5, 6, 9], 1)])
    assert first.is_greedy and not other.is_greedy
    assert other.loglikelihood == pytest.approx(-np.log(512), abs=1e-6)


def test_a_row_asked_for_twice_is_run_once(monkeypatch):
    model, seen = tiny_model(), []
    rows = [Row([1, 5, 6, 7], 2), Row([1, 5, 6, 7], 2), Row([1, 5, 6, 8], 1)]
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"]) or inner(**k))
    found = score_rows(model, rows)
    assert [ids.tolist() for ids in seen] == [[[1, 5, 6]]]
    assert found[0] == found[1]


def test_a_model_may_bring_a_forward_that_reads_all_batches_first():
    model, order = tiny_model(), []

    def own(model, batches):
        batches = list(batches)
        order.append(len(batches))
        yield from logits_of(model, batches)

    rows = questions()
    with on_threads(2):  # what is given is called for one batch after the other
        expected = score_rows(model, rows, batch_tokens=64, batching="shared")
        found = score(model, PackedRows(rows), batch_tokens=64, forward=own)
    assert found.details["batches_at_once"] == 1
    assert found.scores == expected and order[-1] > 1


def test_logits_that_are_missing_are_an_error():
    def half(model, batches):
        for parts in logits_of(model, batches):
            yield [part[:1] for part in parts]

    with pytest.raises(ValueError, match="logits for"):
        score_rows(tiny_model(), windows(), forward=half)


def small_memory(most, error):
    def forward(model, batches):
        for batch in batches:
            if batch.ids.numel() > most:
                raise error
            yield from logits_of(model, [batch])

    return forward


LACKING = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("batching", "error"),
    [*(("shared", error) for error in LACKING), ("padded", LACKING[0])],
)
def test_where_memory_is_lacking_the_budget_is_halved_and_nothing_is_lost(batching, error):
    model, packed, seen = tiny_model(), PackedRows(questions()), []
    expected = score(model, packed, 200, batching)
    found = score(
        model, packed, 200, batching, lambda *x: seen.append(x), forward=small_memory(50, error)
    )
    assert [s.is_greedy for s in found.scores] == [s.is_greedy for s in expected.scores]
    np.testing.assert_allclose(
        [s.loglikelihood for s in found.scores],
        [s.loglikelihood for s in expected.scores],
        atol=1e-5,
    )
    assert expected.details["oom_halvings"] == 0 and expected.details["batch_tokens"] == 200
    assert found.details["oom_halvings"] >= 1 and found.details["batch_tokens"] <= 100
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_batches_are_planned_once_for_all_models(monkeypatch):
    packed, planned, plan = PackedRows(questions()), [], packing._plan
    monkeypatch.setattr(packing, "_plan", lambda *args: planned.append(args[2]) or plan(*args))
    assert score(tiny_model(), packed).details["batching"] == "shared"
    assert "shared" in planned
    before = planned.copy()
    again = tiny_model(seed=1)
    known = sharing.Sharing(True, "exact", 1 << 20, 1 << 20)
    score(again, packed, sharing=known)
    assert planned == before


def test_a_forward_that_knows_nothing_of_scales_over_each_row_gets_one_at_a_time():
    model, packed, sizes = tiny_model(), PackedRows(questions()), set()
    quantize_model(model, "absmax", "W8A4:a=tensor")

    def plain(model, batches):
        for batch in batches:
            sizes.add(len(batch.ids))
            yield [model(**batch.inputs(model.device, model.dtype)).logits[0, batch.wanted]]

    found = score(model, packed, forward=plain)
    assert found.details["batching"] == "one row" and sizes == {1}
    expected = score(model, packed)
    assert expected.details["batching"] == "unshared"
    np.testing.assert_allclose(
        [s.loglikelihood for s in found.scores],
        [s.loglikelihood for s in expected.scores],
        atol=1e-3,
    )


def test_halved_batches_of_a_model_with_scales_per_tensor_keep_each_row_its_scales(monkeypatch):
    model, packed = tiny_model(), PackedRows(questions())
    quantize_model(model, "absmax", "W8A4:a=tensor")
    expected = score(model, packed, 200)
    inner = model.forward

    def small(**inputs):
        if inputs["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(**inputs)

    monkeypatch.setattr(model, "forward", small)
    found = score(model, packed, 200)
    assert found.details["batching"] == expected.details["batching"] == "unshared"
    assert found.details["oom_halvings"] >= 1 and expected.details["oom_halvings"] == 0
    np.testing.assert_allclose(
        [s.loglikelihood for s in found.scores],
        [s.loglikelihood for s in expected.scores],
        atol=1e-3,
    )


def test_one_row_that_does_not_fit_is_a_run_that_failed():
    memory = small_memory(10, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        RunFailed, match=r"one row of \d+ tokens does not fit into the memory of cpu"
    ):
        score_rows(tiny_model(), questions(), batching="padded", forward=memory)


def test_other_errors_of_a_model_are_not_taken_for_lacking_memory():
    broken = small_memory(10, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        score_rows(tiny_model(), questions(), batching="padded", forward=broken)


def test_a_batching_nobody_knows_is_an_error():
    with pytest.raises(QBenchError, match="unknown batching 'sharde'; did you mean 'shared'"):
        score_rows(tiny_model(), windows(), batching="sharde")


def test_nothing_stays_on_a_model_whose_logits_did_not_fit(monkeypatch):
    """What memory is lacking for may be the scores, while the forward waits with its hooks on."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 512 * 8)
    model, rows, failed = build("llama"), windows(), []
    inner = scoring._of_tokens

    def first_fails(*args):
        failed.append(1)
        if len(failed) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args)

    monkeypatch.setattr(scoring, "_of_tokens", first_fails)
    found = score(model, PackedRows(rows), 60, "padded")
    assert found.details["oom_halvings"] == 1 and "forward" not in model.model.__dict__
    assert not model.lm_head._forward_pre_hooks
    for row, own in zip(rows, found.scores, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model, row), abs=2e-4)
