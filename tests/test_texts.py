"""Texts of scored questions: what was asked, and only while it is still the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qbench.errors import QBenchError
from qbench.evaluation.evaluate import prepare_task
from qbench.evaluation.tasks import EvaluationOptions, TaskSpec
from qbench.evaluation.texts import ItemText, item_texts
from qbench.record import TaskKey
from qbench.testing import tiny_tokenizer

DATA = Path(__file__).parent / "data"


def key(task: str) -> TaskKey:
    rest = {"quantization": "", "definition": "", "data": "", "encoding": "joint"}
    return TaskKey(task=task, protocol="lm-eval", max_length=64, **rest)


def stored(task: str) -> dict[int, str]:
    """doc_id -> doc_hash as an evaluation stores them."""
    prepared = prepare_task(
        TaskSpec(task), tiny_tokenizer(), 512, EvaluationOptions(data_dir=DATA, max_length=512)
    )
    n = len(prepared.rows)
    items = prepared._items([0.0] * n, [False] * n)
    return dict(zip(items["doc_id"].tolist(), items["doc_hash"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (
            "piqa",
            ItemText(
                "Question: How do I keep bread from drying out?\nAnswer:",
                ("Put it into a closed bag.", "Put it on a hot stove."),
            ),
        ),
        (
            "winogrande",
            ItemText(
                "",
                (
                    "The cup did not fit on the shelf because the cup was too tall.",
                    "The cup did not fit on the shelf because the shelf was too tall.",
                ),
            ),
        ),
        (
            "hellaswag",
            ItemText(
                "Baking bread: A woman stands in a kitchen. She kneads dough. She",
                (
                    "puts the dough into the oven.",
                    "paints the dough with a car.",
                    "throws the kitchen away.",
                    "sleeps on the oven for a year.",
                ),
            ),
        ),
    ],
)
def test_the_texts_of_stored_items_are_those_of_the_data_folder(task, text):
    """Expected texts are rows of tests/data in the form of the task's own prompt."""
    documents = stored(task)
    found = item_texts(key(task), documents, DATA)
    assert found.texts[0] == text
    assert found.texts.keys() == documents.keys()
    assert not found.changed


def test_a_guessed_word_is_the_one_option():
    found = item_texts(key("lambada_openai"), stored("lambada_openai"), DATA)
    assert found.texts[0].options == (" salt",)


def test_only_the_documents_asked_for_are_read():
    documents = stored("piqa")
    assert item_texts(key("piqa"), {1: documents[1]}, DATA).texts.keys() == {1}


def test_a_document_that_was_changed_since_or_is_gone_is_not_shown(tmp_path):
    shutil.copytree(DATA / "tasks" / "piqa", tmp_path / "tasks" / "piqa")
    path = tmp_path / "tasks" / "piqa" / "validation.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0]) | {"goal": "Another question?"}
    path.write_text("\n".join([json.dumps(row), lines[1]]) + "\n")
    found = item_texts(key("piqa"), stored("piqa"), tmp_path)
    assert found.texts.keys() == {1}
    assert found.changed == {0, 2}


def test_a_folder_without_the_task_is_an_error_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("qbench.evaluation.data._from_hub", lambda *a: pytest.fail("Hub"))
    with pytest.raises(QBenchError, match="validation split of piqa was found nowhere"):
        item_texts(key("piqa"), {0: "x"}, tmp_path)


def test_a_task_that_nobody_knows_is_an_error(monkeypatch):
    with pytest.raises(QBenchError, match="no_such_task"):
        item_texts(key("no_such_task.yaml"), {0: "x"}, DATA)
