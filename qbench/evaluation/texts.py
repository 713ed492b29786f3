"""The texts of scored questions, read from the data folder when somebody wants to see them.

Records hold ids and hashes, never texts: data sets have licences, and stay where they are. A text
is shown only if its document still has the hash it was scored with. Left out: the few-shot examples
before a question, and corpora, whose windows are no questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.evaluation.data import hash_json
from qbench.models.files import data_folder
from qbench.record import TaskKey


@dataclass(frozen=True)
class ItemText:
    """What one question asked."""

    question: str
    """Empty where the options are whole sentences (Winogrande)."""
    options: tuple[str, ...]
    """In the order of the stored items; one where a word was to be guessed."""


@dataclass(frozen=True)
class ItemTexts:
    """The texts of some questions of one task."""

    texts: dict[int, ItemText] = field(default_factory=dict)
    """doc_id -> text."""
    changed: frozenset[int] = frozenset()
    """Documents that are another text now than when they were scored, or are gone."""


def item_texts(
    key: TaskKey, documents: Mapping[int, str], data_dir: Path | str | None
) -> ItemTexts:
    """Read what some questions asked, from the data folder alone.

    Args:
        key: the task as it was measured.
        documents: ``doc_id`` -> ``doc_hash``, as the stored items have them.
        data_dir: the root with ``tasks/``, or ``bundled:world``; the Hub is not asked.

    Raises:
        QBenchError: where the folder lacks the task's data, or nobody knows the task.
    """
    from qbench.evaluation import zeroshot  # lm-eval and torch
    from qbench.evaluation.prompts import compiled_once

    task = zeroshot.load_task(key.task, data_dir=data_folder(data_dir), hub=False)[0]
    texts = {}
    with compiled_once(zeroshot.env):
        for doc_id, document in task.doc_iterator():
            if documents.get(doc_id) == hash_json([document])[:16]:
                texts[doc_id] = _text(task, document)
    return ItemTexts(texts, frozenset(documents) - frozenset(texts))


def _text(task: Any, document: Mapping[str, Any]) -> ItemText:
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.OUTPUT_TYPE != "multiple_choice":
        return ItemText(str(question), (str(target),))
    options = [str(option) for option in task.doc_to_choice(document)]
    if task.multiple_input:  # the options are contexts, what is scored is what follows them all
        between = task.config.target_delimiter
        return ItemText("", tuple(f"{option}{between}{target}" for option in options))
    return ItemText(str(question), tuple(options))
