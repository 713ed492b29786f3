"""Sharing on tiny models of every family: exact, or off by itself with its reason, never wrong.

What right is comes from a plain forward, one row at a time, in float64 log-softmax.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qbench.errors import QBenchError
from qbench.evaluation.forward import logits_of
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.scoring import score
from qbench.evaluation.sharing import Sharing, sharing_of, test_sharing
from qbench.quantization.quantize import quantize_model
from qbench.testing import ARCHITECTURES, tiny_model

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OTHERS = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "phi3": {**_SMALL, "pad_token_id": 0},
    "bitnet": _SMALL,
    "stablelm": _SMALL,
    "olmo2": _SMALL,
    "cohere": {**_SMALL, "logit_scale": 0.5},
    "gemma2": {**_SMALL, "head_dim": 16, "sliding_window": 4096},
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
}
WINDOWED = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
}
EXACT = sorted({*ARCHITECTURES, *OTHERS} - {"bloom", "mpt", "gpt_neo", "mamba"})


def build(architecture, **changes):
    """A tiny model whose attention looks about: sharp enough for a wrong mask to cost nats."""
    if architecture in ARCHITECTURES:
        model = tiny_model(architecture, **changes)
    else:
        common = {"vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 1}
        fields = {**common, **OTHERS[architecture], **changes}
        if architecture in ("gptj", "mpt"):
            del fields["max_position_embeddings"]
        config = AutoConfig.for_model(architecture, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def questions(n=4, context=24, seed=0):
    """Rows of questions with four options of one to six tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(size):
        return torch.randint(3, 512, (size,), generator=generator).tolist()

    rows = []
    for q in range(n):
        before = [1, *tokens(context + q)]
        rows += [Row([*before, *tokens(size)], size) for size in (1, 3, 6, 4)]
    return rows


def brute(model, row):
    tokens = torch.tensor(row.tokens)
    with torch.no_grad():
        logits = model(tokens[None, :-1], use_cache=False).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return -float(losses[-row.n_scored :].sum())


def check(model, exact):
    rows = questions()
    found = score(model, PackedRows(rows))
    assert found.details["batching"] == ("shared" if exact else "padded")
    assert found.details["sharing"].startswith("exact" if exact else "off: ")
    for row, own in zip(rows, found.scores, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model, row), abs=2e-4)
    return found.details["sharing"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "cohere", "gemma2", "mixtral"])
def test_sharing_is_exact_where_attention_takes_any_mask(architecture):
    check(build(architecture), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", EXACT)
def test_sharing_is_exact_on_every_family_of_that_kind(architecture, attention):
    model = build(architecture)
    if (architecture, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no SDPA for Gemma 2")
    model.set_attn_implementation(attention)
    check(model, exact=True)


@pytest.mark.parametrize("architecture", ["mpt", "gpt_neo"])
def test_alibi_by_column_and_local_attention_turn_sharing_off(architecture):
    assert "nats" in check(build(architecture), exact=False)


@pytest.mark.parametrize("architecture", ["bloom", "mamba"])
def test_what_raises_turns_sharing_off(architecture):
    check(build(architecture), exact=False)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_sliding_window_shorter_than_the_row_turns_sharing_off(architecture):
    check(build(architecture, **WINDOWED[architecture]), exact=False)
    check(build(architecture, sliding_window=64), exact=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_of_a_half_precision_model_is_not_taken_for_an_error(dtype):
    for architecture in ("llama", "gpt2", "cohere"):
        assert test_sharing(build(architecture).to(dtype), questions()).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_an_error_is_not_taken_for_noise_of_a_half_precision_model(architecture, dtype):
    model = build(architecture, **WINDOWED[architecture]).to(dtype)
    assert not test_sharing(model, questions()).exact


def test_an_error_in_the_longest_rows_alone_is_found():
    """The window of 32 is wide enough for all questions but the last."""
    rows = [*questions(context=12), *questions(n=1, context=40, seed=1)]
    model = build("mistral", sliding_window=32)
    assert test_sharing(model, rows[:-4]).exact
    assert not test_sharing(model, rows).exact


def counting(calls):
    def forward(model, batches):
        for batch in batches:
            calls.append(batch)
            yield from logits_of(model, [batch])

    return forward


def test_a_verdict_is_kept_with_the_model_and_its_copies_until_rows_grow():
    model, calls = build("llama"), []
    short, long = PackedRows(questions()), PackedRows(questions(context=40))
    first = sharing_of(model, short, forward=counting(calls))
    tested = len(calls)
    assert tested and first.longest == short.longest
    assert sharing_of(copy.deepcopy(model), short, forward=counting(calls)) == first
    assert len(calls) == tested
    assert sharing_of(model, long, forward=counting(calls)).longest == long.longest
    assert len(calls) > tested


def test_a_verdict_belongs_to_one_attention_implementation():
    model, calls = build("llama"), []
    sharing_of(model, PackedRows(questions()), forward=counting(calls))
    tested = len(calls)
    model.set_attn_implementation("eager")
    sharing_of(model, PackedRows(questions()), forward=counting(calls))
    assert len(calls) > tested


def test_a_verdict_that_is_handed_in_is_believed():
    model, packed = build("mistral", sliding_window=8), PackedRows(questions())
    off = score(build("llama"), packed, sharing=Sharing(False, "off: said so"))
    assert off.details["batching"] == "padded" and off.details["sharing"] == "off: said so"
    believed = score(model, packed, sharing=Sharing(True, "exact"))
    assert believed.details["batching"] == "shared"
    short = Sharing(True, "exact", longest=packed.longest - 1)
    assert score(model, packed, sharing=short).details["batching"] == "padded"


def test_the_test_runs_without_activation_quantizers():
    """At four bits a last bit of noise moves whole steps; what is asked is how attention works."""
    model = build("llama")
    quantize_model(model, "rtn", "W16A4")
    assert test_sharing(model, questions()).reason == "exact"


def test_rows_with_nothing_in_common_need_no_test():
    rows = [Row([k, 5, 6, 7], 1) for k in range(10, 20)]
    calls = []
    assert test_sharing(build("llama"), [rows[0]], counting(calls)).exact and not calls
    found = score(build("mistral", sliding_window=2), PackedRows(rows), forward=counting(calls))
    assert found.details["batching"] == "padded" and not any(b.ends is not None for b in calls)
    assert found.details["sharing"] == "off: it would save 0%"


def wide_questions(n=24, seed=0):
    """Short questions, many of them: rows of no window's length, in a tree that is wider."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(size):
        return torch.randint(3, 512, (size,), generator=generator).tolist()

    befores = [[1, *tokens(12)] for _ in range(n)]
    return [Row([*before, *tokens(3)], 3) for before in befores for _ in range(4)]


def test_a_window_that_no_row_reaches_but_the_tree_does_turns_sharing_off():
    """Local attention goes by column, so trees as wide as those to come have to be tried."""
    rows = wide_questions()
    assert max(len(row.tokens) for row in rows) < 32
    model = build("gpt_neo", window_size=32)
    found = score(model, PackedRows(rows))
    assert found.details["batching"] == "padded" and found.details["sharing"].startswith("off: ")
    for row, own in zip(rows, found.scores, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model, row), abs=2e-4)


@pytest.mark.parametrize(
    ("architecture", "changes"), [("mistral", {"sliding_window": 8}), ("mpt", {})]
)
def test_options_of_one_token_are_tested_too(architecture, changes):
    """The first rows are then one chain, and the tree begins after them."""
    generator = torch.Generator().manual_seed(0)
    prefix = [1, *torch.randint(3, 512, (20,), generator=generator).tolist()]
    rows = []
    for n in (9, 3, 4, 5, 6):
        before = [*prefix, *torch.randint(3, 512, (n,), generator=generator).tolist()]
        rows += [Row([*before, option], 1) for option in (5, 6, 7, 8)]
    model = build(architecture, **changes)
    found = score(model, PackedRows(rows))
    assert found.details["batching"] == "padded"
    for row, own in zip(rows, found.scores, strict=True):
        assert own.loglikelihood == pytest.approx(brute(model, row), abs=2e-4)


def test_a_verdict_for_lack_of_memory_is_not_kept():
    model, packed, lacking = build("llama"), PackedRows(questions()), [True]

    def forward(model, batches):
        if lacking.pop() if lacking else False:
            raise torch.OutOfMemoryError("no more")
        yield from logits_of(model, batches)

    first = score(model, packed, forward=forward)
    assert first.details["sharing"] == "off: no memory to test it"
    assert score(model, packed, forward=forward).details["sharing"] == "exact"


def test_what_is_no_fault_of_the_attention_is_no_verdict():
    def forward(model, batches):
        raise QBenchError("a block of the checkpoint is gone")
        yield

    with pytest.raises(QBenchError, match="is gone"):
        score(build("llama"), PackedRows(questions()), forward=forward)


def test_off_for_long_rows_says_nothing_of_short_ones():
    model = build("mistral", sliding_window=40)
    short, long = PackedRows(questions(n=1, context=6)), PackedRows(questions(context=60))
    alone = score(copy.deepcopy(model), short).details
    assert score(model, long).details["batching"] == "padded"
    assert score(model, short).details == alone
    assert alone["batching"] == "shared"


def test_a_model_with_scales_over_its_inputs_is_scored_unshared_unasked():
    model, rows = build("llama"), questions()
    quantize_model(model, "absmax", "W8A4:a=tensor")
    found = score(model, PackedRows(rows))
    alone = score(model, PackedRows(rows), batching="one row")
    assert found.details["batching"] == "unshared"
    for one, other in zip(found.scores, alone.scores, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-3)
