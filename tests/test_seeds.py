"""Seeds: what a sweep repeats for each, and how the rows of several become one."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest
import yaml
from cli_fixtures import qbench, records, refused
from items_fixtures import questions, save
from study_fixtures import add, cells, numbers, quantization, task

from qbench.comparison.entries import entries, mean_of, perplexity_keys
from qbench.comparison.frame import frame
from qbench.comparison.panels import accuracy_panels, caption, perplexity_panels
from qbench.comparison.seeds import merged, n_seeds, spread
from qbench.errors import QBenchError
from qbench.models.checkpoints import find_checkpoint
from qbench.record import CalibrationSpec
from qbench.study import draws, supply
from qbench.study.cells import Draw
from qbench.study.runner import Workbench
from qbench.study.store import Store
from qbench.study.sweep import Sweep
from qbench.tables.sheet import spread_text
from qbench.tables.table import stored_entries, table


def sweep(**fields) -> Sweep:
    known = {"checkpoints": ["x"], "baselines": ["none"], "schemes": ["W4A16"], "tasks": ["piqa"]}
    return Sweep(**(known | fields))


@pytest.fixture
def plan(tiny, text, tmp_path):
    """Writes a sweep file over the tiny checkpoint; the given fields replace its own."""

    def make(**fields):
        known = {
            "checkpoints": [str(tiny)],
            "baselines": ["none", "rtn", "gptq", "quip"],
            "schemes": ["W4A16"],
            "calibration": {"source": str(text), "nsamples": 2, "seqlen": 16},
            "seeds": 2,
            "tasks": [f"{text}@gptq-16"],
            "limit": 2,
            "results": str(tmp_path / "runs"),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(known | fields))
        return path

    return make


def drawn(path, checkpoint) -> list[str]:
    asked = Sweep.read(path)
    bench = Workbench(find_checkpoint(str(checkpoint)), asked.settings(), Store(asked.results))
    return [str(cell) for cell in bench.cells(asked.cells())]


def test_a_number_of_seeds_counts_from_the_seed_of_the_file():
    assert [(d.seed, d.calibration.seed) for d in sweep(seeds=3).draws()] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    assert [d.seed for d in sweep(seeds=2, seed=7).draws()] == [7, 8]


def test_seeds_may_be_listed():
    assert [(d.seed, d.calibration.seed) for d in sweep(seeds=[5, 1, 5]).draws()] == [
        (5, 5),
        (1, 1),
    ]


def test_without_seeds_everything_is_as_before():
    settings = sweep(seed=3, calibration={"source": "c4", "seed": 4}).settings()
    assert (settings.draws, settings.seed, settings.calibration.seed) == ((), 3, 4)
    settings = sweep(seeds=1, seed=3).settings()
    assert (settings.draws, settings.seed, settings.calibration.seed) == ((), 3, 3)


def test_several_texts_are_drawn_from_with_every_seed():
    texts = [{"source": "c4"}, {"source": "wikitext2", "nsamples": 64}]
    found = sweep(seeds=2, calibration=texts).draws()
    assert [(d.calibration.source, d.calibration.nsamples, d.seed) for d in found] == [
        ("c4", 128, 0),
        ("wikitext2", 64, 0),
        ("c4", 128, 1),
        ("wikitext2", 64, 1),
    ]
    assert [d.calibration.source for d in sweep(calibration=texts).draws()] == ["c4", "wikitext2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, "seeds: 0 cannot be; say how many"),
        ({"seeds": []}, r"seeds: \[\] cannot be"),
        ({"seeds": [1, -1]}, "cannot be"),
        ({"seeds": 2, "calibration": {"seed": 9}}, "a seed of 9 contradict"),
        ({"seeds": [1, 2], "seed": 5}, "a seed of 5 contradict"),
    ],
)
def test_seeds_that_cannot_be_are_refused(fields, message):
    with pytest.raises(QBenchError, match=message):
        sweep(**fields).draws()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": "many"}, "seeds"),
        ({"calibration": {"nsample": 3}}, "unknown field calibration.*nsample.*nsamples"),
        ({"calibration": [{"nsample": 3}]}, "unknown field calibration.*nsample.*nsamples"),
        ({"calibration": []}, "calibration"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(plan, fields, message):
    assert re.search(message, refused("sweep", plan(**fields), "--dry-run"))


def test_only_what_depends_on_chance_is_repeated_and_one_text_after_the_other(plan, tiny):
    """QuIP draws rotations and calibrates, GPTQ calibrates, rounding to nearest does neither."""
    assert drawn(plan(), tiny) == [
        "none W16A16",
        "rtn W4A16:w=channel,grid=asym",
        "gptq W4A16:w=channel,grid=asym · text.txt seed 0",
        "quip W4A16:w=tensor,grid=rms · text.txt seed 0",
        "gptq W4A16:w=channel,grid=asym · text.txt seed 1",
        "quip W4A16:w=tensor,grid=rms · text.txt seed 1",
    ]


def test_both_seeds_move_together_and_stand_in_the_keys(plan, tmp_path):
    qbench("sweep", plan())
    found = {
        (key["baseline"]["name"], key["seed"], (key["calibration"] or {}).get("seed"))
        for record in records(tmp_path / "runs").values()
        if (key := record["key"]).get("baseline")
    }
    assert found == {
        ("none", 0, None),
        ("rtn", 0, None),
        ("gptq", 0, 0),
        ("gptq", 0, 1),
        ("quip", 0, 0),
        ("quip", 1, 1),
    }
    values = {
        path.split("/")[2]: record["metrics"]["perplexity"]["value"]
        for path, record in records(tmp_path / "runs").items()
        if "metrics" in record
    }
    assert len(values) == len(set(values.values())) == 6


def test_a_seed_of_a_sweep_is_the_run_with_that_seed(plan, tiny, text, tmp_path):
    qbench("sweep", plan(baselines=["quip"], seeds=[3, 4]))
    options = ["--scheme", "W4A16", "--calibration", text, "--nsamples", 2, "--seqlen", 16]
    options += ["--tasks", f"{text}@gptq-16", "--limit", 2, "--results", tmp_path / "runs"]
    output = qbench("run", tiny, "--baseline", "quip", "--seed", 4, *options).stdout
    assert "(stored)" in output


def test_a_second_sweep_measures_nothing_and_more_seeds_only_what_is_new(
    plan, tmp_path, monkeypatch
):
    qbench("sweep", plan(seeds=2))
    before = records(tmp_path / "runs")
    made = []
    inner = supply.quantize_model
    monkeypatch.setattr(
        supply,
        "quantize_model",
        lambda *args, **more: (made.append(more["seed"]), inner(*args, **more))[1],
    )
    qbench("sweep", plan(seeds=2))
    assert made == [] and records(tmp_path / "runs") == before
    qbench("sweep", plan(seeds=3))
    assert made == [0, 2]  # GPTQ draws nothing itself: only its text is another
    assert before.items() <= records(tmp_path / "runs").items()


def test_a_dry_run_shows_every_seed(plan, no_model):
    output = qbench("sweep", plan(), "--dry-run").stdout
    assert re.findall(r"to run +(\w+) .*?seed (\d)", output) == [
        ("gptq", "0"),
        ("quip", "0"),
        ("gptq", "1"),
        ("quip", "1"),
    ]
    assert "6 cells: 6 to run" in output


@pytest.mark.parametrize("kept", [draws.KEPT, 0])
def test_the_text_of_a_seed_is_captured_once_even_if_it_is_not_kept(plan, tiny, monkeypatch, kept):
    """At most one seed's text is in the model's capture, and windows beyond the limit go."""
    from qbench.quantization import passes

    monkeypatch.setattr(draws, "KEPT", kept)
    made = []
    inner = passes.Calibration.__init__
    monkeypatch.setattr(
        passes.Calibration,
        "__init__",
        lambda self, model, windows, keep=True: (
            made.append(windows),
            inner(self, model, windows, keep),
        )[1],
    )
    qbench("sweep", plan(seeds=3))
    texts = [windows for windows in made if len(windows) == 2]  # without a text, one is traced on
    assert len(texts) == 3 and len({str(windows) for windows in texts}) == 3


def test_weights_are_shared_between_activation_widths_within_a_seed_only(plan, monkeypatch):
    made = []
    inner = supply.quantize_model
    monkeypatch.setattr(
        supply,
        "quantize_model",
        lambda *args, **more: (made.append(str(args[2])), inner(*args, **more))[1],
    )
    qbench("sweep", plan(baselines=["gptq"], schemes=["W4A16", "W4A8"]))
    assert len(made) == 2 and all(scheme.startswith("W4A16") for scheme in made)


# rows


def seeded(store, seed, accuracy=None, baseline="quip", source="c4", **fields):
    calibration = CalibrationSpec(source=source, seed=seed, tokens=f"tokens {source} {seed}")
    record = quantization(
        baseline=baseline, scheme="W2A16:w=tensor,grid=rms", calibration=calibration,
        seed=seed, effective_bits=2.0 + seed / 10, **fields,
    )  # fmt: skip
    return add(store, record, accuracy)


@pytest.fixture
def three(tmp_path):
    """Full precision, and three seeds of QuIP: 50, 60 and 64 % of piqa, 40, 44, 45 of boolq."""
    store = Store(tmp_path / "made-up")
    add(store, quantization(), {"piqa": 0.8, "boolq": 0.7})
    for seed, scores in enumerate([(0.50, 0.40), (0.60, 0.44), (0.64, 0.45)]):
        seeded(store, seed, dict(zip(("piqa", "boolq"), scores, strict=True)))
    return store


def test_rows_that_differ_in_their_seed_alone_become_their_mean(three):
    whole, row = stored_entries(three)
    piqa = row.cells["piqa", ""]
    assert piqa.value == pytest.approx(0.58)
    assert piqa.draws == (0.50, 0.60, 0.64)
    assert spread(piqa) == pytest.approx(statistics.stdev([0.50, 0.60, 0.64]))
    errors = [math.sqrt(p * (1 - p) / 1000) for p in piqa.draws]
    assert piqa.stderr == pytest.approx(sum(errors) / 3)
    assert piqa.also["acc_norm"][0] == pytest.approx(0.59)
    assert n_seeds(row) == 3 and n_seeds(whole) == 1
    assert row.facts["seeds"] == (0, 1, 2) and len(set(row.facts["runs"])) == 3
    assert row.facts["effective_bits"] == pytest.approx(2.1)
    assert (row.method, row.name) == ("quip", "quip W2A16")
    assert spread(whole.cells["piqa", ""]) is None


def test_the_spread_of_a_mean_over_tasks_is_that_of_the_means(three):
    """Not the root of the sum of squares: a seed that is good on one task may be so on others."""
    _, row = stored_entries(three)
    mean = mean_of([row.cells["piqa", ""], row.cells["boolq", ""]])
    assert mean.draws == pytest.approx((0.45, 0.52, 0.545))
    assert spread(mean) == pytest.approx(statistics.stdev([0.45, 0.52, 0.545]))


def test_a_table_says_mean_spread_and_number_of_seeds(three):
    text = table(three)
    row = cells(text)[1]
    assert row["Method"] == "quip (3 seeds)"
    assert (row["piqa"], row["boolq"]) == ("58.0 ± 1.5 (sd 7.2)", "43.0 ± 1.6 (sd 2.6)")
    assert "standard deviation over seeds" in text
    assert "(sd" not in table(three, baselines=["none"])


def test_each_seed_is_a_row_of_its_own_where_that_is_asked_for(three):
    rows = cells(table(three, each_seed=True))
    assert [row["Method"] for row in rows] == [
        "full precision",
        *(f"quip calibration.seed={seed} seed={seed}" for seed in range(3)),
    ]


def test_the_csv_has_the_mean_its_spread_and_the_number_of_seeds(three):
    lines = [line for line in numbers(table(three, format="csv")) if line["task"] == "piqa"]
    assert [line["n_seeds"] for line in lines] == ["", "3"]
    assert float(lines[1]["value"]) == pytest.approx(0.58)
    assert float(lines[1]["sd"]) == pytest.approx(statistics.stdev([0.50, 0.60, 0.64]))
    assert lines[0]["sd"] == ""


@pytest.mark.parametrize(
    "other",
    [
        {"source": "wikitext2"},
        {"baseline": "gptq"},
        {"parameters_of": {"greedy_passes": 5}},
        {"dtype": "bfloat16"},
        {"weights": "others"},
    ],
)
def test_rows_that_differ_in_more_than_the_seed_stay_apart(three, other):
    seeded(three, 3, {"piqa": 0.9}, **other)
    rows = stored_entries(three)
    assert sorted(n_seeds(row) for row in rows) == [1, 1, 3]
    assert len({(row.method, row.facts["weights"]) for row in rows}) == 3


def test_two_texts_under_one_seed_are_not_two_seeds(three):
    """The same seed twice: the text behind the name has changed, which is no matter of chance."""
    calibration = CalibrationSpec(source="c4", seed=1, tokens="another file")
    record = quantization(
        baseline="quip", scheme="W2A16:w=tensor,grid=rms", calibration=calibration, seed=1
    )
    add(three, record, {"piqa": 0.1})
    assert [n_seeds(row) for row in stored_entries(three)] == [1] * 5


def test_a_seed_that_lacks_a_number_is_named(three):
    seeded(three, 3, {"piqa": 0.7})
    _, row = stored_entries(three)
    assert len(row.cells["piqa", ""].draws) == 4
    boolq = row.cells["boolq", ""]
    assert boolq.draws == (0.40, 0.44, 0.45)
    assert boolq.notes == ("boolq: over 3 of 4 seeds; missing, failed or measured differently: 3",)
    assert mean_of([row.cells["piqa", ""], boolq]).draws == ()  # not the same seeds


def test_a_seed_measured_on_fewer_items_is_left_out_and_named(three):
    record = seeded(three, 3)
    measured = task(record, "piqa", {"acc": 0.1, "acc_norm": 0.1}, limit=100)
    three.save_task(record.checkpoint, record.key, measured)
    _, row = stored_entries(three)
    assert row.cells["piqa", ""].draws == (0.50, 0.60, 0.64)
    assert "over 3 of 4 seeds" in row.cells["piqa", ""].notes[0]


def test_a_failed_seed_is_told_and_the_others_stand(three):
    record = seeded(three, 3, status="failed", error="no idea\nat all")
    assert record.status == "failed"
    _, row = stored_entries(three)
    assert n_seeds(row) == 3 and row.facts["status"] == "ok"
    assert "seed 3 of quip W2A16 on opt-6.7b failed: no idea" in table(three)


def test_a_seed_that_diverged_makes_the_mean_infinite_and_the_band_finite(tmp_path):
    store = Store(tmp_path)
    add(store, quantization(), perplexity={"wikitext2@gptq-64": 5.0})
    for seed, value in enumerate([8.0, math.inf, 9.0]):
        record = seeded(store, seed)
        add(store, record, perplexity={"wikitext2@gptq-64": value})
    _, row = stored_entries(store)
    (key,) = perplexity_keys([row])
    assert math.isinf(row.cells[key].value)
    assert "inf (diverged)" in table(store)
    (panel,) = perplexity_panels(stored_entries(store), "wbits")
    assert panel.points[1].band == (8.0, 9.0)


def test_merging_again_changes_nothing(three):
    once = stored_entries(three)
    assert merged(once) == once
    assert merged(entries(frame(three))) == once


def test_a_plot_shows_the_band_and_says_what_it_is(three):
    rows = stored_entries(three)
    panels = accuracy_panels(rows, "wbits")
    whole, point = panels[0].points
    assert whole.band is None
    assert point.y == pytest.approx((0.58 + 0.43) / 2)
    assert point.band == pytest.approx((0.45, 0.545))
    lines = caption(rows, panels, accuracy=True, metric="acc")
    assert "Shaded: lowest to highest of 3 seeds; markers are at their mean." in lines
    single = [row for row in rows if n_seeds(row) == 1]
    assert not any(
        "Shaded" in line for line in caption(single, accuracy_panels(single, "wbits"), True, "acc")
    )


def test_the_band_is_drawn_from_the_lowest_to_the_highest_seed(three):
    from matplotlib import pyplot

    from qbench.plots.plot import draw

    figure = draw(stored_entries(three), "accuracy-vs-bits")
    (axes,) = figure.axes
    (bar,) = [found for found in axes.collections if found.get_label() == "_band"]
    (segment,) = bar.get_segments()
    assert segment[:, 1] == pytest.approx([45.0, 54.5])
    pyplot.close(figure)


def test_a_draw_says_its_text_or_its_seed():
    text = CalibrationSpec(source="/somewhere/text.txt", seed=3)
    assert str(Draw(text, 3)) == "text.txt seed 3"
    assert str(Draw(None, 3)) == "seed 3"
    assert json.loads(text.model_dump_json())["seed"] == 3


# answers of several seeds


@pytest.fixture
def answered(tmp_path):
    """Four questions of two tasks: full precision, two seeds of QuIP, rounding to nearest.

    Full precision chooses options 0 0 1 2 of piqa and 0 0 0 0 of boolq; option 0 is right.
    """
    store = Store(tmp_path / "answers")

    def chosen(record, piqa, boolq):
        save(store, record, {"piqa": questions(piqa), "boolq": questions(boolq)})

    chosen(quantization(), [0, 0, 1, 2], [0, 0, 0, 0])
    rtn = quantization(baseline="rtn", scheme="W2A16:w=channel,grid=asym")
    chosen(rtn, [0, 1, 0, 2], [0, 0, 0, 0])  # as often right, another answer to half of piqa
    for seed, piqa in enumerate([[0, 0, 1, 3], [3, 3, 3, 3]]):
        calibration = CalibrationSpec(seed=seed)
        scheme = "W2A16:w=tensor,grid=rms"
        record = quantization(baseline="quip", scheme=scheme, calibration=calibration, seed=seed)
        chosen(record, piqa, [0, 0, 1, 1])
    return store


def test_flips_are_counted_against_full_precision_for_every_seed(answered):
    """Rounding: 2 of 4 and 0 of 4; QuIP: 1 and 4 of 4 of piqa, 2 of 4 of boolq."""
    rows = {row["Method"]: row for row in cells(table(answered, flips=True))}
    assert "50.0" in rows["rtn"]["piqa"] and rows["rtn"]["Flips"] == "25.0"
    each = [(1 / 4 + 2 / 4) / 2, (4 / 4 + 2 / 4) / 2]
    assert rows["quip (2 seeds)"]["Flips"] == (
        f"{50 * sum(each):.1f} (sd {100 * statistics.stdev(each):.1f})"
    )
    assert rows["full precision"]["Flips"] == "–"
    assert "Flips" not in table(answered)


def test_flips_without_full_precision_are_none(answered):
    rows = cells(table(answered, baselines=["rtn"], flips=True))
    assert [row["Flips"] for row in rows] == ["–"]


def test_flips_of_other_data_are_refused_with_the_reason(answered):
    record = quantization(baseline="gptq", scheme="W2A16:w=channel,grid=asym")
    save(answered, record, {"piqa": questions([0, 0, 0, 0])}, data="other data")
    save(answered, record, {"boolq": questions([0, 0, 0, 0])})
    text = table(answered, flips=True)
    (row,) = [row for row in cells(text) if row["Method"].startswith("gptq")]
    assert row["Flips"].startswith("–")
    assert re.search(r"no flips of gptq W2A16: .*data", text)


def test_rows_of_several_seeds_are_tested_on_all_of_them(answered):
    """The first seed of QuIP has one answer less right than full precision, the second two."""
    tested = numbers(table(answered, format="csv", significance="fp16"))
    (line,) = [x for x in tested if x["baseline"] == "quip" and x["task"] == "piqa"]
    assert (line["n_seeds"], line["verdict"] != "") == ("2", True)
    assert float(line["value"]) == pytest.approx((2 / 4 + 0) / 2)


def test_a_number_that_a_seed_lacks_is_tested_and_counted_on_the_seeds_that_have_it(answered):
    """A third seed of QuIP has piqa alone: 2 of 4 flips; boolq stays that of two seeds."""
    calibration = CalibrationSpec(seed=2)
    scheme = "W2A16:w=tensor,grid=rms"
    record = quantization(baseline="quip", scheme=scheme, calibration=calibration, seed=2)
    save(answered, record, {"piqa": questions([0, 3, 1, 3])})
    lines = numbers(table(answered, format="csv", significance="fp16"))
    tested = [x for x in lines if x["baseline"] == "quip" and x["p"] != ""]
    assert [(x["task"][:4], x["n_seeds"]) for x in tested] == [
        ("bool", "2"), ("piqa", "3"), ("mean", ""),
    ]  # fmt: skip
    assert "could not be tested" not in table(answered, significance="fp16")
    row = {row["Method"]: row for row in cells(table(answered, flips=True))}["quip (3 seeds)"]
    assert row["Flips"] == f"{100 * ((1 + 4 + 2) / 12 + 2 / 4) / 2:.1f}"


def test_a_mean_over_tasks_that_lack_different_seeds_has_no_spread(three):
    seeded(three, 3, {"piqa": 0.7})
    seeded(three, 4, {"boolq": 0.5})
    _, row = stored_entries(three)
    piqa, boolq = row.cells["piqa", ""], row.cells["boolq", ""]
    assert len(piqa.draws) == len(boolq.draws) == 4
    assert mean_of([piqa, boolq]).draws == ()


def test_the_largest_overlap_of_all_seeds_with_the_tested_text_is_told_once(tmp_path):
    store = Store(tmp_path)
    add(store, quantization(), perplexity={"wikitext2@gptq-64": 5.0})
    for seed, overlap in enumerate([0.02, 0.31, 0.07]):
        record = seeded(store, seed)
        measured = task(
            record, "wikitext2", {"perplexity": 6.0}, protocol="gptq-64", n_items=128,
            details={"calibration_overlap": overlap},
        )  # fmt: skip
        store.save_task(record.checkpoint, record.key, measured)
    text = table(store)
    assert text.count("stands in the calibration text") == 1
    assert "31% of the text of wikitext2" in text.replace("\\%", "%")


def test_every_text_of_a_list_is_calibrated_on_and_makes_a_row_of_its_own(plan, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    texts = [{"source": str(path), "nsamples": 2, "seqlen": 16} for path in (text, other)]
    qbench("sweep", plan(baselines=["none", "rtn", "gptq"], calibration=texts))
    found = [
        (key["baseline"]["name"], key["calibration"]["source"], key["calibration"]["seed"])
        for record in records(tmp_path / "runs").values()
        if (key := record["key"]).get("calibration")
    ]
    assert sorted(found) == [
        ("gptq", name, seed) for name in ("other.txt", "text.txt") for seed in (0, 1)
    ]
    rows = cells(table(Store(tmp_path / "runs")))
    assert [row["Method"] for row in rows] == [
        "full precision",
        "gptq calibration.source=other.txt (2 seeds)",
        "gptq calibration.source=text.txt (2 seeds)",
        "rtn",
    ]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.0721, "accuracy", "7.2"),
        (0.0721, "agreement", "7.2"),
        (0.0026, "divergence", "0.0026"),
        (0.031, "perplexity", "0.03"),
        (0.00015, "perplexity", "<0.01"),
        (0.0, "perplexity", "0.00"),
        (2.71, "perplexity", "2.71"),
        (12345.0, "perplexity", "1.2e4"),
    ],
)
def test_a_spread_has_the_decimals_of_its_mean(value, kind, text):
    assert spread_text(value, kind) == text
