"""Zero-shot and few-shot tasks: lm-eval's definitions and metrics on qbench's scores.

lm-eval 0.4.13 defines what a question looks like and what counts as right; qbench finds the data,
scores the options and adds to every multiple-choice task what papers disagree on: ``acc`` (sum of
log-probabilities), ``acc_norm`` (per character) and ``acc_token`` (per token, as GPT-3 and, it
seems, BitNet). Standard errors are closed forms.

lm-eval's own catalogue (14,683 files, 7 s) is read only for a task that is not pinned here. Left
out: its result cache, whose key lacks the model, and its request cache, whose key lacks the data.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api import metrics as lm_metrics
from lm_eval.tasks import TaskManager
from lm_eval.utils import env

from qbench.errors import QBenchError, unknown
from qbench.evaluation import estimates
from qbench.evaluation.data import Rows, hash_json
from qbench.evaluation.definitions import load_splits, pinned_tasks, read_definition, task_splits
from qbench.evaluation.encoding import Encoder, pair_rows, text_rows
from qbench.evaluation.packing import PackedRows, Row
from qbench.evaluation.prompts import build_questions, compiled_once, quiet
from qbench.evaluation.scoring import per_request, score, worth_sharing
from qbench.evaluation.sharing import Sharing
from qbench.evaluation.tasks import (
    DEFAULT_LENGTH,
    EvaluationOptions,
    PreparedTask,
    Progress,
    TaskResult,
    TaskSpec,
    known_tasks,
)
from qbench.record import Metric

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qbench.evaluation.lm import QBenchLM

VERSION = 1
"""Raised when scoring gives other numbers; part of every key."""
_SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


class ZeroShotTask(PreparedTask):
    """An lm-eval task with its questions built and tokenized."""

    def __init__(
        self,
        spec: TaskSpec,
        task: ConfigurableTask,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        options: EvaluationOptions,
        key: dict[str, Any],
        sources: dict[str, str],
    ) -> None:
        self.spec = spec
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.options = options
        self.key_fields = key
        self.sources = sources
        with compiled_once(env):
            self.questions = build_questions(task, spec)
        self.rows: list[list[Row]] = []
        """Of every request, in order; empty for a task that generates."""
        self.counts = {"truncated": 0, "windowed": 0, "spanning": 0}
        if task.OUTPUT_TYPE in _SCORED:
            self._encode()
        self.packed = PackedRows([row for rows in self.rows for row in rows])

    def _encode(self) -> None:
        requests = [r for question in self.questions for r in question.requests]
        if self.task.OUTPUT_TYPE == "loglikelihood_rolling":
            texts = [request.args[0] for request in requests]
            self.rows = [text_rows(self.tokenizer, text, self.max_length) for text in texts]
            return
        encoder = Encoder(self.tokenizer, self.options.encoding)
        for pair in encoder.pairs([request.args for request in requests]):
            rows = pair_rows(pair, self.max_length)
            self.rows.append(rows)
            size = len(pair.context) + len(pair.continuation)
            self.counts["truncated"] += size > self.max_length + 1
            self.counts["windowed"] += len(rows) > 1
            self.counts["spanning"] += pair.spanning

    def run(
        self,
        model: PreTrainedModel,
        progress: Progress | None = None,
        batching: str | None = None,
        sharing: Sharing | None = None,
    ) -> TaskResult:
        """Score every option, then let lm-eval say what is right."""
        details: dict[str, Any] = {**self.counts, "sources": self.sources}
        if self.task.OUTPUT_TYPE not in _SCORED:
            from qbench.evaluation.lm import QBenchLM  # half a second of imports

            lm = QBenchLM(model, self.tokenizer, self.max_length, self.options.encoding)
            return TaskResult(self._generated(lm), len(self.questions), details)
        scored = score(model, self.packed, self.options.batch_tokens, batching, progress, sharing)
        scores, details = per_request(scored.scores, self.rows), details | scored.details
        items = self._items([s.loglikelihood for s in scores], [s.is_greedy for s in scores])
        details["n_tokens"] = int(items["n_tokens"].sum())
        with compiled_once(env):
            metrics = self._metrics(items)
        return TaskResult(metrics, len(self.questions), details, items)

    def token_rows(self) -> Iterable[Sequence[int]]:
        """The token ids of every question with each of its options."""
        return (row.tokens for row in self.packed.rows)

    def test_sharing(self, model: PreTrainedModel) -> Sharing | None:
        """Whether rows of this task may share their beginning on a model; kept with the model."""
        if not self.packed.wanted:
            return None
        return worth_sharing(model, self.packed, self.options.batch_tokens)

    def _items(self, loglikelihood: list[float], greedy: list[bool]) -> dict[str, np.ndarray]:
        columns: dict[str, list[Any]] = defaultdict(list)
        position = 0
        for question in self.questions:
            digest = hash_json([question.doc])[:16]
            for i, size in enumerate(question.n_characters):
                columns["doc_id"].append(question.doc_id)
                columns["doc_hash"].append(digest)
                columns["option"].append(i)
                columns["loglikelihood"].append(loglikelihood[position + i])
                columns["n_tokens"].append(sum(r.n_scored for r in self.rows[position + i]))
                columns["n_characters"].append(size)
                columns["is_greedy"].append(greedy[position + i])
                columns["gold"].append(i in question.gold)
            position += len(question.requests)
        return {name: np.array(values) for name, values in columns.items()}

    def _metrics(self, items: dict[str, np.ndarray]) -> dict[str, Metric]:
        rolling = self.task.OUTPUT_TYPE == "loglikelihood_rolling"
        pairs = list(zip(items["loglikelihood"].tolist(), items["is_greedy"].tolist(), strict=True))
        values: dict[str, list[Any]] = defaultdict(list)
        position = 0
        for question in self.questions:
            own = pairs[position : position + len(question.requests)]
            position += len(question.requests)
            responses = [loglikelihood for loglikelihood, _ in own] if rolling else own
            with np.errstate(all="ignore"):  # an option without characters
                found = self.task.process_results(question.doc, responses)
            for name, value in found.items():
                values[name].append(value)
        if self.task.OUTPUT_TYPE == "multiple_choice":
            values |= _accuracies(items)
        if np.isnan(items["loglikelihood"]).any():
            # an argmax over NaN picks the first option: that share is no accuracy
            return {name: Metric.of(float("nan")) for name in values}
        return {name: self._aggregate(name, found) for name, found in values.items()}

    def _aggregate(self, name: str, values: list[Any]) -> Metric:
        aggregation = self.task.aggregation().get(name, lm_metrics.mean)
        if aggregation is lm_metrics.mean:
            return estimates.mean(values)
        if aggregation is lm_metrics.perplexity:
            mean, stderr = estimates.ratio(values, np.ones(len(values)))
            return estimates.exponential(-mean, stderr)
        if aggregation is lm_metrics.weighted_perplexity:
            mean, stderr = estimates.ratio(*zip(*values, strict=True))
            return estimates.exponential(-mean, stderr)
        if aggregation is lm_metrics.bits_per_byte:
            mean, stderr = estimates.ratio(*zip(*values, strict=True))
            return Metric.of(-mean / np.log(2), stderr and stderr / float(np.log(2)))
        return Metric.of(float(aggregation(values)))

    def _generated(self, lm: QBenchLM) -> dict[str, Metric]:
        """Metrics of a task that generates, for each of its filters."""
        instances = [r for question in self.questions for r in question.requests]
        for instance, text in zip(instances, lm.generate_until(instances), strict=True):
            instance.resps, instance.filtered_resps = [text], {}
        self.task._instances = instances
        self.task.apply_filters()
        values: dict[str, list[Any]] = defaultdict(list)
        for question in self.questions:
            for filter_name in question.requests[0].filtered_resps:
                responses = [r.filtered_resps[filter_name] for r in question.requests]
                for name, value in self.task.process_results(question.doc, responses).items():
                    suffix = "" if filter_name == "none" else f",{filter_name}"
                    values[name + suffix].append(value)
        return {name: self._aggregate(name.split(",")[0], v) for name, v in values.items()}


def _accuracies(items: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Right or wrong, per question, by sum, per character and per token."""
    starts = np.flatnonzero(items["option"] == 0)[1:]
    scores = {
        "acc": items["loglikelihood"],
        "acc_norm": items["loglikelihood"] / np.maximum(items["n_characters"], 1),
        "acc_token": items["loglikelihood"] / np.maximum(items["n_tokens"], 1),
    }
    gold = np.split(items["gold"], starts)
    return {
        name: [
            float(right[np.argmax(own)])
            for own, right in zip(np.split(score, starts), gold, strict=True)
        ]
        for name, score in scores.items()
    }


def prepare_zeroshot(
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    options: EvaluationOptions,
) -> ZeroShotTask:
    """Find the definition and the data, build the questions and tokenize them."""
    task, name, definition, data = load_task(spec.name, spec.num_fewshot, options.data_dir)
    task.set_fewshot_seed(options.seed)
    max_length = options.max_length or context_length or DEFAULT_LENGTH
    key_fields = {
        "task": name,
        "protocol": "lm-eval",
        "definition": _definition_hash(definition, task),
        "data": hash_json([rows.sha256() for rows in data.values()]),
        "version": VERSION,
        "num_fewshot": spec.num_fewshot,
        "seed": options.seed if spec.num_fewshot else 0,
        "limit": spec.limit,
        "encoding": options.encoding,
        "max_length": max_length,
    }
    sources = {split: rows.source for split, rows in data.items()}
    return ZeroShotTask(spec, task, tokenizer, max_length, options, key_fields, sources)


def load_task(
    asked: str, num_fewshot: int = 0, data_dir: Path | None = None, hub: bool = True
) -> tuple[ConfigurableTask, str, Mapping[str, Any], dict[str, Rows]]:
    """lm-eval's task with its rows, its own name, its definition, and the rows by split.

    Args:
        asked: a pinned or any other lm-eval task, or a path to a YAML file.
        num_fewshot: examples before each question.
        data_dir: looked at first.
        hub: whether data that are not there may come from the Hub.
    """
    manager, name, path = _find(asked)
    definition = read_definition(path)
    for key in ("task", "dataset_path"):
        if key not in definition:
            raise QBenchError(
                f"{path.name} has no {key}; qbench runs single lm-eval tasks whose data are rows"
            )
    data = load_splits(definition, num_fewshot, data_dir, hub)
    return _build(manager, name, definition, num_fewshot, data), name, definition, data


def _find(name: str) -> tuple[TaskManager, str, Path]:
    """The manager that knows a task, the task's own name, and its YAML file."""
    pinned = pinned_tasks()
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise QBenchError(f"the task file {name} does not exist; give a path to one that does")
        own = str(read_definition(path).get("task"))
    else:
        path, own = pinned.get(name, Path()), name
    with quiet():
        if path != Path():
            return TaskManager(include_path=str(path.parent), include_defaults=False), own, path
        manager = _catalogue(TaskManager)
    entry = manager.task_index.get(name)
    if entry is None:
        raise unknown("task", name, [*known_tasks(), *manager.all_subtasks])
    if name not in manager.all_subtasks or entry.yaml_path is None:
        members = [t for t in manager.all_subtasks if t.startswith(name)][:5]
        raise QBenchError(
            f"{name!r} is a group of lm-eval tasks; name single ones"
            + (f", such as {', '.join(members)}" if members else "")
        )
    return manager, name, entry.yaml_path


@functools.cache
def _catalogue(manager: Callable[[], TaskManager]) -> TaskManager:
    """lm-eval's whole catalogue, read once per process."""
    return manager()


def _build(
    manager: TaskManager,
    name: str,
    definition: Mapping[str, Any],
    num_fewshot: int,
    data: dict[str, Rows],
) -> ConfigurableTask:
    """lm-eval's task on rows that are already here.

    Only the splits in use are named: lm-eval turns the whole training split into a list even where
    no example is drawn from it. Where examples come from the evaluated split both are named alike,
    because only then lm-eval leaves the question itself out of them.
    """
    from datasets import Dataset

    tables = {
        split: found.rows if isinstance(found.rows, Dataset) else Dataset.from_list(found.rows)
        for split, found in data.items()
    }
    splits = evaluated, examples = task_splits(definition, num_fewshot)
    overrides: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: tables,
        "dataset_kwargs": None,
        "num_fewshot": num_fewshot,
    }
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if definition.get(key) not in splits:
            overrides[key] = None
    if examples == evaluated:
        overrides |= {"test_split": evaluated, "fewshot_split": evaluated}
    if not num_fewshot:
        overrides |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    with quiet(), compiled_once(env):
        # a group of one: the way in which lm-eval merges changes into a task it knows
        loaded = manager.load({"group": "qbench", "task": [overrides]})  # type: ignore[arg-type]
    (task,) = loaded["tasks"].values()
    return task  # type: ignore[return-value]


def _definition_hash(definition: Mapping[str, Any], task: ConfigurableTask) -> str:
    """Hash of what the task asks and counts, helper files included; not of where its data lies."""
    fields = {
        key: value
        for key, value in definition.items()
        if key not in ("metadata", "tag") and not key.startswith("dataset_")
    }
    config = vars(task.config).items()
    code = [getattr(value, "__code__", None) for key, value in config if key != "custom_dataset"]
    files = sorted({c.co_filename for c in code if c is not None})
    return hash_json([json.dumps(fields, sort_keys=True), *(Path(f).read_text() for f in files)])
