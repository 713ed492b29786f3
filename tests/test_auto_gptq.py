"""The optional baseline auto-gptq: qbench's GPTQ held against it, and what it leaves behind.

Without the library the tests of its results are skipped, and say so; what a user is then told is
tested either way.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import golden_vectors as golden
import pytest
import torch
from cli_fixtures import qbench, records, refused

import qbench_baselines.auto_gptq as module
from qbench import CannotQuantize, QBenchError, Scheme, Statistics, quantize_model
from qbench.baseline import resolve_scheme, why_not
from qbench.models.gptq_loading import damaged_words, dequantize, unpack, zero_points
from qbench.registry import load_baseline
from qbench.scheme import WEIGHT_BITS
from qbench.study.sweep import Sweep
from qbench.testing import check_baseline, tiny_model, tiny_windows
from qbench.testing.conformance import claimed
from qbench_baselines.auto_gptq import AddBatch, AutoGPTQ
from qbench_baselines.gptq import GPTQ

installed = pytest.mark.skipif(
    importlib.util.find_spec("auto_gptq") is None,
    reason='auto-gptq is not installed: pip install "qbench[auto-gptq]"',
)


@pytest.fixture
def absent(monkeypatch):
    """As if the library were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "auto_gptq" else find(n)
    )
    module.solver_class.cache_clear()
    yield
    module.solver_class.cache_clear()


# --- without the library --------------------------------------------------------------------------
def test_without_the_library_there_is_one_line_that_says_what_to_install(absent, tiny, tmp_path):
    where = ("--tasks", "piqa", "--results", tmp_path / "runs")
    message = refused("run", tiny, "--baseline", "auto-gptq", "--scheme", "W4A16", *where)
    assert message.startswith('auto-gptq is not installed; pip install "qbench[auto-gptq]"')
    assert "auto-gptq 0.7.1's own GPTQ" in qbench("list", "baselines").stdout
    with pytest.raises(QBenchError, match="not installed"):
        quantize_model(tiny_model(), AutoGPTQ(), "W4A16", tiny_windows(2, 16))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("W5A16", "auto-gptq has 2, 3, 4, 8 bits"),
        ("W1.58A8", "auto-gptq has 2, 3, 4, 8 bits"),
        ("W1A16", "auto-gptq has 2, 3, 4, 8 bits"),
        ("W4A16:grid=rms", "auto-gptq has the grids gptq_sym and asym"),
        ("W4A16:w=tensor", "auto-gptq has a scale for every row or group; drop w=tensor"),
        ("W4A8g32", None),
        ("W16A8", None),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(scheme, said):
    baseline = AutoGPTQ()
    assert why_not(baseline, resolve_scheme(Scheme.parse(scheme), baseline)) == said


def test_its_defaults_are_the_librarys():
    """BaseQuantizeConfig of 0.7.1: damp_percent .01, desc_act, sym, true_sequential, one group."""
    b = AutoGPTQ()
    assert (b.percdamp, b.act_order, b.static_groups, b.true_sequential) == (
        0.01,
        True,
        False,
        True,
    )
    assert str(resolve_scheme(Scheme.parse("W4A16"), b)) == "W4A16:w=channel,grid=gptq_sym"


# --- with it --------------------------------------------------------------------------------------
@installed
def test_it_keeps_the_contract_of_a_baseline():
    for fields in ({}, {"act_order": False}, {"static_groups": True}, {"mse": True}):
        loaded = load_baseline("auto-gptq", fields)
        assert [str(o) for o in check_baseline(loaded.instance) if o.problem] == []
    assert set(claimed(AutoGPTQ())) == {2, 3, 4, 8} < set(WEIGHT_BITS)


def statistics(matrix, wanted):
    stats = Statistics(wanted)
    for sequence in golden.activations(matrix):
        stats.update(sequence[None])
    return stats


CASES = [c for c in golden.cases("GPTQ") if c.get("auto_gptq_bit_identical")]


def options(case):
    return {k: case.get(k, False) for k in ("act_order", "static_groups")}


def both(case):
    """What the library and qbench's GPTQ make of a golden case."""
    group = f"g{case['group']}" if case["group"] > 0 else ""
    grid = "gptq_sym" if case["sym"] else "asym"
    scheme = Scheme.parse(
        f"W{case['bits']}A16{group}:grid={grid}" + ("" if group else ",w=channel")
    )
    weight, generator = golden.weight(case["matrix"]), torch.Generator()
    results = []
    for method, wanted in ((AutoGPTQ, (AddBatch,)), (GPTQ, ("hessian",))):
        stats = statistics(case["matrix"], wanted)
        given = weight.clone()
        made = method(**options(case)).quantize_weight(given, scheme, stats, generator)
        assert torch.equal(given, weight)
        results.append(made)
    return results


@installed
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_qbenchs_gptq_gives_the_librarys_codes_and_groups(case):
    """And the library's are the golden ones, which it made; elsewhere a tie may fall otherwise."""
    theirs, ours = both(case)
    codes = golden.tensors("gptq")[f"{case['id']}.codes"].float()
    codes -= 2 ** (case["bits"] - 1) if case["sym"] else 0
    assert golden.same_codes(theirs.codes, codes) >= 0.999
    assert golden.same_codes(ours.codes, theirs.codes) >= 0.999
    assert (theirs.g_idx is None) == (ours.g_idx is None)
    if theirs.g_idx is not None:
        assert torch.equal(theirs.g_idx.long(), ours.g_idx.long())
    assert theirs.scale.shape == ours.scale.shape


@installed
@pytest.mark.parametrize("case", [c for c in CASES if c["matrix"] == "a"], ids=lambda c: c["id"])
def test_what_the_library_packs_is_read_as_what_it_quantized(case):
    """By its own QuantLinear; where a zero point is 0 it damages the file, which is noticed."""
    theirs = both(case)[0]
    zeros = theirs.zero_point + (2 ** (case["bits"] - 1) if case["sym"] else 0)
    out_features, in_features = theirs.weight.shape
    size = case["group"] if case["group"] > 0 else in_features
    groups = theirs.g_idx
    groups = torch.arange(in_features) // size if groups is None else groups.long()
    layer = packing_layer()(case["bits"], case["group"], in_features, out_features, bias=False)
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = theirs.weight.clone()
    layer.pack(linear, theirs.scale.clone(), zeros.clone(), groups.to(torch.int32))
    form = SimpleNamespace(bits=case["bits"], version="gptq", carries=False, sym=case["sym"])
    damaged = damaged_words(layer.qzeros, form)
    assert (damaged > 0) == bool((zeros == 0).any())
    if damaged:
        return
    codes, found = unpack(layer.qweight, case["bits"]), zero_points(layer.qzeros, form)
    assert torch.equal(found.T.float(), zeros)
    offset = zeros[:, :1] if case["sym"] else 0
    assert torch.equal(codes.T.float(), theirs.codes + offset)
    read = dequantize(codes, found, layer.scales, layer.g_idx.long())
    assert torch.allclose(read, theirs.weight, rtol=1e-3, atol=1e-6)


def packing_layer():
    """The library's layer that runs act-order too; its import needs the package around it alone."""
    folders = importlib.util.find_spec("auto_gptq").submodule_search_locations
    with module._package_alone(list(folders)):
        found = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    return found.QuantLinear


@installed
def test_its_hessian_is_that_of_the_harness_however_the_sequences_arrive():
    """Parts of lower precision come with no sequence of their own, routed tokens unevenly."""
    generator = torch.Generator().manual_seed(0)
    theirs, ours = AddBatch(), Statistics(("hessian",))._observers["hessian"]
    for tokens, sequences in ((24, 3), (7, 2), (8, 0), (16, 1)):
        x = torch.randn(tokens, 12, generator=generator)
        theirs.update(x, sequences)
        ours.update(x, sequences)
    assert torch.allclose(theirs.result(), ours.result(), rtol=1e-5, atol=1e-5)


@installed
@pytest.mark.parametrize("text", ["W4A16:grid=asym", "W3A16g32:grid=gptq_sym", "W2A16:grid=asym"])
def test_a_whole_model_comes_out_the_same(text):
    windows, ids = tiny_windows(4, 32), tiny_windows(2, 16, seed=3)
    fields = {"act_order": True, "true_sequential": True}
    logits, bits = [], []
    for method in (AutoGPTQ(**fields), GPTQ(**fields)):
        model = tiny_model()
        result = quantize_model(model, method, text, windows)
        bits.append(result.effective_bits)
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert bits[0] == bits[1]
    assert torch.allclose(*logits, atol=1e-4)


@installed
def test_importing_and_running_it_leaves_torch_python_and_the_environment_as_they_were(monkeypatch):
    monkeypatch.setenv("DEBUG", "1")
    module.solver_class.cache_clear()
    synchronize, modules = torch.cuda.synchronize, set(sys.modules)
    state = torch.get_rng_state()
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        matmul.allow_tf32 = convolution.allow_tf32 = True
        quantize_model(tiny_model(), AutoGPTQ(), "W4A16", tiny_windows(2, 16))
        assert matmul.allow_tf32 and convolution.allow_tf32
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
    assert torch.cuda.synchronize is synchronize and os.environ["DEBUG"] == "1"
    assert not [n for n in set(sys.modules) - modules if n.split(".")[0] == "auto_gptq"]
    assert torch.equal(torch.get_rng_state(), state)


@installed
def test_a_hessian_it_cannot_factorize_is_declined_and_everything_restored():
    stats = Statistics((AddBatch,))
    stats.update(torch.ones(1, 4, 8))  # of rank one
    synchronize = torch.cuda.synchronize
    scheme = Scheme.parse("W4A16:w=channel,grid=asym")
    with pytest.raises(CannotQuantize, match="auto-gptq: linalg.cholesky"):
        AutoGPTQ(percdamp=0.0).quantize_weight(torch.ones(4, 8), scheme, stats, torch.Generator())
    assert torch.cuda.synchronize is synchronize


@installed
def test_a_sweep_runs_it_at_the_schemes_it_is_given(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("checkpoints: [x]\nbaselines: [auto-gptq]\nschemes: [W4A16]\ntasks: [piqa]\n")
    assert [str(cell) for cell in Sweep.read(file).cells()] == [
        "auto-gptq W4A16:w=channel,grid=gptq_sym"
    ]


@installed
def test_it_runs_from_the_command_line_and_its_layers_name_the_engine(tiny, text, tmp_path):
    where = ("--tasks", f"{text}@gptq-16", "--limit", 4, "--results", tmp_path / "runs")
    read = ("--calibration", text, "--nsamples", 4, "--seqlen", 16)
    asked = ("--baseline", "auto-gptq", "--scheme", "W4A16", "--set", "percdamp=0.1")
    assert "quantized 14 matrices" in qbench("run", tiny, *asked, *read, *where).stdout
    [record] = [r for r in records(tmp_path / "runs").values() if "layers" in r]
    assert {layer["extra"]["engine"] for layer in record["layers"]} == {"auto-gptq 0.7.1"}
    assert {layer["damping"] for layer in record["layers"]} == {0.1}
    assert all(layer["proxy_loss"] > 0 for layer in record["layers"])
