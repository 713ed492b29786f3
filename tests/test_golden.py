"""qbench's methods against vectors made by running the official implementations.

Origin of every expected number: tests/golden/index.json and e2e_index.json, which name the
repository and commit of each reference. Gates: codes at least 99 % equal, proxy loss within 1 %,
SmoothQuant and activations to 1e-6 relative.
"""

from __future__ import annotations

import golden_vectors as golden
import pytest
import torch
from torch import nn

from qbench import Scheme, Statistics, quantize_model
from qbench.grid import round_to_nearest
from qbench.models.linear import Linear
from qbench.models.norms import NormFold
from qbench.quantization.activations import ActivationQuantizer
from qbench_baselines.gptq import GPTQ
from qbench_baselines.quip import QuIP
from qbench_baselines.smoothquant import SmoothQuant, smoothing_scale


def hessian_statistics(matrix: str) -> Statistics:
    stats = Statistics(("hessian",))
    for sequence in golden.activations(matrix):
        stats.update(sequence[None])
    return stats


def by_id(cases):
    return {"argvalues": cases, "ids": [c["id"] for c in cases]}


def test_the_streamed_hessian_is_the_references():
    """Entries where the sum cancels are as far from the exact one in both: 2e-7 of √(H_ii H_jj)."""
    for matrix in "ac":
        found = hessian_statistics(matrix).hessian
        expected = golden.tensors("inputs")[f"{matrix}.H_gptq"]
        size = expected.diagonal().sqrt()
        assert ((found - expected).abs() <= 5e-7 * size * size[:, None]).all()


# at 1 bit the reference's symmetric codes are all zero, and qbench does not offer them
ROUNDED = [c for c in golden.cases("RTN") if not (c["sym"] and c["bits"] == 1)]


@pytest.mark.parametrize("case", **by_id(ROUNDED))
def test_rounding_to_nearest_gives_the_references_codes(case):
    group = "g32" if case["id"].endswith(".g32") else ""
    grid = "gptq_sym" if case["sym"] else "asym"
    options = f"grid={grid}" + ("" if group else ",w=channel")
    scheme = Scheme.parse(f"W{case['bits']}A16{group}:{options}")
    found = round_to_nearest(golden.weight(case["matrix"]), scheme, mse=case.get("mse", False))
    codes = golden.tensors("rtn")[f"{case['id']}.codes"].float()
    codes -= 2 ** (case["bits"] - 1) if case["sym"] else 0
    assert golden.same_codes(found.codes, codes) >= 0.99
    assert golden.relative_proxy(case["matrix"], found.weight) == pytest.approx(
        case["rel"], rel=0.01
    )


ABSMAX_WEIGHTS = [c for c in golden.cases("Absmax") if "act" not in c["id"]]
SMOOTHED = [c for c in golden.cases("") if c["id"].startswith("sq.")]
OWN_ROTATIONS = [
    c
    for c in golden.cases("QuIP", codes_only=False)
    if c["matrix"] == "a" and "rel_over_seeds" in c and "gptq" not in c["id"]
]


@pytest.mark.parametrize("case", **by_id(ABSMAX_WEIGHTS))
def test_absmax_weights_are_smoothquants(case):
    width = "tensor" if case["granularity"] == "per-tensor" else "channel"
    scheme = Scheme.parse(f"W{case['bits']}A16:w={width},grid=restricted")
    found = round_to_nearest(golden.weight(case["matrix"]), scheme)
    stored = golden.tensors("rtn")
    assert torch.equal(found.codes, stored[f"{case['id']}.codes"].float())
    alive = found.codes.abs().amax(1, keepdim=True) > 0  # a zero row's scale means nothing
    scale, reference = found.scale.expand_as(alive), stored[f"{case['id']}.scale"]
    assert torch.allclose(scale[alive], reference.expand_as(alive)[alive], rtol=1e-6)


@pytest.mark.parametrize("case", **by_id(golden.cases("Absmax activations")))
def test_absmax_activations_are_smoothquants_and_the_input_is_untouched(case):
    x = golden.activations(case["matrix"]).flatten(0, 1)[:16]
    before = x.clone()
    granularity = case["granularity"].removeprefix("per-")
    found = ActivationQuantizer(case["bits"], "restricted", granularity)(x)
    assert torch.allclose(found, golden.tensors("rtn")[f"{case['id']}.Xq"], rtol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("case", **by_id(golden.cases("GPTQ")))
def test_gptq_gives_the_references_codes(case):
    group = f"g{case['group']}" if case["group"] > 0 else ""
    options = f"grid={'gptq_sym' if case['sym'] else 'asym'}" + ("" if group else ",w=channel")
    scheme = Scheme.parse(f"W{case['bits']}A16{group}:{options}")
    method = GPTQ(act_order=case["act_order"], static_groups=case["static_groups"])
    stats = hessian_statistics(case["matrix"])
    found = method.quantize_weight(golden.weight(case["matrix"]), scheme, stats, golden.generator())
    stored = golden.tensors("gptq")
    codes = stored[f"{case['id']}.codes"].float()
    codes -= 2 ** (case["bits"] - 1) if case["sym"] else 0
    assert golden.same_codes(found.codes, codes) >= 0.99
    assert torch.allclose(found.scale, stored[f"{case['id']}.scale"], rtol=1e-4)
    assert golden.relative_proxy(case["matrix"], found.weight) == pytest.approx(
        case["rel"], rel=0.01
    )


class Dense:
    """A stored rotation matrix."""

    def __init__(self, matrix):
        self.matrix = matrix

    def turn(self, x):
        return self.matrix @ x

    def turn_back(self, x):
        return self.matrix.T @ x


@pytest.mark.parametrize("case", **by_id([c for c in golden.cases("QuIP") if c["file"] == "quip"]))
def test_quip_gives_the_references_codes(case):
    stored, matrix, bits = golden.tensors("quip"), case["matrix"], case["bits"]
    weight, hessian = golden.weight(matrix), hessian_statistics(matrix).hessian / 2
    if "incoh" in case["id"]:
        left, right = Dense(stored[f"quip.{matrix}.U"]), Dense(stored[f"quip.{matrix}.V"])
        scheme = Scheme.parse(f"W{bits}A16:w=tensor,grid=rms")
        found = QuIP().round_incoherent(weight, hessian, scheme, left, right)
    else:
        reordered = "RG5" in case["id"]
        method = QuIP(
            incoherence=False,
            rounding="ldlq_rg" if reordered else "ldlq",
            greedy_passes=5 if reordered else 0,
        )
        found = method.round(weight, hessian, Scheme.parse(f"W{bits}A16:w=channel,grid=asym"))
    codes = stored[f"{case['id']}.codes"].float()
    assert golden.same_codes(found.codes, codes) >= 0.99
    assert golden.relative_proxy(matrix, found.weight) == pytest.approx(case["rel"], rel=0.01)


@pytest.mark.parametrize("case", **by_id(OWN_ROTATIONS))
def test_quip_with_its_own_rotations_is_as_good_as_the_reference_over_ten_seeds(case):
    """Means of two samples of ten: equal within four standard errors (spread 10 to 45 %)."""
    fields = {"greedy_passes": 5, "rounding": "ldlq_rg"} if "RG5" in case["id"] else {}
    if "nearest" in case["id"]:
        fields = {"rounding": "nearest"}
    if "extra1" in case["id"]:
        fields = {"rotation": "kronecker"}
    scheme = Scheme.parse(f"W{case['bits']}A16:w=tensor,grid=rms")
    stats, weight = hessian_statistics("a"), golden.weight("a")
    found = [
        golden.relative_proxy(
            "a",
            QuIP(**fields)
            .quantize_weight(weight, scheme, stats, torch.Generator().manual_seed(seed))
            .weight,
        )
        for seed in range(10)
    ]
    reference = case["rel_over_seeds"]
    error = (torch.tensor(found).var() / 10 + reference["std"] ** 2 / 10) ** 0.5
    assert abs(sum(found) / 10 - reference["mean"]) <= 4 * error


@pytest.mark.parametrize("matrix", ["a", "c"])
@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothquant_folds_the_references_scales(matrix, alpha):
    stored, prefix = golden.tensors("smoothquant"), f"sq.{matrix}.alpha{alpha}"
    weight = golden.weight(matrix)
    scale = smoothing_scale(stored[f"sq.{matrix}.act_scales"], weight.abs().amax(0), alpha)
    assert torch.allclose(scale, stored[f"{prefix}.s"], rtol=1e-6)

    norm, linear = nn.LayerNorm(weight.shape[1]), nn.Linear(weight.shape[1], weight.shape[0])
    norm.weight.data, norm.bias.data = (stored[f"sq.{matrix}.ln_{p}"].clone() for p in "wb")
    linear.weight.data = weight.clone()
    NormFold("norm", norm, 0.0, [Linear("fc", linear)]).fold_(scale)
    if f"{prefix}.W" in stored:
        assert torch.allclose(linear.weight, stored[f"{prefix}.W"], rtol=1e-6)
    assert torch.allclose(norm.weight, stored[f"{prefix}.ln_w"], rtol=1e-6)
    assert torch.allclose(norm.bias, stored[f"{prefix}.ln_b"], rtol=1e-6)


@pytest.mark.parametrize("case", **by_id(SMOOTHED))
def test_smoothed_w8a8_linears_give_the_references_outputs(case):
    stored, matrix = golden.tensors("smoothquant"), case["matrix"]
    prefix = f"sq.{matrix}.alpha{case['alpha']}"
    weight = golden.weight(matrix) * (stored[f"{prefix}.s"] if case["alpha"] else 1)
    width = case["weight_quant"].removeprefix("per_")
    scheme = Scheme.parse(f"W8A8:w={width},grid=restricted")
    parts = weight.split(case["fc_split"]) if case.get("fc_split") else [weight]
    quantizer = ActivationQuantizer(8, "restricted", case["act_quant"].removeprefix("per_"))
    x = quantizer(stored[case["inputs"]["x"]])
    y = torch.cat([x @ round_to_nearest(part, scheme).weight.T for part in parts], -1)
    reference = stored[case["outputs"]["y"]]
    assert (y - reference).norm() <= 1e-6 * reference.norm()


# --- whole models -------------------------------------------------------------------------------


def golden_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**golden.index("e2e_index")["llama_config"]))
    stored = golden.tensors("e2e")
    weights = {k.removeprefix("llama.w."): v for k, v in stored.items() if k.startswith("llama.w.")}
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.float().eval()


def logits(model):
    """As stored: the last positions of the four test sequences."""
    with torch.no_grad():
        found = model(golden.tensors("e2e")["llama.test_ids"]).logits
    return found[:, -golden.tensors("e2e")["llama.logits_fp32"].shape[1] :]


def mean_nll(model):
    ids = golden.tensors("e2e")["llama.test_ids"]
    with torch.no_grad():
        found = model(ids).logits[:, :-1]
    return float(nn.functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()))


def e2e_cases(prefix):
    return [c for c in golden.index("e2e_index")["cases"] if c["id"].startswith(prefix)]


def test_the_golden_llama_runs_as_it_did():
    model = golden_llama()
    assert torch.allclose(logits(model), golden.tensors("e2e")["llama.logits_fp32"], atol=1e-4)
    expected = golden.index("e2e_index")["llama_fp32_mean_nll"]
    assert mean_nll(model) == pytest.approx(expected, rel=1e-5)


def test_gptq_through_a_whole_model_gives_the_references_weights():
    stored, case = golden.tensors("e2e"), e2e_cases("llama.gptq")[0]
    model = golden_llama()
    result = quantize_model(model, GPTQ(), "W4A16:grid=gptq_sym", stored["llama.calib_ids"])
    equal = total = 0
    for report in result.layers:
        prefix = f"{case['id']}.{report.name}"
        codes, scale, zero = (stored[f"{prefix}.{p}"].float() for p in ("codes", "scale", "zero"))
        found = model.get_parameter(f"{report.name}.weight")
        equal += int(torch.isclose(found, scale * (codes - zero), rtol=1e-3, atol=1e-6).sum())
        total += found.numel()
    assert total == 61440
    assert equal / total >= 0.99
    assert mean_nll(model) == pytest.approx(case["mean_nll"], rel=1e-3)


@pytest.mark.parametrize("case", **by_id(e2e_cases("llama.rtn")))
def test_rounding_a_whole_model_to_nearest_loses_what_the_reference_loses(case):
    model = golden_llama()
    quantize_model(model, "rtn", f"W{case['bits']}A16")
    assert mean_nll(model) == pytest.approx(case["mean_nll"], rel=1e-5)


@pytest.mark.parametrize("case", **by_id(e2e_cases("llama.sq")))
def test_a_smoothed_w8a8_model_gives_the_references_logits(case):
    """Ties between codes move with the order of summation: the references agree to about 1e-2."""
    stored, model = golden.tensors("e2e"), golden_llama()
    width, act = (case[k].removeprefix("per_") for k in ("weight_quant", "act_quant"))
    scheme = f"W8A8:w={width},a={act}" + (",bmm" if case["quantize_bmm_input"] else "")
    if case["alpha"] is None:
        quantize_model(model, "absmax", scheme)
    else:
        method = SmoothQuant(alpha=case["alpha"])
        quantize_model(model, method, scheme, stored["llama.calib_ids"])
    reference = stored[f"{case['id']}.logits"]
    assert (logits(model) - reference).norm() <= 1e-2 * reference.norm()
    assert mean_nll(model) == pytest.approx(case["mean_nll"], rel=1e-3)
