"""Questions of an lm-eval task: what it builds, at the cost of building it once.

lm-eval compiles its Jinja templates again for every document, up to 3 ms each, which is most of
what preparing a task takes; here every template is compiled once per process, and only while one
of our own calls is running. Left out: lm-eval's own loop over documents, its ranks and its cache.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qbench.evaluation.tasks import TaskSpec

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask


@dataclass(frozen=True)
class Question:
    """A document and its requests."""

    doc_id: int
    doc: Mapping[str, Any]
    requests: list[Instance]
    gold: frozenset[int]
    """Numbers of the right options; empty where there are no options."""
    n_characters: list[int]
    """Of each option, without the blank in front."""


def build_questions(task: ConfigurableTask, spec: TaskSpec) -> list[Question]:
    """The questions of a task, in the order of its documents."""
    questions = []
    multiple_choice = task.OUTPUT_TYPE == "multiple_choice"
    for doc_id, doc in task.doc_iterator(limit=spec.limit):
        context = task.fewshot_context(
            doc, num_fewshot=spec.num_fewshot, gen_prefix=task.doc_to_prefix(doc)
        )
        made = task.construct_requests(doc=doc, ctx=context, metadata=(spec.name, doc_id, 1))
        requests = made if isinstance(made, list) else [made]
        if multiple_choice:
            choices = task.doc_to_choice(doc)
            # where the option stands in the context, what is scored is the shared continuation
            scored = [task.doc_to_target(doc)] * len(choices) if task.multiple_input else choices
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            right = frozenset(gold if isinstance(gold, list) else [gold])
            questions.append(Question(doc_id, doc, requests, right, [len(c) for c in scored]))
        else:
            sizes = [len(str(request.args[-1]).strip()) for request in requests]
            questions.append(Question(doc_id, doc, requests, frozenset(), sizes))
    return questions


@contextmanager
def compiled_once(env: Environment) -> Iterator[None]:
    """While active, templates of ``env`` are compiled once; nothing stays on it afterwards."""
    if "from_string" in vars(env):  # within another one
        yield
        return
    env.from_string = functools.partial(_compiled, env)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del env.from_string


@functools.lru_cache(maxsize=256)
def _compiled(env: Environment, source: str) -> Template:
    return type(env).from_string(env, source)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's warnings to itself: about models in memory, defaults and samplers."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
