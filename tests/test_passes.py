"""What one calibration pass or one quantized copy serves, and that sharing changes no number."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cli_fixtures import DATA, qbench
from invented_architecture import odd_model, odd_windows
from torch import nn

from qbench import Baseline, QBenchError, evaluate, quantize_model, round_to_nearest
from qbench.grid import GRIDS
from qbench.models.blocks import find_blocks
from qbench.models.bypass import Bypass, bypass_of
from qbench.models.bypass import same as alike
from qbench.models.streaming import resident
from qbench.quantization import calibration, passes
from qbench.quantization.activations import (
    ActivationQuantizer,
    _InputHook,
    activations_off,
    scales_of_sequences,
)
from qbench.quantization.calibration import capture
from qbench.quantization.outcome import batching_of, quantization_of
from qbench.quantization.passes import Calibration
from qbench.quantization.quantize import requantize_activations
from qbench.registry import load_baseline
from qbench.scheme import Scheme
from qbench.study import supply
from qbench.study.cells import Cell
from qbench.study.sweep import Sweep
from qbench.testing import ARCHITECTURES, tiny_checkpoint, tiny_model, tiny_tokenizer, tiny_windows

WINDOWS = tiny_windows(6, 24)
BASELINES = ["rtn", "absmax", "smoothquant", "gptq", "quip"]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_windows(3, 20, seed=9)).logits


# --- running around the blocks --------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_blocks_are_called_with_is_found_without_running_them(architecture, monkeypatch):
    model, windows = tiny_model(architecture), tiny_windows(4, 16)
    assert not bypass_of(model, lambda name: resident(model, name)).refused
    with torch.no_grad():
        around = capture(model, windows, 2)
        refusing = Bypass(refused="to see the other way")
        monkeypatch.setattr(calibration, "bypass_of", lambda *_: refusing)
        whole = capture(model, windows, 2)
    assert all(torch.equal(a, b) for a, b in zip(around.hidden, whole.hidden, strict=True))
    for name in whole.calls:
        assert alike(around.calls[name], whole.calls[name])


def test_capturing_runs_no_block(monkeypatch):
    model = tiny_model()
    bypass_of(model, lambda name: resident(model, name))
    ran = []
    for _, block in find_blocks(model):
        block.mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        capture(model, WINDOWS)
    assert not ran


def test_a_model_whose_blocks_depend_on_each_other_runs_whole():
    """Its second block is told what the first one made of the text."""
    model = tiny_model()
    first, second = (block for _, block in find_blocks(model))
    told = []
    first.register_forward_hook(lambda module, args, output: told.append(output.mean()))
    second.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"said": told[-1] if told else None}),
        with_kwargs=True,
    )
    forward = type(second).forward
    second.forward = lambda *args, said, **kwargs: forward(second, *args, **kwargs)
    found = bypass_of(model, lambda name: resident(model, name))
    assert "depends on what they compute" in found.refused
    with torch.no_grad():
        captured = capture(model, WINDOWS[:2])
    first_said, second_said = (call[1]["said"] for call in captured.calls["model.layers.1"])
    assert first_said != second_said


# --- one calibration for many cells ---------------------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8:static"])
def test_a_shared_calibration_gives_the_weights_of_one_of_its_own(baseline, scheme):
    model = tiny_model()
    shared = Calibration(model, WINDOWS)
    for other in ("smoothquant", "gptq"):  # what was asked for before changes nothing
        quantize_model(copy.deepcopy(model), other, "W8A8", shared)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    found = quantize_model(one, baseline, scheme, shared)
    expected = quantize_model(other, baseline, scheme, WINDOWS)
    assert same(weights(one), weights(other))
    assert torch.equal(logits(one), logits(other))
    assert found.notes == expected.notes
    assert same(weights(model), weights(tiny_model()))


def test_statistics_of_the_full_precision_model_are_collected_once(monkeypatch):
    model, ran = tiny_model(), []
    collect = passes.collect
    monkeypatch.setattr(passes, "collect", lambda *a: (ran.append(a[0].name), collect(*a))[1])
    shared = Calibration(model, WINDOWS)
    for scheme in ("W8A8", "W4A4", "W1A8"):
        quantize_model(copy.deepcopy(model), "smoothquant", scheme, shared)
    assert ran == ["model.layers.0", "model.layers.1"]


def test_methods_share_the_hessians_of_the_first_block(monkeypatch):
    model, ran = tiny_model(), []
    collect = passes.collect
    monkeypatch.setattr(passes, "collect", lambda *a: (ran.append(a[0].name), collect(*a))[1])
    shared = Calibration(model, WINDOWS)
    for baseline, scheme in (("gptq", "W4A16"), ("gptq", "W2A16"), ("quip", "W4A16")):
        quantize_model(copy.deepcopy(model), baseline, scheme, shared)
    assert ran.count("model.layers.0") == 1


def test_a_pass_that_only_observes_ends_at_the_last_linear_observed():
    model, ran = tiny_model(), []
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "down_proj")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    quantize_model(model, "gptq", "W4A16", WINDOWS)
    for block in ("model.layers.0.mlp.", "model.layers.1.mlp."):  # its input is seen, and no more
        assert ran.count(f"{block}down_proj") == ran.count(f"{block}gate_proj") - 1


@dataclass(frozen=True)
class Looking(Baseline):
    """Reads every batch that enters and leaves a block in full precision."""

    transform_statistics = ("absmax",)
    calibrate_on = "full_precision"
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def transform(self, block, context):
        before = torch.cat(list(context.inputs))
        self.seen.append((before, torch.cat(list(context.reference_outputs))))

    def quantize_weight(self, weight, scheme, stats, generator):
        return round_to_nearest(weight, scheme)


def test_a_method_may_look_into_batches_that_were_not_kept():
    model = tiny_model()
    shared = Calibration(model, WINDOWS)
    Looking.seen.clear()
    for scheme in ("W4A16", "W3A16"):
        quantize_model(copy.deepcopy(model), Looking(), scheme, shared)
    first, second = Looking.seen[:2], Looking.seen[2:]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(first[0][1], first[1][0])


def test_experts_in_one_tensor_compute_as_before_after_their_inputs_were_seen():
    model = tiny_model("mixtral")
    before = logits(model)
    shared = Calibration(model, WINDOWS)
    quantize_model(copy.deepcopy(model), "smoothquant", "W8A8", shared)
    assert torch.equal(logits(model), before)


# --- one quantized copy for many activation widths ------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
def test_other_activations_on_the_same_weights_are_those_of_a_new_quantization(baseline):
    model = tiny_model()
    result = quantize_model(model, baseline, "W4A16", WINDOWS)
    for text in ("W4A8", "W4A4:a=tensor", "W4A8KV4", "W4A16"):
        scheme = quantized(baseline, text)
        result = requantize_activations(model, scheme, result)
        expected = tiny_model()
        other = quantize_model(expected, baseline, text, WINDOWS)
        assert torch.equal(logits(model), logits(expected))
        assert result.scheme == other.scheme
        assert [r.scheme for r in result.layers] == [r.scheme for r in other.layers]
        assert batching_of(model) == batching_of(expected)


def quantized(baseline, text):
    return Cell.of(load_baseline(baseline), Scheme.parse(text)).scheme


def test_a_sweep_quantizes_once_for_cells_that_differ_in_activations(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "tiny")
    calls = []
    quantize = supply.quantize_model
    monkeypatch.setattr(
        supply, "quantize_model", lambda *a, **k: (calls.append(str(a[2])), quantize(*a, **k))[1]
    )
    (tmp_path / "sweep.yaml").write_text(
        f"""
checkpoints: [{folder}]
baselines: [none, rtn, gptq]
schemes: [W4A16, W3A16, W4A8, "W4A8:static"]
calibration: {{source: wikitext2, nsamples: 4, seqlen: 16}}
tasks: [arc_easy]
limit: 2
data: {DATA}
results: {tmp_path / "runs"}
"""
    )
    qbench("sweep", tmp_path / "sweep.yaml")
    # W4 (W4A8 on the same copy), W3, static
    assert len(calls) == 3 + 3


def test_cells_with_the_same_weights_stand_together(tmp_path):
    sweep = Sweep(
        checkpoints=["any"],
        baselines=["gptq"],
        schemes=["W4A16", "W2A16", "W4A8", "W2A4"],
        tasks=["piqa"],
    )
    assert [cell.scheme.label for cell in sweep.cells()] == ["W4A16", "W4A8", "W2A16", "W2A4"]


# --- scales over the whole input ------------------------------------------------------------------


def test_activation_quantizers_can_be_switched_off_for_a_while():
    model, only_weights = tiny_model(), tiny_model()
    quantize_model(model, "rtn", "W4A4KV4:bmm", WINDOWS)
    quantize_model(only_weights, "rtn", "W4A16", WINDOWS)
    with activations_off(model):
        assert torch.equal(logits(model), logits(only_weights))
    assert not torch.equal(logits(model), logits(only_weights))


def test_scales_of_sequences_are_those_of_each_sequence_alone():
    model, ids, lengths = tiny_model(), tiny_windows(3, 20, seed=9), [20, 13, 7]
    quantize_model(model, "absmax", "W8A4:a=tensor", WINDOWS)
    assert batching_of(model) == "unshared"

    def without_filling(logits):
        return torch.cat([row[:n] for row, n in zip(logits, lengths, strict=True)])

    with torch.no_grad():
        each = [
            model(input_ids=row[None, :n]).logits[0] for row, n in zip(ids, lengths, strict=True)
        ]
        together = model(input_ids=ids).logits
        with scales_of_sequences(lengths):
            apart = model(input_ids=ids).logits
    alone = torch.cat(each)
    # rounding ties may fall otherwise in a product of another shape
    assert (without_filling(apart) - alone).abs().median() < 1e-6
    assert (without_filling(together) - alone).abs().median() > 1e-4


@pytest.mark.parametrize(("grid", "bits"), [(g.name, g.min_bits) for g in GRIDS.values()])
def test_filling_is_no_part_of_a_scale_on_any_grid(grid, bits):
    quantizer, lengths = ActivationQuantizer(bits, grid, "tensor"), [9, 1, 4]
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(3))
    for one, n in zip(x, lengths, strict=True):
        one[n:] *= 100
    x[1] = x[1].abs()  # a sequence of one sign
    with scales_of_sequences(lengths):
        found = quantizer(x)
    for one, own, n in zip(found, x, lengths, strict=True):
        torch.testing.assert_close(one[:n], quantizer(own[None, :n])[0])
    assert torch.equal(quantizer(x), quantizer(x.reshape(1, 27, 16)).reshape(x.shape))


@pytest.mark.parametrize("scheme", ["W4A4", "W4A4:a=tensor", "W4A8:static"])
def test_a_tensor_that_several_linears_read_is_rounded_once(scheme, monkeypatch):
    """Query, key and value; gate and up: four roundings instead of seven, of the same values."""
    model, rounded = tiny_model(), []
    quantize_model(model, "rtn", scheme, WINDOWS)
    plain, quantizer = copy.deepcopy(model), ActivationQuantizer.__call__
    for hook in rounding_hooks(plain):
        hook.next.clear()
    counting = lambda self, x: rounded.append(self) or quantizer(self, x)  # noqa: E731
    monkeypatch.setattr(ActivationQuantizer, "__call__", counting)
    expected, each = logits(plain), len(rounded)
    assert torch.equal(logits(model), expected)
    assert 7 * (len(rounded) - each) == 4 * each > 0


def rounding_hooks(model):
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(getattr(hook, "__self__", None), _InputHook):
                yield hook.__self__


def test_nothing_that_was_rounded_is_kept_after_a_pass_whole_or_broken_off():
    model = tiny_model()
    quantize_model(model, "rtn", "W4A4", WINDOWS)
    hooks, held = list(rounding_hooks(model)), []
    assert len(hooks) == len(find_blocks(model))
    logits(model)
    assert not any(hook.held for hook in hooks)

    def lacking(module, args):
        held.extend(hook.held for hook in hooks if hook.held)
        raise torch.OutOfMemoryError("between the query and the key")

    _, block = find_blocks(model)[0]
    block.self_attn.k_proj.register_forward_pre_hook(lacking, prepend=True)
    with pytest.raises(torch.OutOfMemoryError):
        logits(model)
    assert held == [{}]
    assert not any(hook.held for hook in hooks)


def test_where_others_run_between_two_readers_nothing_is_held():
    """Falcon's MLP reads what its attention read, after the attention's own output projection."""
    model = tiny_model("falcon")
    quantize_model(model, "rtn", "W4A4", WINDOWS)
    assert any(len(group) > 1 for group in quantization_of(model).blocks[0].input_groups)
    assert [hook.next for hook in rounding_hooks(model)] == [{}] * len(find_blocks(model))


@pytest.mark.parametrize("scheme", ["W16A4:a=tensor,bmm", "W16A4:static,bmm"])
def test_rounded_attention_inputs_have_scales_of_each_sequence_too(scheme):
    model, ids = tiny_model(), tiny_windows(2, 20, seed=9)
    quantize_model(model, "rtn", scheme, WINDOWS)
    with torch.no_grad(), scales_of_sequences([20, 6]):
        apart = model(input_ids=ids).logits[1, :6]
    with torch.no_grad():
        alone = model(input_ids=ids[1:, :6]).logits[0]
        together = model(input_ids=ids).logits[1, :6]
    assert (apart - alone).abs().median() < 1e-6
    assert (together - alone).abs().median() > 1e-4


class Flat(nn.Module):
    """A linear that runs the rows of a batch as one long row."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.reshape(1, -1, x.shape[-1])).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("calibration", [None, WINDOWS])
def test_rows_that_are_laid_end_to_end_have_lost_their_sequences(calibration):
    model = tiny_model()
    _, block = find_blocks(model)[0]
    block.mlp.down_proj = Flat(block.mlp.down_proj)
    quantize_model(model, "rtn", "W8A8:a=tensor", calibration)
    assert batching_of(model) == "one row"


def test_linears_of_other_widths_round_what_they_share_by_themselves():
    model, per_linear = tiny_model(), {}
    quantize_model(model, "rtn", "W4A4;*.k_proj=W4A8;*.up_proj=W4A16", WINDOWS)
    _, block = find_blocks(model)[0]
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        owner = block.self_attn if name[0] in "qkv" else block.mlp
        getattr(owner, name).register_forward_pre_hook(
            lambda _, args, name=name: per_linear.update({name: args[0].unique().numel()})
        )
    with torch.no_grad():
        model(input_ids=WINDOWS[:1, :2])
    assert per_linear["q_proj"] == per_linear["v_proj"] < 31 < per_linear["k_proj"]
    assert per_linear["gate_proj"] < 31 < per_linear["up_proj"]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_signed_codes_have_the_zero_point_0(grid):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    for bits in {grid.min_bits, min(8, grid.max_bits)}:
        affine = grid.fit(x, bits)
        assert (grid.qmin(bits) < 0) == (not affine.zero_point.any())
        expected = grid.decode(grid.encode(x, affine, bits), affine)
        assert torch.equal(ActivationQuantizer(bits, grid.name, "token")(x), expected)


def test_scales_of_sequences_refuse_an_input_without_them():
    quantizer = ActivationQuantizer(8, "restricted", "tensor")
    with scales_of_sequences([3, 2]):
        for shape in [(6, 16), (3, 3, 16), (2, 2, 16), (2, 4, 16)]:
            with pytest.raises(QBenchError, match="one row"):
                quantizer(torch.ones(shape))


def test_routed_experts_lose_their_sequences_so_that_every_row_runs_alone():
    model = odd_model()
    quantize_model(model, "absmax", "W8A8:a=tensor", odd_windows())
    assert not quantization_of(model).sees_sequences
    assert batching_of(model) == "one row"


def test_unshared_rows_together_score_as_every_row_alone():
    model = tiny_model()
    quantize_model(model, "absmax", "W8A8:a=tensor", WINDOWS)
    options = {"limit": 6, "data_dir": DATA}
    found = evaluate(model, tiny_tokenizer(), ["arc_easy"], **options)["arc_easy"]
    alone = evaluate(model, tiny_tokenizer(), ["arc_easy"], batching="one row", **options)
    assert found.details["batching"] == "unshared"
    differences = found.items["loglikelihood"] - alone["arc_easy"].items["loglikelihood"]
    assert abs(differences).max() < 0.05 * abs(found.items["loglikelihood"]).mean()


@dataclass(frozen=True)
class Caching(Baseline):
    """Keeps something of its own beside the statistics, under a careless name."""

    weight_statistics = ("hessian",)
    strength: float = 0.1

    def quantize_weight(self, weight, scheme, stats, generator):
        clip = stats.cached("clip", lambda: self.strength * float(stats.hessian.diagonal().max()))
        return round_to_nearest(weight.clamp(-clip, clip), scheme)


def test_what_a_method_caches_in_one_cell_is_not_read_in_the_next():
    model = tiny_model()
    shared = Calibration(model, WINDOWS)
    quantize_model(copy.deepcopy(model), Caching(0.001), "W4A16", shared)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(one, Caching(0.5), "W4A16", shared)
    quantize_model(other, Caching(0.5), "W4A16", WINDOWS)
    assert same(weights(one), weights(other))


def test_a_calibration_that_is_kept_leaves_its_own_model_alone():
    model = tiny_model()
    with pytest.raises(QBenchError, match="quantize a copy of the model"):
        quantize_model(model, "gptq", "W4A16", Calibration(model, WINDOWS))
    assert same(weights(model), weights(tiny_model()))


def test_activations_that_cannot_be_leave_those_that_are_there(monkeypatch):
    """As where only the second block has no place for keys and values."""
    model = tiny_model()
    result = quantize_model(model, "rtn", "W4A8", WINDOWS)
    before = logits(model)
    result.blocks[1].uses_sdpa = False
    with pytest.raises(QBenchError, match="KV4"):
        requantize_activations(model, quantized("rtn", "W4A4KV4"), result)
    assert torch.equal(logits(model), before)
    again = requantize_activations(model, quantized("rtn", "W4A16"), result)
    expected = tiny_model()
    quantize_model(expected, "rtn", "W4A16", WINDOWS)
    assert torch.equal(logits(model), logits(expected))
    assert not again.handles


def test_energies_of_rounded_outputs_with_a_bias_are_not_taken():
    """A bias of 300 rounds off more in bfloat16 than the product is large."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    for _, block in find_blocks(model):
        block.self_attn.k_proj.bias.data.fill_(300)
    before = weights(model)
    result = quantize_model(model, "gptq", "W4A16", WINDOWS)
    name = "model.layers.0.self_attn.k_proj"
    report = next(r for r in result.layers if r.name == name)
    exact = tiny_model("qwen2")
    exact.load_state_dict({k: v.float() for k, v in before.items()})
    stats = hessian_of(exact, name)
    w = before[f"{name}.weight"].float()
    delta = w - model.get_parameter(f"{name}.weight").detach().float()
    expected = float(((delta @ stats) * delta).sum() / ((w @ stats) * w).sum())
    assert report.proxy_loss == pytest.approx(expected, rel=0.05)


def hessian_of(model, name):
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    handle.remove()
    x = seen[0].flatten(0, 1)
    return 2 / len(WINDOWS) * x.T @ x
