"""Products in oneDNN are the products of torch, and only those that gain by it go there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbench import quantize_model
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.scoring import score_rows
from qbench.evaluation.sharing import sharing_of
from qbench.models import products
from qbench.models.products import fast_products, has_onednn
from qbench.study.environment import environment
from qbench.testing import tiny_model, tiny_windows

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="torch without oneDNN on x86")


class Blocks(nn.Module):
    """A list of blocks with one matrix each."""

    def __init__(self, width: int, **kind: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, **kind) for _ in range(2))


@pytest.fixture
def sent(monkeypatch):
    """Shapes of what was sent to oneDNN."""
    found: list[tuple[int, ...]] = []
    product = products._product

    def see(x, weight, bias):
        found.append((*x.shape, *weight.shape))
        return product(x, weight, bias)

    has_onednn()  # its trial is none of ours
    monkeypatch.setattr(products, "_product", see)
    return found


@needs_onednn
@pytest.mark.parametrize("shape", [(600, 512), (3, 200, 512)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_in_onednn_is_as_exact_as_float32_can_be(sent, shape, has_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(512, 512, generator=generator)
    bias = torch.randn(512, generator=generator) if has_bias else None
    with torch.no_grad(), fast_products(Blocks(512)):
        ours = F.linear(x, weight, bias)
    assert sent == [(*shape, 512, 512)]
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    # 512 sums in float32; bfloat16 in three parts would be ten times as far off, TF32 a thousand
    assert (ours - exact).norm() <= 5e-7 * exact.norm()


@needs_onednn
@pytest.mark.parametrize(
    "why",
    ["small", "float64", "strided", "gradient", "outside"],
)
def test_other_products_stay_with_torch(sent, why):
    x, weight = torch.ones(600, 512), torch.ones(512, 512)
    if why == "small":
        x = x[:20]
    elif why == "float64":
        x, weight = x.double(), weight.double()
    elif why == "strided":
        weight = weight.T
    elif why == "gradient":
        weight.requires_grad_()
    if why == "outside":
        F.linear(x, weight)
    else:
        with torch.set_grad_enabled(why == "gradient"), fast_products(Blocks(512)):
            y = F.linear(x, weight)
        if why == "gradient":
            y.sum().backward()
            assert weight.grad is not None
    assert sent == []


@needs_onednn
def test_infinities_and_nans_come_through():
    x, weight = torch.ones(600, 512), torch.ones(512, 512)
    x[0, 0], x[1, 0] = float("inf"), float("nan")
    with torch.no_grad(), fast_products(Blocks(512)):
        y = F.linear(x, weight)
    assert y[0].isposinf().all() and y[1].isnan().all() and (y[2:] == 512).all()


def test_a_small_model_runs_on_one_thread_and_the_threads_come_back(monkeypatch):
    now = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    with fast_products(Blocks(511)):
        assert now == [1]
    assert now == [7]
    with fast_products(Blocks(512)):
        assert now == [7]
    with pytest.raises(ZeroDivisionError), fast_products(Blocks(511)):
        raise ZeroDivisionError
    assert now == [7]


@pytest.mark.parametrize(
    ("what", "width"),
    [
        ("no blocks", 4),
        ("no blocks", 512),
        ("bfloat16", 512),
        *(("another device", n) for n in (4, 512)),
    ],
)
def test_other_models_are_left_alone(monkeypatch, sent, what, width):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("threads were changed"))
    model = Blocks(width, dtype=torch.bfloat16 if what == "bfloat16" else torch.float32)
    if what == "no blocks":
        model = model.blocks[0]
    elif what == "another device":
        monkeypatch.setattr(products, "device_kind", lambda model: "cuda")
    with torch.no_grad(), fast_products(model):
        F.linear(torch.ones(600, 512), torch.ones(512, 512))
    assert sent == []


def test_the_device_of_a_model_whose_blocks_are_on_disk_is_that_of_the_rest():
    model = nn.ModuleList([Blocks(4, device="meta"), nn.Linear(4, 4)])
    assert products.device_kind(model) == "cpu"
    assert products.device_kind(Blocks(4, device="meta")) == "cpu"


def test_a_large_head_makes_a_model_large():
    model = tiny_model("llama", vocab_size=16_384)
    assert products._largest_matrix(model) is model.get_output_embeddings().weight
    small = tiny_model("llama", vocab_size=8)
    assert products._largest_matrix(small) is not small.get_output_embeddings().weight


@needs_onednn
def test_quantizing_scoring_and_the_test_of_sharing_multiply_there(monkeypatch, sent):
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "WORTH_IT", 0)
    model = tiny_model("llama")
    quantize_model(model, "gptq", "W4A16", tiny_windows())
    assert sent
    sent.clear()
    rows = [Row((*range(1, 20), token, 7), 2) for token in (4, 5)]
    score_rows(model, rows, batching="padded")
    assert sent
    sent.clear()
    assert sharing_of(model, PackedRows(rows)).exact
    assert sent


def test_the_environment_tells_the_threads_that_a_model_is_run_with(monkeypatch):
    now = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    assert environment()["threads"] == environment("cpu", Blocks(512))["threads"] == "7"
    assert environment("cpu", Blocks(8))["threads"] == "1"


@needs_onednn
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_model_gives_the_same_logits(monkeypatch, sent, architecture):
    """Whatever way it multiplies: experts in one tensor, and Conv1D, which stays with torch."""
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "WORTH_IT", 0)
    model = tiny_model(architecture)
    ids = torch.arange(24)[None] % model.config.vocab_size
    with torch.no_grad():
        expected = model(ids).logits
        with fast_products(model):
            found = model(ids).logits
    assert sent
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
