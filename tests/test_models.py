"""Blocks, their matrices and their norms as tracing finds them, for every architecture.

What is expected of each architecture is read off transformers' modeling files.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from invented_architecture import odd_model, odd_windows
from torch import nn
from transformers.pytorch_utils import Conv1D

from qbench import QBenchError
from qbench.models.blocks import find_blocks, trace_block
from qbench.models.linear import Linear, attach
from qbench.models.norms import NormFold
from qbench.quantization.calibration import capture
from qbench.quantization.passes import use_eager_experts_
from qbench.testing import ARCHITECTURES, tiny_model, tiny_windows


class Expected(NamedTuple):
    blocks: str
    """Name of the list of blocks."""
    groups: list[str]
    """Linears that read one input, in order of execution, separated by blanks."""
    folds: dict[str, str]
    """Norm -> everything that reads its output."""
    attention: str
    """Linears that make queries, keys and values."""
    offset: float = 0.0


QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = Expected(
    "model.layers",
    [QKV, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"],
    {"input_layernorm": QKV, "post_attention_layernorm": "mlp.gate_proj mlp.up_proj"},
    QKV,
)
EXPERTS = range(4)
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA._replace(offset=1.0),
    "opt": Expected(
        "model.decoder.layers",
        [QKV, "self_attn.out_proj", "fc1", "fc2"],
        {"self_attn_layer_norm": QKV, "final_layer_norm": "fc1"},
        QKV,
    ),
    "gpt2": Expected(
        "transformer.h",
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"},
        "attn.c_attn",
    ),
    "gpt_neox": Expected(  # parallel residual, but a norm for each branch
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        {
            "input_layernorm": "attention.query_key_value",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
        "attention.query_key_value",
    ),
    "falcon": Expected(  # parallel attention: one norm feeds both branches
        "transformer.h",
        [
            "self_attention.query_key_value mlp.dense_h_to_4h",
            "self_attention.dense",
            "mlp.dense_4h_to_h",
        ],
        {"input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h"},
        "self_attention.query_key_value",
    ),
    "bloom": Expected(
        "transformer.h",
        [
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        {
            "input_layernorm": "self_attention.query_key_value",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
        "self_attention.query_key_value",
    ),
    "phi": Expected(  # parallel attention
        "model.layers",
        [f"{QKV} mlp.fc1", "self_attn.dense", "mlp.fc2"],
        {"input_layernorm": f"{QKV} mlp.fc1"},
        QKV,
    ),
    "mixtral": Expected(  # fused experts; the router reads the norm too and stays as it is
        "model.layers",
        [QKV, "self_attn.o_proj"]
        + [f"mlp.experts.{part}_proj.{e}" for e in EXPERTS for part in ("gate_up", "down")],
        {
            "input_layernorm": QKV,
            "post_attention_layernorm": " ".join(
                ["mlp.gate.weight", *(f"mlp.experts.gate_up_proj.{e}" for e in EXPERTS)]
            ),
        },
        QKV,
    ),
}


def traced(model, windows=None, number=0):
    use_eager_experts_(model)
    with torch.no_grad():
        captured = capture(model, tiny_windows(2, 16) if windows is None else windows)
        hidden = captured.hidden
        for name, module in find_blocks(model)[: number + 1]:
            block, _ = trace_block(name, module, captured.runner(name, module), hidden[0])
            hidden = [block.run(h, i) for i, h in enumerate(hidden)] if number else hidden
    return block


@pytest.fixture(scope="module")
def blocks():
    return {name: traced(tiny_model(name)) for name in ARCHITECTURES}


def test_every_architecture_of_the_tests_has_an_expectation():
    assert set(EXPECTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_found(architecture):
    names = [name for name, _ in find_blocks(tiny_model(architecture))]
    assert names == [f"{EXPECTED[architecture].blocks}.{i}" for i in range(2)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_and_who_shares_their_inputs_are_found(architecture, blocks):
    block = blocks[architecture]
    groups = [" ".join(group) for group in block.input_groups]
    # which expert runs first depends on the tokens
    assert sorted(groups) == sorted(EXPECTED[architecture].groups)
    if architecture != "mixtral":
        assert groups == EXPECTED[architecture].groups
    assert sorted(block.linears) == sorted(" ".join(groups).split())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_and_all_their_readers_are_found(architecture, blocks):
    found = {fold.name: [r.name for r in fold.readers] for fold in blocks[architecture].folds}
    expected = {norm: readers.split() for norm, readers in EXPECTED[architecture].folds.items()}
    assert {norm: sorted(names) for norm, names in found.items()} == {
        norm: sorted(names) for norm, names in expected.items()
    }
    assert {f.offset for f in blocks[architecture].folds} == {EXPECTED[architecture].offset}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_becomes_queries_keys_and_values_is_found(architecture, blocks):
    block = blocks[architecture]
    assert block.attention_inputs == EXPECTED[architecture].attention.split()
    assert "Attention" in type(block.attention).__name__
    # transformers' BLOOM adds its alibi bias in a product of its own
    assert block.uses_sdpa is (architecture != "bloom")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_a_block_is_a_linear_or_named_as_skipped(architecture, blocks):
    block = blocks[architecture]
    covered = 0
    for linear in block.linears.values():
        covered += linear.weight.numel()
    skipped = [block.module.get_parameter(name) for name in block.skipped]
    matrices = [p for p in block.module.parameters() if p.ndim > 1]
    assert covered + sum(p.numel() for p in skipped) == sum(p.numel() for p in matrices)
    assert set(block.skipped) == ({"mlp.gate.weight"} if architecture == "mixtral" else set())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_are_out_by_in_whatever_the_storage(architecture, blocks):
    """Each linear's matrix times its input is its output, biases aside."""
    block = blocks[architecture]
    for linear in block.linears.values():
        if linear.has_module:
            x = torch.randn(3, linear.shape[1], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                y = linear.module(x) - linear.module(torch.zeros_like(x))
            assert torch.allclose(x @ linear.weight.T, y, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tracing_leaves_the_model_as_it_was(architecture):
    model = tiny_model(architecture)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    traced(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_function_in_both_precisions(architecture, dtype, blocks):
    """And in half precision the same folds are found."""
    model, windows = tiny_model(architecture).to(dtype), tiny_windows(2, 16)
    block = traced(model)
    assert [f.name for f in block.folds] == [f.name for f in blocks[architecture].folds]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = model(windows).logits.float()
        for fold in block.folds:
            fold.fold_(torch.rand(fold.norm.weight.numel(), generator=generator) + 0.5)
        after = model(windows).logits.float()
    assert (after - before).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * before.norm()


def test_a_fold_of_gemmas_norm_divides_one_plus_its_weight(blocks):
    model = tiny_model("gemma")
    fold = traced(model).folds[0]
    before = fold.norm.weight.detach().clone()
    scale = torch.linspace(0.5, 2, 64)
    fold.fold_(scale)
    assert torch.allclose(1 + fold.norm.weight, (1 + before) / scale, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_norm_is_folded_whose_output_the_residual_reads(architecture, changes, dtype):
    """BLOOM's variant, and OPT-350m: the norms come after the residual and feed the next one."""
    assert traced(tiny_model(architecture, **changes).to(dtype)).folds == []


class FaintReader(nn.Module):
    """A norm with one visible reader and one that is no matrix product at all."""

    def __init__(self, strength):
        super().__init__()
        self.norm, self.linear, self.strength = nn.LayerNorm(32), nn.Linear(32, 32), strength

    def forward(self, x):
        y = self.norm(x)
        return 20 * x + self.linear(y) + self.strength * y.roll(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("strength", "folds"), [(0.0, 1), (0.3, 0)])
def test_a_faint_reader_beside_a_strong_residual_stops_the_fold(dtype, strength, folds):
    """It moves the output by 1 %, below what rounding to bfloat16 would hide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = FaintReader(strength).to(dtype)
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        found, _ = trace_block("0", block, lambda hidden, _: block(hidden), x)
    assert len(found.folds) == folds


# --- an architecture that nobody has seen ---------------------------------------------------------


@pytest.fixture(scope="module")
def odd():
    """Experts 0 and 1 are reached, 2 and 3 are not even called."""
    return traced(odd_model(), odd_windows())


def test_an_unknown_architecture_is_understood_without_a_change(odd):
    assert [name for name, _ in find_blocks(odd_model())] == ["decoder.0", "decoder.1"]
    widened = [f"experts.{e}.widen" for e in range(4)]
    narrowed = [f"experts.{e}.narrow" for e in range(4)]
    assert set(odd.linears) == {"mix", "out", "twice", *widened, *narrowed}
    assert list(odd.linears)[:3] == ["mix", "out", "twice"]
    assert odd.skipped == {"router": "not an nn.Linear (a router, for instance)"}
    assert odd.attention_inputs == ["mix"] and odd.uses_sdpa
    assert odd.attention is odd.module  # attention without a module of its own


def test_experts_that_were_not_reached_are_linears_that_share_nothing(odd):
    assert sorted(odd.input_groups) == sorted([name] for name in odd.linears)


def test_experts_that_are_called_without_a_token_share_nothing_either():
    """All their inputs are empty, and empty tensors have one address."""
    block = traced(odd_model(calls_empty=True), odd_windows())
    assert sorted(block.input_groups) == sorted([name] for name in block.linears)


def test_a_linear_used_twice_stands_alone_and_sees_both_inputs(odd):
    from qbench.quantization.passes import collect

    model, windows = odd_model(), odd_windows()
    seen = []
    handle = model.decoder[0].twice.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().flatten(0, 1))
    )
    with torch.no_grad():
        model(windows)
        handle.remove()
        captured = capture(model, windows)
        module = model.decoder[0]
        block, _ = trace_block(
            "decoder.0", module, captured.runner("decoder.0", module), captured.hidden[0]
        )
        stats, _ = collect(block, list(block.linears), ("absmax",), captured.hidden)
    assert ["twice"] in block.input_groups
    assert torch.allclose(stats["twice"].absmax, torch.cat(seen).abs().amax(0), rtol=1e-5)


@pytest.mark.parametrize("calls_empty", [False, True])
def test_folding_reaches_the_experts_that_no_token_reached(calls_empty):
    """One that was forgotten would read a rescaled norm as soon as a token came."""
    model, windows = odd_model(calls_empty=calls_empty), odd_windows()
    block = traced(model, windows)
    assert [f.name for f in block.folds] == ["entry"]  # the gated norm is none that can be folded
    fold = block.folds[0]
    readers = {"mix", "router", *(f"experts.{e}.widen" for e in range(4))}
    assert {r.name for r in fold.readers} == readers

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [expert(block.module.entry(x)) for expert in block.module.experts]
        logits = model(windows)
        fold.fold_(torch.linspace(0.3, 3, 32))
        after = [expert(block.module.entry(x)) for expert in block.module.experts]
        assert torch.allclose(model(windows), logits, atol=1e-4)
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_every_argument_reaches_the_block_again(odd):
    model, windows = odd_model(), odd_windows()
    with torch.no_grad():
        captured = capture(model, windows)
        hidden = captured.hidden
        for name, module in find_blocks(model):
            hidden = [captured.runner(name, module)(h, i) for i, h in enumerate(hidden)]
        replayed = torch.cat([model.read_out(h) for h in hidden])
        assert torch.equal(replayed, torch.cat([model(w[None]) for w in windows]))
    assert captured.calls["decoder.1"][0][1]["temperature"] == 1.5


def test_a_model_that_touches_the_stream_between_blocks_is_refused():
    model = odd_model()
    model.spoil = True
    with pytest.raises(QBenchError, match="something changes the hidden states .*decoder.1"):
        capture(model, odd_windows())


# --- finding blocks -------------------------------------------------------------------------------


def test_a_model_without_a_list_of_blocks_is_refused():
    with pytest.raises(QBenchError, match="Sequential has no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_the_largest_outermost_list_is_the_list_of_blocks():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.empty = nn.ModuleList([nn.ReLU()])
    model.big = nn.ModuleList([nn.Module()])
    model.big[0].inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    assert [name for name, _ in find_blocks(model)] == ["big.0"]


def test_a_block_that_runs_twice_per_pass_is_refused():
    """As where layers share their weights."""
    model = odd_model()
    model.decoder[1] = model.decoder[0]
    with pytest.raises(QBenchError, match="needs blocks that each run once"):
        capture(model, odd_windows())


def test_equal_masks_are_kept_once_for_all_blocks_and_batches():
    with torch.no_grad():
        captured = capture(tiny_model("opt"), tiny_windows(4, 16))
    tensors = {
        id(value)
        for calls in captured.calls.values()
        for _, kwargs in calls
        for value in kwargs.values()
        if isinstance(value, torch.Tensor)
    }
    assert len(tensors) <= 3


# --- one matrix -----------------------------------------------------------------------------------


def test_writing_a_transposed_matrix_writes_the_parameter():
    module = Conv1D(6, 4)  # six outputs, four inputs, stored (in, out)
    linear = Linear("c", module, transposed=True)
    assert linear.shape == (6, 4)
    values = torch.arange(24.0).view(6, 4)
    before = module.weight.data_ptr()
    linear.set_weight_(values)
    assert torch.equal(module.weight, values.T) and module.weight.data_ptr() == before


def test_writing_one_expert_leaves_the_others():
    module = nn.Module()
    module.stack = nn.Parameter(torch.zeros(3, 2, 5))
    Linear("stack.1", module, "stack", expert=1).set_weight_(torch.ones(2, 5))
    Linear("stack.2", module, "stack", expert=2, transposed=True).set_weight_(
        torch.full((5, 2), 2.0)
    )
    assert module.stack.flatten(1).mean(1).tolist() == [0, 1, 2]


def test_writing_casts_to_the_parameters_type():
    module = nn.Linear(4, 2).half()
    Linear("x", module).set_weight_(torch.full((2, 4), 1 / 3))
    assert module.weight.dtype == torch.float16


class Fused(nn.Module):
    """Two experts in one tensor, used through three spellings of the product."""

    def __init__(self, stored):
        super().__init__()
        self.stack = nn.Parameter(stored)

    def forward(self, x, how):
        if how == "linear":
            return sum(F.linear(x, w) for w in self.stack)
        if how == "matmul":
            return sum(x @ w.T for w in self.stack)
        return sum(torch.mm(x, w.T) for w in self.stack)


@pytest.mark.parametrize("how", ["linear", "matmul", "mm"])
def test_hooks_see_and_replace_what_one_expert_reads(how):
    generator = torch.Generator().manual_seed(0)
    stack, x = torch.randn(2, 3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    module, seen = Fused(stack), []
    linears = [Linear(f"stack.{e}", module, "stack", expert=e) for e in range(2)]

    def hook(linear, given):
        seen.append((linear.name, given))
        return given * 2 if linear.name == "stack.1" else None

    handles = attach(linears, hook)
    expected = x @ stack[0].T + 2 * x @ stack[1].T
    assert torch.allclose(module(x, how), expected, atol=1e-5)
    assert [name for name, _ in seen] == ["stack.0", "stack.1"]
    assert all(torch.equal(given, x) for _, given in seen)
    for handle in handles:
        handle.remove()
    assert torch.allclose(module(x, how), x @ (stack[0] + stack[1]).T, atol=1e-5)


def test_an_error_inside_a_fused_module_leaves_no_interception_behind():
    module = Fused(torch.zeros(1, 3, 5))
    attach([Linear("stack.0", module, "stack", expert=0)], lambda linear, x: x * 0)
    with pytest.raises(RuntimeError):
        module(torch.zeros(4, 7), "linear")
    assert torch.equal(F.linear(torch.ones(1, 5), torch.ones(3, 5)), torch.full((1, 3), 5.0))


def test_a_fold_moves_the_scale_of_norm_and_bias_into_its_readers():
    """2211.10438 eq. 3 by hand."""
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 3)
    norm.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weight, scale = linear.weight.detach().clone(), torch.tensor([1.0, 2.0, 4.0, 0.5])
    NormFold("n", norm, 0.0, [Linear("l", linear)]).fold_(scale)
    assert torch.equal(norm.weight.data, 1 / scale)
    assert norm.bias.tolist() == [1.0, 1.0, 0.75, 8.0]
    assert torch.equal(linear.weight.data, weight * scale)


def test_a_new_weight_takes_new_memory_and_stays_the_parameter_that_others_hold():
    """Pages of a file that are mapped are not written to; tied modules see the new values."""
    mapped = torch.ones(4, 2).T  # strided, as nothing that is saved should be
    module, tied = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    module.weight = tied.weight = nn.Parameter(mapped, requires_grad=False)
    values = torch.arange(8.0).view(2, 4)
    with torch.inference_mode():
        Linear("x", module).set_weight_(values)
    assert tied.weight is module.weight and torch.equal(tied.weight, values)
    assert torch.equal(mapped, torch.ones(2, 4))
    assert module.weight.data_ptr() != values.data_ptr() and module.weight.is_contiguous()
    assert not module.weight.is_inference()
