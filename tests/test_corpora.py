"""Corpora: what is found where, and windows drawn as GPTQ's loaders draw them."""

import json
import random
from pathlib import Path

import pytest
import torch

from qbench.errors import QBenchError
from qbench.evaluation import data
from qbench.evaluation.corpora import calibration_windows, known_corpora, load_corpus
from qbench.evaluation.data import HubSource, load_rows
from qbench.models.files import data_folder
from qbench.record import CalibrationSpec
from qbench.testing import tiny_tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(data, "hub_answers", lambda: False)


def spec(source, nsamples=3, seqlen=16, seed=0):
    return CalibrationSpec(source=source, nsamples=nsamples, seqlen=seqlen, seed=seed)


def test_a_local_file_is_used_without_looking_at_the_hub(monkeypatch):
    monkeypatch.setattr(data, "_from_hub", lambda *a: pytest.fail("went to the Hub"))
    corpus = load_corpus("ptb-new", data_dir=DATA)
    assert corpus.split == "test" and corpus.documents[0] == "bond prices were little changed"
    assert corpus.source.endswith("ptb/test.jsonl")


def test_the_hash_of_a_corpus_is_over_its_documents_not_over_the_file(tmp_path):
    rows = [json.loads(line) for line in (DATA / "tasks/ptb/test.jsonl").open()]
    folder = tmp_path / "corpora" / "ptb"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(
        "\n\n".join(json.dumps({"extra": 1, "text": row["sentence"]}) for row in rows)
    )
    here, there = (load_corpus("ptb-new", data_dir=d).sha256 for d in (DATA, tmp_path))
    assert here == there != load_corpus("ptb", data_dir=DATA).sha256


def test_missing_data_name_every_place_looked_for_and_the_fix(offline, tmp_path):
    with pytest.raises(QBenchError) as error:
        load_corpus("wikitext2", data_dir=tmp_path)
    text = str(error.value)
    assert f"put it at {tmp_path}/tasks/wikitext2/test.jsonl" in text
    assert f"{tmp_path}/corpora/wikitext2/test.txt" in text
    assert "Salesforce/wikitext" in text and "go online" in text


def test_offline_flags_are_left_as_they_were(offline, tmp_path):
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with pytest.raises(QBenchError, match="Hub data set nobody/nothing"):
        load_rows("x", "test", tmp_path, HubSource("nobody/nothing"))
    assert (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == before


def test_a_data_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(QBenchError, match="does not exist"):
        load_corpus("ptb", data_dir=tmp_path / "nowhere")


def test_an_unknown_corpus_is_named_with_the_nearest_known_one():
    with pytest.raises(QBenchError, match="did you mean 'wikitext2'"):
        load_corpus("wikitex2", data_dir=DATA)


def test_any_folder_of_the_data_folder_serves_as_a_corpus():
    assert load_corpus("lambada_openai", data_dir=DATA, split="test").documents


def test_a_text_file_is_one_document_and_a_jsonl_file_one_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one\\u2028line"}\n\n{"text": "two"}\n')
    assert load_corpus(str(tmp_path / "a.txt")).documents == ["one\ntwo\n"]
    assert load_corpus(str(tmp_path / "b.jsonl")).documents == ["one\u2028line", "two"]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "line 1 is not JSON"), ("[1]", "not a JSON object")]
)
def test_a_broken_jsonl_file_names_the_line(tmp_path, content, message):
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(QBenchError, match=message):
        load_corpus(str(tmp_path / "b.jsonl"))


def test_rows_without_a_text_column_list_the_columns_there_are(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"goal": "x"}')
    with pytest.raises(QBenchError, match="has the columns goal"):
        load_corpus(str(tmp_path / "b.jsonl"))


def test_every_known_corpus_has_a_line_and_a_stand_in_that_loads():
    for name, line in known_corpora().items():
        folder = data_folder("bundled:world") if name == "world" else DATA
        assert line and load_corpus(name, data_dir=folder).documents


def test_windows_of_joined_text_start_where_gptqs_loader_would_start_them(tokenizer):
    ids, filled = calibration_windows(tokenizer, spec("wikitext2", seed=7), DATA)
    rows = [json.loads(line)["text"] for line in (DATA / "tasks/wikitext2/train.jsonl").open()]
    whole = tokenizer("\n\n".join(rows))["input_ids"]
    draws = random.Random(7)
    starts = [draws.randint(0, len(whole) - 16 - 1) for _ in range(3)]
    assert ids.tolist() == [whole[s : s + 16] for s in starts]
    assert ids.dtype == torch.long and filled.tokens and filled.seed == 7


def test_windows_of_c4_lie_in_documents_drawn_as_gptqs_loader_draws_them(tokenizer):
    ids, _ = calibration_windows(tokenizer, spec("c4", nsamples=5, seqlen=120, seed=3), DATA)
    rows = [json.loads(line)["text"] for line in (DATA / "tasks/c4/train.jsonl").open()]
    draws, expected = random.Random(3), []
    while len(expected) < 5:
        document = tokenizer(rows[draws.randint(0, len(rows) - 1)])["input_ids"]
        if len(document) > 120:
            start = draws.randint(0, len(document) - 120 - 1)
            expected.append(document[start : start + 120])
    assert ids.tolist() == expected
    assert len({len(tokenizer(row)["input_ids"]) > 120 for row in rows}) == 2  # some are too short


def test_windows_leave_the_global_random_numbers_alone(tokenizer):
    random.seed(5)
    before = random.getstate()
    calibration_windows(tokenizer, spec("c4"), DATA)
    assert random.getstate() == before


def test_the_hash_of_the_tokens_tells_seeds_apart_and_is_checked(tokenizer):
    _, first = calibration_windows(tokenizer, spec("ptb"), DATA)
    _, again = calibration_windows(tokenizer, first, DATA)
    _, other = calibration_windows(tokenizer, spec("ptb", seed=1), DATA)
    assert first == again and first.tokens != other.tokens
    with pytest.raises(QBenchError, match="not the one of the record"):
        calibration_windows(tokenizer, spec("ptb-new").model_copy(update={"tokens": "0"}), DATA)


@pytest.mark.parametrize("source", ["c4", "ptb"])
def test_a_corpus_too_short_for_a_window_says_so(tokenizer, source):
    with pytest.raises(QBenchError, match="too few for a window of 4000"):
        calibration_windows(tokenizer, spec(source, seqlen=4000), DATA)
