"""The baselines that a plain installation can run; optional extras have tests of their own."""

from __future__ import annotations

from qbench.registry import baseline_entry_points

OPTIONAL = {"auto-gptq"}


def built_in() -> list[str]:
    """Names of the registered baselines without those of optional extras."""
    return sorted(set(baseline_entry_points()) - OPTIONAL)
