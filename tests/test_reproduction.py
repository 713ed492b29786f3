"""Reproduction presets: what they say, what they allow, and every one of them run to the end."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from cli_fixtures import qbench, refused
from pydantic import ValidationError
from reproduction_fixtures import CONTEXT, kind_of, same_size, small, stand_in, texts

from qbench.comparison import reference
from qbench.comparison.pairing import Paired
from qbench.errors import QBenchError, RunFailed
from qbench.models.checkpoints import Checkpoint
from qbench.progress import Reporter
from qbench.reproduction import collecting, presets, printing, published
from qbench.reproduction import outcome as outcomes
from qbench.reproduction.collecting import reads_data
from qbench.reproduction.planning import shape_from, stored_bytes
from qbench.reproduction.presets import Family, Measure, Preset, Tolerance, read_family
from qbench.reproduction.published import Published, half_unit
from qbench.reproduction.running import Reproduction, Request
from qbench.reproduction.verdicts import (
    Reproduced,
    noise,
    paired_error,
    seed_interval,
    too_wide,
    verdict,
)
from qbench.study.store import Store

PRESETS = presets.presets()
REPRODUCED = {name: p for name, p in PRESETS.items() if p.family.weights != "unreleased"}
QUICK = {
    *("gptq-bloom-560m", "quip-opt-125m", "llmint8-125m", "b158-large"),
    *("bitnet-2b4t", "smoothquant-mistral-7b", "smoothquant-opt-iml-30b"),
}
"""Of every architecture and kind of row one runs by default; the others have the same cells."""
PERPLEXITY = Measure(task="wikitext2", protocol="gptq-2048", metric="perplexity")
ACCURACY = Measure(task="piqa", metric="acc_norm")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Texts, and stand-ins as they are asked for."""
    folder = tmp_path_factory.mktemp("reproduction")
    texts(folder / "data")
    return folder


def request(place: Path, kind: str, results: Path | None = None, **changes) -> Request:
    """What a user would ask for, with a stand-in of a kind."""
    folder = stand_in(place / kind.replace("/", "_"), kind)
    given = {"checkpoint": str(folder), "data": place / "data", "ignore_gate": True, **changes}
    return Request(results or place / "runs" / kind.replace("/", "_"), **given)


def run(preset: Preset, asked: Request):
    return Reproduction.of(preset, asked).run(Reporter(quiet=True))


# --- presets as data -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_and_column_of_a_preset_has_a_published_number(name):
    preset = PRESETS[name]
    assert preset.reference in reference.names()
    found = {row.name: published.numbers(preset, row) for row in preset.rows}
    assert all(found.values())
    columns = {measure.title for numbers in found.values() for measure, _ in numbers}
    assert columns == {measure.title for measure in preset.measures}
    for numbers in found.values():
        for measure, printed in numbers:
            assert math.isclose(
                float(printed.printed.replace(",", "")), printed.value, rel_tol=1e-12
            )
            if measure.is_perplexity:
                assert printed.value > 1
            else:
                assert 0 <= printed.value <= 100


@pytest.mark.parametrize("name", PRESETS)
def test_the_metric_of_a_column_is_the_published_one_where_that_is_known(name):
    preset = PRESETS[name]
    table = reference.load(preset.reference)
    for measure in preset.measures:
        wanted = measure.where["task"]
        known = set(table[table["task"] == wanted]["metric"]) - {"score"}  # "not stated"
        same = wanted == "winogrande"  # its options share their continuation: one length for both
        assert same or not known or measure.metric in known


def test_the_first_row_is_the_full_precision_one_and_is_alone():
    for preset in PRESETS.values():
        assert [row.is_full_precision for row in preset.rows].count(True) == 1
        assert preset.rows[0].is_full_precision


@pytest.mark.parametrize(
    ("preset", "row", "task", "printed"),
    [  # GPTQ Tables 3 and 4, QuIP App. C.6, SmoothQuant's README, LLM.int8 Table 1, 1bitLLM's card
        ("gptq-opt-125m", "GPTQ W3A16", "wikitext2", "53.85"),
        ("gptq-opt-66b", "RTN W4A16", "wikitext2", "110"),
        ("gptq-opt-1.3b", "RTN W3A16", "wikitext2", "1.3e4"),
        ("gptq-opt-350m", "FP16", "lambada_openai", "46.67"),
        ("gptq-bloom-176b", "GPTQ W2A16g64", "wikitext2", "9.17"),
        ("quip-opt-125m", "QuIP W2A16", "wikitext2", "347.4"),
        ("quip-opt-2.7b", "QuIP-RG W3A16", "ptb-new", "20.49"),
        ("quip-llama2-70b", "OPTQ W2A16", "wikitext2", "123.9"),
        ("smoothquant-mistral-7b", "SmoothQuant W8A8", "wikitext2", "5.277"),
        ("smoothquant-bloom-176b", "SmoothQuant-O3 W8A8", "average", "67.4"),
        ("smoothquant-opt-13b", "INT8 activations per-token W8A8", "average", "33.0"),
        ("llmint8-6.7b", "absmax W8A8", "c4-new", "14.59"),
        ("b158-3b", "BitNet b1.58", "b158", "9.88"),
        ("bitnet-2b4t", "BitNet b1.58", "winogrande", "71.90"),
        ("bitnet-table3", "QuIP W2A16", "wikitext2", "70.43"),
    ],
)
def test_published_numbers_are_those_of_the_papers(preset, row, task, printed):
    chosen = next(r for r in PRESETS[preset].rows if r.name == row)
    found = {m.task: number.printed for m, number in published.numbers(PRESETS[preset], chosen)}
    assert found[task] == printed


def rows_of(name: str) -> dict[str, presets.Row]:
    return {row.name: row for row in PRESETS[name].rows}


def test_settings_of_gptq_are_those_of_its_released_code():
    for name in ("gptq-opt-125m", "gptq-bloom-3b", "quip-opt-6.7b"):
        text = PRESETS[name].family.calibration
        assert (text.source, text.nsamples, text.seqlen, text.seed) == ("c4", 128, 2048, 0)
    fields = rows_of("gptq-opt-125m")["GPTQ W4A16"].fields
    assert (fields["percdamp"], fields["act_order"], fields["block_size"]) == (0.01, False, 128)
    assert not (fields["true_sequential"] or fields["static_groups"])
    assert rows_of("gptq-opt-125m")["GPTQ W4A16"].scheme == "W4A16:w=channel,grid=asym"
    llama = rows_of("gptq-llama-7b")["GPTQ W4A16"].fields
    assert llama["act_order"] and llama["true_sequential"]


def test_settings_of_quip_are_those_of_its_paper_and_code():
    rows = rows_of("quip-opt-1.3b")
    assert rows["QuIP W2A16"].fields["rounding"] == "ldlq"
    assert rows["QuIP W2A16"].scheme == "W2A16:w=tensor,grid=rms"
    assert rows["QuIP-RG W2A16"].fields["greedy_passes"] == 10
    assert rows_of("quip-opt-30b")["QuIP-RG W2A16"].fields["greedy_passes"] == 5
    assert rows_of("quip-opt-30b")["QuIP W2A16"].fields["greedy_passes"] == 0
    assert rows["Near+IncP W3A16"].fields["rounding"] == "nearest"
    assert PRESETS["quip-opt-1.3b"].family.seeds == 3


def test_settings_of_smoothquant_are_those_of_its_paper_and_code():
    alphas = {
        "llama2-7b": 0.85, "llama2-70b": 0.9, "llama3-8b": 0.85, "mistral-7b": 0.8,
        "mixtral-8x7b": 0.8, "falcon-7b": 0.6, "falcon-40b": 0.7,
    }  # fmt: skip
    for model, alpha in alphas.items():
        rows = rows_of(f"smoothquant-{model}")
        assert rows["SmoothQuant W8A8"].fields == {"alpha": alpha}
    text = PRESETS["smoothquant-llama2-7b"].family.calibration
    assert (text.source, text.nsamples, text.seqlen, text.seed) == ("pile-val", 512, 512, 42)
    levels = rows_of("smoothquant-bloom-176b")
    assert levels["SmoothQuant-O1 W8A8"].scheme.startswith("W8A8:w=tensor,a=token")
    assert levels["SmoothQuant-O2 W8A8"].scheme.startswith("W8A8:w=tensor,a=tensor,grid")
    assert levels["SmoothQuant-O3 W8A8"].scheme.startswith("W8A8:w=tensor,a=tensor,static")


def test_settings_of_b158_are_those_of_the_released_evaluation():
    family = PRESETS["b158-3b"].family
    assert (family.encoding, family.max_length, family.dtype) == ("lmeval03", 2048, "float16")
    assert [m.metric for m in family.measures[1:]] == ["acc"] * 8


def test_a_field_nobody_knows_is_refused_with_its_file_and_place():
    data = {"paper": "p", "about": "a", "measures": [], "rows": [], "targets": [{"name": "x"}]}
    with pytest.raises(QBenchError, match=r"my\.yaml: targets\.0\.hub: Field required"):
        read_family(data, "my.yaml")
    data["targets"] = [{"name": "x", "hub": None, "colour": "red"}]
    with pytest.raises(QBenchError, match=r"my\.yaml: targets\.0\.colour: Extra inputs"):
        read_family(data, "my.yaml")
    with pytest.raises(ValidationError):
        Family(**data, surprise=1)


def test_a_preset_of_an_unknown_checkpoint_or_without_a_table_is_refused():
    data = {"paper": "p", "about": "a", "measures": [], "rows": []}
    target = {"name": "x", "hub": "nobody/nothing"}
    with pytest.raises(QBenchError, match="x names no reference table"):
        read_family({**data, "targets": [target]}, "my.yaml")
    with pytest.raises(QBenchError, match="unknown checkpoint in my.yaml 'nobody/nothing'"):
        read_family({**data, "reference": "gptq-opt", "targets": [target]}, "my.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("hub", presets.checkpoints())
def test_sizes_of_checkpoints_follow_from_their_configurations(hub):
    facts = presets.checkpoints()[hub]
    assert shape_from(facts).parameters / 1e6 == pytest.approx(facts.parameters, rel=2e-3)


def test_a_packed_checkpoint_is_as_large_as_its_codes_and_what_is_left_in_bfloat16():
    facts = presets.checkpoints()["microsoft/bitnet-b1.58-2B-4T"]
    shape = shape_from(facts)
    size = shape.in_blocks / 4 + 2 * (facts.parameters * 1e6 - shape.in_blocks)
    assert stored_bytes(facts, shape) == pytest.approx(size)
    assert 1.1e9 < size < 1.3e9  # the Hub's file has 1.18 GB


# --- noise and verdicts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "half"),
    [
        ("27.65", 0.005), ("3.319", 0.0005), ("110", 0.5), ("1.3e3", 50), ("309.", 0.5),
        ("18,687", 0.5), ("4.8e4", 500), ("00.00", 0.005),
    ],
)  # fmt: skip
def test_the_rounding_of_a_printed_number_is_half_a_unit_of_its_last_digit(printed, half):
    assert half_unit(printed) == pytest.approx(half)


def test_a_text_that_is_no_number_has_no_rounding():
    with pytest.raises(QBenchError, match="no printed number"):
        half_unit("about 3")


def test_the_least_noise_is_rounding_and_tolerance():
    allowed = Tolerance(perplexity=0.5, accuracy=1.0)
    found = Reproduced((27.7,))
    assert noise(Published(27.65, "27.65"), PERPLEXITY, found, allowed) == pytest.approx(
        0.005 + 0.13825
    )
    assert noise(Published(61.9, "61.9"), ACCURACY, found, allowed) == pytest.approx(1.05)


def test_paired_noise_replaces_the_tolerance_where_it_is_larger():
    allowed = Tolerance(perplexity=0.5, accuracy=1.0)
    found = Reproduced((31.0,), paired=0.5)
    expected = 0.005 + 1.96 * 0.5
    assert noise(Published(31.12, "31.12"), PERPLEXITY, found, allowed) == pytest.approx(expected)
    found = Reproduced((31.0,), paired=0.01)
    assert noise(Published(31.12, "31.12"), PERPLEXITY, found, allowed) < expected


def test_seeds_give_the_interval_of_one_further_draw():
    """Values 1, 2, 3: mean 2, deviation 1; t with 2 degrees of freedom at 97.5 % is 4.302653."""
    half = 4.302652729911275 * math.sqrt(4 / 3)
    assert seed_interval([1, 2, 3], 2, is_perplexity=False) == pytest.approx(half)
    values = [math.exp(x) for x in (1, 2, 3)]
    centre = Reproduced(tuple(values)).centre(PERPLEXITY)
    assert centre == pytest.approx(math.exp(2))
    assert seed_interval(values, centre, is_perplexity=True) == pytest.approx(
        math.exp(2 + half) - math.exp(2)
    )
    assert seed_interval([5], 5, is_perplexity=True) is None
    assert seed_interval([5, math.inf], 5, is_perplexity=True) is None


def test_a_difference_is_judged_by_its_noise_and_one_without_end_always_differs():
    assert verdict(-0.1, 0.1) == "within noise"
    assert verdict(0.11, 0.1) == "differs"
    assert verdict(math.inf, 1e9) == "differs"
    assert verdict(math.nan, 1e9) == "differs"


@pytest.mark.parametrize(
    ("values", "printed", "metric", "wide"),
    [
        # the interval is centre * (exp(4.303 sd sqrt(4/3)) - 1): 2.2 times the centre here
        ((300.0, 400.0, 500.0), 30.0, PERPLEXITY, True),
        ((39.9, 40.0, 40.1), 40.2, PERPLEXITY, False),  # 1.3 % of it
        # 12.706 * 0.354 * sqrt(3/2) = 5.5 points of two seeds half a point apart
        ((61.0, 61.5), 64.0, ACCURACY, True),
        ((61.0, 61.1), 61.9, ACCURACY, False),
    ],
)
def test_noise_that_everything_lies_within_gives_no_verdict(values, printed, metric, wide):
    number = Published(printed, f"{printed}")
    allowed = noise(number, metric, Reproduced(values), Tolerance())
    assert too_wide(number, metric, allowed) == wide


def test_only_what_calibration_changes_is_allowed_the_noise_of_another_draw():
    rows = {row.name: reads_data(row) for row in PRESETS["quip-opt-125m"].rows}
    assert {name.split()[0] for name, reads in rows.items() if not reads} == {"FP16", "Near"}
    rows = {row.name: reads_data(row) for row in PRESETS["smoothquant-bloom-176b"].rows}
    assert {n for n, reads in rows.items() if not reads} == {"FP16", "W8A8 (per tensor)"}


def test_the_paired_error_of_a_perplexity_is_that_of_the_mean_loss_times_the_perplexity():
    generator = np.random.default_rng(0)
    before = generator.uniform(100, 200, 40)
    moved = generator.normal(5, 2, 40)
    tokens = np.full(40, 50)
    items = [
        pandas.DataFrame({"window": np.arange(40), "nll": nll, "n_tokens": tokens})
        for nll in (before, before + moved)
    ]
    value = math.exp((before + moved).sum() / tokens.sum())
    error = paired_error(Paired(*items), PERPLEXITY, value)
    assert error == pytest.approx(value * moved.std(ddof=1) / math.sqrt(40) / 50)


def test_the_paired_error_of_an_accuracy_comes_from_the_questions_that_flipped():
    """100 questions, 8 lost and 2 won: variance of the differences 0.1 - 0.06², n - 1 below."""
    gold = np.tile([True, False], 100)

    def items(wrong: range) -> pandas.DataFrame:
        score = np.where(gold, 1.0, 0.0)
        for question in wrong:
            score[2 * question] = -1.0
        columns = {"doc_id": np.repeat(np.arange(100), 2), "option": np.tile([0, 1], 100)}
        rest = {"loglikelihood": score, "n_characters": 1, "n_tokens": 1, "gold": gold}
        return pandas.DataFrame({**columns, **rest, "is_greedy": False})

    pairs = Paired(items(range(0, 2)), items(range(2, 10)))
    expected = 100 * math.sqrt((0.1 - 0.06**2) / 99)
    assert paired_error(pairs, ACCURACY, 92.0) == pytest.approx(expected)


# --- every preset, to the last step --------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in REPRODUCED],
)
def test_every_preset_runs_to_its_last_row_on_a_stand_in_of_its_architecture(place, name):
    preset = small(PRESETS[name])
    found = run(preset, request(place, kind_of(preset)))
    assert [row.name for row in found.rows] == [row.name for row in preset.rows]
    numbers = [number for row in found.rows for number in row.numbers]
    wanted = sum(len(published.numbers(preset, row)) for row in preset.rows)
    assert len(numbers) == wanted
    assert all(number.reproduced is not None for number in numbers)
    verdicts = {number.verdict.partition(", which")[0] for number in numbers}  # never a bare pass
    nearest = preset.family.weights == "nearest"
    other = "published on other weights" if nearest else f"other weights than {preset.target.hub}"
    assert verdicts == {f"no verdict: {other}"}
    expected = {"released": ("none" if preset.is_trained else "failed"), "nearest": "none"}
    assert found.gate.state == expected[preset.family.weights]
    assert any("in place of" in departure for departure in found.departures)
    for form in printing.FORMATS:
        text = printing.render(found, form)
        assert preset.rows[-1].name.split(" ")[0] in text.replace("\\", "")
    path = found.path(place / "runs" / kind_of(preset).replace("/", "_"))
    assert outcomes.read(path) == found


# --- the gate ------------------------------------------------------------------------------------


def planted(
    monkeypatch, place: Path, preset: Preset, values: dict[str, float], digits: int = 3
) -> None:
    """Let the tables print these perplexities, by the row's name, of a model of this size."""
    same_size(monkeypatch, preset, place / "opt")

    def number(of, row, measure):
        value = values.get(row.name)
        return None if value is None else Published(value, f"{value:.{digits}f}", source="planted")

    monkeypatch.setattr(published, "number", number)


def short(preset: Preset, *tasks: str, **changes) -> Preset:
    """A preset with only some columns, in windows of the stand-in's context."""
    measures = [
        measure.model_copy(update={"protocol": f"gptq-{CONTEXT}"})
        for measure in preset.measures
        if measure.task in tasks
    ]
    return small(preset, measures=tuple(measures), **changes)


@pytest.fixture(scope="module")
def gptq() -> Preset:
    return short(PRESETS["gptq-opt-125m"], "wikitext2")


@pytest.fixture(scope="module")
def measured(place, gptq) -> dict[str, float]:
    """What the stand-in gives for every row, from a run that ignored its gate."""
    found = run(gptq, request(place, "opt", place / "measured"))
    return {row.name: row.numbers[0].reproduced.as_float() for row in found.rows}


def test_a_full_precision_row_that_is_off_stops_everything_before_quantizing(
    place, gptq, measured, monkeypatch, tmp_path
):
    planted(monkeypatch, place, gptq, {**measured, "FP16": measured["FP16"] * 1.01})
    with pytest.raises(RunFailed) as failure:
        run(gptq, request(place, "opt", tmp_path, ignore_gate=False))
    message = str(failure.value)
    assert failure.value.exit_code == 1
    assert f"is {measured['FP16']:.6g}" in message
    assert f"published {measured['FP16'] * 1.01:.3f}" in message
    tolerance = 0.0005 + 0.005 * measured["FP16"] * 1.01
    assert f"tolerance {tolerance:.2g}" in message and "nothing was quantized" in message
    assert "in place of facebook/opt-125m" in message
    assert {r.quantization.key.baseline.name for r in Store(tmp_path).runs()} == {"none"}
    (stored,) = outcomes.stored(tmp_path)
    assert stored.gate.state == "failed" and [row.name for row in stored.rows] == ["FP16"]


def test_a_gate_that_passes_lets_every_row_have_its_verdict(
    place, gptq, measured, monkeypatch, tmp_path
):
    values = {
        **measured,
        "FP16": measured["FP16"] * 1.004,
        "GPTQ W3A16": measured["GPTQ W3A16"] * 2,
    }
    planted(monkeypatch, place, gptq, values)
    found = run(gptq, request(place, "opt", place / "measured", ignore_gate=False))
    verdicts = {row.name: row.numbers[0].verdict for row in found.rows}
    assert found.gate.state == "passed"
    assert verdicts.pop("GPTQ W3A16") == "differs"
    assert set(verdicts.values()) == {"within noise"}
    worst = next(row for row in found.rows if row.name == "GPTQ W3A16").numbers[0]
    assert any("calibration windows" in reason for reason in worst.reasons)
    assert worst.difference == pytest.approx(-measured["GPTQ W3A16"], abs=1e-6)
    assert "differs" in printing.render(found, "md")


def test_a_row_that_reads_nothing_differs_where_a_calibrated_one_would_be_within_noise(
    place, gptq, measured, monkeypatch
):
    """Both are published 0.6 % off; paired errors of five windows are far larger than 0.5 %."""
    values = {name: 1.006 * value for name, value in measured.items()}
    planted(monkeypatch, place, gptq, {**values, "FP16": measured["FP16"]})
    monkeypatch.setattr(collecting, "paired_error", lambda pairs, measure, value: 0.01 * value)
    found = run(gptq, request(place, "opt", place / "measured", ignore_gate=False))
    verdicts = {row.name: row.numbers[0].verdict for row in found.rows}
    assert verdicts["RTN W3A16"] == "differs" and verdicts["GPTQ W3A16"] == "within noise"


def test_a_published_number_that_full_precision_meets_too_has_a_caveat(
    place, gptq, measured, monkeypatch
):
    values = {**measured, "RTN W4A16": measured["FP16"], "FP16": measured["FP16"]}
    planted(monkeypatch, place, gptq, values)
    found = run(gptq, request(place, "opt", place / "measured", ignore_gate=False))
    for row in found.rows[1:]:
        number = row.numbers[0]
        near = abs(number.published - measured["FP16"]) <= number.noise
        within = number.verdict == "within noise"
        assert bool(number.caveat) == (near and within)
    assert any(row.numbers[0].caveat for row in found.rows)
    assert "Says little: full precision itself" in printing.render(found, "md")


def test_a_number_the_paper_copied_from_another_row_gets_no_verdict(
    place, gptq, measured, monkeypatch
):
    quip = PRESETS["quip-opt-13b"]
    (row,) = (row for row in quip.rows if row.name == "OPTQ W4A16")
    (copied,) = (n for m, n in published.numbers(quip, row) if m.task == "arc_easy")
    same_size(monkeypatch, gptq, place / "opt")

    def number(of, row, measure):
        note = "" if row.is_full_precision else copied.error
        return Published(measured[row.name], f"{measured[row.name]:.3f}", note)

    monkeypatch.setattr(published, "number", number)
    found = run(gptq, request(place, "opt", place / "measured", ignore_gate=True))
    assert {row.numbers[0].verdict for row in found.rows[1:]} == {
        "no verdict: in the paper it is identical to the row of OPT-30b"
    }


def test_what_is_stored_is_not_measured_again_and_gives_the_same_outcome(
    place, gptq, measured, monkeypatch
):
    before = run(gptq, request(place, "opt", place / "measured"))

    def load(self, *args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Checkpoint, "load_model", load)
    path = before.path(place / "measured")
    path.unlink()
    again = run(gptq, request(place, "opt", place / "measured"))
    assert again.model_copy(update={"created": before.created}) == before
    assert path.is_file()


def test_rows_and_columns_that_are_run_one_after_the_other_are_stored_together(place, tmp_path):
    preset = short(PRESETS["gptq-opt-125m"], "wikitext2", "ptb-new")
    asked = request(place, "opt", tmp_path)
    run(preset, replace(asked, rows=("RTN W3A16",), tasks=("ptb-new",)))
    printed = run(preset, replace(asked, rows=("RTN W4A16",), tasks=("wikitext2",)))
    assert [row.name for row in printed.rows] == ["FP16", "RTN W4A16"]
    (stored,) = outcomes.stored(tmp_path)
    found = {row.name: [number.task for number in row.numbers] for row in stored.rows}
    assert list(found.items()) == [
        ("FP16", ["wikitext2", "ptb-new"]),
        ("RTN W4A16", ["wikitext2"]),
        ("RTN W3A16", ["ptb-new"]),
    ]
    other = replace(asked, dtype="bfloat16", rows=("RTN W4A16",), tasks=("wikitext2",))
    run(preset, other)  # other conditions: nothing of the earlier ones is carried on
    (stored,) = outcomes.stored(tmp_path)
    assert [row.name for row in stored.rows] == ["FP16", "RTN W4A16"]


def test_rows_that_draw_at_random_are_judged_by_the_spread_of_their_seeds(
    place, monkeypatch, tmp_path
):
    preset = short(PRESETS["quip-opt-125m"], "wikitext2", seeds=3)
    asked = request(place, "opt", tmp_path, rows=("QuIP W2A16", "Near W2A16"))
    found = {row.name: row.numbers[0] for row in run(preset, asked).rows}
    assert not found["Near W2A16"].seeds
    values = [seed.as_float() for seed in found["QuIP W2A16"].seeds]
    assert len(set(values)) == 3
    middle = math.exp(sum(map(math.log, values)) / 3)
    assert found["QuIP W2A16"].reproduced.as_float() == pytest.approx(middle)
    spread = seed_interval(values, middle, is_perplexity=True)
    full = found["FP16"].reproduced.as_float()
    planted(monkeypatch, place, preset, {"FP16": full, "QuIP W2A16": middle})
    again = run(preset, replace(asked, ignore_gate=False, rows=("QuIP W2A16",)))
    number = again.rows[1].numbers[0]
    assert number.verdict == "within noise"
    assert number.noise >= spread
    assert "geometric mean of 3 seeds" in printing.render(again, "md")


def test_a_part_of_the_items_is_called_partial_and_stored_under_another_name(
    place, gptq, measured, monkeypatch
):
    planted(monkeypatch, place, gptq, measured)
    asked = request(place, "opt", place / "measured", limit=8, ignore_gate=False)
    found = run(gptq, asked)
    assert {n.verdict for row in found.rows for n in row.numbers} == {"partial: first 8"}
    assert found.path(Path("r")) == Path("r/reproductions/gptq-opt-125m--opt--first-8.json")


def test_other_windows_than_the_papers_get_no_verdict(place, measured, monkeypatch, tmp_path):
    preset = small(PRESETS["gptq-opt-125m"], measures=(PERPLEXITY,))
    planted(monkeypatch, place, preset, measured)
    found = run(preset, request(place, "opt", place / "measured", ignore_gate=False))
    assert found.gate.state == "passed"
    assert {n.verdict for row in found.rows for n in row.numbers} == {
        f"no verdict: measured as gptq-{CONTEXT}, published as gptq-2048"
    }


def test_fewer_questions_than_the_published_split_get_no_verdict(place, monkeypatch, tmp_path):
    preset = small(PRESETS["gptq-opt-125m"])
    same_size(monkeypatch, preset, stand_in(place / "opt", "opt"))
    asked = request(place, "opt", tmp_path, tasks=("piqa",), rows=("RTN W4A16",))
    numbers = [row.numbers[0] for row in run(preset, asked).rows]
    assert [number.verdict for number in numbers] == [
        "no verdict: piqa over 3 questions, published over 1838"
    ] * 2


def test_a_task_without_data_leaves_its_column_empty_unless_it_was_asked_for(place, tmp_path):
    preset = small(PRESETS["gptq-opt-125m"])
    data = tmp_path / "data"
    for name in ("wikitext2", "c4"):
        (data / "tasks" / name).mkdir(parents=True)
        for path in (place / "data" / "tasks" / name).iterdir():
            (data / "tasks" / name / path.name).write_text(path.read_text())
    asked = request(place, "opt", tmp_path / "runs", data=data, rows=("RTN W4A16",))
    numbers = {n.task: n for n in run(preset, asked).rows[1].numbers}
    assert numbers["wikitext2"].reproduced is not None
    assert numbers["piqa"].verdict.startswith("not measured: the validation split of piqa")
    with pytest.raises(QBenchError, match="the validation split of piqa"):
        run(preset, replace(asked, tasks=("piqa",)))


def test_weights_of_another_kind_are_refused(place):
    with pytest.raises(QBenchError, match="bloom is of the kind bloom, gptq-opt-125m is about opt"):
        run(PRESETS["gptq-opt-125m"], request(place, "bloom"))
    trained = request(place, "1bitLLM/bitnet_b1_58-large")
    with pytest.raises(QBenchError, match="is about full-precision weights, .* stored at W1.58A8"):
        run(PRESETS["gptq-llama-7b"], trained)
    with pytest.raises(QBenchError, match="is about a BitNet checkpoint, llama is full precision"):
        run(PRESETS["b158-3b"], request(place, "llama"))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Whatever asks the network fails the test."""
    import socket

    def connect(self, *args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_without_a_name_the_presets_are_listed():
    text = qbench("reproduce").stdout
    assert text == qbench("reproduce", "--list").stdout
    for name, preset in PRESETS.items():
        line = next(x for x in text.splitlines() if x.split()[:1] == [name])
        assert (preset.target.hub or "never released") in line


@pytest.mark.parametrize("name", ["gptq-opt-125m", "smoothquant-llama2-7b", "bitnet-2b4t"])
def test_a_dry_run_says_what_would_be_downloaded_without_asking_the_network(
    name, offline, tmp_path
):
    preset = PRESETS[name]
    text = qbench("reproduce", name, "--dry-run", "--results", tmp_path / "runs").stdout
    size = {"gptq-opt-125m": "250 MB", "smoothquant-llama2-7b": "13.5 GB", "bitnet-2b4t": "1.18 GB"}
    assert f"{preset.target.hub}, about {size[name]} to download" in text
    assert ("the Hub asks for an agreement" in text) == (name == "smoothquant-llama2-7b")
    assert "on this machine" in text
    for row in preset.rows:
        assert f"  {row.name} " in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_on_weights_that_are_here_looks_up_what_is_stored(place, tmp_path):
    folder, data = stand_in(place / "opt", "opt"), place / "data"
    common = ("gptq-opt-125m", "--checkpoint", folder, "--data", data, "--results", tmp_path)
    common = (*common, "--tasks", "wikitext2", "--rows", "RTN W4A16")
    text = qbench("reproduce", *common, "--dry-run").stdout
    assert "nothing to download" in text and "2 cells: 2 to run" in text
    qbench("reproduce", *common, "--ignore-gate")
    assert "2 cells: 2 stored" in qbench("reproduce", *common, "--dry-run").stdout


def test_weights_in_the_cache_of_the_hub_are_planned_under_their_own_name(
    place, offline, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--facebook--opt-125m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(stand_in(place / "opt", "opt"), repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = qbench(
        "reproduce", "gptq-opt-125m", "--dry-run", "--data", place / "data", "--results", tmp_path
    ).stdout
    assert "weights: facebook/opt-125m, in the Hub's cache; nothing to download" in text
    assert "facebook/opt-125m: 0.0958 M parameters" in text
    assert "in place of" not in text and "5 cells: 5 to run" in text


def test_the_command_prints_its_table_and_names_the_stand_in(place, tmp_path):
    folder, data = stand_in(place / "opt", "opt"), place / "data"
    common = ("gptq-opt-125m", "--checkpoint", folder, "--data", data, "--results", tmp_path)
    common = (*common, "--tasks", "wikitext2,ptb-new", "--rows", "RTN W3A16")
    line = refused_gate(*common)
    assert "published 27.65" in line and "0.09581 M parameters where" in line
    assert f"measured as gptq-{CONTEXT}" in line
    text = qbench("reproduce", *common, "--ignore-gate", "--format", "md").stdout
    assert "Not as in the paper: weights of opt in place of facebook/opt-125m" in text
    assert "| FP16 | wikitext2 gptq-2048 | 27.65 |" in text
    rows = list(csv.DictReader(io.StringIO(
        qbench("reproduce", *common, "--ignore-gate", "--format", "csv").stdout
    )))  # fmt: skip
    assert [(row["row"], row["task"]) for row in rows] == [
        (name, task) for name in ("FP16", "RTN W3A16") for task in ("wikitext2", "ptb-new")
    ]
    assert rows[2]["printed"] == "1.3e3" and rows[2]["published"] == "1300.0"
    path = tmp_path / "reproductions" / "gptq-opt-125m--opt.json"
    assert json.loads(path.read_text())["gate"]["state"] == "failed"


def refused_gate(*arguments) -> str:
    """The error line of a run whose full-precision row is off."""
    result = qbench("reproduce", *arguments, code=1)
    assert result.stdout == ""
    return next(x for x in result.stderr.splitlines() if x.startswith("error: "))


def test_names_there_are_not_are_refused_with_the_nearest(place):
    assert "did you mean" in refused("reproduce", "gptq-opt-125")
    folder = stand_in(place / "opt", "opt")
    common = ("gptq-opt-125m", "--checkpoint", folder)
    assert "unknown row of gptq-opt-125m 'GPTQ W5*'" in refused(
        "reproduce", *common, "--rows", "GPTQ W5*"
    )
    assert "unknown task of gptq-opt-125m 'boolq'" in refused(
        "reproduce", *common, "--tasks", "boolq"
    )
    assert "unknown format 'pdf'" in refused("reproduce", *common, "--format", "pdf")
    assert "about one checkpoint" in refused("reproduce", *common, "--checkpoint", folder)


def test_bitnet_table3_runs_its_rows_on_the_checkpoints_named(place, tmp_path):
    """Its weights were never released: no verdicts, the published rows beside the measured."""
    llama = stand_in(place / "llama", "llama")
    bitnet = stand_in(place / "1bitLLM_x", "1bitLLM/x")
    result = qbench(
        "reproduce", "bitnet-table3", "--checkpoint", llama, "--checkpoint", bitnet, "--data",
        place / "data", "--results", tmp_path, "--tasks", "wsc285", "--limit", 3, "--rows",
        "Absmax*", "--format", "md",
    )  # fmt: skip
    assert "its weights were never released" in result.stderr
    assert "left open by the paper" in result.stderr
    lines = [x for x in result.stdout.splitlines() if x.startswith("| llama |")]
    assert [x.split(" | ")[3] for x in lines] == ["W16A16", "W8A8", "W4A4", "W1A8"]
    assert "| 1bitLLM\\_x | 1.58 | trained | W1.58A8 |" in result.stdout
    assert "Absmax (published)" in result.stdout
    assert "within noise" not in result.stdout


def test_bitnet_table3_takes_the_bundled_twins_where_nothing_is_named(tmp_path):
    result = qbench("reproduce", "bitnet-table3", "--dry-run", "--results", tmp_path / "runs")
    for name in ("fp16-2m", "b158-2m", "b1-2m"):
        assert name in result.stdout
    assert "12 cells: 12 to run" in result.stdout
