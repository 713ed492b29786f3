"""Plots, checked through the Figure: what is drawn where, and that files are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from study_fixtures import BITNET_TASKS, add, bitnet_store, quantization, task

from qbench.errors import QBenchError, RunFailed
from qbench.plots.plot import draw, plot
from qbench.study.store import Store
from qbench.tables.table import stored_entries


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bitnet_store(tmp_path_factory.mktemp("bitnet"))


def markers(axes: Any) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Positions of the markers by shape and fill; horizontal and joining lines left out."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_marker() not in ("None", "_", None, ""):
            key = (str(line.get_marker()), line.get_fillstyle())
            found.setdefault(key, []).extend(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return found


def level(axes: Any, style: str) -> list[float]:
    """Heights of the horizontal lines of one style."""
    lines = [line for line in axes.lines if line.get_linestyle() == style]
    return [float(line.get_ydata()[0]) for line in lines if len(set(line.get_ydata())) == 1]


def best_line(axes: Any) -> Any:
    (line,) = [line for line in axes.lines if line.get_label() == "_best"]
    return line


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def about(figure: Any) -> str:
    return " ".join(figure.legends[0].get_title().get_text().split())


def test_accuracy_against_bits_is_figure_1_of_the_paper(bitnet: Store) -> None:
    figure = draw(stored_entries(bitnet))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low > 16 > 1 > high  # from many bits to few
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    # random: (50 + 50 + 25 + 50) / 4; full precision: Table 3's row
    assert level(axes, "--") == [pytest.approx(43.75)]
    assert level(axes, ":") == [pytest.approx(57.825)]
    # the best PTQ points of Fig. 1: 56.7, 52.9, 49.0, 44.6
    assert list(best_line(axes).get_ydata()) == pytest.approx([56.725, 52.925, 49.0, 44.55])


def test_every_ptq_point_is_drawn_once_and_fills_tell_activation_widths(bitnet: Store) -> None:
    (axes,) = draw(stored_entries(bitnet)).axes
    found = markers(axes)
    counts = {key: len(points) for key, points in found.items()}
    assert counts == {
        **{("o", "left"): 2, ("o", "bottom"): 1},  # absmax W8A8 and W1A8, W4A4
        **{("s", "full"): 2, ("D", "full"): 1},  # gptq W4A16 and W2A16, quip W2A16
        **{("^", "left"): 2, ("^", "bottom"): 1},  # smoothquant
        **{("*", "full"): 1, ("o", "full"): 1},  # BitNet, and full precision
    }
    assert found["*", "full"] == [(1, pytest.approx(55.875))]
    hollow = [line for line in axes.lines if line.get_marker() == "s"]
    assert {line.get_markerfacecolor() for line in hollow} == {"white"}


def test_methods_stand_apart_but_nearer_to_their_width_than_to_the_next(store: Store) -> None:
    for name in "abcdefgh":
        for bits in (5, 4):
            add(store, quantization(baseline=name, scheme=f"W{bits}A16"), {"piqa": 0.6})
    add(store, quantization(baseline="alone", scheme="W2A16"), {"piqa": 0.5})
    (axes,) = draw(stored_entries(store)).axes
    across = sorted(x for points in markers(axes).values() for x, _ in points)
    assert across[0] == 2 and len(set(across)) == 17
    assert all(abs(math.log2(x / 4)) < abs(math.log2(x / 5)) for x in across[1:9])
    assert all(abs(math.log2(x / 5)) < abs(math.log2(x / 4)) for x in across[9:])


def test_methods_differ_in_shape_and_in_colour(bitnet: Store) -> None:
    figure = draw(stored_entries(bitnet))
    handles = figure.legends[0].legend_handles[:4]
    assert legend(figure)[:4] == ["absmax", "gptq", "quip", "smoothquant"]
    assert len({h.get_marker() for h in handles}) == len({h.get_color() for h in handles}) == 4
    assert {"trained: BitNet-6.7B", "random guessing", "best PTQ per width"} <= set(legend(figure))


def test_error_bars_are_the_standard_error_of_the_mean(store: Store) -> None:
    scores = {"piqa": 0.7, "boolq": 0.6}
    add(store, quantization(), scores)
    (axes,) = draw(stored_entries(store)).axes
    caps = sorted(float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "_")
    # each task has 1000 items: sqrt(p(1-p)/1000), the mean of two has half their hypotenuse
    error = 100 * math.sqrt(0.7 * 0.3 / 1000 + 0.6 * 0.4 / 1000) / 2
    assert caps == pytest.approx([65 - error, 65 + error])


def test_points_without_a_finite_perplexity_stand_at_the_top_with_a_label(bitnet: Store) -> None:
    (axes,) = draw(stored_entries(bitnet), "perplexity-vs-bits").axes
    assert axes.get_yscale() == "log"
    texts = {text.get_text() for text in axes.texts}
    assert {"inf", "NaN", "diverged"} <= texts
    across = axes.get_xaxis_transform()
    lost = [
        line for line in axes.lines if line.get_transform() == across and line.get_marker() in "o^"
    ]
    assert len(lost) == 2 and all(0.8 < line.get_ydata()[0] < 1 for line in lost)
    (band,) = axes.patches
    finite = [y for points in markers(axes).values() for _, y in points if y > 2]
    assert len(finite) == 9
    _, top = axes.transAxes.inverted().transform(axes.transData.transform((1, max(finite))))
    assert top < band.get_y()  # no finite point is hidden in the band


def test_the_best_line_skips_widths_where_everything_diverged(bitnet: Store) -> None:
    (axes,) = draw(stored_entries(bitnet), "perplexity-vs-bits").axes
    assert list(best_line(axes).get_ydata()) == [15.67, 16.05, 70.43]


def test_effective_bits_put_points_where_they_are_stored(bitnet: Store) -> None:
    (axes,) = draw(stored_entries(bitnet), x="effective_bits").axes
    assert [x for x, _ in markers(axes)["D", "full"]] == [2.02]
    assert list(best_line(axes).get_xdata()) == [8.02, 4.02, 2.02, 1.02]


def test_a_run_without_effective_bits_is_told_not_dropped_in_silence(bitnet: Store) -> None:
    figure = draw(stored_entries(bitnet), x="effective_bits")
    assert "not shown, as effective bits are unknown: BitNet-6.7B" in about(figure)


def test_each_checkpoint_has_its_panel_and_a_trained_model_joins_the_nearest_in_size(
    store: Store,
) -> None:
    sizes = {"small": 125_000_000, "medium": 1_300_000_000, "large": 6_700_000_000}
    for name in ("large", "small", "medium"):
        add(store, quantization(name, parameters=sizes[name]), {"piqa": 0.7})
        add(store, quantization(name, "rtn", "W4A16", parameters=sizes[name]), {"piqa": 0.6})
    trained = quantization("b158", scheme="W1.58A8", trained=True, parameters=3_000_000_000)
    add(store, trained, {"piqa": 0.65})
    axes = draw(stored_entries(store)).axes
    assert [a.get_title() for a in axes] == ["small", "medium", "large"]
    # 3B is 2.2 times from 6.7B and 2.3 times from 1.3B
    assert [("(4, 1, 0)", "full") in markers(a) for a in axes] == [False, False, True]
    assert {a.get_xlim() for a in axes} == {axes[0].get_xlim()}


def test_a_run_that_lacks_a_task_is_named_instead_of_averaged(store: Store) -> None:
    add(store, quantization(), dict.fromkeys(BITNET_TASKS, 0.6))
    add(store, quantization(baseline="a", scheme="W4A16"), dict.fromkeys(BITNET_TASKS, 0.5))
    add(
        store, quantization(baseline="b", scheme="W4A16"), {"hellaswag": 0.9, "lambada_openai": 0.5}
    )
    figure = draw(stored_entries(store))
    assert "not shown, as a task is missing: b W4A16" in about(figure)
    assert "not part of the mean, as few runs have it: lambada_openai" in about(figure)
    assert level(figure.axes[0], "--") == [pytest.approx(43.75)]


def test_a_point_measured_differently_is_named_and_not_on_the_best_line(store: Store) -> None:
    add(store, quantization(), {"piqa": 0.7})
    for scheme, score in (("W4A16", 0.6), ("W2A16", 0.55)):
        add(store, quantization(baseline="a", scheme=scheme), {"piqa": score})
    add(store, quantization(baseline="b", scheme="W4A16"), {"piqa": 0.9}, limit=10)
    figure = draw(stored_entries(store))
    assert "measured differently (limit=10): b W4A16" in about(figure)
    assert list(best_line(figure.axes[0]).get_ydata()) == pytest.approx([60, 55])


def test_a_limit_that_all_points_share_is_told(store: Store) -> None:
    model = add(store, quantization(), {"piqa": 0.7, "boolq": 0.6}, limit=100)
    assert "Mean of boolq, piqa (0-shot, acc, limit=100)" in about(draw(stored_entries(store)))
    add(store, model, {"hellaswag": 0.5})
    told = about(draw(stored_entries(store)))
    assert "(0-shot, acc);" in told and "limit=100: boolq, piqa" in told
    text = task(model, "c4", {"perplexity": 9.0}, protocol="gptq-2048", limit=56)
    store.save_task("opt-6.7b", model.key, text)
    assert about(draw(stored_entries(store), "perplexity-vs-bits")) == "limit=56: c4 gptq-2048"


def test_a_run_with_per_layer_overrides_is_pale_named_and_not_on_the_best_line(
    store: Store,
) -> None:
    for scheme, score in (("W4A16", 0.6), ("W2A16", 0.55), ("W2A16;*.fc1=W8A16", 0.65)):
        add(store, quantization(baseline="a", scheme=scheme), {"piqa": score})
    figure = draw(stored_entries(store))
    assert "pale, with per-layer overrides, not on the best line: a W2A16;*.fc1=W8A16" in (
        about(figure)
    )
    assert list(best_line(figure.axes[0]).get_ydata()) == pytest.approx([60, 55])
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    pale = {float(line.get_ydata()[0]) for line in lines if line.get_alpha() is not None}
    assert len(lines) == 3 and pale == {65}


def test_a_task_of_unknown_chance_draws_no_chance_line(store: Store) -> None:
    add(store, quantization(), {"piqa": 0.7, "my_own_task": 0.4})
    figure = draw(stored_entries(store))
    assert level(figure.axes[0], "--") == [] and "random guessing" not in legend(figure)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_each_format_is_written_and_twice_the_same(
    bitnet: Store, tmp_path: Path, suffix: str, start: bytes
) -> None:
    paths = [plot(bitnet, output=tmp_path / "new" / f"{name}{suffix}") for name in "ab"]
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(start) and first == second
    if suffix == ".pdf":
        assert b"/FontFile2" in first and b"/Type3" not in first  # embedded TrueType
    if suffix == ".png":
        width = int.from_bytes(first[16:20], "big")
        assert width >= 200 * 5  # at least 200 dots per inch


def test_the_legend_lies_inside_the_figure(bitnet: Store) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for kind in ("accuracy-vs-bits", "perplexity-vs-bits"):
        figure = draw(stored_entries(bitnet), kind, width_in=4.0)
        FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
        (axes,) = figure.axes
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 <= axes.get_tightbbox().y0 + 1
        assert axes.get_window_extent().height > 100


def test_drawing_changes_no_global_setting(bitnet: Store, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot(bitnet, output=tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"output": "a.jpg"}, r"must end in \.png, \.svg or \.pdf"),
        ({"output": "a.png", "kind": "accuracy"}, "did you mean.* .accuracy-vs-bits."),
        ({"output": "a.png", "x": "bits"}, "did you mean 'wbits'"),
        (
            {"output": "a.png", "metric": "foo"},
            "known: acc, acc_norm, acc_token, bits_per_byte, perplexity",
        ),
    ],
)
def test_wrong_usage_names_what_is_possible(
    bitnet: Store, given: dict[str, str], said: str
) -> None:
    with pytest.raises(QBenchError, match=said):
        plot(bitnet, **given)  # type: ignore[arg-type]


def test_nothing_to_draw_is_an_error_that_says_why(store: Store, tmp_path: Path) -> None:
    add(store, quantization(), {"piqa": 0.7})
    with pytest.raises(QBenchError, match="no run has perplexities"):
        plot(store, "perplexity-vs-bits", output=tmp_path / "a.png")


def test_a_file_that_cannot_be_written_is_one_clear_error(bitnet: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(RunFailed, match="name another file"):
        plot(bitnet, output=tmp_path / "folder" / "a.png")
