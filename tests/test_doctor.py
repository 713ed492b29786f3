"""The doctor: what it looks at, what it calls a problem, and what it says to do."""

from __future__ import annotations

import importlib.metadata
import json
import re
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from cli_fixtures import DATA, qbench
from study_fixtures import add, quantization

from qbench.evaluation import data
from qbench.study import doctor
from qbench.study.findings import Finding, report
from qbench.study.store import Store


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Online, and nothing fetched before."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def examined(*options, code=0):
    """(heading, name) -> (state, what was found); and the last line."""
    lines = qbench("doctor", *options, code=code).stdout.splitlines()
    found, heading = {}, ""
    for line in lines:
        if line.startswith("  "):
            name, _, text = line[11:].partition(": ")
            found[heading, name] = (line[2:10].strip(), text)
        elif line:
            heading = line
    return found, lines[-1]


# --- data -----------------------------------------------------------------------------------------
def test_every_task_and_corpus_is_named_with_its_file_or_how_to_get_it(tmp_path):
    found, verdict = examined("--data", DATA, "--results", tmp_path / "runs")
    assert found["Data", "folder"] == ("ok", str(DATA))
    assert found["Data", "task piqa"] == ("ok", "tasks/piqa/validation.jsonl")
    assert found["Data", "task wsc273_lmeval"] == ("ok", "tasks/wsc273/test.jsonl")  # it shares
    ptb = "tasks/ptb/test.jsonl (to measure); tasks/ptb/train.jsonl (to calibrate)"
    assert found["Data", "corpus ptb-new"] == ("ok", ptb)
    assert verdict == "Nothing is in the way of a run."
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_said_with_the_file_and_the_hubs_name(tmp_path):
    found, _ = examined("--data", tmp_path, "--results", tmp_path)
    state, text = found["Data", "task piqa"]
    assert state == "absent"
    assert text.startswith("a run fetches it from the Hub (")
    assert text.endswith("), or put tasks/piqa/validation.jsonl there")
    authors = "put its authors' cloze_test_val__winter2018*.csv there, in tasks/storycloze_2018"
    assert found["Data", "task storycloze_2018"][1].startswith(authors)
    assert found["Data", "corpus c4"] == (
        "absent",
        "a run fetches it from the Hub (allenai/c4), or put tasks/c4/validation.jsonl "
        "(to measure) and tasks/c4/train.jsonl (to calibrate) there",
    )
    assert found["Data", "corpus world"][1] == "comes with qbench: --data bundled:world"


def test_files_put_where_it_says_are_found(tmp_path):
    folder = tmp_path / "tasks" / "storycloze_2018"
    folder.mkdir(parents=True)
    (folder / "cloze_test_val__winter2018-cloze_test_ALL_val - 1.csv").write_text("")
    (tmp_path / "tasks" / "c4").mkdir()
    (tmp_path / "tasks" / "c4" / "train.jsonl").write_text("")
    found, _ = examined("--data", tmp_path, "--results", tmp_path / "runs")
    assert found["Data", "task storycloze_2018"][0] == "ok"
    assert found["Data", "corpus c4"] == (
        "ok",
        "tasks/c4/train.jsonl (to calibrate); a run fetches it from the Hub (allenai/c4), or put "
        "tasks/c4/validation.jsonl (to measure) there",
    )


def test_what_was_fetched_before_counts_as_there(tmp_path):
    (tmp_path / "cache" / "allenai___c4").mkdir(parents=True)
    found, _ = examined("--results", tmp_path)
    fetched = "fetched from the Hub before (allenai/c4)"
    assert found["Data", "corpus c4-new"][1] == f"{fetched} (to measure); {fetched} (to calibrate)"


def test_offline_without_data_is_a_problem_and_with_data_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, verdict = examined("--results", tmp_path, code=1)
    assert found["Data", "folder"][0] == "PROBLEM"
    assert "HF_HUB_OFFLINE is set" in found["Data", "task piqa"][1]
    assert verdict == "1 problem a run would fail of: folder"
    examined("--data", DATA, "--results", tmp_path)


def test_the_hub_is_asked_only_on_request(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "hub_answers", lambda: asked.append(1) or True)
    found, _ = examined("--results", tmp_path)
    assert found["Data", "hub"] == ("note", "not asked; qbench doctor --hub does") and not asked
    found, _ = examined("--results", tmp_path, "--hub")
    assert found["Data", "hub"] == ("ok", "answers") and asked
    monkeypatch.setattr(data, "hub_answers", lambda: False)
    found, _ = examined("--results", tmp_path, "--hub", code=1)
    assert found["Data", "hub"][1].startswith("does not answer")
    assert found["Data", "folder"][0] == "PROBLEM"
    examined("--results", tmp_path, "--hub", "--data", DATA)


def test_a_data_folder_that_is_none_is_a_problem(tmp_path):
    found, _ = examined("--data", tmp_path / "no", "--results", tmp_path, code=1)
    said = f"{tmp_path / 'no'} is no folder; give one that exists"
    assert found["Data", "folder"] == ("PROBLEM", said)


# --- packages and extras --------------------------------------------------------------------------
def versions(monkeypatch, **changed):
    """Other versions than installed; None for what is not."""

    def version(name):
        if name in changed:
            if changed[name] is None:
                raise PackageNotFoundError(name)
            return changed[name]
        return importlib.metadata.version(name)

    monkeypatch.setattr(doctor, "version", version)


def test_packages_are_listed_with_their_versions(tmp_path):
    found, _ = examined("--results", tmp_path)
    assert found["Packages", "torch"] == ("ok", torch.__version__)
    assert ("Packages", "pytest") not in found  # of the extra dev


def test_a_package_too_old_or_missing_is_a_problem_with_its_command(tmp_path, monkeypatch):
    versions(monkeypatch, transformers="4.57.1", pandas=None, torch="2.13.0+cpu")
    found, verdict = examined("--results", tmp_path, code=1)
    old = '4.57.1, but qbench needs >=5; pip install --upgrade "transformers>=5"'
    assert found["Packages", "transformers"] == ("PROBLEM", old)
    missing = 'is not installed; pip install "pandas>=2"'
    assert found["Packages", "pandas"] == ("PROBLEM", missing)
    assert found["Packages", "torch"][0] == "ok"
    assert verdict == "2 problems a run would fail of: transformers, pandas"


def test_versions_are_not_compared_as_strings(tmp_path, monkeypatch):
    versions(monkeypatch, **{"lm-eval": "0.4.9"})
    found, _ = examined("--results", tmp_path, code=1)
    assert found["Packages", "lm-eval"][0] == "PROBLEM"  # 0.4.13 is wanted
    versions(monkeypatch, transformers="10.0")
    assert examined("--results", tmp_path)[0]["Packages", "transformers"][0] == "ok"


def test_optional_extras_are_absent_without_being_a_problem(tmp_path, monkeypatch):
    needs = ['auto-gptq==0.7.1; extra == "auto-gptq"', 'pytest>=8; extra == "dev"']
    needs.append('old-gptq==1; python_version < "3.0" and extra == "old"')
    extras = SimpleNamespace(get_all=lambda name: ["auto-gptq", "dev", "old"])
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "metadata", lambda name: extras)
    versions(monkeypatch, **{"auto-gptq": None})
    found, _ = examined("--results", tmp_path)
    missing = 'not installed; pip install "qbench[auto-gptq]" adds the baseline'
    assert found["Optional", "auto-gptq"] == ("absent", missing)
    none = "has no release for this version of Python"
    assert found["Optional", "old"] == ("absent", none) and ("Optional", "dev") not in found
    versions(monkeypatch, **{"auto-gptq": "0.7.1"})
    assert examined("--results", tmp_path)[0]["Optional", "auto-gptq"] == ("ok", "auto-gptq 0.7.1")


def test_programs_are_found_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found, _ = examined("--results", tmp_path)
    assert found["Optional", "LaTeX"][0] == found["Optional", "browser"][0] == "absent"
    program = tmp_path / "tectonic"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert examined("--results", tmp_path)[0]["Optional", "LaTeX"] == ("ok", str(program))


# --- machine --------------------------------------------------------------------------------------
def test_what_makes_a_machine_slow_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    found, _ = examined("--results", tmp_path)
    assert found["Machine", "waiting threads"] == ("ok", "asleep (OMP_WAIT_POLICY=passive)")
    assert found["Machine", "column loops"][1].startswith("compiled by numba ")
    assert re.fullmatch(r"\d+\.\d GiB free", found["Machine", "memory"][1])
    versions(monkeypatch, numba=None)
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**29)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found, _ = examined("--results", tmp_path, code=1)
    assert found["Machine", "column loops"][0] == "absent"
    assert found["Machine", "memory"][0] == "PROBLEM"
    assert found["Machine", "memory"][1].startswith("0.5 GiB free; ")
    assert found["Machine", "waiting threads"][1].startswith("awake (OMP_WAIT_POLICY=active)")


# --- results --------------------------------------------------------------------------------------
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    found, _ = examined("--results", tmp_path / "file" / "runs", code=1)
    state, text = found["Results", "folder"]
    assert state == "PROBLEM" and text.startswith("cannot write results under")


def test_stored_runs_are_counted_and_one_that_cannot_be_read_is_named(tmp_path):
    store = Store(tmp_path / "runs")
    add(store, quantization(), {"piqa": 0.7, "boolq": 0.6})
    broken = store.save_quantization(quantization("other", status="failed", error="no room"))
    found, _ = examined("--results", tmp_path / "runs")
    counted = "2, 2 measurements; 1 failures are stored, --retry-failed repeats them"
    assert found["Results", "stored runs"] == ("note", counted)
    broken.write_text("{")
    found, _ = examined("--results", tmp_path / "runs", code=1)
    state, text = found["Results", "unreadable"]
    assert state == "PROBLEM" and str(broken) in text
    assert text.endswith("delete it to measure again") and text.count("delete it") == 1
    assert found["Results", "stored runs"][1] == "1, 2 measurements"


def test_runs_of_other_versions_are_counted_by_version(tmp_path):
    store = Store(tmp_path / "runs")
    now = {"torch": importlib.metadata.version("torch"), "qbench": "0.0.1", "python": "3.9"}
    add(store, quantization("a", environment=now), {"piqa": 0.7})
    add(store, quantization("b", environment=now | {"torch": "2.6.0"}))
    add(store, quantization("c", environment=now | {"torch": "2.6.0", "transformers": "5.0.0"}))
    lines = qbench("doctor", "--results", tmp_path / "runs").stdout.splitlines()
    told = [line for line in lines if "other versions" in line]
    assert len(told) == 2
    assert "2 runs were measured with torch 2.6.0" in told[0]
    assert "1 runs were measured with transformers 5.0.0" in told[1]
    assert all(line.startswith("  note ") for line in told)


def test_the_report_has_a_heading_for_each_group_and_ends_with_a_verdict():
    found = [Finding("A", "x", "1"), Finding("B", "y", "2", "PROBLEM"), Finding("A", "z", "3")]
    assert report(found) == [
        *("A", "  ok       x: 1", "  ok       z: 3", "", "B", "  PROBLEM  y: 2", ""),
        "1 problem a run would fail of: y",
    ]
    assert json.dumps(report(found[:1])[-1]) == '"Nothing is in the way of a run."'
