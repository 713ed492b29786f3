"""Winograd schemas made ready for partial scoring, named by the task files with ``!function``.

Restates lm-evaluation-harness 0.4.13's preparation, so its output is part of what the tasks are:
this file's hash is in their keys. Left out: reading data (:mod:`qbench_tasks.originals`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_POSSESSIVE = {"my", "his", "her", "our", "their"}
_LOWERED = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}


def wsc_documents(dataset: Iterable[dict[str, Any]]) -> Any:
    """Winograd schemas with candidates that read well in the pronoun's place."""
    return _map(dataset, lambda doc: _fit_options(_single_blanks(doc)))


def wsc_documents_lmeval(dataset: Iterable[dict[str, Any]]) -> Any:
    """The same as lm-eval does it: blanks are squeezed, the pronoun's position is not moved."""
    return _map(dataset, lambda d: _fit_options({**d, "text": d["text"].replace("  ", " ")}))


def _map(dataset: Iterable[dict[str, Any]], change: Callable[[dict[str, Any]], Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([change(dict(doc)) for doc in dataset])


def _single_blanks(doc: dict[str, Any]) -> dict[str, Any]:
    start = doc["pronoun_loc"]
    end = start + len(doc["pronoun"])
    before = doc["text"][:start].replace("  ", " ")
    after = doc["text"][end:].replace("  ", " ")
    return {**doc, "text": before + doc["pronoun"] + after, "pronoun_loc": len(before)}


def _fit_options(doc: dict[str, Any]) -> dict[str, Any]:
    return {**doc, "options": [_fit_option(doc, option) for option in doc["options"]]}


def _fit_option(doc: dict[str, Any], option: str) -> str:
    """A candidate with the genitive of a possessive pronoun and the case of its place."""
    if doc["pronoun"].lower() in _POSSESSIVE:
        option += "'s"
    first = option.split()[0]
    starts_sentence = doc["text"][doc["pronoun_loc"] - 2] == "."
    if starts_sentence or first not in _LOWERED:
        return option
    return option.replace(first, first.lower())
