"""Figures of everything in a store, in one call: against bits, against model size, the papers' own.

Left out on purpose: choosing colours and sizes; take the Figure that :func:`draw` returns. What a
figure looks like stands in a module of its own, and only that of the wanted kind is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.comparison import reference
from qbench.comparison.entries import Entry
from qbench.comparison.panels import X_AXES
from qbench.comparison.sizes import LOSSES
from qbench.errors import QBenchError, unknown
from qbench.plots.style import check_suffix, save
from qbench.plots.wanted import Wanted
from qbench.study.store import Store
from qbench.tables.table import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (
    *("accuracy-vs-bits", "perplexity-vs-bits", "accuracy-vs-size", "loss-vs-size"),
    *("heatmap", "layer-errors", "bitnet-fig1", "bitnet-fig3", "bitnet-fig6", "b158-fig2"),
    *("b158-fig3", "accuracy-vs-cost", "perplexity-vs-cost", "agreement-vs-bits"),
)
BY_SIZE = KINDS[2:4]
BY_COST = ("accuracy-vs-cost", "perplexity-vs-cost")
_OF_THEIR_OWN = {
    "agreement-vs-bits": ("against_bits", "draw_agreement"),
    "heatmap": ("heatmap", "draw_heatmap"),
    "layer-errors": ("profile", "draw_layer_errors"),
    "bitnet-fig1": ("paper_bits", "draw_bitnet_fig1"),
    "bitnet-fig3": ("paper_sizes", "draw_bitnet_fig3"),
    "bitnet-fig6": ("paper_sizes", "draw_bitnet_fig6"),
    "b158-fig2": ("paper_costs", "draw_b158_fig2"),
    "b158-fig3": ("paper_costs", "draw_b158_fig3"),
    "accuracy-vs-cost": ("against_cost", "draw_against_cost"),
    "perplexity-vs-cost": ("against_cost", "draw_against_cost"),
}
"""Kinds that read the store themselves -> module in this folder, and its function."""


def plot(
    store: Store,
    kind: str | None = None,
    *,
    output: Path | str,
    x: str = "wbits",
    metric: str = "acc",
    against: str | None = None,
    width_in: float | None = None,
    checkpoints: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    num_fewshot: int | None = None,
) -> Path:
    """Draw what is stored and save it; returns the path.

    Args:
        store: where the results are.
        kind: one of ``KINDS``; None takes the first one that shows the metric.
        output: a .png, .svg or .pdf file; its folder is made if need be.
        x: ``wbits`` or ``effective_bits``; against cost ``size`` (for which ``wbits`` stands as
            well), ``energy``, ``energy_int32`` or ``effective_bits`` of the whole model.
        metric: ``acc``, ``acc_norm`` or ``acc_token``; ``perplexity`` takes the kind against bits
            or size that shows it; ``bits_per_byte`` is a loss.
        against: name of a published table whose points are added, hollow or in panels of their
            own; for the kinds against size and the papers' figures.
        width_in: width of the figure in inches; None fits the number of panels.
        checkpoints: filters, this and the next four, as in :func:`qbench.tables.table.table`.
        baselines: methods. Against size, these two choose the quantized rows that join the
            full-precision and trained ones; without them there are none.
        schemes: by label or full text.
        tasks: what is averaged, or drawn.
        num_fewshot: examples in the prompt.

    Raises:
        QBenchError: for an unknown name, an empty store or nothing to draw.
        RunFailed: if the file cannot be written.
    """
    output = Path(output)
    check_suffix(output)
    wanted = Wanted(store, kind or "", metric, against, width_in, checkpoints, baselines, schemes,
                    tasks, num_fewshot)  # fmt: skip
    if kind in _OF_THEIR_OWN:
        save(_draw_its_own(wanted, x), output)
        return output
    kind, metric = _kind_and_metric(kind, metric)
    by_size = kind in BY_SIZE
    asked = wanted.asked() if by_size else None
    entries = wanted.entries(**({"baselines": None, "schemes": None} if by_size else {}))
    figure = draw(
        entries, kind, x=x, metric=metric, against=against, width_in=width_in, asked=asked
    )
    save(figure, output)
    return output


def draw(
    entries: Sequence[Entry],
    kind: str | None = None,
    *,
    x: str = "wbits",
    metric: str = "acc",
    against: str | None = None,
    width_in: float | None = None,
    asked: Collection[str] | None = None,
) -> Figure:
    """The figure of some rows (see :func:`qbench.tables.table.stored_entries`).

    Args:
        entries: the rows; none is fine against size where published ones are added.
        kind: as in :func:`plot`, like the rest.
        x: the axis of bits.
        metric: what is shown.
        against: a published table.
        width_in: inches.
        asked: the runs of quantized rows to draw against size; None draws all of them.

    Raises:
        QBenchError: for an unknown kind, axis or published table, or nothing to draw.
    """
    kind, metric = _kind_and_metric(kind, metric)
    if x not in X_AXES:
        raise unknown("x axis", x, X_AXES)
    if kind not in BY_SIZE:
        from qbench.plots.against_bits import draw_against_bits

        if against is not None:
            raise QBenchError(
                f"{kind} has no published points; --against is for {' and '.join(BY_SIZE)}"
            )
        return draw_against_bits(entries, kind == "accuracy-vs-bits", x, metric, width_in)
    if x != X_AXES[0]:
        raise QBenchError(f"{kind} has sizes on its axis, not {x}; leave --x out")
    from qbench.plots.against_size import draw_against_size

    published = [] if against is None else reference.entries(against, [])
    return draw_against_size(
        [*entries, *published], kind == "accuracy-vs-size", metric, width_in, asked
    )


def _draw_its_own(wanted: Wanted, x: str) -> Figure:
    """A figure of a kind that reads the store itself."""
    module, name = _OF_THEIR_OWN[wanted.kind]
    if wanted.kind in BY_COST:
        wanted = replace(wanted, x="size" if x == X_AXES[0] else x)
    elif x != X_AXES[0]:
        raise QBenchError(f"{wanted.kind} has its own axes; leave --x out")
    figure: Figure = getattr(import_module(f"qbench.plots.{module}"), name)(wanted)
    return figure


def _kind_and_metric(kind: str | None, metric: str) -> tuple[str, str]:
    """The kind that shows a metric, and the metric as that kind takes it."""
    accuracy, perplexity, _, loss_by_size = KINDS[:4]
    if metric not in (*METRICS, *LOSSES):
        raise unknown("metric", metric, (*METRICS, *LOSSES))
    if kind is None:
        kind = loss_by_size if metric == "bits_per_byte" else accuracy
    if kind not in KINDS:
        raise unknown("plot", kind, KINDS)
    if kind in BY_SIZE:
        if metric in LOSSES:
            return loss_by_size, metric
        return kind, LOSSES[0] if kind == loss_by_size else metric
    if metric == "bits_per_byte":
        raise QBenchError(f"{kind} does not show {metric}; take --kind {loss_by_size}")
    return (perplexity, METRICS[0]) if metric in LOSSES else (kind, metric)
