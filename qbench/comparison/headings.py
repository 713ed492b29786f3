"""What the papers call the tasks, and what guessing scores on them.

A task that is not listed keeps its own name and has no chance level, unless its record brings one
(``details["chance"]``).
"""

from __future__ import annotations

MISSING = "–"
"""What stands where there is no number."""

_KNOWN = {  # how a task's name begins -> (column heading of the papers, share right by guessing)
    "wsc": ("WG", 0.5),
    "winograd_": ("WG", 0.5),
    "winogrande": ("WGe", 0.5),
    "hellaswag": ("HS", 0.25),
    "storycloze": ("SC", 0.5),
    "arc_easy": ("ARCe", 0.25),
    "arc_challenge": ("ARCc", 0.25),
    "boolq": ("BQ", 0.5),
    "openbookqa": ("OQ", 0.25),
    "piqa": ("PQ", 0.5),
    "lambada": ("LA", 0.0),
}


def short_name(task: str) -> str:
    """The papers' heading of a task ("HS"), or the task's own name."""
    return next((known[0] for start, known in _KNOWN.items() if task.startswith(start)), task)


def chance_level(task: str) -> float | None:
    """The share of right answers by guessing on a task, or on the papers' heading of one.

    None where it is not known.
    """
    heading = short_name(task)
    return next((chance for name, chance in _KNOWN.values() if name == heading), None)


def task_order(task: str) -> tuple[int, str]:
    """Sort key: the papers' tasks in the papers' order, then the others by name."""
    starts = list(_KNOWN)
    rank = next((i for i, start in enumerate(starts) if task.startswith(start)), len(starts))
    return rank, task


def size_text(parameters: int | None) -> str:
    """125M, 1.3B, 0.51M, 2.1K."""
    if parameters is None:
        return MISSING
    for unit, name, least in ((1e9, "B", 1), (1e6, "M", 0.1), (1e3, "K", 1)):
        scaled = parameters / unit
        if round(scaled, 3) >= least:
            digits = 2 if scaled < 1 else 1 if scaled < 100 else 0
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").removesuffix(".") if digits else text) + name
    return str(parameters)
