"""Recipes, presets against the papers' tables, and the two schedules."""

import pytest
import yaml

from qbench.errors import QBenchError
from qbench.training.presets import PRESETS
from qbench.training.recipe import Recipe, digest

PATHS = {"corpus": "corpus.jsonl", "tokenizer": "tokenizer"}
SMALL = {
    "name": "s",
    "shape": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "seqlen": 16,
    "tokens_per_step": 64,
    "steps": 100,
    "learning_rate": 1e-3,
    **PATHS,
}


def small(**changes):
    fields = {**SMALL, **changes}
    return Recipe.of({name: value for name, value in fields.items() if value is not None})


# BitNet, arXiv 2310.11453, appendix A: hidden, layers, heads, peak learning rate, weight decay
BITNET_APPENDIX_A = """
    125m   768 12 12 2.4e-3 0.01
    350m  1024 24 16 1.2e-3 0.01
    760m  1536 24 16 1e-3   0.01
    1.3b  2048 24 32 8e-4   0.01
    2.7b  2560 32 32 6.4e-4 0.01
    6.7b  4096 32 32 4.8e-4 0.01
    13b   5120 40 40 4e-4   0.05
    30b   7168 48 56 4e-4   0.05
"""

# "The Era of 1-bit LLMs: Training Tips, Code and FAQ", tables 1 and 2: hidden, GLU, heads, layers,
# both b1.58 peaks, LLaMA's peak
TIPS_TABLES_1_AND_2 = """
    700m 1536  4096 24 24 1.5e-3 1e-3 2.5e-4
    1.3b 2048  5460 32 24 1.2e-3 8e-4 2.0e-4
    3b   3200  8640 32 26 1.2e-3 8e-4 2.0e-4
    3.9b 3200 12800 32 26 1.2e-3 8e-4 -
"""


def rows(table):
    return [line.split() for line in table.strip().splitlines()]


@pytest.mark.parametrize("row", rows(BITNET_APPENDIX_A), ids=lambda row: row[0])
def test_bitnet_presets_are_appendix_a_of_the_paper(row):
    size, hidden, layers, heads, rate, decay = row
    recipe = Recipe.of({"preset": f"bitnet-{size}", **PATHS})
    shape = recipe.shape
    assert (shape.hidden_size, shape.num_hidden_layers) == (int(hidden), int(layers))
    assert shape.num_attention_heads == int(heads)
    # 40K updates of 256K tokens, Adam (0.9, 0.98), polynomial decay, warm-up 750, no clipping
    assert (recipe.steps, recipe.tokens_per_step) == (40_000, 256 * 1024)
    assert (recipe.betas, recipe.warmup, recipe.clip) == ((0.9, 0.98), 750, None)
    runs = recipe.runs()
    assert [run.kind for run in runs] == ["fp16", "b1"]
    for run in runs:
        assert run.peaks == (float(rate),)
        assert run.schedule == "polynomial"
        assert run.weight_decay_at(0) == run.weight_decay_at(39_999) == float(decay)


@pytest.mark.parametrize("row", rows(BITNET_APPENDIX_A), ids=lambda row: row[0])
def test_bitnet_presets_have_the_papers_weights_per_block(row):
    """Eq. 16-18 and Table 1 follow from 12 d^2 weights a block, of which the MLP has 8 d^2."""
    shape = Recipe.of({"preset": f"bitnet-{row[0]}", **PATHS}).shape
    d = shape.hidden_size
    assert 3 * d * shape.intermediate_size == pytest.approx(8 * d * d, rel=0.002)


@pytest.mark.parametrize("row", rows(TIPS_TABLES_1_AND_2), ids=lambda row: row[0])
def test_b158_presets_are_tables_1_and_2_of_the_training_tips(row):
    size, hidden, glu, heads, layers, first, second, llama = row
    recipe = Recipe.of({"preset": f"bitnet-b1.58-{size}", **PATHS})
    shape = recipe.shape
    assert (shape.hidden_size, shape.intermediate_size) == (int(hidden), int(glu))
    assert (shape.num_attention_heads, shape.num_hidden_layers) == (int(heads), int(layers))
    assert (recipe.betas, recipe.warmup, recipe.seqlen) == ((0.9, 0.95), 375, 2048)
    assert (recipe.steps, recipe.tokens_per_step) == (100_000, 2**20)  # 100B tokens in steps of 1M
    runs = {run.kind: run for run in recipe.runs()}
    assert runs["b158"].peaks == (float(first), float(second))
    assert runs["b158"].weight_decay_at(49_999) == 0.1
    assert runs["b158"].weight_decay_at(50_000) == 0.0
    if llama == "-":
        assert list(runs) == ["b158"]
    else:
        assert runs["fp16"].peaks == (float(llama),)
        assert runs["fp16"].weight_decay_at(99_999) == 0.1


def test_every_preset_becomes_a_recipe_and_every_field_can_be_overridden():
    for name in PRESETS:
        recipe = Recipe.of(
            {
                "preset": name,
                **PATHS,
                "name": "mine",
                "steps": 5000,
                "shape": {"intermediate_size": 96},
            }
        )
        assert (recipe.name, recipe.steps, recipe.shape.intermediate_size) == ("mine", 5000, 96)
        assert recipe.shape.num_hidden_layers == PRESETS[name]["shape"]["num_hidden_layers"]


def test_a_shape_can_be_a_presets():
    assert small(shape="bitnet-125m").shape.hidden_size == 768


def test_overriding_a_preset_leaves_the_preset_as_it_was():
    Recipe.of({"preset": "bitnet-125m", **PATHS, "shape": {"hidden_size": 384}})
    assert PRESETS["bitnet-125m"]["shape"]["hidden_size"] == 768


# --- schedules -----------------------------------------------------------------------------------


def test_linear_rises_over_the_warmup_and_falls_to_zero():
    run = small(warmup=10, learning_rate=2.0).runs()[0]
    assert [run.learning_rate_at(step) for step in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert run.learning_rate_at(10) == 2.0
    assert run.learning_rate_at(55) == 1.0  # half of the 90 steps after the warm-up
    assert run.learning_rate_at(100) == 0.0


def test_polynomial_is_linear_at_power_one_and_below_it_at_power_two():
    linear = small(warmup=10).runs()[0]
    for power in (1.0, 2.0):
        run = small(warmup=10, schedule="polynomial", power=power).runs()[0]
        for step in (0, 9, 10, 37, 99):
            left = linear.learning_rate_at(step) / 1e-3
            expected = left if step < 10 else left**power
            assert run.learning_rate_at(step) == pytest.approx(1e-3 * expected)


def test_two_stages_drop_to_the_lower_peak_half_way_on_one_falling_line():
    run = small(twins=["b158"], schedule="two-stage", learning_rate=[4.0, 1.0]).runs()[0]
    assert run.learning_rate_at(0) == 4.0
    assert run.learning_rate_at(49) == pytest.approx(4.0 * 0.51)
    assert run.learning_rate_at(50) == pytest.approx(1.0 * 0.5)
    assert run.learning_rate_at(75) == pytest.approx(0.25)


def test_two_stages_of_700m_are_the_training_tips_figure():
    """Read off the figure by others: from 1.5e-3 to 8e-4 over 50K steps, then from 5e-4 to 0."""
    recipe = Recipe.of({"preset": "bitnet-b1.58-700m", **PATHS, "twins": ["b158"]})
    (run,) = recipe.runs()
    rates = [run.learning_rate_at(step) for step in (374, 49_999, 50_000, 100_000)]
    # the figure's 8e-4 is read off an axis; one line over the 99,625 steps says 7.53e-4
    half = 50_000 / 99_625
    assert rates == pytest.approx([1.5e-3, 1.5e-3 * half, 1e-3 * half, 0.0], rel=1e-4)
    assert rates[1:3] == pytest.approx([8e-4, 5e-4], abs=5e-5)


def test_the_second_half_begins_in_the_middle_of_an_odd_number_of_steps():
    run = small(
        twins=["b158"], schedule="two-stage", learning_rate=[4.0, 1.0], steps=5, weight_decay=0.1
    ).runs()[0]
    assert [run.weight_decay_at(step) for step in range(5)] == [0.1, 0.1, 0.1, 0.0, 0.0]


def test_weight_decay_stays_on_in_one_stage():
    run = small(weight_decay={"fp16": 0.3}, twins=["fp16", "b1"]).runs()
    assert run[0].weight_decay_at(99) == 0.3
    assert run[1].weight_decay_at(0) == 0.0


# --- what a recipe asks for ----------------------------------------------------------------------


def test_twins_are_named_by_kind_and_size():
    assert [run.name for run in small(name="2m").runs()] == ["fp16-2m", "b1-2m", "b158-2m"]


def test_several_learning_rates_are_one_training_each():
    runs = small(
        learning_rate=None,
        learning_rates={"fp16": [1e-3, "4e-3"], "b1": [1e-2]},
        twins=["fp16", "b1"],
    ).runs()
    assert [run.name for run in runs] == ["fp16-s-lr0.001", "fp16-s-lr0.004", "b1-s-lr0.01"]
    assert [run.peaks for run in runs] == [(0.001,), (0.004,), (0.01,)]


def test_several_learning_rates_take_the_place_of_a_presets_one():
    recipe = Recipe.of({"preset": "bitnet-125m", **PATHS, "learning_rates": [1e-3, 2e-3]})
    assert len(recipe.runs()) == 4


def test_a_resolved_recipe_is_the_same_recipe_again():
    recipe = Recipe.of({"preset": "bitnet-b1.58-700m", **PATHS, "seed": 3})
    again = Recipe.of(yaml.safe_load(recipe.as_yaml()))
    assert again == recipe


def test_a_resolved_recipe_names_no_folder_of_the_machine():
    text = small(
        corpus="/home/me/corpus.jsonl", tokenizer="/opt/tokenizer", output="/out"
    ).as_yaml()
    assert "corpus: corpus.jsonl" in text and "tokenizer: tokenizer" in text
    assert "/" not in text and "output" not in text


CHANGES = [
    {"seed": 1},
    {"steps": 101},
    {"tokens_per_step": 128},
    {"learning_rate": 2e-3},
    {"weight_decay": 0.1},
    {"warmup": 1},
    {"betas": [0.9, 0.98]},
    {"precision": "bfloat16"},
    {"shape": {**SMALL["shape"], "num_hidden_layers": 2}},
    {"clip": 1.0},
]
SAME = [
    {"output": "elsewhere"},
    {"save_every": 7},
    {"log_every": 7},
    {"batch_size": 2},
    {"held_out": "other.jsonl"},
    {"twins": ["fp16"]},
]


def identity(**changes):
    return digest(small(**changes).runs()[0].identity("tokens", 512))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_what_decides_the_weights_is_in_the_digest(change):
    assert identity(**change) != identity()


@pytest.mark.parametrize("change", SAME, ids=lambda change: next(iter(change)))
def test_what_does_not_decide_the_weights_is_not(change):
    assert identity(**change) == identity()


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "unknown preset 'bitnet-1b'; did you mean 'bitnet-1": {"preset": "bitnet-1b"},
    "unknown preset \"['bitnet-125m']\"; ": {"preset": ["bitnet-125m"]},
    "unknown preset \"{'bitnet-125m': 1}\"; ": {"preset": {"bitnet-125m": 1}},
    "unknown shape 'bitnet-125'; did you mean 'bitnet-125m'": {"shape": "bitnet-125"},
    "unknown field 'twin'; did you mean 'twins'": {"twin": ["fp16"]},
    "unknown field shape 'hiden_size'; did you mean 'hidden_size'": {
        "shape": {**SMALL["shape"], "hiden_size": 3}
    },
    "shape.num_hidden_layers is missing": {"shape": {"hidden_size": 8, "intermediate_size": 8}},
    "twins.0: Input should be 'fp16', 'b1' or 'b158' (got 'fp32')": {"twins": ["fp32"]},
    "schedule: Input should be 'linear', 'polynomial' or 'two-stage' (got 'cosine')": {
        "schedule": "cosine"
    },
    "tokens_per_step 65 is no multiple of seqlen 16": {"tokens_per_step": 65},
    "seqlen 16 is beyond max_position_embeddings 8": {
        "shape": {**SMALL["shape"], "max_position_embeddings": 8}
    },
    "hidden_size 16 is no even multiple of num_attention_heads 3": {
        "shape": {**SMALL["shape"], "num_attention_heads": 3}
    },
    "num_attention_heads 2 is no multiple of num_key_value_heads 3": {
        "shape": {**SMALL["shape"], "num_key_value_heads": 3}
    },
    "warmup 100 leaves nothing of 100 steps": {"warmup": 100},
    "learning_rate has none for the twin b1": {"learning_rate": {"fp16": 1e-3}},
    "learning_rates has none for the twin b1": {
        "learning_rate": None,
        "learning_rates": {"fp16": [1e-3]},
    },
    "give learning_rate, or learning_rates": {"learning_rates": [1e-3]},
    "schedule two-stage of fp16 wants two learning rates, not 0.001": {"schedule": "two-stage"},
    "schedule linear of fp16 wants one learning rate, not (0.001, 0.002)": {
        "learning_rate": [1e-3, 2e-3]
    },
    "learning rate -1.0 of fp16 is not above 0": {"learning_rate": -1},
    "learning_rates goes with schedule linear or polynomial only": {
        "learning_rate": None,
        "learning_rates": [1e-3],
        "schedule": "two-stage",
    },
    "learning_rate: Input should be a valid number": {"learning_rate": "fast"},
    "learning_rate.fp32: Input should be 'fp16', 'b1' or 'b158' (got 'fp32')": {
        "learning_rate": {"fp32": 1e-3, "b1": 1e-3}
    },
    "learning_rate.b158: Tuple should have at most 2 items": {"learning_rate": {"b158": [1, 2, 3]}},
    "weight_decay.fp16: Input should be greater than or equal to 0 (got -1)": {
        "weight_decay": {"fp16": -1}
    },
    "betas.1: Input should be less than 1 (got 1.5)": {"betas": [0.9, 1.5]},
    "seed: Input should be greater than or equal to 0 (got -1)": {"seed": -1},
    "steps: Input should be greater than 0 (got 0)": {"steps": 0},
    "clip: Input should be a finite number": {"clip": float("inf")},
    "name: String should match pattern": {"name": "../x"},
    "unknown activation function 'sillu'; did you mean 'silu'": {
        "shape": {**SMALL["shape"], "hidden_act": "sillu"}
    },
    "unknown BitLinear option 'qmx'; did you mean 'qmax'": {"bitlinear": {"qmx": 1}},
    "a b1 model has binary weights": {"bitlinear": {"weights": "ternary"}},
    "corpus is missing": {"corpus": None},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(message):
    with pytest.raises(QBenchError) as error:
        small(**MISTAKES[message])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(QBenchError, match="cannot read .*recipe.yaml: No such file"):
        Recipe.read(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(QBenchError, match="recipe.yaml holds no mapping"):
        Recipe.read(path)
    path.write_text("a: [")
    with pytest.raises(QBenchError, match="recipe.yaml is not YAML"):
        Recipe.read(path)
    path.write_text("seeds: 3")
    with pytest.raises(
        QBenchError, match=r"recipe.yaml: unknown field 'seeds'; did you mean 'seed'"
    ):
        Recipe.read(path)
