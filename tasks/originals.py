"""Readers of the files that the authors of a benchmark give out, into the Hub's columns.

For data that cannot be redistributed (Story Cloze) or is easily had from its source (the Winograd
schemas). Left out: finding the files, which :mod:`qbench.evaluation.data` does.
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def storycloze_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of ``cloze_test_{val,test}__*.csv``; a file without answers raises ``KeyError``."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {
                "story_id": row["InputStoryid"],
                **{f"input_sentence_{i}": row[f"InputSentence{i}"] for i in range(1, 5)},
                "sentence_quiz1": row["RandomFifthSentenceQuiz1"],
                "sentence_quiz2": row["RandomFifthSentenceQuiz2"],
                "answer_right_ending": int(row["AnswerRightEnding"]),
            }
            for row in csv.DictReader(file)
        ]


def winograd_xml(path: Path) -> list[dict[str, Any]]:
    """Schemas of Ernest Davis' ``WSCollection.xml``.

    White space is made single before the pronoun's position is taken: the file breaks and indents
    its lines, so positions in the raw text mean nothing.
    """
    return [_schema(schema) for schema in ElementTree.parse(path).getroot().iter("schema")]


def _schema(schema: ElementTree.Element) -> dict[str, Any]:
    def text(tag: str) -> str:
        node = schema.find(tag)
        return " ".join("".join(node.itertext()).split()) if node is not None else ""

    before, pronoun, after = text("text/txt1"), text("text/pron"), text("text/txt2")
    lead = before + " " if before else ""
    gap = "" if after.startswith(("'", ",", ".", ";", "?", "!")) else " "
    options = [" ".join("".join(a.itertext()).split()) for a in schema.findall("answers/answer")]
    return {
        "text": lead + pronoun + gap + after,
        "pronoun": pronoun,
        "pronoun_loc": len(lead),
        "options": options,
        "label": "AB".index(text("correctAnswer").strip(" .")),
        "source": text("source"),
    }
