"""Task definitions as data: reading lm-eval's YAML, and the rows a definition asks for.

lm-eval-free, so that tasks can be listed in a moment. What a definition means is lm-eval's business
(:mod:`qbench.evaluation.zeroshot`); here only includes are merged and functions left as names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qbench.errors import QBenchError
from qbench.evaluation.data import HubSource, Original, Rows, load_rows


@cache
def pinned_tasks() -> Mapping[str, Path]:
    """Name -> YAML file of every task definition that comes with qbench, read once."""
    folder = Path(str(resources.files("qbench_tasks")))
    found = {}
    for path in sorted(folder.glob("*/*.yaml")):
        found[str(read_definition(path)["task"])] = path
    return found


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads ``!function module.name`` as that text, importing nothing."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def read_definition(path: Path) -> Mapping[str, Any]:
    """A task's YAML with its includes merged in, functions left as their names."""
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (OSError, yaml.YAMLError) as error:
        raise QBenchError(f"cannot read the task definition {path}: {error}") from None
    if not isinstance(own, dict):
        raise QBenchError(f"{path} is not a task definition: it holds no mapping")
    includes = own.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged |= read_definition(path.parent / include)
    return merged | own


def load_splits(
    definition: Mapping[str, Any], num_fewshot: int, data_dir: Path | None, hub: bool = True
) -> dict[str, Rows]:
    """The rows of the splits in use: the one measured on, then the one examples come from.

    Without ``hub`` only the data folder is looked at.
    """
    splits = task_splits(definition, num_fewshot)
    data = {split: _rows(definition, split, data_dir, hub) for split in splits if split}
    _enough_examples(str(definition["task"]), num_fewshot, splits, data)
    return data


def task_splits(definition: Mapping[str, Any], num_fewshot: int) -> tuple[str, str | None]:
    """The split to measure on, and the one few-shot examples come from (None without them)."""
    test, validation = definition.get("test_split"), definition.get("validation_split")
    evaluated = test or validation
    if evaluated is None:
        raise QBenchError(f"{definition['task']} names neither a test nor a validation split")
    config = definition.get("fewshot_config") or {}
    if not num_fewshot or "samples" in config:
        return evaluated, None
    named = config.get("split") or definition.get("fewshot_split")
    return evaluated, named or definition.get("training_split") or validation or evaluated


def _enough_examples(
    name: str, num_fewshot: int, splits: tuple[str, str | None], data: dict[str, Rows]
) -> None:
    examples = splits[1]
    if examples is None:
        return
    have = len(data[examples].rows)
    if have <= num_fewshot:  # lm-eval draws one more, to be able to leave the question itself out
        raise QBenchError(
            f"{name} asks for {num_fewshot} few-shot examples, its {examples} split has {have} "
            f"rows; ask for at most {have - 1}"
        )


def _rows(
    definition: Mapping[str, Any], split: str, data_dir: Path | None, online: bool = True
) -> Rows:
    metadata = definition.get("metadata") or {}
    original = metadata.get("original") or {}
    arguments = definition.get("dataset_kwargs") or {}
    hub = HubSource(
        definition["dataset_path"],
        definition.get("dataset_name"),
        {k: v for k, v in arguments.items() if k != "trust_remote_code"},  # refused by datasets 4
    )
    rows = load_rows(
        metadata.get("data", definition["task"]),
        split,
        data_dir,
        hub if online else None,
        Original(original[split], original["reader"]) if split in original else None,
    )
    most = metadata.get("rows")
    return rows if most is None else Rows(_first(rows.rows, most), rows.source)


def _first(rows: Sequence[Any], n: int) -> Sequence[Any]:
    return rows.select(range(min(n, len(rows)))) if hasattr(rows, "select") else rows[:n]
