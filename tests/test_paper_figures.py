"""The papers' own figures, read from the drawn artists; expected numbers are the papers'."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.text import Text
from PIL import Image
from study_fixtures import BITNET_TASKS, add, bitnet_store, quantization, task

from qbench.comparison import reference, shapes
from qbench.comparison.layer_errors import place
from qbench.errors import QBenchError
from qbench.plots import style
from qbench.plots.heatmap import cell_text, contrast_with_black
from qbench.plots.plot import KINDS, plot
from qbench.plots.style import inches
from qbench.record import CalibrationSpec, LayerReport
from qbench.study.store import Store

SIZES = {"125M": 125_000_000, "350M": 350_000_000}
PUBLISHED = {
    "bitnet-fig1": "bitnet-fig1",
    "bitnet-fig3": "bitnet-scaling",
    "bitnet-fig6": "bitnet-fig6",
    "b158-fig2": "b158-fig2",
    "b158-fig3": "b158-fig3",
}


def layers(size: str, scheme: str, error: float) -> list[LayerReport]:
    """The matrices of one of BitNet's shapes, block by block; the error grows with the block."""
    dimensions = shapes.shape(f"bitnet-{size}")
    hidden = dimensions.hidden_size
    kinds = {f"attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    kinds |= {"mlp.up": (4 * hidden, hidden), "mlp.down": (hidden, 4 * hidden)}
    return [
        LayerReport(
            name=f"model.layers.{block}.{kind}",
            shape=shape,
            scheme=scheme,
            relative_error=error * (1 + block),
            proxy_loss=0.1 * error if error < 0.03 else None,
            stored_bits=shape[0] * shape[1],
        )
        for block in range(dimensions.n_blocks)
        for kind, shape in kinds.items()
    ]


def fill(store: Store) -> Store:
    """Twins of two of BitNet's sizes; gptq with two seeds, zero-shot and four-shot."""
    for step, (size, parameters) in enumerate(SIZES.items()):
        known: dict[str, Any] = {
            "parameters": parameters,
            "dimensions": shapes.shape(f"bitnet-{size}"),
        }
        rows: list[tuple[float, Any]] = [(0.60, quantization(f"fp-{size}", **known))]
        for seed in (0, 1):
            text = CalibrationSpec(source="c4", nsamples=8, seqlen=64, seed=seed)
            scheme = "W2A16:w=channel,grid=asym"
            own = known | {"layers": layers(size, scheme, 0.02 + 0.01 * seed)}
            record = quantization(f"fp-{size}", "gptq", scheme, calibration=text, seed=seed, **own)
            rows.append((0.40 + 0.02 * seed, record))
        scheme = "W4A4:grid=restricted,agrid=restricted"
        own = known | {"layers": layers(size, scheme, 0.05)}
        rows.append((0.45, quantization(f"fp-{size}", "absmax", scheme, **own)))
        scheme = "W2A16:w=channel,grid=restricted"
        own = known | {"layers": layers(size, scheme, 0.06)}
        rows.append((0.30, quantization(f"fp-{size}", "rtn", scheme, **own)))
        for scheme, score in (("W1A8:grid=sign", 0.55), ("W1.58A8:grid=ternary", 0.58)):
            own = known | {"layers": layers(size, scheme, 0.5), "trained": True}
            rows.append((score, quantization(f"b-{scheme[:4]}-{size}", scheme=scheme, **own)))
        for score, record in rows:
            score += 0.03 * step
            add(store, record, dict.fromkeys(BITNET_TASKS, score), {"c4@gptq-64": 3 / score})
            add(store, record, {"piqa": score - 0.1}, num_fewshot=4)
            agreement = {"kl_divergence": 1 - score, "top1_agreement": score}
            measured = task(record, "c4", agreement, protocol="agreement-64")
            store.save_task(record.checkpoint, record.key, measured)
    store.save_quantization(
        quantization("fp-350M", "quip", "W1A8", status="not_applicable", parameters=350_000_000)
    )
    store.save_quantization(
        quantization("fp-350M", "quip", "W2A16", status="failed", error="out of memory")
    )
    return store


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(Store(tmp_path_factory.mktemp("twins")))


def figure(store: Store, kind: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """What :func:`plot` would have saved."""
    drawn = []
    monkeypatch.setattr("qbench.plots.plot.save", lambda figure, output: drawn.append(figure))
    plot(store, kind, output="f.png", **options)
    return drawn[0]


def points(axes: Any, marker: Any) -> list[tuple[float, float]]:
    """Positions of the markers of one shape."""
    found = [line for line in axes.lines if line.get_marker() == marker]
    return [
        (float(x), float(y))
        for line in found
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def about(drawn: Any) -> str:
    return " ".join(drawn.legends[0].get_title().get_text().split())


def titles(drawn: Any) -> list[str]:
    return [axes.get_title() for axes in drawn.axes]


# --- BitNet, Fig. 1 ------------------------------------------------------------------------------


def test_energy_saved_is_the_papers_computed_and_printed(twins, monkeypatch):
    drawn = figure(twins, "bitnet-fig1", monkeypatch, against="bitnet-fig1")
    energy = drawn.axes[0]
    hollow = [line for line in energy.lines if line.get_markerfacecolor() == "white"]
    assert list(hollow[0].get_ydata()) == [8.8, 11.0, 15.0, 18.6, 21.7, 29.1, 32.9, 38.8]
    (own,) = [line for line in energy.lines if line.get_marker() == "*" and line not in hollow]
    assert list(own.get_xdata()) == list(SIZES.values())
    # papers.md: the recipe gives 8.79 and 11.02 where 8.8 and 11.0 are printed
    assert list(own.get_ydata()) == pytest.approx([8.79, 11.02], abs=0.01)
    assert energy.get_xscale() == "log"


def test_the_papers_points_stand_on_a_reversed_linear_axis(monkeypatch, tmp_path):
    drawn = figure(
        Store(tmp_path), "bitnet-fig1", monkeypatch, against="bitnet-fig1"
    )  # nothing stored: published points alone
    axes = drawn.axes[1]
    assert titles(drawn) == ["energy saved", "published: 6.7B, BitNet"]
    low, high = axes.get_xlim()
    assert low > 8 > 1 > high and axes.get_xscale() == "linear"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "4", "2", "1"]
    (best,) = [line for line in axes.lines if line.get_label() == "_best"]
    assert list(best.get_ydata()) == pytest.approx([56.7, 52.9, 49.0, 44.6], abs=0.05)
    assert points(axes, "*") == [(1, pytest.approx(55.9, abs=0.05))]
    chance = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert chance[0].get_ydata()[0] == pytest.approx(43.75, abs=0.051)


def test_measured_methods_are_hollow_black_markers_of_different_shapes(monkeypatch, tmp_path):
    drawn = figure(bitnet_store(tmp_path), "bitnet-fig1", monkeypatch)
    (axes,) = drawn.axes  # no dimensions are recorded, so no energy
    for marker, count in (("o", 3), ("s", 2), ("D", 1), ("^", 3)):
        lines = [line for line in axes.lines if line.get_marker() == marker]
        assert len(lines) == count
        assert {line.get_markerfacecolor() for line in lines} == {"white"}
        assert {line.get_color() for line in lines} == {style.FULL}
    # absmax and smoothquant share 8 bits and stand around it
    across = sorted(x for m in ("o", "^") for x, _ in points(axes, m))
    assert sum(across[-2:]) == pytest.approx(16) and across[-1] > across[-2]


def test_only_the_largest_checkpoint_is_shown_and_the_others_are_told(twins, monkeypatch):
    drawn = figure(twins, "bitnet-fig1", monkeypatch)
    assert titles(drawn) == ["energy saved", "fp-350M"]
    assert "choose with --checkpoint: fp-125M" in about(drawn)
    chosen = figure(twins, "bitnet-fig1", monkeypatch, checkpoints=["*-125M"])
    assert "fp-125M" in titles(chosen)


# --- BitNet, Fig. 3 and 6 ------------------------------------------------------------------------


def test_losses_stand_against_size_and_against_energy(twins, monkeypatch):
    drawn = figure(twins, "bitnet-fig3", monkeypatch, against="bitnet-scaling")
    own, own_energy, theirs, their_energy = drawn.axes
    assert points(own, "o") == [
        (125e6, pytest.approx(np.log2(3 / 0.60))),
        (350e6, pytest.approx(np.log2(3 / 0.63))),
    ]
    # papers.md 1.6: joules at 7 nm and losses of FP16, 125M and 6.7B
    assert (0.02415, 4.724) in points(their_energy, "o")
    assert (1.684, 3.925) in points(their_energy, "o")
    # and the same energies computed from the shapes of the stored twins
    assert [x for x, _ in points(own_energy, "o")] == pytest.approx([0.02415, 0.08372], rel=1e-3)
    assert (6.7e9, 4.093) in points(theirs, "*")
    assert len([line for line in theirs.lines if line.get_label() == "_law"]) == 2
    assert own_energy.get_xlabel() == "energy of 512 tokens"


def test_a_law_of_size_passes_the_same_losses_where_energy_stands_across(twins, monkeypatch):
    """BitNet's 30B lies 0.01 from L(N) continued, and no further where its joules stand."""
    drawn = figure(twins, "bitnet-fig3", monkeypatch, against="bitnet-scaling")
    ends = []
    for axes in drawn.axes[2:]:
        (beyond,) = [line for line in axes.lines if line.get_label() == "_beyond"]
        ends.append((float(beyond.get_xdata()[-1]), float(beyond.get_ydata()[-1])))
    assert [x for x, _ in ends] == pytest.approx([30e9, 0.1974])
    assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-6)
    assert ends[1][1] == pytest.approx(3.954, abs=0.02)
    assert "L(N) again" in about(drawn)


@pytest.mark.parametrize("kind", ["bitnet-fig1", "bitnet-fig3", "bitnet-fig6"])
def test_a_column_with_published_panels_fits_on_a_page(kind, twins, monkeypatch):
    drawn = figure(twins, kind, monkeypatch, width_in=3.25, against=PUBLISHED[kind])
    assert len(drawn.axes) > 2
    assert drawn.get_size_inches()[1] <= 11.0


def test_averages_have_a_panel_per_number_of_examples(twins, monkeypatch):
    drawn = figure(twins, "bitnet-fig6", monkeypatch, against="bitnet-fig6")
    assert titles(drawn) == ["0-shot", "4-shot", "published: 0-shot", "published: 4-shot"]
    zero, four, their_zero, their_four = drawn.axes
    assert [y for _, y in points(zero, "o")] == pytest.approx([60, 63])
    assert [y for _, y in points(four, "o")] == pytest.approx([50, 53])  # piqa, ten points less
    # Fig. 6: FP16 zero-shot 54.87 55.55 57.82, BitNet four-shot 52.45 54.80 55.85
    assert [y for _, y in points(their_zero, "o")] == pytest.approx([54.87, 55.55, 57.82])
    assert [y for _, y in points(their_four, "*")] == pytest.approx([52.45, 54.80, 55.85])
    random = [line for line in their_zero.lines if line.get_linestyle() == "--"]
    assert random[0].get_ydata()[0] == pytest.approx(44.5)
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert {"absmax W4A4", "gptq W2A16", "rtn W2A16", "quip W2A16", "smoothquant W4A4"} <= set(
        names
    )


def test_seeds_are_a_band_along_a_family(twins, monkeypatch):
    drawn = figure(twins, "bitnet-fig6", monkeypatch, baselines=["gptq"])
    (band,) = [c for c in drawn.axes[0].collections if isinstance(c, PolyCollection)]
    heights = sorted(set(np.round(band.get_paths()[0].vertices[:, 1], 6)))
    assert heights == pytest.approx([40, 42, 43, 45])  # two seeds at each of two sizes
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert "gptq W2A16" in names and "rtn W2A16" not in names


def test_a_table_without_averages_by_examples_is_refused_for_figure_6(twins, monkeypatch):
    with pytest.raises(QBenchError, match="take bitnet-fig6"):
        figure(twins, "bitnet-fig6", monkeypatch, against="quip-opt-125m")


# --- b1.58, Fig. 2 and 3 -------------------------------------------------------------------------


def test_memory_and_latency_saved_are_published_beside_what_follows_from_shapes(twins, monkeypatch):
    drawn = figure(twins, "b158-fig2", monkeypatch, against="b158-fig2")
    latency, memory = drawn.axes
    ternary = style.trained_look(1.58)["marker"]
    assert [y for _, y in points(latency, ternary)] == [1.67, 2.71, 2.90, 3.68, 4.10]
    assert [y for x, y in points(memory, ternary) if x > 1e9] == [2.93, 3.55, 4.40, 5.12, 7.16]
    line = [line for line in memory.lines if line.get_color() == style.GREY][-1]
    assert list(line.get_xdata()) == [1.3e9, 3e9, 7e9, 13e9, 70e9]
    assert list(line.get_ydata()) == sorted(line.get_ydata())
    assert 1 < line.get_ydata()[0] and line.get_ydata()[-1] < 8  # 16 bits over 2 bits, at most
    stored = [y for x, y in points(memory, ternary) if x < 1e9]
    assert len(stored) == 2 and all(1 < ratio < 16 for ratio in stored)


def test_a_latency_nobody_measured_is_said_in_its_panel(twins, monkeypatch):
    drawn = figure(twins, "b158-fig2", monkeypatch)
    assert [text.get_text() for text in drawn.axes[0].texts] == ["not measured here"]


def test_energy_has_both_accumulators_and_reproduces_the_printed_ratios(twins, monkeypatch):
    drawn = figure(twins, "b158-fig3", monkeypatch, against="b158-fig3")
    parts, joules = drawn.axes
    texts = " ".join(text.get_text().replace("\n", " ") for text in parts.texts)
    assert "71.4× less" in texts and "16.7× less" in texts
    # Fig. 3: 18.6, 21.7, 29.1, 32.9, 41.2 from 1.3B to 70B
    whole = [(x, y) for x, y in points(joules, "o") if x > 1e9]
    ternary = style.trained_look(1.58)["marker"]
    trained = [(x, y) for x, y in points(joules, ternary) if x > 1e9]
    ratios = [f / t for (_, f), (_, t) in zip(whole, trained, strict=True)]
    assert ratios == pytest.approx([18.6, 21.7, 29.1, 32.9, 41.2], abs=0.06)


def test_without_twins_and_published_points_there_is_nothing_to_draw(monkeypatch, tmp_path):
    store = bitnet_store(tmp_path)
    for kind in ("b158-fig2", "b158-fig3"):
        with pytest.raises(QBenchError, match=f"--against {kind}"):
            figure(store, kind, monkeypatch)


# --- errors of matrices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("self_attn.q_proj", 3)),
        ("transformer.h.11.mlp.c_fc", ("mlp.c_fc", 11)),
        ("model.layers.0.mlp.experts.5.w1", ("mlp.experts.*.w1", 0)),
        ("lm_head", ("lm_head", 0)),
    ],
)
def test_a_matrix_is_found_by_block_and_kind(name, expected):
    assert place(name) == expected


def test_errors_stand_by_block_in_a_panel_per_kind_with_seeds_as_a_band(twins, monkeypatch):
    drawn = figure(twins, "layer-errors", monkeypatch)
    # W2A16 has gptq and rtn, two methods; the larger of two equal checkpoints
    assert drawn.get_suptitle() == "fp-350M W2A16"
    assert titles(drawn) == ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down"]
    gptq, rtn = drawn.axes[0].lines
    assert list(gptq.get_xdata()) == list(range(24))
    assert gptq.get_ydata()[2] == pytest.approx(3 * 0.025)  # the mean of 0.02 and 0.03
    assert rtn.get_ydata()[2] == pytest.approx(3 * 0.06)
    (band,) = drawn.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.02) and heights.max() == pytest.approx(24 * 0.03)
    assert "fp-350M W4A4" in about(drawn) and "fp-125M W2A16" in about(drawn)


def test_a_method_without_proxy_loss_is_named(twins, monkeypatch):
    drawn = figure(twins, "layer-errors", monkeypatch, metric="proxy_loss")
    assert [line.get_label() for line in drawn.legends[0].legend_handles] == ["gptq"]
    assert "No proxy_loss is stored of rtn" in about(drawn)
    with pytest.raises(QBenchError, match="proxy_loss"):
        figure(twins, "layer-errors", monkeypatch, metric="proxy_loss", schemes=["W4A4"])


def test_a_matrix_that_fell_back_has_a_cross(monkeypatch, tmp_path):
    drawn = figure(
        bitnet_store(tmp_path), "layer-errors", monkeypatch, schemes=["W2A16"]
    )  # there, three of gptq's four matrices fell back
    crosses = [line for axes in drawn.axes for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == 3


# --- heat map ------------------------------------------------------------------------------------


def test_every_cell_has_its_number_and_cells_without_one_say_why(twins, monkeypatch):
    drawn = figure(twins, "heatmap", monkeypatch, num_fewshot=0)
    small, large = drawn.axes[:2]
    assert [axes.get_title() for axes in (small, large)] == [
        "fp-125M\nfull precision 60.0",
        "fp-350M\nfull precision 63.0",
    ]
    rows = [label.get_text() for label in large.get_yticklabels()]
    columns = [label.get_text().replace("\n", "") for label in large.get_xticklabels()]
    assert rows == ["absmax", "gptq", "quip", "rtn", "trained"]
    assert columns == ["W4A4", "W2A16", "W1.58A8", "W1A8"]
    texts = {
        (rows[int(t.get_position()[1])], columns[int(t.get_position()[0])]): t.get_text()
        for t in large.texts
    }
    assert texts["gptq", "W2A16"] == "44.0"  # the mean of two seeds, 43 and 45
    assert texts["trained", "W1A8"] == "58.0" and texts["trained", "W1.58A8"] == "61.0"
    assert texts["quip", "W1A8"] == "" and texts["quip", "W2A16"] == "✕"
    assert texts["absmax", "W2A16"] == "–"
    hatched = [patch for patch in large.patches if patch.get_hatch()]
    assert [patch.get_xy() for patch in hatched] == [(3, 2)]


def test_a_heat_map_of_full_precision_alone_says_what_it_lacks(tmp_path):
    store = Store(tmp_path / "runs")
    add(store, quantization("fp"), dict.fromkeys(BITNET_TASKS, 0.5))
    with pytest.raises(QBenchError, match="^nothing to draw: no quantized run was measured; mea"):
        plot(store, "heatmap", output=tmp_path / "f.png")


def test_perplexities_that_diverged_are_grey_and_named(monkeypatch, tmp_path):
    drawn = figure(bitnet_store(tmp_path), "heatmap", monkeypatch, metric="perplexity")
    texts = {text.get_text() for text in drawn.axes[0].texts}
    assert {"inf", "NaN", "1.6e6", "4.8e4", "1032", "70.4", "16.1"} <= texts


def test_a_heat_map_too_narrow_for_its_numbers_says_how_wide_it_must_be(twins, monkeypatch):
    with pytest.raises(QBenchError, match=r"4 widths needs 2\.25 in, not 2\.2"):
        figure(twins, "heatmap", monkeypatch, width_in=2.2)  # 0.07 x 7 + 0.1 + 4 x 0.25 + 0.65
    figure(twins, "heatmap", monkeypatch, width_in=2.25)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.934, "1.93"), (70.43, "70.4"), (1032.2, "1032"), (4.8e4, "4.8e4"), (3.5e23, "4e23")],
)
def test_a_perplexity_takes_five_letters_at_most(value, text):
    assert cell_text(value, accuracy=False) == text and len(text) <= 5


def test_letters_are_black_on_light_and_white_on_dark_colours():
    assert contrast_with_black((1.0, 1.0, 1.0)) and not contrast_with_black((0.0, 0.0, 0.3))
    # equal contrast at luminance sqrt(0.05 * 1.05) - 0.05 = 0.179, which is sRGB 0.461 of grey
    assert contrast_with_black((0.47,) * 3) and not contrast_with_black((0.45,) * 3)


# --- as a page prints it -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3.25, pytest.param(6.75, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_legible_inside_the_figure_and_apart(kind, width, twins, monkeypatch):
    """At a column's and at a page's width; what is drawn is caught as it is drawn."""
    against = PUBLISHED.get(kind)
    drawn = figure(twins, kind, monkeypatch, width_in=width, against=against)
    seen: list[Text] = []
    draw = Text.draw

    def caught(self: Text, renderer: Any) -> None:
        draw(self, renderer)
        if self.get_visible() and self.get_text().strip():
            seen.append(self)

    drawn.set_dpi(100)
    monkeypatch.setattr(Text, "draw", caught)
    FigureCanvasAgg(drawn).draw()
    assert drawn.get_size_inches()[0] == width
    assert min(text.get_fontsize() for text in seen) >= style.SMALLEST_PT
    boxes = [(text.get_text(), text.get_window_extent()) for text in seen]
    page = drawn.bbox
    outside = [
        words
        for words, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]
    assert not outside
    clashes = [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]
    assert not clashes


def test_a_pdf_is_as_wide_as_the_column_and_embeds_truetype(twins, tmp_path):
    path = plot(twins, "bitnet-fig6", output=tmp_path / "f.pdf", width_in=inches("8.25cm"))
    content = path.read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
    assert box and float(box[1]) == pytest.approx(8.25 / 2.54 * 72, abs=0.01)
    assert b"/FontFile2" in content and b"/Type3" not in content


def test_a_png_is_small_and_its_colours_are_those_that_were_drawn(twins, tmp_path, monkeypatch):
    drawn = figure(twins, "heatmap", monkeypatch, width_in=3.25)
    drawn.draw_without_rendering()
    drawn.set_layout_engine("none")  # laid out anew, letters would move by parts of a pixel
    style.save(drawn, tmp_path / "small.png")
    with style.our_style():
        drawn.savefig(tmp_path / "full.png", dpi=220)
    with Image.open(tmp_path / "small.png") as small, Image.open(tmp_path / "full.png") as full:
        assert small.mode == "P" and small.width == int(3.25 * 220)
        assert small.info["dpi"][0] == pytest.approx(220, abs=0.1)
        both = [np.asarray(image.convert("RGB"), dtype=int) for image in (small, full)]
    assert abs(both[0] - both[1]).max() <= 10  # of 255
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("small", "full")]
    assert sizes[0] < 0.5 * sizes[1]


def test_the_same_results_give_the_same_bytes(twins, tmp_path):
    paths = [tmp_path / f"{name}.pdf" for name in "ab"]
    for path in paths:
        plot(twins, "heatmap", output=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3.25in", 3.25), ("3.25", 3.25), ("8cm", 3.1496), ("84 mm", 3.3071), ("234pt", 3.2379)],
)
def test_widths_are_read_as_people_write_them(text, expected):
    assert inches(text) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("text", ["wide", "3ft", "", "in", "2in", "nan", "2000"])
def test_other_widths_are_refused(text):
    with pytest.raises(QBenchError, match="in"):
        inches(text)


@pytest.mark.parametrize("kind", ["heatmap", "layer-errors"])
def test_kinds_without_published_points_or_axes_to_choose_say_so(kind, twins, monkeypatch):
    with pytest.raises(QBenchError, match="--against"):
        figure(twins, kind, monkeypatch, against="bitnet-table3")
    with pytest.raises(QBenchError, match="--x"):
        figure(twins, kind, monkeypatch, x="effective_bits")


def test_metrics_that_a_figure_does_not_show_are_refused(twins, monkeypatch):
    for kind, metric in (
        *(("bitnet-fig1", "perplexity"), ("bitnet-fig3", "acc_norm"), ("bitnet-fig6", "loss")),
        *(("b158-fig2", "acc_norm"), ("b158-fig3", "perplexity"), ("layer-errors", "acc_norm")),
    ):
        with pytest.raises(QBenchError, match=metric):
            figure(twins, kind, monkeypatch, metric=metric)


def test_only_the_module_of_the_wanted_kind_is_loaded():
    code = (
        "import sys\nfrom qbench.plots import plot\n"
        "print(*[name for name in sys.modules if name.startswith(('qbench.plots.', 'matplotlib'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert set(run.stdout.split()) <= {
        *("qbench.plots.plot", "qbench.plots.style", "qbench.plots.wanted")
    }


# --- colours -------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency (2009), severity 1.0, on linear RGB
SEEN_WITH = {
    "normal vision": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
LEAST = 15.0
"""CIE76 distance; 2.3 is just noticeable side by side, and markers are small and far apart."""


def linear(colour: str) -> np.ndarray:
    """sRGB as hexadecimal digits -> linear RGB (IEC 61966-2-1)."""
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB -> CIELAB under D65."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    ratio = to_xyz @ rgb / (to_xyz @ np.ones(3))
    small = (6 / 29) ** 3
    f = np.where(ratio > small, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", SEEN_WITH)
def test_colours_are_told_apart_with_every_kind_of_eyes(eyes):
    matrix = SEEN_WITH[eyes]
    assert matrix.sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)  # greys stay as they are
    trained = [colour for colour, _ in [*style.TRAINED_LOOKS.values(), style.OTHER_TRAINED]]
    palette = [*style.COLOURS, style.FULL, style.GREY, *trained]
    assert len(set(palette)) == len(palette)
    seen = {colour: lab(np.clip(matrix @ linear(colour), 0, 1)) for colour in palette}
    near = {
        (one, other): float(np.linalg.norm(seen[one] - seen[other]))
        for one, other in itertools.combinations(palette, 2)
    }
    assert min(near.values()) > LEAST, min(near, key=near.get)


def test_the_simulation_knows_what_red_and_green_are_for_a_deuteranope():
    """Two colours that differ for most eyes and not for theirs, so that the test above can fail."""
    red, green = "#8f6b00", "#5a7d00"
    apart = {
        eyes: float(np.linalg.norm(lab(m @ linear(red)) - lab(np.clip(m @ linear(green), 0, 1))))
        for eyes, m in SEEN_WITH.items()
    }
    assert apart["normal vision"] > LEAST > apart["deuteranopia"]


def test_a_trained_width_has_one_look_in_all_figures(twins, monkeypatch):
    from qbench.training.curves import _COLOURS

    for wbits, kind in ((1.0, "b1"), (1.58, "b158")):
        look = style.trained_look(wbits)
        assert _COLOURS[kind] == look["color"]
        for name in ("accuracy-vs-bits", "loss-vs-size", "bitnet-fig1", "bitnet-fig6"):
            drawn = figure(twins, name, monkeypatch)
            lines = [line for axes in drawn.axes for line in axes.lines]
            colours = {ln.get_color() for ln in lines if ln.get_marker() == look["marker"]}
            assert colours == {look["color"]}, name


def test_published_figures_need_no_results(tmp_path):
    for kind, name in PUBLISHED.items():
        path = plot(Store(tmp_path), kind, output=tmp_path / f"{kind}.svg", against=name)
        assert path.stat().st_size > 5000
        assert name in reference.names()
