"""Models against their size: families, fitted curves, figures and the table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from study_fixtures import BITNET_TASKS, add, cells, numbers, quantization, task
from typer.testing import CliRunner

from qbench.cli import app
from qbench.errors import QBenchError
from qbench.plots import plot as plots
from qbench.plots.plot import draw, plot
from qbench.record import Metric, QuantizationRecord
from qbench.study.store import Store
from qbench.tables.table import stored_entries, table

SIX = (125_000_000, 350_000_000, 760_000_000, 1_300_000_000, 2_700_000_000, 6_700_000_000)
B158 = "W1.58A8:grid=ternary"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def measure(
    store: Store,
    record: QuantizationRecord,
    loss: float,
    *,
    text: str = "world",
    bytes_per_token: float = 4.0,
    **key: Any,
) -> None:
    """Store a loss in bits per token, its standard error 1 % of the perplexity."""
    store.save_quantization(record)
    perplexity = 2**loss if math.isfinite(loss) else math.inf
    fields = {"protocol": "documents-512", "n_items": 100} | key
    measured = task(record, text, {"perplexity": perplexity}, **fields)
    measured.metrics["perplexity"] = Metric.of(perplexity, perplexity / 100)
    measured.metrics["bits_per_byte"] = Metric.of(loss / bytes_per_token, 0.001)
    store.save_task(record.checkpoint, record.key, measured)


def model(name: str, parameters: int | None, **fields: Any) -> QuantizationRecord:
    return quantization(name, parameters=parameters, **fields)


def twins(store: Store, **key: Any) -> Store:
    """Two sizes, each in full precision and trained at 1.58 bits with a few norms more."""
    for name, size, loss in (("s", 500_000, 2.6), ("l", 2_000_000, 2.1)):
        measure(store, model(f"fp16-{name}", size), loss, **key)
        trained = model(f"b158-{name}", size + 2000, scheme=B158, trained=True)
        measure(store, trained, loss + 0.25, **key)
    return store


def six(store: Store, losses: list[float] | None = None, **key: Any) -> Store:
    """Six sizes on an exact law, or at given losses."""
    for index, size in enumerate(SIX):
        loss = losses[index] if losses else 0.5 * (size / 1e9) ** -0.4 + 3
        measure(store, model(f"opt-{size // 10**6}m", size), loss, **key)
    return store


def markers(axes: Any, hollow: bool = False) -> dict[str, list[tuple[float, float]]]:
    """Where markers of each shape stand: filled ones, or those that are white inside."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        white = line.get_markerfacecolor() == "white"
        if line.get_marker() not in ("None", "_", None, "") and white == hollow:
            places = zip(line.get_xdata(), line.get_ydata(), strict=True)
            found.setdefault(str(line.get_marker()), []).extend(places)
    return {shape: sorted(places) for shape, places in found.items()}


def labelled(axes: Any, label: str) -> list[Any]:
    return [line for line in axes.lines if line.get_label() == label]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def about(figure: Any) -> str:
    return " ".join(figure.legends[0].get_title().get_text().split())


# --- figures -------------------------------------------------------------------------------------


def test_the_published_points_are_hollow_on_their_curves_and_predicted_beyond_them() -> None:
    figure = draw([], "loss-vs-size", against="bitnet-scaling")
    (axes,) = figure.axes
    found = markers(axes, hollow=True)
    # Fig. 3: six Transformers, eight BitNets
    assert [y for _, y in found["o"]] == pytest.approx([4.724, 4.364, 4.21, 4.147, 4.019, 3.925])
    assert [y for _, y in found["*"]][-2:] == pytest.approx([4.041, 3.954])
    assert len(found["*"]) == 8 and markers(axes) == {}
    laws = {line.get_color(): line for line in labelled(axes, "_law")}
    assert len(laws) == 2
    for line in laws.values():
        assert (line.get_xdata()[0], line.get_xdata()[-1]) == pytest.approx((125e6, 6.7e9))
    # the paper's BitNet curve at its end, refitted: 0.641·30^-0.391 + 3.786
    (beyond,) = labelled(axes, "_beyond")
    assert beyond.get_linestyle() == "--" and beyond.get_xdata()[0] == pytest.approx(6.7e9)
    assert beyond.get_xdata()[-1] == pytest.approx(30e9)
    assert beyond.get_ydata()[-1] == pytest.approx(0.641 * 30**-0.391 + 3.786, abs=0.002)
    assert legend(figure) == [
        *("full precision", "trained at W1A8", "fitted power law", "beyond the fitted sizes"),
    ]
    told = about(figure)
    assert "full precision, published: L(N) = 0.429·N^−0.400 + 3.733, within 0.028 of 6" in told
    assert "N in billions" in told and "Figs. 3 and 4" in told


def test_two_sizes_are_joined_and_the_note_says_why_no_law_is_fitted(store: Store) -> None:
    figure = draw(stored_entries(twins(store)), "loss-vs-size")
    (axes,) = figure.axes
    assert markers(axes)["o"] == [(5e5, pytest.approx(2.6)), (2e6, pytest.approx(2.1))]
    assert markers(axes)["(4, 1, 0)"] == [
        (502e3, pytest.approx(2.85)),
        (2002e3, pytest.approx(2.35)),
    ]
    segments = [list(line.get_ydata()) for line in labelled(axes, "_best")]
    assert sorted(segments) == [pytest.approx([2.6, 2.1]), pytest.approx([2.85, 2.35])]
    assert labelled(axes, "_law") == [] and "fitted power law" not in legend(figure)
    assert "needs at least 4 sizes, not 2: full precision, trained at W1.58A8" in about(figure)
    assert axes.get_ylabel() == "loss (bits per token)"


def test_the_axis_counts_all_parameters_and_reads_like_names_of_models(store: Store) -> None:
    (axes,) = draw(stored_entries(twins(store)), "loss-vs-size", against="bitnet-scaling").axes
    assert axes.get_xlabel() == "N: all parameters of the checkpoint"
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert [shown[i] for i in (0, 1, 2, -1)] == ["0.5M", "2M", "125M", "30B"]
    low, high = axes.get_xlim()
    assert low < 5e5 and high > 30e9 and axes.get_xscale() == "log"


def test_six_sizes_get_the_law_they_lie_on(store: Store) -> None:
    figure = draw(stored_entries(six(store)), "loss-vs-size")
    (axes,) = figure.axes
    (law,) = labelled(axes, "_law")
    for size, loss in zip(law.get_xdata(), law.get_ydata(), strict=True):
        assert loss == pytest.approx(0.5 * (size / 1e9) ** -0.4 + 3, abs=1e-4)
    assert labelled(axes, "_best") == [] and labelled(axes, "_beyond") == []
    assert "full precision: L(N) = 0.5·N^−0.400 + 3.000, within 0.001 of 6" in about(figure)


def test_error_bars_of_a_loss_are_those_of_its_perplexity(store: Store) -> None:
    (axes,) = draw(stored_entries(twins(store)), "loss-vs-size").axes
    caps = sorted(float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "_")
    # d log2(p) = dp / (p ln 2), and dp is 1 % of p
    error = 0.01 / math.log(2)
    losses = (2.1, 2.35, 2.6, 2.85)
    assert caps == pytest.approx([loss + side for loss in losses for side in (-error, error)])


def test_bits_per_byte_are_drawn_as_stored(store: Store) -> None:
    figure = draw(stored_entries(twins(store)), metric="bits_per_byte")
    (axes,) = figure.axes
    assert [y for _, y in markers(axes)["o"]] == pytest.approx([0.65, 0.525])  # 4 bytes a token
    caps = sorted(float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "_")
    assert caps[0] == pytest.approx(0.524)
    assert axes.get_ylabel() == "loss (bits per byte)" and "Loss: bits per byte" in about(figure)


def test_models_with_other_tokens_get_no_law_per_token_and_one_per_byte(store: Store) -> None:
    for index, size in enumerate(SIX):
        name, length = f"opt-{size // 10**6}m", 4.0 if index < 3 else 3.0
        per_byte = 0.1 * (size / 1e9) ** -0.4 + 0.9
        loss = per_byte * length
        measure(store, model(name, size), loss, bytes_per_token=length)
    entries = stored_entries(store)
    figure = draw(entries, "loss-vs-size")
    assert labelled(figure.axes[0], "_law") == []
    assert "losses per token do not compare" in about(figure)
    assert "3.00 to 4.00 bytes a token" in about(figure)
    assert "not fitted: the models have different vocabularies: full precision" in about(figure)
    figure = draw(entries, "loss-vs-size", metric="bits_per_byte")
    (law,) = labelled(figure.axes[0], "_law")
    assert law.get_ydata()[0] == pytest.approx(0.1 * 0.125**-0.4 + 0.9, abs=1e-4)
    assert "do not compare" not in about(figure)


def test_a_point_measured_differently_is_pale_named_and_not_fitted(store: Store) -> None:
    six(store)
    measure(store, model("odd", 500_000_000), 9.0, limit=10)
    figure = draw(stored_entries(store), "loss-vs-size")
    (law,) = labelled(figure.axes[0], "_law")
    assert max(law.get_ydata()) == pytest.approx(0.5 * 0.125**-0.4 + 3, abs=1e-4)
    assert "measured differently (limit=10), not fitted: full precision of odd" in about(figure)
    pale = [line for line in figure.axes[0].lines if line.get_alpha() == 0.4]
    assert {float(line.get_ydata()[0]) for line in pale if line.get_marker() == "o"} == {9.0}


def with_quantized(store: Store) -> Store:
    twins(store)
    for baseline, scheme in (("a", "W4A16"), ("a", "W2A16"), ("b", "W4A16")):
        for name, size in (("fp16-s", 500_000), ("fp16-l", 2_000_000)):
            measure(store, model(name, size, baseline=baseline, scheme=scheme), 3.0)
    return store


def test_quantized_rows_are_shown_where_a_filter_names_them(store: Store) -> None:
    with_quantized(store)

    def shown(**filters: Any) -> str:
        headings = cells(table(store, "sizes", **filters))[0]
        found = [name.split(" loss ")[0] for name in headings if " loss " in name]
        return ", ".join(sorted(name for name in found if "Δ" not in name))

    always = "full precision, trained at W1.58A8"
    assert shown() == always
    assert shown(schemes=["W4A16"]) == f"a W4A16, b W4A16, {always}"
    assert shown(baselines=["a"]) == f"a W2A16, a W4A16, {always}"
    assert shown(baselines=["a"], schemes=["W2*"]) == f"a W2A16, {always}"
    assert shown(baselines=["none"]) == always
    told = "quantized rows are shown where --baseline or --scheme names them; stored: a W2A16, "
    assert told + "a W4A16, b W4A16" in table(store, "sizes")
    with pytest.raises(QBenchError, match="unknown scheme 'W3A16'"):
        shown(schemes=["W3A16"])


def test_a_figure_has_the_quantized_rows_a_filter_names(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, output: drawn.append(figure))
    with_quantized(store)
    for schemes in (None, ["W4A16"]):
        plot(store, "loss-vs-size", output=tmp_path / "a.png", schemes=schemes)
    always = ["full precision", "trained at W1.58A8"]
    assert [legend(figure) for figure in drawn] == [always, [*always, "a W4A16", "b W4A16"]]
    assert "stored: a W2A16, a W4A16, b W4A16" in about(drawn[0])
    assert about(drawn[1]).endswith("stored: a W2A16")


def test_schemes_that_share_their_widths_are_families_of_their_own(store: Store) -> None:
    for grid, extra in (("asym", 0.0), ("rms", 1.0)):
        for name, size in (("s", 500_000), ("l", 2_000_000)):
            record = model(name, size, baseline="a", scheme=f"W4A16:grid={grid}")
            measure(store, record, 3.0 + extra)
    figure = draw(stored_entries(store), "loss-vs-size")
    assert legend(figure) == ["a W4A16:grid=asym", "a W4A16:grid=rms"]
    handles = figure.legends[0].legend_handles
    assert len({handle.get_marker() for handle in handles}) == 2


def test_a_published_row_shares_the_look_of_its_measured_family(store: Store) -> None:
    for name, size, loss in (("s", 500_000, 2.6), ("l", 2_000_000, 2.1)):
        measure(store, model(name, size, scheme="W1A8:grid=sign", trained=True), loss)
    figure = draw(stored_entries(store), "loss-vs-size", against="bitnet-scaling")
    (axes,) = figure.axes
    assert len(markers(axes)["*"]) == 2 and len(markers(axes, hollow=True)["*"]) == 8
    assert legend(figure)[:3] == ["full precision", "trained at W1A8", "published"]
    assert "hollow: published, measured on another text with other tokens: BitNet" in about(figure)


def test_published_points_join_the_panel_of_their_own_text(store: Store) -> None:
    for text, protocol in (("b158", "b158-2048"), ("c4", "gptq-2048")):
        for name, size in (("s", 700_000_000), ("l", 3_000_000_000)):
            measure(store, model(name, size), 3.5, text=text, protocol=protocol)
    figure = draw(stored_entries(store), "loss-vs-size", against="b158-table2")
    own, other = figure.axes
    assert own.get_title() == "b158, b158-2048"
    # Table 2: three LLaMAs; 12.33 at 700M
    assert markers(own, hollow=True)["o"][0] == (700e6, pytest.approx(math.log2(12.33)))
    assert markers(other, hollow=True) == {}
    assert "hollow: published: BitNet b1.58, arXiv 2402.17764, Table 2" in about(figure)


def test_each_text_has_its_panel_and_one_of_a_single_size_is_named(store: Store) -> None:
    twins(store)
    twins(store, text="c4", protocol="gptq-2048")
    measure(store, model("fp16-s", 500_000), 2.0, text="ptb")
    figure = draw(stored_entries(store), "loss-vs-size")
    assert [axes.get_title() for axes in figure.axes] == ["c4, gptq-2048", "world, documents-512"]
    assert "not drawn, as it has fewer than two sizes: ptb documents-512" in about(figure)
    # a published law is the same in every panel, and told once
    told = about(draw(stored_entries(store), "loss-vs-size", against="bitnet-scaling"))
    assert told.count("full precision, published: L(N)") == 1


def test_what_has_no_place_in_the_figure_is_told(store: Store) -> None:
    twins(store)
    measure(store, model("lost", 1_000_000), math.inf)
    measure(store, model("strange", None), 2.0)
    told = about(draw(stored_entries(store), "loss-vs-size"))
    assert "not shown, as it diverged: full precision of lost" in told
    assert "not shown, as its size is unknown: full precision of strange" in told


def test_latent_weights_count_with_the_quantized_rows(store: Store) -> None:
    twins(store)
    latent = model("b158-s-latent", 502_000)
    measure(store, latent, 12.0)
    entries = stored_entries(store)
    assert max(y for _, y in markers(draw(entries, "loss-vs-size", asked=()).axes[0])["o"]) < 3
    assert "full precision W16A16 of latent weights" in legend(draw(entries, "loss-vs-size"))
    # in the table they stand in the row of their size
    row = cells(table(store, "sizes", baselines=["none"]))[0]
    assert row["Checkpoints"] == "fp16-s; b158-s; b158-s-latent"


def test_accuracy_against_size_is_the_mean_of_the_tasks_with_chance(store: Store) -> None:
    for name, size, score in (("s", 500_000, 0.5), ("l", 2_000_000, 0.6)):
        add(store, model(name, size), dict.fromkeys(BITNET_TASKS, score))
    figure = draw(stored_entries(store), "accuracy-vs-size", against="bitnet-scaling")
    (axes,) = figure.axes
    assert markers(axes)["o"] == [(5e5, pytest.approx(50)), (2e6, pytest.approx(60))]
    # Fig. 4, 125M and 6.7B
    published = markers(axes, hollow=True)["o"]
    assert (published[0][1], published[-1][1]) == pytest.approx((47.90, 57.83))
    chance = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [float(line.get_ydata()[0]) for line in chance] == [pytest.approx(43.75)]
    assert "random guessing" in legend(figure)
    assert "Mean of wsc285, winogrande, hellaswag, storycloze_2016 (0-shot, acc)" in about(figure)
    assert "the mean of the paper's own tasks in its own metric: BitNet" in about(figure)


def test_nothing_in_the_figure_overlaps(store: Store) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for text in ("c4", "ptb", "wikitext2"):
        six(store, text=text, protocol="gptq-2048")
    for kind, width in (("loss-vs-size", None), ("loss-vs-size", 7.0)):
        figure = draw(stored_entries(store), kind, against="bitnet-scaling", width_in=width)
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert len(boxes) >= 2
            for left, right in zip(boxes, boxes[1:], strict=False):
                assert left.x1 < right.x0
        names = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
        for left, right in zip(names, names[1:], strict=False):
            assert left.x1 < right.x0
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes) + 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "loss-vs-size", "against": "bitnet"}, "unknown published table 'bitnet'"),
        ({"against": "bitnet-scaling"}, "--against is for accuracy-vs-size and loss-vs-size"),
        ({"kind": "loss-vs-size", "x": "effective_bits"}, "has sizes on its axis, not effective"),
        ({"kind": "accuracy-vs-bits", "metric": "bits_per_byte"}, "--kind loss-vs-size"),
        ({"kind": "loss-vs-sizes"}, "did you mean 'loss-vs-size'"),
        ({"kind": "accuracy-vs-size"}, "accuracies of two sizes, and there is none"),
    ],
)
def test_wrong_usage_names_what_is_possible(store: Store, given: dict[str, Any], said: str) -> None:
    entries = stored_entries(twins(store))
    with pytest.raises(QBenchError, match=said):
        draw(entries, **given)


def test_one_size_is_an_error_that_says_what_there_is(store: Store) -> None:
    measure(store, model("fp16", 500_000), 2.6)
    measure(store, model("b158", 502_000, scheme=B158, trained=True), 2.8)
    with pytest.raises(QBenchError) as error:
        draw(stored_entries(store), "loss-vs-size")
    message = str(error.value)
    assert "it takes losses of two sizes, and there is fp16 (0.5M), b158 (0.5M);" in message
    assert "--against bitnet-scaling" in message and "\n" not in message
    # beside published points one size is enough
    (axes,) = draw(stored_entries(store), "loss-vs-size", against="bitnet-scaling").axes
    assert len(markers(axes)["o"]) == 1


# --- the table -----------------------------------------------------------------------------------


def test_twins_that_differ_by_norms_share_a_row_with_their_gap(store: Store) -> None:
    twins(store)
    for name, score in (("fp16-s", 0.6), ("fp16-l", 0.7)):
        record = model(name, 500_000 if name.endswith("s") else 2_000_000)
        add(store, record, dict.fromkeys(BITNET_TASKS, score))
    trained = model("b158-l", 2_002_000, scheme=B158, trained=True)
    add(store, trained, dict.fromkeys(BITNET_TASKS, 0.65))
    text = table(store, "sizes")
    small, large = cells(text)
    assert (small["Size"], small["Checkpoints"]) == ("0.5M", "fp16-s; b158-s")
    assert (large["Size"], large["Checkpoints"]) == ("2M", "fp16-l; b158-l")
    where = "world documents-512"
    assert large[f"full precision loss {where}"] == "2.100"
    assert large[f"full precision PPL {where}"] == "4.29"  # 2^2.1
    assert large[f"trained at W1.58A8 loss {where}"] == "2.350"
    assert large[f"trained at W1.58A8 Δ loss {where}"] == "+0.250"
    assert large["full precision Avg"].startswith("70.0")
    assert large["trained at W1.58A8 Δ Avg"] == "−5.0"
    assert small["trained at W1.58A8 Avg"] == small["trained at W1.58A8 Δ Avg"] == "–"
    assert not any(name.startswith("full precision Δ") for name in large)
    assert "needs at least 4 sizes, not 2: full precision" in text


def test_the_table_has_the_published_points_beside_each_other(store: Store) -> None:
    text = table(twins(store), "sizes", against="bitnet-scaling")
    rows = {row["Size"]: row for row in cells(text)}
    assert list(rows) == "0.5M 2M 125M 350M 760M 1.3B 2.7B 6.7B 13B 30B".split()
    row, where = rows["1.3B"], "validation bitnet-validation"
    # papers: 4.147 and 4.346 bits, 20.34 printed; 54.88 and 52.30 percent
    assert row[f"full precision (published) loss {where}"] == "4.147"
    assert row[f"trained at W1A8 (published) loss {where}"] == "4.346"
    assert row[f"trained at W1A8 (published) Δ loss {where}"] == "+0.199"
    assert row[f"trained at W1A8 (published) PPL {where}"] == "20.34"
    assert row["trained at W1A8 (published) Avg"] == "52.3"
    assert row["trained at W1A8 (published) Δ Avg"] == "−2.6"
    assert rows["30B"][f"trained at W1A8 (published) Δ loss {where}"] == "–"
    assert "trained at W1A8, published: L(N) = 0.641·N^−0.391 + 3.785" in text
    assert "Figs. 3 and 4: other weights" in text


def test_checkpoints_further_apart_have_rows_of_their_own(store: Store) -> None:
    measure(store, model("fp16", 1_000_000), 2.0)
    near, far = (model(name, size, scheme=B158, trained=True) for name, size in
                 (("near", 1_049_000), ("far", 1_051_000)))  # fmt: skip
    measure(store, far, 2.4)
    measure(store, near, 2.5)
    rows = cells(table(store, "sizes"))
    assert [row["Checkpoints"] for row in rows] == ["fp16; near", "far"]
    assert rows[1]["trained at W1.58A8 Δ loss world documents-512"] == "–"


def test_every_number_of_the_csv_has_the_facts_of_its_own_run(store: Store) -> None:
    lines = numbers(table(twins(store), "sizes", format="csv"))
    found = {(line["checkpoint"], line["metric"]): line for line in lines}
    assert len(lines) == len(found) == 8
    line = found["b158-l", "log2 perplexity"]
    assert float(line["value"]) == pytest.approx(2.35)
    assert float(line["stderr"]) == pytest.approx(0.01 / math.log(2))
    assert (line["label"], line["trained"], line["parameters"]) == ("W1.58A8", "True", "2002000")
    assert float(found["fp16-l", "perplexity"]["value"]) == pytest.approx(2**2.1)


def test_the_table_of_sizes_flags_fallbacks_failures_and_limits(store: Store) -> None:
    measure(store, model("m", 1_000_000), 2.0, limit=7)
    quantized = model("m", 1_000_000, baseline="a", scheme="W4A16", fallbacks=2)
    measure(store, quantized, 2.5, limit=7)
    broken = model("m", 1_000_000, baseline="b", scheme="W4A16", status="failed", error="no memory")
    store.save_quantization(broken)
    text = table(store, "sizes", schemes=["W4A16"])
    (row,) = cells(text)
    assert row["a W4A16 loss world documents-512"] == "2.500 †"
    assert "a W4A16 on m: 2 of 4 layers were rounded to nearest" in text
    assert "b W4A16 on m: failed: no memory" in text
    assert "world: limit=7" in text


def test_a_diverged_loss_says_so_in_the_table(store: Store) -> None:
    twins(store)
    measure(store, model("fp16-s", 500_000, baseline="a", scheme="W1A8"), math.inf)
    row = cells(table(store, "sizes", baselines=["a"]))[0]
    assert row["a W1A8 loss world documents-512"] == "inf (diverged)"
    assert row["a W1A8 Δ loss world documents-512"] == "+inf"


def test_the_table_takes_bits_per_byte_and_others_do_not(store: Store) -> None:
    twins(store)
    row = cells(table(store, "sizes", metric="bits_per_byte"))[0]
    assert row["full precision bits/byte world documents-512"] == "0.650"
    assert row["trained at W1.58A8 Δ bits/byte world documents-512"] == "+0.062"
    with pytest.raises(QBenchError, match="unknown metric 'bits_per_byte'"):
        table(store, metric="bits_per_byte")


def test_the_command_line_draws_and_tables_sizes(store: Store, tmp_path: Path) -> None:
    twins(store)
    figure, common = tmp_path / "figure.png", ["--results", str(store.root)]
    given = ["--kind", "loss-vs-size", "--against", "bitnet-scaling", "-o", str(figure), *common]
    done = CliRunner().invoke(app, ["plot", *given])
    assert done.exit_code == 0 and done.stdout.strip() == str(figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(app, ["table", "--layout", "sizes", "--format", "md", *common])
    assert cells(done.stdout)[0]["Size"] == "0.5M"
    done = CliRunner().invoke(app, ["plot", "--kind", "accuracy-vs-size", "-o", "a.png", *common])
    assert done.exit_code == 2 and "accuracies of two sizes" in done.output
