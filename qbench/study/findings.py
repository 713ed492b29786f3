"""What the doctor finds: one thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "absent", "PROBLEM"]
"""``note``: worth knowing; ``absent``: matters only to those who want it; ``PROBLEM``: a run would
fail."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    group: str
    what: str
    found: str
    state: State = "ok"

    @property
    def is_problem(self) -> bool:
        """Whether a run would fail because of it."""
        return self.state == "PROBLEM"

    def __str__(self) -> str:
        return f"  {self.state:8} {self.what}: {self.found}"


def report(findings: list[Finding]) -> list[str]:
    """The findings under the headings of their groups, and what they come to."""
    lines: list[str] = []
    for group in dict.fromkeys(finding.group for finding in findings):
        lines += ["", group, *(str(f) for f in findings if f.group == group)]
    problems = [finding.what for finding in findings if finding.is_problem]
    if not problems:
        verdict = "Nothing is in the way of a run."
    else:
        counted = f"{len(problems)} problem{'s' if problems[1:] else ''}"
        verdict = f"{counted} a run would fail of: {', '.join(problems)}"
    return [*lines[1:], "", verdict]
