"""What a table tells of rows that were made elsewhere, otherwise, or with the test text in hand."""

from __future__ import annotations

import numpy as np
import pytest
from cli_fixtures import qbench, records
from items_fixtures import measured, questions
from study_fixtures import cells, quantization

from qbench.comparison.frame import frame
from qbench.evaluation.overlap import RUN, overlap, shared_tokens
from qbench.record import CalibrationSpec
from qbench.study.store import Store
from qbench.tables.table import table

ONE = {"torch": "2.7", "transformers": "5.1", "device": "cpu", "cpu": "A", "threads": "2"}


def put(store: Store, baseline: str, environment=None, details=None, **fields) -> None:
    scheme = "W16A16" if baseline == "none" else "W4A16:w=channel,grid=asym"
    record = quantization(baseline=baseline, scheme=scheme, **fields)
    store.save_quantization(record)
    items = questions([0, 1, 0, 0])
    task = measured(record, "piqa", items, details=details or {})
    task.environment = environment or {}
    store.save_task(record.checkpoint, record.key, task, items)


def notes(store: Store) -> list[str]:
    return [line for line in table(store).splitlines() if line.startswith("\\[")]


def test_a_number_made_with_other_software_or_on_another_device_has_a_footnote(tmp_path):
    store = Store(tmp_path)
    put(store, "none", ONE)
    put(store, "rtn", ONE | {"cpu": "B", "threads": "16"})
    put(store, "gptq", ONE | {"torch": "2.6", "device": "cuda", "gpu": "H200"})
    assert notes(store) == [
        "\\[1\\] measured with torch 2.6, device cuda, gpu H200; "
        "most of the column with torch 2.7, device cpu, gpu none"
    ]
    marked = {row["Method"]: row["piqa"] for row in cells(table(store))}
    assert [name for name, text in marked.items() if "[1]" in text] == ["gptq"]


def test_records_without_an_environment_say_nothing_about_it(tmp_path):
    store = Store(tmp_path)
    put(store, "none", ONE)
    put(store, "rtn")
    assert notes(store) == []


def test_a_row_calibrated_otherwise_than_most_has_a_footnote_and_another_seed_has_none(tmp_path):
    store = Store(tmp_path)
    c4 = CalibrationSpec(source="c4", nsamples=128, seqlen=2048, tokens="x")
    put(store, "none")
    put(store, "gptq", calibration=c4)
    put(store, "awq", calibration=c4.model_copy(update={"seed": 3, "tokens": "z"}))
    put(store, "quip", calibration=c4.model_copy(update={"source": "wikitext2", "tokens": "y"}))
    put(store, "rtn")
    assert notes(store) == [
        "\\[1\\] calibrated on 128 windows of 2048 tokens of wikitext2; "
        "most rows on 128 windows of 2048 tokens of c4"
    ]


def test_a_row_whose_name_says_its_calibration_needs_no_footnote(tmp_path):
    store = Store(tmp_path)
    for nsamples in (16, 128, 512):
        put(store, "gptq", calibration=CalibrationSpec(nsamples=nsamples, tokens=str(nsamples)))
    assert notes(store) == []


def test_text_that_was_calibrated_on_is_told_from_one_percent_up(tmp_path):
    store = Store(tmp_path)
    put(store, "none")
    put(store, "gptq", details={"calibration_overlap": 0.37})
    put(store, "quip", details={"calibration_overlap": 0.004})
    assert notes(store) == [
        "\\[1\\] 37% of the text of piqa stands in the calibration text of this row too: "
        "it has seen what it is tested on"
    ]
    shares = frame(store).set_index("baseline")["calibration_overlap"]
    assert shares["gptq"].iloc[0] == 0.37
    assert np.isnan(shares["none"].iloc[0])


def brute_force(calibration, rows, run):
    """Every token of the rows that lies in a run some calibration window has."""
    seen = {tuple(w[i : i + run]) for w in calibration for i in range(len(w) - run + 1)}
    shared = 0
    for row in rows:
        starts = [i for i in range(len(row) - run + 1) if tuple(row[i : i + run]) in seen]
        shared += len({i + k for i in starts for k in range(run)})
    return shared, sum(map(len, rows))


@pytest.mark.parametrize("run", [2, 3, 5])
def test_shared_runs_are_those_that_a_search_finds(run):
    draw = np.random.default_rng(run)
    calibration = draw.integers(0, 4, (6, 20))  # four tokens, so that runs do meet
    rows = [draw.integers(0, 4, size).tolist() for size in (30, 1, 0, 4, 17)]
    found = shared_tokens(calibration, rows, run)
    assert found == brute_force(calibration.tolist(), rows, run)
    assert found[0] > 0


def test_a_run_across_two_windows_or_two_rows_is_no_overlap():
    text = np.arange(10)
    assert shared_tokens([text[:5], text[5:]], [text[3:7].tolist()], run=4) == (0, 4)
    assert shared_tokens([text], [text[:2].tolist(), text[2:4].tolist()], run=4) == (0, 4)
    assert shared_tokens([text], [text[3:7].tolist()], run=4) == (4, 4)


@pytest.mark.parametrize(("seqlen", "found"), [(64, 0.8), (32, 0.8), (24, None)])
def test_short_calibration_windows_are_looked_for_as_a_whole(seqlen, found):
    """Four of five windows of the text were calibrated on; below 25 tokens nobody can tell."""
    text = np.random.default_rng(0).integers(0, 500, 5 * seqlen)
    assert overlap(text.reshape(5, seqlen)[:4], [text.tolist()]) == found


def test_of_questions_that_are_too_short_no_share_is_known():
    text = np.arange(200).reshape(2, 100)
    assert overlap(text, [range(40), range(7)]) is None
    assert overlap(text, []) is None
    assert overlap(text, [range(60), range(900, 940)]) == 0.6


def test_nothing_is_shared_with_nothing():
    assert shared_tokens(np.zeros((0, 60)), [], RUN) == (0, 0)


def test_a_run_calibrated_on_its_test_text_says_how_much_of_it_and_others_say_none(tiny, tmp_path):
    """The same file for both, another one, and a method that reads no text."""
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghij "))
    for name in ("test", "other"):
        (tmp_path / f"{name}.txt").write_text("".join(draw.choice(letters, 3000)))
    common = ("--scheme", "W4A16", "--tasks", f"{tmp_path}/test.txt", "--max-length", "64")
    common += ("--nsamples", "16", "--seqlen", "64", "--results", tmp_path / "runs")
    for source, baseline in (("test", "gptq"), ("other", "gptq"), ("other", "rtn")):
        text = tmp_path / f"{source}.txt"
        qbench("run", tiny, "--baseline", baseline, "--calibration", text, *common)
    overlaps = sorted(
        record["details"].get("calibration_overlap", -1.0)
        for record in records(tmp_path / "runs").values()
        if "details" in record
    )
    assert overlaps[:2] == [-1.0, 0.0]
    assert overlaps[2] > 0.1  # 16 windows of 64 out of some 2,000 tokens
    text = table(Store(tmp_path / "runs"))
    assert "it has seen what it is tested on" in text
