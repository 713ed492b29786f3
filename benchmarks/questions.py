"""The eight task sets: seeded samples of the user's data, and lm-eval tasks that read them.

Both sides ask the same questions in the same words: the definitions are those pinned in tasks/,
the rows come from the same files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

TASK_SPLITS = {
    "hellaswag": "validation",
    "arc_easy": "test",
    "arc_challenge": "test",
    "piqa": "validation",
    "winogrande": "validation",
    "wsc273": "test",
    "boolq": "validation",
    "openbookqa": "test",
}


def task_files(tasks: Iterable[str]) -> list[str]:
    """The files of a data folder that hold the tasks."""
    return [f"tasks/{task}/{TASK_SPLITS[task]}.jsonl" for task in tasks]


def sample(data: Path, folder: Path, tasks: Iterable[str], items: int, seed: int = 0) -> Path:
    """A data folder with ``items`` seeded rows of each task, in their own order (all if fewer)."""
    for name in task_files(tasks):
        lines = [x for x in (data / name).read_text(encoding="utf-8").split("\n") if x.strip()]
        chosen = random.Random(seed).sample(range(len(lines)), min(items, len(lines)))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines[i] for i in sorted(chosen)) + "\n", encoding="utf-8")
    return folder


def lm_eval_definitions(data: Path, folder: Path, tasks: Iterable[str]) -> Path:
    """YAML files for lm-eval's ``TaskManager``: the pinned tasks on local rows."""
    from qbench.evaluation.definitions import pinned_tasks

    folder.mkdir(parents=True, exist_ok=True)
    pinned = pinned_tasks()
    for task in tasks:
        split = existing_split(data, task)
        fields = {
            "include": str(pinned[task]),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data / f"tasks/{task}/{split}.jsonl")}},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{split}_split": split,
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
        (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def existing_split(data: Path, task: str) -> str:
    """The split a task is measured on: its test split if the folder has that, else validation."""
    splits = ("test", "validation")
    return next(s for s in splits if (data / f"tasks/{task}/{s}.jsonl").is_file())


def trie_size(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens left when every shared prefix is counted once: the nodes of a trie."""
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = 0
        for token in sequence:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def token_counts(
    encoded: Sequence[tuple[Sequence[int], Sequence[int]]],
    sizes: Sequence[int],
    max_length: int,
) -> dict[str, int]:
    """Tokens that each way of scoring runs through the model.

    Args:
        encoded: context and continuation of every request, in order.
        sizes: requests of each question.
        max_length: longest input.

    Returns:
        ``hflm``: every request's input once, those that only differ in their last token together
        (its logits cache), padding aside; ``questions``: a trie for each question; ``task``: one
        trie for all.
    """
    inputs = [tuple([*c, *t][-(max_length + 1) :][:-1]) for c, t in encoded]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    own = (inputs[start : start + size] for start, size in zip(starts, sizes, strict=True))
    return {
        "hflm": sum(len(x) for x in set(inputs)),
        "questions": sum(trie_size(part) for part in own),
        "task": trie_size(inputs),
    }
