"""The way into an evaluation: prepare a task once, run it on every model of a sweep.

Left out: where results are stored, and what their key says about the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench.evaluation.tasks import (
    EvaluationOptions,
    PreparedTask,
    Progress,
    TaskResult,
    TaskSpec,
)
from qbench.quantization.outcome import batching_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_length(config: PretrainedConfig) -> int | None:
    """The context a model was made for, None where its configuration names none (Mamba)."""
    text = config.get_text_config()
    lengths = (getattr(text, name, None) for name in _CONTEXT_FIELDS)
    return next((n for n in lengths if isinstance(n, int) and n > 0), None)


def prepare_task(
    spec: TaskSpec | str,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    options: EvaluationOptions | None = None,
) -> PreparedTask:
    """Load and tokenize a task; the result is independent of the weights.

    Args:
        spec: the task, or its text form (``wikitext2@documents``).
        tokenizer: the checkpoint's.
        context: the model's context in tokens (:func:`context_length`).
        options: what holds for every task of the run.

    Raises:
        QBenchError: for an unknown task, missing data, or a text too short for a window.
    """
    spec = TaskSpec.parse(spec) if isinstance(spec, str) else spec
    options = options or EvaluationOptions()
    if spec.is_agreement:
        from qbench.evaluation.agreement import prepare_agreement

        return prepare_agreement(spec, tokenizer, context, options)
    if spec.is_perplexity:
        from qbench.evaluation.perplexity import prepare_perplexity

        return prepare_perplexity(spec, tokenizer, context, options)
    from qbench.evaluation.zeroshot import prepare_zeroshot  # imports lm_eval

    return prepare_zeroshot(spec, tokenizer, context, options)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | TaskSpec] | str,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    batching: str | None = None,
    reference: PreTrainedModel | None = None,
    **options: Any,
) -> dict[str, TaskResult]:
    """Measure a model in memory.

    Args:
        model: a causal language model of transformers, in eval mode, on any device. On a CPU two
            batches may run at once: hooks on it are then called from two threads.
        tokenizer: its tokenizer.
        tasks: tasks or their text forms, as in ``["wikitext2", "piqa", "my.txt@documents"]``.
        num_fewshot: of tasks given as text that are not perplexities.
        limit: of tasks given as text.
        progress: called with tokens done and tokens in all of a task.
        batching: how rows share a batch, a key of :data:`qbench.evaluation.tasks.BATCHING`; None
            asks what :func:`qbench.quantize_model` left on the model, else shares what rows have
            in common.
        reference: the same checkpoint in full precision, which ``wikitext2@agreement`` compares
            with.
        **options: fields of :class:`~qbench.evaluation.tasks.EvaluationOptions`.

    Returns:
        A result for each task, by its text form.
    """
    from dataclasses import replace

    chosen = EvaluationOptions(**options)
    batching = batching or batching_of(model)
    results = {}
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if isinstance(task, str):
            spec = replace(TaskSpec.parse(task), limit=limit)
            spec = spec if spec.is_perplexity else replace(spec, num_fewshot=num_fewshot)
        else:
            spec = task
        prepared = prepare_task(spec, tokenizer, context_length(model.config), chosen)
        if prepared.needs_reference and reference is not None:
            prepared = prepared.against(prepared.refer(reference))
        results[str(spec)] = prepared.run(model, progress, batching)
    return results
