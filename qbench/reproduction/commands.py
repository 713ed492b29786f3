"""What ``qbench reproduce`` does; returns the exit code.

The outcome lies at ``<results>/reproductions/<preset>.json``: see
:mod:`qbench.reproduction.outcome`, whose ``stored`` reads them all without torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

from qbench.errors import QBenchError
from qbench.progress import Reporter
from qbench.reproduction import presets, printing
from qbench.reproduction.running import Reproduction, Request


def reproduce(
    name: str,
    request: Request,
    checkpoints: Sequence[str] = (),
    form: str = "terminal",
    dry_run: bool = False,
) -> int:
    """Run a preset, or say what it would take; 1 if a run failed."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    printing.check_format(form)
    width = shutil.get_terminal_size((120, 24)).columns
    preset = presets.find(name)
    if preset.family.weights == "unreleased":
        from qbench.reproduction import unreleased

        return unreleased.reproduce(preset, request, checkpoints, form, dry_run, width)
    if len(checkpoints) > 1:
        raise QBenchError(f"{name} is about one checkpoint; give --checkpoint once")
    request = replace(request, checkpoint=checkpoints[0] if checkpoints else None)
    if dry_run:
        from qbench.reproduction.planning import reproduction_lines

        print("\n".join(reproduction_lines(preset, request)))
        return 0
    outcome = Reproduction.of(preset, request).run(Reporter())
    print(printing.render(outcome, form, width), end="")
    failed = any(n.verdict.startswith("failed") for row in outcome.rows for n in row.numbers)
    return 1 if failed else 0
