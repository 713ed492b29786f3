"""The methods among themselves: theorems, counter-examples, and what their options do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import qbench_baselines.quip as quip
from qbench import (
    QBenchError,
    Scheme,
    Statistics,
    get_grid,
    quantize_model,
    round_to_nearest,
)
from qbench.baseline import resolve_scheme
from qbench.registry import load_baseline
from qbench.testing import tiny_model, tiny_windows
from qbench_baselines.absmax import Absmax
from qbench_baselines.gptq import GPTQ
from qbench_baselines.none import NoQuantization
from qbench_baselines.quip import QuIP
from qbench_baselines.smoothquant import SmoothQuant


@pytest.fixture(scope="module")
def layer_case():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=generator)
    mixing = torch.randn(48, 48, generator=generator) / 48**0.5
    x = torch.randn(16, 32, 48, generator=generator) @ (torch.eye(48) + mixing)
    stats = Statistics(("hessian",))
    stats.update(x)
    return weight, stats


def optimal_brain_quantizer(target, hessian, encode):
    """GPTQ as 2210.17323 eq. 2-3 derive it, with the inverse of what is left, in float64."""
    target, inverse = target.double().clone(), hessian.double().inverse()
    codes = torch.empty_like(target)
    for j in range(target.shape[1]):
        codes[:, j] = encode(target[:, j])
        error = (target[:, j] - codes[:, j]) / inverse[j, j]
        target[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes


def unit_factor(hessian):
    """L of H = L D Lᵀ."""
    factor = torch.linalg.cholesky(hessian)
    return factor / factor.diagonal()


def test_ldlq_is_gptq_on_reversed_columns(layer_case):
    """QuIP 2307.13304 Theorem 6, on a grid without ends; random weights have no ties."""
    weight, stats = layer_case
    hessian = stats.hessian.double() + 0.01 * torch.eye(48)
    expected = optimal_brain_quantizer(weight.flip(1) * 4, hessian.flip(0, 1), torch.round)
    found = quip.ldlq(weight.double() * 4, unit_factor(hessian), quip.Limits(-(10**6), 10**6))
    assert torch.equal(found, expected.flip(1))
    assert not torch.equal(found, (weight.double() * 4).round())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_the_papers_recursion(bits, layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse(f"W{bits}A16:w=tensor,grid=asym")
    found = GPTQ(block_size=16).quantize_weight(weight, scheme, stats, torch.Generator())
    hessian = stats.hessian.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    scale, zero = float(found.scale), float(found.zero_point)
    codes = optimal_brain_quantizer(
        weight / scale, hessian, lambda x: x.round().clamp(-zero, 2**bits - 1 - zero)
    )
    assert (found.codes == codes + zero).float().mean() > 0.998


def released_gptq(weight, hessian, scheme, block_size, act_order, static_groups, fresh_groups):
    """The order of steps of the released code, with the inverse and its factor, in float64."""
    grid, bits, size = get_grid(scheme.grid), scheme.wbits, scheme.group_size
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    groups = [grid.fit(part, bits) for part in weight.split(size, 1)]
    order = torch.arange(weight.shape[1])
    if act_order:
        order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)
    codes = torch.empty_like(weight)
    for start in range(0, len(order), block_size):
        stale = weight.clone()
        for k in range(start, min(start + block_size, len(order))):
            if static_groups:
                affine = groups[order[k] // size]
            elif k % size == 0:
                affine = grid.fit((weight if fresh_groups else stale)[:, k : k + size], bits)
            codes[:, k : k + 1] = grid.encode(weight[:, k : k + 1], affine, bits)
            values = grid.decode(codes[:, k : k + 1], affine)
            error = (weight[:, k : k + 1] - values) / upper[k, k]
            weight[:, k:] -= error * upper[k, k:]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("group", [4, 6, 12, 24, 48])
@pytest.mark.parametrize("block_size", [5, 12, 16, 128])
@pytest.mark.parametrize(
    "fields",
    [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"fresh_groups": True}],
    ids=str,
)
def test_groups_are_fitted_when_the_released_code_fits_them(fields, block_size, group, layer_case):
    """Groups within a block, across blocks, and of several blocks; one input is dead."""
    weight, full = layer_case
    hessian = full.hessian.clone()
    hessian[7] = hessian[:, 7] = 0
    stats = SimpleNamespace(hessian=hessian, cached=lambda key, compute: compute())
    scheme = Scheme.parse(f"W3A16g{group}:grid=asym")
    options = {"act_order": False, "static_groups": False, "fresh_groups": False} | fields
    expected = released_gptq(weight, hessian, scheme, block_size, **options)
    method = GPTQ(block_size=block_size, **fields)
    found = method.quantize_weight(weight, scheme, stats, torch.Generator())
    assert (found.codes == expected).float().mean() > 0.995


def test_rows_quantized_together_are_rows_quantized_alone(layer_case):
    """Linears that read one input may be stacked; only the order of sums may differ."""
    weight, stats = layer_case
    for text in ("W3A16:w=channel,grid=asym", "W3A16g16:grid=gptq_sym"):
        whole, *parts = (
            GPTQ().quantize_weight(rows, Scheme.parse(text), stats, torch.Generator())
            for rows in (weight, *weight.split([1, 5, 18]))
        )
        same = whole.codes == torch.cat([part.codes for part in parts])
        assert same.float().mean() > 0.999
        assert torch.allclose(whole.scale, torch.cat([part.scale for part in parts]), rtol=1e-4)


def test_greedy_passes_in_blocks_are_coordinate_descent_column_by_column(layer_case):
    """As released: the error is kept up within a pass, codes are clamped after it."""
    weight, stats = layer_case
    hessian = stats.hessian.double() + 0.1 * torch.eye(48)
    target = weight.double() * 4
    limits = quip.Limits(-8, 7)
    codes = limits.round(target)
    expected, error = codes.clone(), codes - target
    for _ in range(3):
        for k in reversed(range(48)):
            pull = error @ hessian[:, k] / hessian[k, k]
            moved = torch.floor(expected[:, k] - pull + 0.5)
            error[:, k] += moved - expected[:, k]
            expected[:, k] = moved
        expected.clamp_(-8, 7)
    assert not torch.equal(expected, codes)
    for size in (1, 7, 48):
        found = quip.greedy(codes, target, hessian, limits, passes=3, block_size=size)
        assert torch.equal(found, expected)


def test_ldlq_in_blocks_is_ldlq_in_one_block(layer_case):
    weight, stats = layer_case
    factor = unit_factor(stats.hessian + 0.1 * torch.eye(48))
    limits = quip.Limits(-8, 7)
    whole = quip.ldlq(weight * 4, factor, limits, block_size=48)
    for size in (1, 7, 16, 128):
        assert (quip.ldlq(weight * 4, factor, limits, size) == whole).float().mean() > 0.999


def counter_example(n, c=0.01):
    """QuIP's released counter-example: H and W, in code units, for a finite grid."""
    hessian = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    hessian[n - 1, n - 1] = 1
    hessian[0, 1 : n - 1] += 2 * c
    hessian[1 : n - 1, 0] += 2 * c
    hessian[0, n - 1] += c
    hessian[n - 1, 0] += c
    hessian[0, 0] += 4 * c + n * c**2
    weight = 0.499 + 0.002 * (torch.arange(n, dtype=torch.float64) % 2)
    return weight[None], hessian


def test_on_a_finite_grid_ldlq_can_lose_to_nearest_rounding():
    """QuIP section 5.2: the optimality of LDLQ holds only while nothing is clamped."""
    weight, hessian = (part.flip(-1) for part in counter_example(64))
    hessian = hessian.flip(0)  # the example walks from the first column to the last
    factor = unit_factor(hessian)

    def loss(codes):
        return float(((weight - codes) @ hessian * (weight - codes)).sum())

    clamped, free = quip.Limits(0, 15), quip.Limits(-1000, 1000)
    nearest = loss(clamped.round(weight.clone()))
    assert loss(quip.ldlq(weight, factor, clamped)) > 50 * nearest
    assert loss(quip.ldlq(weight, factor, free)) < nearest


@pytest.mark.parametrize(("group", "differs"), [(8, True), (16, False), (48, False)])
def test_fresh_groups_differ_only_where_a_group_begins_inside_a_block(group, differs, layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse(f"W3A16g{group}:grid=asym")
    frozen, fresh = (
        GPTQ(block_size=16, fresh_groups=flag).quantize_weight(
            weight, scheme, stats, torch.Generator()
        )
        for flag in (False, True)
    )
    assert torch.equal(frozen.weight, fresh.weight) is not differs


@pytest.mark.parametrize("block_size", [1, 5, 48, 1000])
def test_the_block_size_of_gptq_changes_no_result_without_groups(block_size, layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse("W3A16:w=channel,grid=asym")
    reference = GPTQ(block_size=16).quantize_weight(weight, scheme, stats, torch.Generator())
    found = GPTQ(block_size=block_size).quantize_weight(weight, scheme, stats, torch.Generator())
    assert (found.codes == reference.codes).float().mean() > 0.999


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (GPTQ(block_size=0), "GPTQ block_size=0"),
        (GPTQ(percdamp=-0.1), "percdamp=-0.1"),
        (QuIP(rounding="ldql"), "QuIP has no 'ldql'; choose one of"),
        (QuIP(rotation="none"), "QuIP has no 'none'; choose one of"),
        (QuIP(greedy_passes=-1), "greedy_passes=-1"),
        (SmoothQuant(alpha=7.0), "SmoothQuant alpha=7 is outside 0"),
    ],
    ids=repr,
)
def test_hyperparameters_out_of_range_are_refused_before_anything_changes(method, said):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QBenchError, match=said):
        quantize_model(model, method, "W4A16", tiny_windows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fields", [{}, {"act_order": True}, {"static_groups": True}])
@pytest.mark.parametrize("text", ["W3A16:w=channel,grid=asym", "W3A16g16:grid=asym"])
def test_codes_scales_and_group_index_rebuild_gptqs_weights(fields, text, layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse(text)
    found = GPTQ(**fields).quantize_weight(weight, scheme, stats, torch.Generator())
    groups = torch.arange(48) // scheme.group_size if scheme.group_size > 0 else torch.zeros(48)
    index = (found.g_idx if found.g_idx is not None else groups).long()
    rebuilt = found.scale[:, index] * (found.codes - found.zero_point[:, index])
    assert torch.allclose(rebuilt, found.weight, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"act_order": True}, {"mse": True}])
def test_feedback_beats_rounding_to_nearest_where_it_is_meant_to(fields, layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse("W3A16:w=channel,grid=asym")

    def loss(found):
        delta = weight - found.weight
        return float((delta @ stats.hessian * delta).sum())

    nearest = loss(round_to_nearest(weight, scheme, mse=bool(fields.get("mse"))))
    assert loss(GPTQ(**fields).quantize_weight(weight, scheme, stats, torch.Generator())) < nearest


def test_quip_stores_codes_one_scale_and_the_rescaling_vector(layer_case):
    weight, stats = layer_case
    scheme = Scheme.parse("W2A16:w=tensor,grid=rms")

    def stored(**fields):
        generator = torch.Generator().manual_seed(0)
        return QuIP(**fields).quantize_weight(weight, scheme, stats, generator).stored_bits

    assert stored() == 24 * 48 * 2 + 16 * (1 + 48)
    assert stored(rescale=False) == 24 * 48 * 2 + 16


@pytest.mark.parametrize("rotation", quip.ROTATIONS)
@pytest.mark.parametrize("size", [1, 2, 7, 12, 48, 96])
def test_quips_rotations_are_orthogonal_and_undone(rotation, size):
    turned = quip.Rotation.draw(
        size, torch.Generator().manual_seed(0), shared=rotation == "kronecker"
    )
    dense = turned.turn(torch.eye(size))
    assert torch.allclose(dense @ dense.T, torch.eye(size), atol=1e-5)
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(turned.turn_back(turned.turn(x)), x, atol=1e-5)
    p, q = quip.two_factors(size)
    assert p * q == size


def test_quip_without_rotation_rounds_rows_as_they_are():
    """QuIP as released: 'a' is per row; with incoherence there is one scale."""
    assert resolve_scheme(Scheme(wbits=4), QuIP(incoherence=False)).w_granularity == "channel"
    assert resolve_scheme(Scheme(wbits=4), QuIP()).w_granularity == "tensor"


def test_the_none_baseline_and_absmax_are_what_they_say():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert NoQuantization().quantize_weight(weight, Scheme(), Statistics(), None) is weight
    scheme = resolve_scheme(Scheme(wbits=8), Absmax())
    found = Absmax().quantize_weight(weight, scheme, Statistics(), None).weight
    top = weight.abs().max()
    assert torch.allclose(found, (weight * 127 / top).round() * top / 127, atol=1e-6)
    assert load_baseline("none").instance == NoQuantization()
