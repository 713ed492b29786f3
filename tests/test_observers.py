"""Streaming statistics against brute force in float64, and who shares them."""

from __future__ import annotations

import pytest
import torch

import qbench_baselines.gptq as gptq
from qbench import Baseline, CannotQuantize, QBenchError, Statistics, quantize_model
from qbench.models.blocks import find_blocks, trace_block
from qbench.quantization import factorize
from qbench.quantization.calibration import capture
from qbench.quantization.factorize import (
    damped,
    feedback_factor,
    ladder,
    lower_cholesky,
)
from qbench.quantization.observers import Observer
from qbench.quantization.passes import collect
from qbench.testing import tiny_model, tiny_windows

ALL = ("hessian", "absmax", "mean_abs")


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 20, 16, generator=generator) * torch.logspace(-2, 2, 16)


def seen(batches, wanted=ALL):
    stats = Statistics(wanted)
    for batch in batches:
        stats.update(batch)
    return stats


def test_each_statistic_is_its_definition_in_double_precision(sequences):
    stats, x = seen(sequences.split(1)), sequences.double().flatten(0, 1)
    exact = 2 / 12 * x.T @ x  # GPTQ as released: 2/n over n sequences, not tokens
    size = exact.diagonal().sqrt()
    assert ((stats.hessian - exact).abs() <= 1e-6 * size * size[:, None]).all()
    assert torch.equal(stats.absmax.double(), x.abs().amax(0))
    assert torch.allclose(stats.mean_abs.double(), x.abs().mean(0), rtol=1e-6)
    assert all(stats[name].dtype == torch.float32 for name in ALL)
    assert (stats.n_sequences, stats.n_tokens) == (12, 240)


@pytest.mark.parametrize("size", [2, 5, 12])
def test_streaming_in_any_batches_and_any_order_gives_the_same(sequences, size):
    reference = seen([sequences])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    other = seen(sequences[order].split(size))
    assert torch.equal(other.absmax, reference.absmax)
    for name in ("hessian", "mean_abs"):
        assert torch.allclose(other[name], reference[name], rtol=1e-4, atol=1e-4)
    assert (other.n_sequences, other.n_tokens) == (12, 240)


def test_sequences_of_unequal_length_count_as_one_each():
    long, short = torch.ones(1, 30, 2), torch.ones(1, 10, 2) * 3
    stats = seen([long, short])
    assert torch.allclose(stats.hessian, torch.full((2, 2), 2 / 2 * (30 + 90.0)))
    assert torch.allclose(stats.mean_abs, torch.full((2,), (30 + 30) / 40.0))


def test_flattened_inputs_count_as_one_sequence_unless_the_caller_knows_better(sequences):
    flat = sequences.flatten(0, 1)
    blind, told = Statistics(ALL), Statistics(ALL)
    blind.update(flat)
    told.update(flat, n_sequences=12)
    assert (blind.n_sequences, told.n_sequences) == (1, 12)
    assert torch.allclose(told.hessian, seen([sequences]).hessian)
    assert torch.allclose(blind.hessian, 12 * told.hessian, rtol=1e-4, atol=1)


def test_half_precision_inputs_are_accumulated_in_float32(sequences):
    """A running sum in float16 would stop at 2048, where adding one changes nothing."""
    ones = torch.ones(1, 4099, 1, dtype=torch.float16)
    assert seen([ones]).hessian.item() == pytest.approx(2 * 4099)
    assert seen([ones * 300]).hessian.item() == pytest.approx(2 * 4099 * 90000, rel=1e-4)
    assert seen([sequences.bfloat16()]).absmax.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 255, 257, 600])
def test_a_hessian_of_several_panels_is_the_whole_product_and_symmetric(size):
    x = torch.randn(2, 30, size, generator=torch.Generator().manual_seed(0))
    stats = seen(x[:1], ("hessian",))
    first = stats.hessian.clone()
    stats.update(x[1:])
    for found, part in ((first, x[:1]), (stats.hessian, x)):
        flat = part.double().flatten(0, 1)
        assert torch.equal(found, found.T)
        assert torch.allclose(found.double(), 2 / len(part) * flat.T @ flat, rtol=1e-4, atol=1e-4)


def test_inputs_cast_in_parts_give_what_they_give_at_once():
    """5000 tokens of two sequences are five parts; all values are exact in bfloat16."""
    x = torch.randint(-8, 9, (2, 2500, 5), generator=torch.Generator().manual_seed(0))
    whole, parts = seen([x.float()]), seen([x.bfloat16()])
    assert (parts.n_sequences, parts.n_tokens) == (2, 5000)
    for name in ALL:
        assert torch.equal(parts[name], whole[name])


def test_statistics_of_nothing_are_none():
    stats = Statistics(ALL)
    stats.update(torch.empty(0, 16))
    assert all(stats[name] is None for name in ALL)
    assert stats.n_tokens == stats.n_sequences == 0


def test_updating_never_touches_the_input(sequences):
    before = sequences.clone()
    seen(sequences.split(3))
    assert torch.equal(sequences, before)


def test_a_statistic_that_was_not_collected_says_how_to_get_it():
    stats = Statistics(("absmax",))
    assert "absmax" in stats and "hessian" not in stats
    with pytest.raises(AttributeError, match="'hessian' was not collected .*absmax.*weight_stat"):
        _ = stats.hessian


def test_an_unknown_statistic_is_refused_with_the_nearest_names():
    with pytest.raises(QBenchError, match="unknown statistic 'hesian'; did you mean 'hessian'"):
        Statistics(("hesian",))


def test_a_plugins_own_observer_is_collected_under_its_name(sequences):
    class Variance(Observer):
        name = "variance"

        def __init__(self):
            self.squares = 0

        def update(self, x, n_sequences):
            self.squares = self.squares + x.square().sum(0)

        def result(self):
            return self.squares

    stats = seen(sequences.split(4), (Variance, "absmax"))
    assert torch.allclose(stats.variance, sequences.square().sum((0, 1)), rtol=1e-4)
    assert torch.equal(stats["variance"], stats.variance)


def test_something_cached_is_computed_once_until_new_data_arrive(sequences):
    stats, calls = seen([sequences]), []

    def compute():
        calls.append(1)
        return object()

    first = stats.cached("factor", compute)
    assert stats.cached("factor", compute) is first
    assert stats.cached("another", compute) is not first
    stats.update(sequences)
    assert stats.cached("factor", compute) is not first
    assert len(calls) == 3


# --- inside a model ------------------------------------------------------------------------------


def first_block(model, windows, batch_size=1):
    with torch.no_grad():
        captured = capture(model, windows, batch_size)
        name, module = find_blocks(model)[0]
        block, _ = trace_block(name, module, captured.runner(name, module), captured.hidden[0])
    return block, captured.hidden


def inputs_of(model, name, windows):
    """What enters one module, by a plain hook over plain forward passes."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_collected_in_a_block_is_what_plain_hooks_see(architecture, batch_size):
    """OPT flattens (sequences, tokens) in front of its MLP; the count of sequences survives."""
    model, windows = tiny_model(architecture), tiny_windows(6, 12)
    block, hidden = first_block(model, windows, batch_size)
    with torch.no_grad():
        stats, outputs = collect(block, list(block.linears), ALL, hidden)
    assert [len(o) for o in outputs] == [len(h) for h in hidden]
    for name in block.linears:
        x = inputs_of(model, f"{block.name}.{name}", windows)
        assert stats[name].n_sequences == 6
        assert torch.allclose(stats[name].absmax.double(), x.abs().amax(0), rtol=1e-4)
        exact = 2 / 6 * x.T @ x
        error = (stats[name].hessian - exact).abs().max() / exact.abs().max()
        assert error < 1e-5


def test_linears_with_one_input_share_one_statistics_object():
    block, hidden = first_block(tiny_model(), tiny_windows(2, 12))
    with torch.no_grad():
        stats, _ = collect(block, list(block.linears), ALL, hidden)
    q, k, v = (stats[f"self_attn.{n}_proj"] for n in "qkv")
    assert q is k is v
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert len({id(s) for s in stats.values()}) == 4
    assert q.n_sequences == 2  # seen once, not once for every reader


def test_a_stage_of_some_linears_still_shares_what_they_read():
    block, hidden = first_block(tiny_model(), tiny_windows(2, 12))
    with torch.no_grad():
        stats, _ = collect(block, ["self_attn.v_proj", "self_attn.k_proj"], ALL, hidden)
    assert set(stats) == {"self_attn.v_proj", "self_attn.k_proj"}
    assert stats["self_attn.v_proj"] is stats["self_attn.k_proj"]
    assert stats["self_attn.v_proj"].n_sequences == 2


def test_gptq_factorizes_one_hessian_per_shared_input(monkeypatch):
    calls = []
    factorize = gptq.lower_cholesky
    monkeypatch.setattr(gptq, "lower_cholesky", lambda *args: calls.append(1) or factorize(*args))
    result = quantize_model(tiny_model(), "gptq", "W4A16", tiny_windows(4, 24))
    assert len(result.layers) == 14 and len(calls) == 8  # two blocks of seven, four inputs each


def test_the_base_class_asks_for_no_statistics():
    assert Baseline.transform_statistics == Baseline.weight_statistics == ()


# --- factorization -------------------------------------------------------------------------------


@pytest.fixture
def hessian():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    return x.T @ x


def test_factors_are_those_of_the_damped_hessian(hessian):
    exact = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(8)
    lower, damping = lower_cholesky(hessian, 0.01)
    assert damping == 0.01
    assert torch.allclose((lower @ lower.T).double(), exact, rtol=1e-4, atol=1e-4)
    unit, damping = feedback_factor(hessian, 0.01)
    assert torch.allclose(unit, lower / lower.diagonal()) and damping == 0.01
    assert (unit.diagonal() == 1).all()


def test_a_factor_can_be_asked_for_in_another_order_of_the_inputs(hessian):
    """In reversed order it is GPTQ's: its U, UᵀU = H⁻¹, is the inverse of what this turns into."""
    order = torch.arange(7, -1, -1)
    lower = lower_cholesky(hessian, 0.01, order).matrix.double()
    exact = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(8)
    assert torch.allclose(lower @ lower.T, exact[order][:, order], rtol=1e-4, atol=1e-4)
    upper = torch.linalg.cholesky(exact.inverse(), upper=True)
    assert torch.allclose(lower.flip(0, 1).inverse(), upper, rtol=1e-3, atol=1e-5)


def test_an_input_that_never_fires_counts_as_one_on_the_diagonal(hessian):
    """As released: it enters the mean diagonal that damping is a share of."""
    hessian[3] = hessian[:, 3] = 0
    living = hessian.diagonal().sum() + 1
    assert damped(hessian, 0.5)[3, 3] == 1 + 0.5 * living / 8
    assert lower_cholesky(hessian, 0.0).damping == 0.0


def test_damping_leaves_the_hessian_itself_alone(hessian):
    before = hessian.clone()
    damped(hessian, 0.5)
    lower_cholesky(hessian, 0.01)
    feedback_factor(hessian, 0.01, torch.arange(7, -1, -1))
    assert torch.equal(hessian, before)


def test_the_factor_takes_the_place_of_the_one_copy(hessian, monkeypatch):
    """A hessian of 5504 inputs is 121 MB; a streamed run has no room for a third one."""
    copies, damp = [], damped
    monkeypatch.setattr(factorize, "damped", lambda *args: copies.append(damp(*args)) or copies[-1])
    assert lower_cholesky(hessian, 0.01).matrix.data_ptr() == copies[0].data_ptr()
    assert len(copies) == 1


def test_a_hessian_with_a_negative_direction_climbs_the_ladder(hessian):
    """Smallest eigenvalue -0.05 of the mean diagonal: 1 % damping fails, 10 % is enough."""
    values, vectors = torch.linalg.eigh(hessian.double())
    mean = float(hessian.diagonal().mean())
    values[0] = -0.05 * mean
    broken = (vectors * values @ vectors.T).float()
    for factor in (lower_cholesky, feedback_factor):
        assert factor(broken, 0.01).damping == pytest.approx(0.1)
        assert factor(broken, 0.2).damping == 0.2


@pytest.mark.parametrize("factor", [lower_cholesky, feedback_factor])
def test_what_no_damping_can_mend_is_declined_with_the_reason(factor, hessian):
    with pytest.raises(CannotQuantize, match="not positive definite even with damping 1"):
        factor(-hessian, 0.01)
    hessian[2, 3] = float("nan")
    with pytest.raises(CannotQuantize, match="the hessian is not finite"):
        factor(hessian, 0.01)


@pytest.mark.parametrize(
    ("percdamp", "rungs"),
    [
        (0.01, [0.01, 0.1, 1.0]),
        (0.0, [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0]),
        (0.5, [0.5, 5.0]),
        (3.0, [3.0]),
    ],
)
def test_the_ladder_starts_at_what_was_asked_and_ends_at_the_whole_mean_diagonal(percdamp, rungs):
    assert ladder(percdamp) == pytest.approx(rungs)
