"""Figures against cost, and the Pareto front they draw."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from study_fixtures import add, quantization

from qbench.comparison.cost_points import X_COSTS, cost_panels, front
from qbench.comparison.panels import Point
from qbench.errors import QBenchError
from qbench.plots import against_cost
from qbench.plots import plot as plots
from qbench.plots.against_cost import draw_against_cost
from qbench.plots.wanted import Wanted
from qbench.record import Dimensions, LayerReport, MatrixShape, QuantizationRecord
from qbench.study.store import Store
from qbench.tables.table import stored_entries

TASKS = ("piqa", "hellaswag")


def point(x: float, y: float, **changes) -> Point:
    known = dict(stderr=None, role="ptq", series="m", wbits=4, abits=16, name=f"{x:g}|{y:g}")
    return Point(x=x, y=y, **(known | changes))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_a_comparison_of_every_pair_leaves(lower, seed):
    draw = random.Random(seed)
    points = [point(draw.randint(1, 9), draw.randint(1, 9) / 10) for _ in range(12)]
    sign = 1 if lower else -1

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.x <= b.x and sign * a.y <= sign * b.y
        return no_worse and (a.x < b.x or sign * a.y < sign * b.y)

    left = {
        (b.x, b.y)
        for b in points
        if not any(beats(a, b) for a in points if (a.x, a.y) != (b.x, b.y))
    }
    found = front(points, lower)
    assert {(p.x, p.y) for p in found} == left and len(found) == len(left)
    assert all(a.x < b.x for a, b in itertools.pairwise(found))


def test_what_was_measured_differently_or_diverged_is_not_on_the_front():
    points = [point(1, 0.9, comparable=False), point(2, 0.5), point(3, math.nan)]
    assert [p.x for p in front(points, lower=False)] == [2]


def model(name: str, baseline: str, scheme: str, width: int = 8, **fields) -> QuantizationRecord:
    """A model of one block with four square matrices, stored at the scheme's plain width."""
    size = 4 * width * width
    record = quantization(name, baseline, scheme, parameters=size + 100, **fields)
    bits = float(scheme[1 : scheme.index("A")])
    layers = [
        LayerReport(
            name=f"block.{i}", shape=(width, width), scheme=scheme, relative_error=0.1,
            stored_bits=bits * width * width,
        )
        for i in range(4)
    ]  # fmt: skip
    dimensions = Dimensions(
        hidden_size=width, intermediate_size=width, n_blocks=1, n_heads=1, n_kv_heads=1,
        head_dim=width, vocabulary=10, tied_embeddings=True, embedding_parameters=100,
        head_parameters=0,
        matrices=[MatrixShape(out_features=width, in_features=width, count=4, active=4)],
    )  # fmt: skip
    record.layers = [] if bits == 16 else layers
    record.dimensions = fields.get("dimensions", dimensions)
    return record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two sizes: the large one at four bits is better and smaller than the small one whole."""
    store = Store(tmp_path / "runs")
    rows = [
        ("small", "none", "W16A16", 8, 0.60, 20.0),
        ("small", "rtn", "W8A8", 8, 0.59, 21.0),
        ("large", "none", "W16A16", 16, 0.80, 10.0),
        ("large", "rtn", "W4A16", 16, 0.78, 11.0),
        ("large", "rtn", "W2A16", 16, 0.30, math.inf),
    ]
    for name, baseline, scheme, width, accuracy, perplexity in rows:
        record = model(name, baseline, scheme, width)
        add(store, record, dict.fromkeys(TASKS, accuracy), {"text@documents-512": perplexity})
    return store


def draw(store: Store, kind: str = "accuracy-vs-cost", x: str = "size", **changes):
    return draw_against_cost(Wanted(store, kind, x=x, **changes))


def about(figure) -> str:
    return " ".join(figure.legends[0].get_title().get_text().split())


def steps(axes) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_label() == "_front"]
    assert line.get_drawstyle() == "steps-post"
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_points_stand_at_the_bytes_of_the_whole_model_and_the_front_joins_the_best(store):
    (axes,) = draw(store).axes
    weights = {8: 4 * 64, 16: 4 * 256}
    size = {
        ("small", 8): (8 * weights[8] + 1600) / 8,
        ("large", 2): (2 * weights[16] + 1600) / 8,
        ("large", 4): (4 * weights[16] + 1600) / 8,
        ("large", 16): 2 * (weights[16] + 100),
    }
    # the small one whole takes as much as the large one at four bits, and knows less
    assert size["large", 4] == 712 and 2 * (weights[8] + 100) == 712
    assert steps(axes) == [
        (456, pytest.approx(59)),
        (712, pytest.approx(78)),
        (size["large", 16], pytest.approx(80)),
    ]
    assert size["small", 8] == size["large", 2] == 456


def test_a_weight_only_row_costs_the_energy_of_full_precision(store):
    panels = cost_panels(stored_entries(store), "energy", accuracy=True)
    energy = {p.name: p.x for p in panels[0].points}
    assert energy["1.1K rtn W4A16"] == energy["1.1K full precision"] > energy["356 full precision"]
    assert energy["356 rtn W8A8"] < energy["356 full precision"]
    wide = cost_panels(stored_entries(store), "energy_int32", accuracy=True)[0].points
    assert {p.name: p.x for p in wide}["356 rtn W8A8"] > energy["356 rtn W8A8"]


def test_effective_bits_are_those_of_the_whole_model(store):
    (panel,) = cost_panels(stored_entries(store), "effective_bits", accuracy=True)
    bits = {p.name: p.x for p in panel.points}
    assert bits["1.1K rtn W4A16"] == pytest.approx((4 * 1024 + 1600) / 1124)
    assert bits["1.1K full precision"] == 16


def test_a_perplexity_that_diverged_is_told_and_not_drawn(store):
    figure = draw(store, "perplexity-vs-cost", metric="perplexity")
    (axes,) = figure.axes
    assert "text, documents-512" in axes.get_title() and axes.get_yscale() == "log"
    assert "not shown, as it diverged: large rtn W2A16" in about(figure)
    assert [y for _, y in steps(axes)] == [21, 11, 10]


def test_perplexities_far_above_the_rest_are_told_and_leave_the_axis_to_the_others(store):
    add(store, model("large", "rtn", "W3A16", 16), None, {"text@documents-512": 101.0})
    figure = draw(store, "perplexity-vs-cost", metric="perplexity")
    assert "not shown, over 10 times the lowest: large rtn W3A16" in about(figure)
    assert figure.axes[0].get_ylim()[1] < 40


def test_points_of_one_model_are_named_without_it_and_those_of_equal_sizes_by_name(store):
    (one,) = cost_panels(stored_entries(store, checkpoints=["large"]), "size", accuracy=True)
    assert {p.name for p in one.points} == {"full precision", "rtn W4A16", "rtn W2A16"}
    add(store, model("twin", "none", "W16A16", 16), dict.fromkeys(TASKS, 0.7))
    (several,) = cost_panels(stored_entries(store), "size", accuracy=True)
    assert {"twin full precision", "large rtn W4A16"} <= {p.name for p in several.points}


def test_names_of_the_front_cover_neither_points_nor_each_other(store):
    figure = draw(store)
    (axes,) = figure.axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in texts} <= {
        "356 rtn W8A8",
        "1.1K rtn W4A16",
        "1.1K full precision",
    }
    assert len(texts) >= 2
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for at in axes.transData.transform(steps(axes)):
        assert not any(box.contains(*at) for box in boxes)


@pytest.mark.parametrize(("lower", "named"), [(0.76, False), (0.40, True)])
def test_a_name_does_not_stand_beside_another_point(lower, named, tmp_path, monkeypatch):
    """Left below a point is where a name of the point under it would stand."""
    store = Store(tmp_path / "runs")
    for scheme, accuracy in (("W4A16", 0.80), ("W2A16", lower), ("W1.58A8", 0.20)):
        add(store, model("large", "rtn", scheme, 16), dict.fromkeys(TASKS, accuracy))
    monkeypatch.setattr(against_cost, "_AROUND", ((-6, -7, "right", "top"),))
    (axes,) = draw(store, x="energy").axes
    assert ("W4A16" in " ".join(text.get_text() for text in axes.texts)) is named


def test_the_name_of_an_axis_fits_a_column(store):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(store, x="energy_int32", width_in=3.25)
    FigureCanvasAgg(figure).draw()
    box = figure.axes[0].xaxis.label.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_energy_is_labelled_arithmetic_only(store):
    figure = draw(store, x="energy")
    assert "arithmetic only" in " ".join(figure.axes[0].get_xlabel().split())
    assert "arithmetic only" in about(figure) and "weight-only schemes compute in FP16" in about(
        figure
    )


def test_larger_checkpoints_have_larger_markers_and_the_caption_says_so(store):
    figure = draw(store)
    sizes = {
        line.get_markersize()
        for line in figure.axes[0].lines
        if line.get_marker() == "o" and line.get_markerfacecolor() == "#000000"
    }
    assert sizes == {5.0, 9.0}
    assert "Larger markers: larger checkpoints, 356 to 1.1K parameters" in about(figure)


def test_a_run_from_before_dimensions_is_told_where_energy_is_asked(store):
    record = model("old", "rtn", "W4A16")
    record.dimensions = None
    add(store, record, dict.fromkeys(TASKS, 0.5))
    assert "gives no energy: old rtn W4A16" in about(draw(store, x="energy"))
    assert "old" not in about(draw(store, x="size"))


def test_costs_that_span_decades_stand_on_a_logarithmic_axis(store):
    assert draw(store).axes[0].get_xscale() == "linear"  # 456 to 2248 bytes
    add(store, model("huge", "none", "W16A16", 64), dict.fromkeys(TASKS, 0.9))
    assert draw(store).axes[0].get_xscale() == "log"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": "latency"}, "unknown x axis 'latency'"),
        ({"against": "bitnet-table3"}, "no published points"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
        ({"checkpoints": ["nobody"]}, "nobody"),
    ],
)
def test_what_cannot_be_drawn_is_refused(store, changes, message):
    with pytest.raises(QBenchError, match=message):
        draw(store, **changes)


def test_the_command_draws_it_and_without_an_axis_takes_the_size(store, tmp_path):
    path = plots.plot(store, "accuracy-vs-cost", output=tmp_path / "a.png")
    again = plots.plot(store, "accuracy-vs-cost", x="size", output=tmp_path / "b.png")
    assert path.read_bytes() == again.read_bytes()
    for x in X_COSTS:
        assert plots.plot(store, "perplexity-vs-cost", x=x, output=tmp_path / f"{x}.svg").is_file()
