"""The one exception a user is meant to read: what was given, what the limit is, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QBenchError(Exception):
    """A problem the user can mend. The command line prints it as one line, without a traceback.

    ``exit_code`` is 2 for wrong usage (the default) and 1 for a run that failed.
    """

    exit_code = 2


class RunFailed(QBenchError):
    """A measurement that could not be finished (exit code 1)."""

    exit_code = 1


def unknown(kind: str, value: str, known: Iterable[str]) -> QBenchError:
    """An error for a name nobody knows, with the nearest known names.

    Args:
        kind: what the name was meant to be ("baseline", "grid", "task", ...).
        value: the name as given.
        known: every valid name.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    known_names = f"known: {', '.join(names)}" if names else "there is none"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else known_names
    return QBenchError(f"unknown {kind} {value!r}; {hint}")
