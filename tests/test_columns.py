"""The walk over columns: its definition in double precision, and that compiled walks equal it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import qbench.quantization
from qbench.grid import GRIDS, Affine
from qbench.quantization.columns import (
    Corrections,
    Rounding,
    compiled_walk,
    round_columns_,
    walk_,
)

WIDTHS = {name: 1.58 if grid.min_bits == 1.58 else grid.min_bits for name, grid in GRIDS.items()}


def block(rows=70, width=33, groups=3, seed=0):
    """A block of weights with feedback large enough to matter, and a grid per group."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(rows, width, generator=generator)
    current = original + 0.1 * torch.randn(rows, width, generator=generator)
    factor = (0.3 * torch.randn(width, width, generator=generator)).tril(-1) + torch.eye(width)
    group = torch.randint(0, groups, (width,), generator=generator)
    return current, original, factor, group


def test_a_walk_is_the_sum_it_is_defined_by():
    """Column k becomes the code of c_k + sum of later errors times L[j, k], taken in float64."""
    current, original, factor, _ = (part.double() for part in block())
    codes, errors = current.clone(), original.clone()
    scale = torch.tensor([[0.25]], dtype=torch.float64)
    affine = Affine(scale, torch.full_like(scale, 7))
    round_columns_(codes, errors, factor, affine, Rounding(0, 15))
    for k in range(current.shape[1]):
        seen = current[:, k] + errors[:, k + 1 :] @ factor[k + 1 :, k]
        expected = ((seen / 0.25).round() + 7).clamp(0, 15)
        assert torch.equal(codes[:, k], expected)
        assert torch.allclose(errors[:, k], original[:, k] - 0.25 * (expected - 7))


@pytest.mark.parametrize("name", GRIDS)
def test_without_feedback_codes_are_those_of_the_grid(name):
    grid, bits = GRIDS[name], max(WIDTHS[name], 1)
    current, original, factor, group = block(rows=40, width=24, groups=2)
    affine = grid.fit(original.unflatten(1, (2, 12)), bits)
    expected = grid.encode(original.unflatten(1, (2, 12)), affine, bits).flatten(1)
    table = Affine(*(part.squeeze(-1) for part in affine))
    group = torch.arange(24) // 12
    codes, errors = original.clone(), original.clone()
    rounding = Rounding(grid.qmin(bits), grid.qmax(bits))
    round_columns_(codes, errors, torch.eye(24), table, rounding, group)
    assert torch.equal(codes, expected)
    values = grid.decode(expected.unflatten(1, (2, 12)), affine).flatten(1)
    assert torch.equal(errors, original - values)


@pytest.mark.parametrize("width", [1, 8, 12, 100])
def test_corrections_in_two_levels_are_the_whole_product(width):
    """Blocks of 4 of 30 columns, asked for by themselves and with columns further down."""
    generator = torch.Generator().manual_seed(0)
    errors, factor = (torch.randn(9, 30, generator=generator).double() for _ in range(2))
    factor = factor.T @ factor
    corrections = Corrections(errors, factor, width)
    for end in range(30, 0, -4):
        for start in (max(end - 4, 0), max(end - 10, 0)):
            expected = errors[:, end:] @ factor[end:, start:end]
            assert torch.allclose(corrections.of(start, end), expected)
        errors[:, max(end - 4, 0) : end] += 1  # what is rounded next is read from then on


def test_ties_go_to_even_or_up():
    ties = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for half_up, expected in ((False, [-2, 0, 0, 2, 2]), (True, [-1, 0, 1, 2, 3])):
        codes = ties.clone()
        rounding = Rounding(-8, 7, half_up)
        round_columns_(codes, ties.clone(), torch.eye(5), (one, zero), rounding)
        assert codes.tolist() == [expected]


def cases():
    """(rows, width, scales per row, scales per matrix's groups): tiles full, partial and single."""
    return [(1, 1, True, 1), (5, 3, True, 2), (64, 128, True, 1), (70, 33, True, 3)] + [
        (201, 128, False, 1),
        (300, 7, True, 7),
    ]


def both(walk, rows, width, per_row, groups, rounding, seed=0):
    """Codes and errors of the torch walk and of another one, in slices of larger matrices."""
    current, original, factor, group = block(rows, width, groups, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    scale = 0.1 + torch.rand(rows if per_row else 1, groups, generator=generator)
    zero = 7 * torch.rand(rows if per_row else 1, groups, generator=generator)
    affine = [part.expand(rows, -1) for part in (scale, zero)]
    found = []
    for chosen in (walk_, walk):
        wide = torch.zeros(2, rows, width + 5)
        codes, errors = wide[:, :, 3 : 3 + width]
        codes.copy_(current)
        errors.copy_(original)
        chosen(codes, errors, factor.T.contiguous().T, *affine, group, rounding)
        found.append(wide)
    return found


ROUNDINGS = [Rounding(0, 15), Rounding(-2, 1, True), Rounding(-float("inf"), float("inf"), True)]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_walk_equals_the_torch_walk_to_the_last_bit(threads, case, rounding):
    pytest.importorskip("numba")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        walk = compiled_walk("cpu")
        assert walk is not walk_
        expected, found = both(walk, *case, rounding)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    assert expected.abs().sum() > 0


def test_what_is_not_a_number_stays_so_in_its_row():
    """A broken weight must show, and must not reach the rows beside it."""
    for walk in (walk_, compiled_walk("cpu")):
        current, original, factor, group = block()
        clean = current.clone(), original.clone()
        current[3, 20] = original[3, 20] = float("nan")
        table = torch.full((70, 3), 0.3), torch.full((70, 3), 7.0)
        walk(current, original, factor, *table, group, Rounding(0, 15))
        walk(*clean, factor, *table, group, Rounding(0, 15))
        assert current[3, :21].isnan().all() and not current[3, 21:].isnan().any()
        others = torch.arange(70) != 3
        assert torch.equal(current[others], clean[0][others])


def test_a_device_or_a_precision_without_a_compiled_walk_takes_the_torch_loop():
    assert compiled_walk("xpu") is walk_
    current, original, factor, _ = (part.double() for part in block())
    one = torch.ones(1, 1, dtype=torch.float64)
    round_columns_(current, original, factor, (one, one * 0), Rounding(-9, 9))
    assert current.dtype == torch.float64 and torch.equal(current, current.round())


@pytest.mark.parametrize(("device", "module"), [("cpu", "numba"), ("cuda", "triton")])
def test_without_a_compiler_the_torch_loop_runs_and_says_so(device, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, f"qbench.quantization.columns_{device}", raising=False)
    monkeypatch.delattr(qbench.quantization, f"columns_{device}", raising=False)
    with pytest.warns(UserWarning, match=f"rounded in torch, many times slower: .*{module}"):
        assert compiled_walk.__wrapped__(device) is walk_


TRITON = """
import torch
import test_columns as t
from qbench.quantization import columns_cuda
for rounding in t.ROUNDINGS:
    for case in [(1, 1, True, 1), (5, 3, True, 2), (35, 33, True, 3), (20, 64, False, 1)]:
        expected, found = t.both(columns_cuda.walk_, *case, rounding)
        assert torch.equal(found, expected), (rounding, case, (found - expected).abs().max())
print("equal")
"""


def test_the_triton_walk_equals_the_torch_walk_in_its_interpreter():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_walk_on_a_gpu_equals_the_torch_walk():
    walk = compiled_walk("cuda")

    def there(*parts):
        moved = [part.cuda() if isinstance(part, torch.Tensor) else part for part in parts]
        walk(*moved)
        for old, new in zip(parts[:2], moved, strict=False):
            old.copy_(new)

    for case in cases():
        expected, found = both(there, *case, Rounding(0, 15))
        assert torch.equal(found, expected)
