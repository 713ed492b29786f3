"""Grids against closed forms, brute force and the relative errors measured on other toolkits."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from registered import built_in

from qbench.baseline import resolve_scheme
from qbench.errors import QBenchError
from qbench.grid import (
    GRIDS,
    Affine,
    QuantizedWeight,
    check_group_size,
    default_activation_grid,
    get_grid,
    round_to_nearest,
    rows_of,
    search_clip,
    stored_bits,
)
from qbench.scheme import WEIGHT_BITS, Scheme

README = Path(__file__).parent.parent / "README.md"

OFFERED = [
    (name, bits)
    for name, grid in GRIDS.items()
    for bits in WEIGHT_BITS
    if bits < 16 and grid.offers(bits)
]
PAIRS = pytest.mark.parametrize(("name", "bits"), OFFERED)


@pytest.fixture(scope="module")
def rows():
    """Rows of every kind: centred, shifted, positive, negative, sparse, tiny, heavy-tailed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 40, generator=generator)
    x[1] += 3
    x[2] = x[2].abs() + 0.1
    x[3] = -x[3].abs() - 0.1
    x[4, 5:] = 0
    x[5] *= 1e-20
    x[6, 7] = 60.0
    x[7] *= 1e15
    return x


def closed_form(name, row, bits):
    """Every level of a row, in float64, from the formulas as papers and codes print them."""
    row = row.double()
    absmax, mean = row.abs().max().item(), row.abs().mean().item()
    half = 2 ** (bits - 1)
    if name == "restricted":  # SmoothQuant fake_quant.py: q_max = 2^(b-1) - 1
        return [absmax * k / (half - 1) for k in range(-int(half) + 1, int(half))]
    if name == "bitnet":  # 2310.11453 eq. 4 with Q_b = 2^(b-1) and rounding
        return [absmax * k / half for k in range(-int(half), int(half) + 1)]
    if name == "gptq_sym":  # quant.py: xmin = -xmax only where the row has a negative value
        span = 2 * absmax if row.min() < 0 else absmax
        return [span / (2**bits - 1) * k for k in range(-int(half), int(half))]
    if name == "full":
        return [absmax * k / half for k in range(-int(half), int(half))]
    if name == "asym":  # quant.py: range includes zero, zero point rounded
        low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        return [step * (k - zero) for k in range(2**bits)]
    if name == "rms":  # QuIP 2307.13304 Algorithm 1 line 6, rho = 2.4
        top = 2.4 * row.square().mean().sqrt().item()
        return [top * (2 * k / (2**bits - 1) - 1) for k in range(2**bits)]
    if name == "sign":  # 2310.11453 eq. 12
        return [-mean, mean]
    assert name == "ternary"  # 2402.17764
    return [-mean, 0.0, mean]


@PAIRS
def test_values_are_the_nearest_of_the_closed_form_levels(name, bits, rows):
    found = GRIDS[name].fake_quantize(rows, bits).double()
    for row, rounded in zip(rows, found, strict=True):
        levels = torch.tensor(closed_form(name, row, bits), dtype=torch.float64)
        size = levels.abs().max()
        distance = (rounded[:, None] - levels).abs().amin(1)
        assert (distance <= 1e-5 * size).all(), "not on the grid"
        nearest = (row.double()[:, None] - levels).abs().amin(1)
        assert ((row.double() - rounded).abs() <= nearest + 1e-5 * size).all(), "not the nearest"


@PAIRS
def test_levels_counts_the_codes_and_no_row_has_more_values(name, bits, rows):
    grid = GRIDS[name]
    assert grid.levels(bits) == len(closed_form(name, rows[0], bits))
    for row in grid.fake_quantize(rows, bits):
        assert len(row.unique()) <= grid.levels(bits)


@PAIRS
def test_results_are_finite_and_no_row_vanishes(name, bits, rows):
    found = GRIDS[name].fake_quantize(rows, bits)
    assert torch.isfinite(found).all()
    assert found.any()
    if not (name in ("asym", "gptq_sym", "full") and bits <= 2):  # these may clip a row away
        assert found.any(1).all()


@PAIRS
def test_rows_of_zeros_have_a_positive_scale_and_stay_zero(name, bits):
    zeros = torch.zeros(3, 8)
    affine = GRIDS[name].fit(zeros, bits)
    assert torch.isfinite(affine.scale).all() and (affine.scale > 0).all()
    assert GRIDS[name].fake_quantize(zeros, bits).abs().max() < 1e-30
    mixed = torch.stack(
        [torch.zeros(8), torch.randn(8, generator=torch.Generator().manual_seed(0))]
    )
    assert GRIDS[name].fake_quantize(mixed, bits)[0].abs().max() < 1e-30


@PAIRS
def test_codes_are_whole_numbers_in_range_even_for_values_far_outside_the_fit(name, bits, rows):
    grid = GRIDS[name]
    affine = grid.fit(rows, bits)
    codes = grid.encode(rows * 1e6, affine, bits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.qmin(bits) and codes.max() <= grid.qmax(bits)


@PAIRS
def test_rounding_twice_on_one_grid_changes_nothing(name, bits, rows):
    grid = GRIDS[name]
    affine = grid.fit(rows, bits)
    once = grid.encode(rows, affine, bits)
    assert torch.equal(grid.encode(grid.decode(once, affine), affine, bits), once)


@pytest.mark.parametrize(
    ("name", "bits"), [p for p in OFFERED if p[0] in ("restricted", "bitnet", "asym", "sign")]
)
def test_grids_that_keep_their_extremes_are_idempotent(name, bits, rows):
    """The others refit: their scale is no function of values that rounding leaves alone."""
    once = GRIDS[name].fake_quantize(rows, bits)
    assert torch.allclose(GRIDS[name].fake_quantize(once, bits), once, rtol=1e-4, atol=0)


@PAIRS
def test_scaling_the_values_scales_the_result(name, bits, rows):
    """By a power of two, so that not one rounding moves."""
    found = GRIDS[name].fake_quantize(rows[:5] * 4, bits)
    assert torch.equal(found, GRIDS[name].fake_quantize(rows[:5], bits) * 4)


def test_grids_without_zero_never_give_zero():
    x = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    for name in ("rms", "sign"):
        for bits in (1, 2, 3, 4):
            if GRIDS[name].offers(bits):
                assert GRIDS[name].fake_quantize(x, bits).abs().min() > 0


def test_zero_goes_to_minus_on_the_sign_grid_as_bitnet_eq_2_has_it():
    found = GRIDS["sign"].fake_quantize(torch.tensor([[0.0, 3.0, -1.0]]), 1)
    assert torch.allclose(found, torch.tensor([[-4 / 3, 4 / 3, -4 / 3]]))


def test_a_row_without_negatives_saturates_on_gptq_sym_as_in_the_released_code():
    """quant.py widens (0, max) to (-max, max) only if some value is below zero."""
    found = GRIDS["gptq_sym"].fake_quantize(torch.tensor([[1.0, 2.0, 15.0]]), 4)
    assert found.tolist() == [[1.0, 2.0, 7.0]]


def test_half_precision_is_rounded_in_float32_and_double_in_double():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single = GRIDS["asym"].fake_quantize(x, 8)
    assert single.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        y = x.to(dtype)
        found = GRIDS["asym"].fake_quantize(y, 8)
        assert found.dtype == dtype
        assert torch.equal(found, GRIDS["asym"].fake_quantize(y.float(), 8).to(dtype))


def test_grids_never_write_into_their_input(rows):
    before = rows.clone()
    for name, bits in OFFERED:
        GRIDS[name].fake_quantize(rows, bits)
        search_clip(GRIDS[name], rows, bits)
    assert torch.equal(rows, before)


# Relative MSE of Gaussian 256 x 1024 weights, one scale per row, of SmoothQuant, LLMC and brevitas
# (restricted), GPTQ and torchao (gptq_sym, asym), brevitas without narrow_range (full), QuIP (rms,
# one scale), BitNet eq. 4 (bitnet); all run at the released versions. Two to three digits each.
MEASURED = {
    "restricted": {8: 6.21e-5, 4: 0.0205, 3: 0.112, 2: 0.756},
    "gptq_sym": {8: 6.17e-5, 4: 0.0179, 3: 0.082, 2: 0.430},
    "full": {4: 0.0158, 2: 0.256},
    "asym": {8: 5.48e-5, 4: 0.0158, 3: 0.073, 2: 0.388, 1: 0.997},
    "rms": {8: 3.5e-3, 4: 0.0119, 2: 0.215, 1: 2.93},
    "bitnet": {8: 6.11e-5, 4: 0.0157, 3: 0.063, 2: 0.250, 1: 0.756},
    "sign": {1: 0.364},  # closed form: 1 - 2/pi
    "ternary": {1.58: 0.264},
}


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "bits", "expected"), [(n, b, e) for n, row in MEASURED.items() for b, e in row.items()]
)
def test_errors_on_gaussian_weights_are_those_of_the_implementations(
    name, bits, expected, gaussian
):
    rows = gaussian.reshape(1, -1) if name == "rms" else gaussian
    found = GRIDS[name].fake_quantize(rows, bits)
    error = float((found - rows).square().sum() / rows.square().sum())
    # extremes of 1024 values decide the scale: another draw moves the error by a percent or two
    assert error == pytest.approx(expected, rel=0.04)


# --- widths --------------------------------------------------------------------------------------


def test_every_width_has_a_grid_and_every_grid_says_its_widths():
    for bits in WEIGHT_BITS:
        assert any(grid.offers(bits) for grid in GRIDS.values())
    offered = {name: grid.widths_text() for name, grid in GRIDS.items()}
    assert offered == {
        "restricted": "b >= 2",
        "bitnet": "b >= 1",
        "gptq_sym": "b >= 2",
        "full": "b >= 2",
        "asym": "b >= 1",
        "rms": "b >= 1",
        "sign": "1",
        "ternary": "1.58",
    }


@pytest.mark.parametrize("name", ["restricted", "gptq_sym", "full"])
def test_one_bit_is_refused_where_it_would_give_nan_or_zeros_naming_who_offers_it(name):
    with pytest.raises(QBenchError) as error:
        GRIDS[name].fit(torch.randn(2, 4), 1)
    assert f"grid {name!r} has no 1-bit codes" in str(error.value)
    assert str(error.value).endswith("at 1 bits choose: bitnet, asym, rms, sign")


def test_only_ternary_offers_1_58_bits_and_nothing_else():
    assert [name for name, grid in GRIDS.items() if grid.offers(1.58)] == ["ternary"]
    assert not GRIDS["ternary"].offers(2) and not GRIDS["sign"].offers(2)
    with pytest.raises(QBenchError, match="at 2 bits choose: restricted, bitnet, gptq_sym"):
        GRIDS["ternary"].check(2)


def test_an_unknown_grid_is_refused_with_the_nearest_names():
    with pytest.raises(QBenchError, match="unknown grid 'asymm'; did you mean 'asym'"):
        get_grid("asymm")


def test_activations_default_to_restricted_and_to_bitnet_where_that_has_no_codes():
    assert [default_activation_grid(b) for b in (8, 2, 1)] == ["restricted", "restricted", "bitnet"]


# --- weights -------------------------------------------------------------------------------------


@pytest.fixture
def weight():
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("text", "shape", "scales"),
    [
        ("W4A16:w=tensor,grid=asym", (1, 1, 72), (1, 1)),
        ("W4A16:w=channel,grid=asym", (6, 1, 12), (6, 1)),
        ("W4A16g4:grid=asym", (6, 3, 4), (6, 3)),
    ],
)
def test_a_scale_is_shared_by_the_tensor_the_row_or_the_group(weight, text, shape, scales):
    scheme = Scheme.parse(text)
    assert rows_of(weight, scheme).shape == shape
    found = round_to_nearest(weight, scheme)
    assert found.scale.shape == found.zero_point.shape == scales
    assert found.weight.shape == found.codes.shape == weight.shape
    width = weight.shape[1] // scales[1]
    scale, zero = (part.repeat_interleave(width, 1) for part in (found.scale, found.zero_point))
    assert torch.allclose(found.weight, scale * (found.codes - zero))


def test_a_group_is_rounded_as_if_it_were_a_row_of_its_own(weight):
    grouped = round_to_nearest(weight, Scheme.parse("W3A16g4:grid=asym")).weight
    rows = Scheme.parse("W3A16:w=channel,grid=asym")
    parts = [round_to_nearest(part, rows).weight for part in weight.split(4, 1)]
    assert torch.equal(grouped, torch.cat(parts, 1))


def test_a_transposed_weight_is_grouped_along_its_inputs(weight):
    """Conv1D keeps (in, out); its weight arrives as a non-contiguous view."""
    scheme = Scheme.parse("W3A16g4:grid=asym")
    view = weight.T.contiguous().T
    assert torch.equal(
        round_to_nearest(view, scheme).weight, round_to_nearest(weight, scheme).weight
    )


def test_a_group_size_that_does_not_divide_names_the_nearest_that_do(weight):
    with pytest.raises(QBenchError) as error:
        rows_of(weight, Scheme(wbits=4, group_size=5))
    assert str(error.value) == (
        "group size 5 does not divide a row of 12 weights; choose one that does "
        "(near: 3, 4, 6) or -1"
    )
    for fine in (-1, 1, 12):
        check_group_size(12, fine)
    with pytest.raises(QBenchError, match="group size 24 does not divide a row of 12"):
        check_group_size(12, 24)


@PAIRS
def test_the_clip_search_never_loses_to_the_full_range(name, bits, gaussian):
    grid, rows = GRIDS[name], gaussian[:8, :64]

    def error(affine):
        rounded = grid.decode(grid.encode(rows, affine, bits), affine)
        return (rounded - rows).abs().pow(2.4).sum(1)

    plain, clipped = error(grid.fit(rows, bits)), error(search_clip(grid, rows, bits))
    assert (clipped <= plain).all()
    if name == "asym" and bits in (2, 3):
        assert clipped.sum() < 0.9 * plain.sum()


def test_the_clip_search_finds_the_best_of_its_eighty_ranges():
    """Brute force over p = 1, 0.99, ... 0.21 on one row."""
    row, grid = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)), GRIDS["asym"]
    errors = []
    for step in range(80):
        affine = grid.fit(row * (1 - step / 100), 3)
        rounded = grid.decode(grid.encode(row, affine, 3), affine)
        errors.append(float((rounded - row).abs().pow(2.4).sum()))
    best = grid.fit(row * (1 - errors.index(min(errors)) / 100), 3)
    assert 0 < errors.index(min(errors)) < 79
    assert torch.equal(search_clip(grid, row, 3).scale, best.scale)


# --- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("W4A16:w=channel,grid=asym", 72 * 4 + 6 * (16 + 4)),
        ("W4A16g4:grid=asym", 72 * 4 + 18 * (16 + 4)),
        ("W4A16:w=tensor,grid=gptq_sym", 72 * 4 + 16),
        ("W8A16:w=channel,grid=restricted", 72 * 8 + 6 * 16),
        ("W1A16:w=tensor,grid=sign", 72 * 1 + 16),
        ("W2A16:w=tensor,grid=rms", 72 * 2 + 16),
        ("W1A16:w=tensor,grid=bitnet", 72 * math.log2(3) + 16),
        ("W2A16:w=tensor,grid=bitnet", 72 * math.log2(5) + 16),
        ("W1.58A16:w=tensor,grid=ternary", 72 * math.log2(3) + 16),
    ],
)
def test_stored_bits_count_codes_scales_and_zero_points(weight, text, bits):
    scheme = Scheme.parse(text)
    assert stored_bits(round_to_nearest(weight, scheme), scheme) == pytest.approx(bits)
    # a method that returns only the matrix is charged for the scales its scheme implies
    assert stored_bits(QuantizedWeight(weight), scheme) == pytest.approx(bits)


def test_a_method_may_say_itself_what_it_stores(weight):
    scheme = Scheme.parse("W4A16g4:grid=asym")
    assert stored_bits(QuantizedWeight(weight, stored_bits=100), scheme) == 100
    index = torch.arange(12) // 4
    with_index = QuantizedWeight(weight, scale=torch.ones(6, 3), g_idx=index)
    assert stored_bits(with_index, scheme) == 72 * 4 + 18 * 20 + 12 * 32
    assert stored_bits(QuantizedWeight(weight), Scheme()) == 72 * 16


def test_a_fitted_affine_can_be_taken_apart_by_name():
    affine = GRIDS["asym"].fit(torch.tensor([[-1.0, 2.0]]), 2)
    assert affine == Affine(affine.scale, affine.zero_point)
    assert affine.scale.tolist() == [[1.0]] and affine.zero_point.tolist() == [[1.0]]


# --- the README's tables -------------------------------------------------------------------------


def readme_table(first_column):
    """Rows of the README's table whose first heading is ``first_column``, as dictionaries."""
    lines = README.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |")]
    assert len(starts) == 1, f"README.md has {len(starts)} tables starting with {first_column!r}"
    header, *rows = (
        [cell.strip().strip("`") for cell in line.strip("| ").split(" | ")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[starts[0] :])
    )
    return [dict(zip(header, row, strict=True)) for row in rows if set(row[0]) - set("-:|")]


def test_the_readmes_table_of_grids_is_the_codes():
    table = readme_table("grid")
    assert [row["grid"] for row in table] == list(GRIDS)
    for row in table:
        assert row["widths"] == GRIDS[row["grid"]].widths_text()
        assert row["codes at b bits, scale"] == GRIDS[row["grid"]].summary


def test_the_readmes_table_of_default_grids_is_what_auto_means():
    from qbench.registry import load_baseline

    table = readme_table("baseline")
    quantizing = set(built_in()) - {"none"}
    assert quantizing <= {row["baseline"] for row in table} <= quantizing | {"none"}
    for row in table:
        if row["baseline"] == "none":
            continue
        baseline = load_baseline(row["baseline"]).instance
        columns = {"2 to 8 bits": range(2, 9), "1.58 bits": [1.58], "1 bit": [1]}
        for column, widths in columns.items():
            for bits in widths:
                scheme = resolve_scheme(Scheme(wbits=bits, abits=8), baseline)
                assert row[column] == scheme.grid, (row["baseline"], bits)
        assert row["weights share a scale per"].startswith(
            {"tensor": ("tensor", "matrix"), "channel": ("channel", "row", "output")}[
                scheme.w_granularity
            ]
        )
        assert row["activations share a scale per"].startswith(scheme.a_granularity)
