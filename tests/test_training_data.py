"""Windows of tokens and the order in which a training sees them."""

import json

import pytest
import torch

from qbench.errors import QBenchError
from qbench.testing.models import tiny_tokenizer
from qbench.training.data import Windows, collate, fingerprint, pack, read_documents


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_every_document_begins_with_the_first_token_and_windows_are_cut_without_padding(tokenizer):
    texts = ["Anna found the bread.", "Nobody sold the boat.", "It was late."]
    ids = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = pack(texts, tokenizer, 7)
    assert windows.shape == (len(ids) // 7, 7) and windows.dtype == torch.int32
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert ids.count(tokenizer.bos_token_id) == 3


def test_packing_in_chunks_loses_nothing(tokenizer, monkeypatch):
    texts = [f"The {number}th letter." for number in range(10)]
    whole = pack(texts, tokenizer, 4)
    monkeypatch.setattr("qbench.training.data._CHUNK", 3)
    told = []
    assert torch.equal(pack(texts, tokenizer, 4, lambda *at: told.append(at)), whole)
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]


def test_a_text_shorter_than_one_window_is_refused_with_both_lengths(tokenizer):
    have = 1 + len(tokenizer("late", add_special_tokens=False)["input_ids"])
    assert pack(["late"], tokenizer, have).shape == (1, have)
    with pytest.raises(
        QBenchError, match=rf"has {have} tokens, less than one window of {have + 1};"
    ):
        pack(["late"], tokenizer, have + 1)


def test_a_tokenizer_without_a_first_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(QBenchError, match="has no bos_token"):
        pack(["late"], tokenizer, 2)


def test_a_line_of_text_or_of_jsonl_is_a_document(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\n two \n", encoding="utf-8")
    rows = tmp_path / "a.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSONL
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in ("one\u2028two", "", "three")]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_documents(str(text), "calibration") == ["one", " two "]
    assert read_documents(str(rows), "calibration") == ["one\u2028two", "three"]


def test_a_known_corpus_gives_its_training_split_or_its_held_out_one(tmp_path):
    folder = tmp_path / "corpora" / "wikitext2"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "for training"}\n')
    (folder / "test.jsonl").write_text('{"text": "held out"}\n')
    assert read_documents("wikitext2", "calibration", tmp_path) == ["for training"]
    assert read_documents("wikitext2", "evaluation", tmp_path) == ["held out"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", " \n\n", "holds no document"),
        ("a.jsonl", "", "holds no document"),
        ("a.jsonl", "{]", "line 1 is not JSON"),
        ("a.jsonl", '{"words": "x"}', "a corpus needs one of text"),
    ],
)
def test_a_file_without_documents_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(QBenchError, match=message):
        read_documents(str(path), "calibration")


# --- order ---------------------------------------------------------------------------------------


def numbered(count):
    return torch.arange(count, dtype=torch.int32).repeat_interleave(3).view(count, 3)


def order(length, seed, count=10):
    windows = Windows(numbered(count), length, seed)
    return [windows.window_at(position) for position in range(length)]


def test_every_pass_sees_every_window_once_in_an_order_of_its_own():
    seen = order(30, seed=0)
    passes = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_order_depends_on_the_seed_and_the_position_alone():
    whole = order(30, seed=4)
    assert whole == order(30, seed=4) != order(30, seed=5)
    late = Windows(numbered(10), 30, 4)  # as a training that continues reads it
    assert [late.window_at(position) for position in (25, 3, 14)] == [whole[i] for i in (25, 3, 14)]


def test_without_a_seed_windows_stand_in_the_order_of_the_text():
    windows = Windows(numbered(4))
    assert len(windows) == 4
    assert [windows.window_at(position) for position in range(4)] == [0, 1, 2, 3]


def test_a_batch_is_what_single_windows_are():
    windows = Windows(numbered(10), 20, 1)
    batch = collate(windows.__getitems__([3, 12, 7]))
    singles = torch.cat([windows[position]["input_ids"] for position in (3, 12, 7)])
    assert torch.equal(batch["input_ids"], singles)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_the_fingerprint_sees_tokens_and_shape():
    one = numbered(4)
    assert fingerprint(one) == fingerprint(one.clone())
    assert fingerprint(one) != fingerprint(one.view(2, 6))
    other = one.clone()
    other[3, 2] += 1
    assert fingerprint(one) != fingerprint(other)
