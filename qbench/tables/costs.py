"""What ``qbench costs`` prints: a model's costs, or published costs beside computed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qbench.errors import QBenchError, unknown
from qbench.tables import render
from qbench.tables.model_costs import Use, find_model, model_sheet
from qbench.tables.published_costs import published_sheet

_FORMATS = {"md": render.markdown, "latex": render.latex, "html": render.html_page}


def costs(
    model: str | None,
    schemes: Sequence[str] = (),
    *,
    seqlen: int | None = None,
    batch: int = 1,
    against: str | None = None,
    results: Path | str = "results/runs",
    format: str = "terminal",
    width: int = 100,
) -> str:
    """The costs of a model, or a published table of costs beside computed numbers.

    Args:
        model: a shape's name, a stored run, a checkpoint; None with ``against``.
        schemes: to be compared with full precision; none takes that of the run or the training.
        seqlen: tokens of a sequence, 512 unless given; with ``against`` a table of memory, tokens
            in the cache, 2048 unless given.
        batch: sequences.
        against: name of a published table.
        results: the store that runs are looked up in.
        format: ``terminal``, ``md``, ``latex`` or ``html``.
        width: characters in a line, for the terminal.

    Raises:
        QBenchError: for both or neither of model and table, an unknown name, a scheme that cannot
            be read.
    """
    if format != "terminal" and format not in _FORMATS:
        raise unknown("format", format, ["terminal", *_FORMATS])
    if (model is None) == (against is None):
        raise QBenchError(
            "name one of both: a model (a run, a checkpoint, or a shape such as bitnet-6.7B), or "
            "--against a published table such as bitnet-table1"
        )
    if against is not None:
        if schemes or batch != 1:
            raise QBenchError("a published table has its own schemes and batch; leave them out")
        sheet = published_sheet(against, seqlen)
    else:
        use = Use(512 if seqlen is None else seqlen, batch)
        sheet = model_sheet(find_model(str(model), Path(results)), schemes, use)
    return render.terminal(sheet, width) if format == "terminal" else _FORMATS[format](sheet)
