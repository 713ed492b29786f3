"""Every architecture with every baseline at the bit pairs of BitNet's tables, through one code.

The default suite runs a covering part; ``-m slow`` runs the whole matrix.
"""

from __future__ import annotations

import pytest
import torch
from invented_architecture import odd_model, odd_windows
from registered import built_in
from transformers.pytorch_utils import Conv1D

from qbench import Scheme, get_grid, quantize_model, rows_of
from qbench.models.blocks import find_blocks
from qbench.registry import load_baseline
from qbench.testing import ARCHITECTURES, tiny_model, tiny_windows

METHODS = sorted(set(built_in()) - {"none"})
SCHEMES = ("W4A16", "W4A4", "W2A16", "W1A8")  # 2310.11453 section 4.1
MODELS = [*ARCHITECTURES, "invented"]
MATRIX = [(a, b, s) for a in MODELS for b in METHODS for s in SCHEMES]

UNREACHED = "no calibration token reached it"


def covering() -> list[tuple[str, str, str]]:
    """Two cells per architecture, going around the baselines and the schemes."""
    cells = []
    for i, architecture in enumerate(MODELS):
        cells.append((architecture, METHODS[i % len(METHODS)], SCHEMES[i % 4]))
        cells.append((architecture, METHODS[(i + 2) % len(METHODS)], SCHEMES[(i + i // 4 + 1) % 4]))
    return cells


def model_and_windows(architecture):
    if architecture == "invented":
        return odd_model(), odd_windows(8, 24), odd_windows(2, 16, seed=5)
    return tiny_model(architecture), tiny_windows(8, 24), tiny_windows(2, 16, seed=5)


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def matrices(model):
    """Names and shapes (out, in) of what a block multiplies with; experts of one tensor apart."""
    found = {}
    for prefix, block in find_blocks(model):
        for name, parameter in block.named_parameters():
            full = f"{prefix}.{name}"
            if parameter.ndim == 3:
                found |= {f"{full}.{e}": part for e, part in enumerate(parameter)}
            elif parameter.ndim == 2:
                found[full] = parameter
    return found


def parameter_of(model, name, shape):
    """The matrix a report speaks of, (out_features, in_features)."""
    found = matrices(model)
    if name in found:  # one expert of several in one tensor; none of them is square
        stored, transposed = found[name], found[name].shape != shape
    else:
        stored, transposed = found[f"{name}.weight"], type(model.get_submodule(name)) is Conv1D
    return stored.detach().T if transposed else stored.detach()


def check(architecture, baseline, text):
    model, windows, ids = model_and_windows(architecture)
    before = logits(model, ids)
    method = load_baseline(baseline).instance
    result = quantize_model(model, method, text, windows)
    after = logits(model, ids)

    assert torch.isfinite(after).all()
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)

    named = {report.name for report in result.layers}
    whole = {name.removesuffix(".weight") for name in matrices(model)}
    assert named | {name.removesuffix(".weight") for name in result.skipped} == whole
    assert len(named) == len(result.layers)
    assert not result.skipped or architecture in ("mixtral", "invented")

    fallen = {report.name: report.fallback for report in result.layers if report.fallback}
    assert set(fallen.values()) <= {UNREACHED}
    if architecture == "invented" and method.weight_statistics:
        assert {name.split(".")[3] for name in fallen} == {"2", "3"}
    else:
        assert not fallen

    for report in result.layers:
        scheme = Scheme.parse(report.scheme)
        assert scheme.wbits == Scheme.parse(text).wbits
        weight = parameter_of(model, report.name, report.shape)
        assert weight.any()
        if method.on_grid:
            allowed = get_grid(scheme.grid).levels(scheme.wbits)
            rows = rows_of(weight, scheme).flatten(0, 1)
            assert max(len(row.unique()) for row in rows) <= allowed


@pytest.mark.parametrize(("architecture", "baseline", "scheme"), covering())
def test_a_covering_part_of_the_matrix_runs_through_the_same_code(architecture, baseline, scheme):
    check(architecture, baseline, scheme)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "baseline", "scheme"), MATRIX)
def test_every_architecture_takes_every_baseline_at_every_bit_pair(architecture, baseline, scheme):
    check(architecture, baseline, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(set(MODELS) - {"bloom"}))
@pytest.mark.parametrize("scheme", ["W4A8KV4:bmm", "W8A8:static", "W4A4g16:grid=gptq_sym"])
def test_every_architecture_takes_the_other_options_of_a_scheme(architecture, scheme):
    check(architecture, "rtn", scheme)


def test_the_covering_part_covers():
    architectures, baselines, schemes = zip(*covering(), strict=True)
    assert set(architectures) == set(MODELS)
    assert all(baselines.count(name) >= 4 for name in METHODS)
    assert all(schemes.count(text) >= 5 for text in SCHEMES)
    assert set(covering()) < set(MATRIX)
