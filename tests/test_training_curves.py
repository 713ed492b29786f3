"""Loss curves on disk and as figures."""

import math

import pytest

from qbench.errors import QBenchError
from qbench.training import curves
from qbench.training.curves import COLUMNS, Curve, CurveWriter, Row, read_curve


def row(step, loss=2.0, eval_loss=None):
    return Row(step, 100 * step, loss, eval_loss, 1e-3, float(step))


def written(path, steps):
    writer = CurveWriter(path)
    for step in steps:
        writer.append(row(step))
    return path


def test_a_curve_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "loss.csv"
    writer = CurveWriter(path)
    rows = [Row(10, 1000, 3.25, None, 1e-3, 0.5), Row(20, 2000, 2.5, 2.75, 5e-4, 1.0)]
    for one in rows:
        writer.append(one)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_curve(path) == rows == writer.rows


def test_continuing_drops_the_steps_beyond_the_checkpoint(tmp_path):
    path = written(tmp_path / "loss.csv", [10, 20, 30, 40])
    writer = CurveWriter(path, step=20)
    assert writer.seconds == 20.0
    writer.append(row(30, loss=1.0))
    assert [(r.step, r.loss) for r in read_curve(path)] == [(10, 2.0), (20, 2.0), (30, 1.0)]


@pytest.mark.parametrize("torn", ["30,3000,1.", "30,3000,1.5,,0.001,3"])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, torn):
    path = written(tmp_path / "loss.csv", [10, 20])
    with path.open("a") as file:
        file.write(torn)
    assert [r.step for r in read_curve(path)] == [10, 20]
    CurveWriter(path, step=30).append(row(40))
    assert [r.step for r in read_curve(path)] == [10, 20, 40]


def test_a_training_from_the_start_begins_its_curve_anew(tmp_path):
    path = written(tmp_path / "loss.csv", [10, 20])
    assert CurveWriter(path).rows == []
    assert read_curve(path) == []


def test_a_file_that_is_no_curve_is_refused(tmp_path):
    path = tmp_path / "loss.csv"
    with pytest.raises(QBenchError, match="cannot read"):
        read_curve(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(QBenchError, match="is no loss curve; its first line is step,tokens"):
        read_curve(path)
    path.write_text(",".join(COLUMNS) + "\n1,2\n")
    with pytest.raises(QBenchError, match="loss.csv is damaged"):
        read_curve(path)


def drawn(*found, title=""):
    return curves.draw(found, title).axes[0]


def test_a_figure_has_a_line_per_twin_against_tokens_with_its_unit():
    rows = [row(step, loss=5 / step) for step in range(1, 100)]
    axes = drawn(Curve("fp16", "FP16", rows), Curve("b1", "BitNet", rows[:50]))
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["FP16"].get_xdata()) == [r.tokens / 1e3 for r in rows]  # up to 9900
    assert list(lines["BitNet"].get_ydata()) == [r.loss for r in rows[:50]]
    assert axes.get_xlabel() == "thousand tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert lines["FP16"].get_color() != lines["BitNet"].get_color()


def test_held_out_losses_are_points():
    rows = [row(1), row(2, eval_loss=2.5), row(3), row(4, eval_loss=2.25)]
    points = [
        line for line in drawn(Curve("b158", "x", rows)).get_lines() if line.get_marker() == "o"
    ]
    assert [(200 / 1, 2.5), (400 / 1, 2.25)] == list(zip(*points[0].get_data(), strict=True))


def test_several_learning_rates_of_a_twin_share_its_colour_and_differ_in_style():
    rows = [row(1), row(2)]
    axes = drawn(*(Curve("fp16", f"lr {i}", rows) for i in range(3)))
    lines = [line for line in axes.get_lines() if line.get_marker() in ("None", None, "")]
    assert len({line.get_color() for line in lines}) == 1
    assert len({line.get_linestyle() for line in lines}) == 3


def test_a_cross_stands_where_a_loss_diverged():
    rows = [row(1), row(2, loss=3.0)]
    lines = drawn(Curve("fp16", "x", rows, diverged_at=3)).get_lines()
    (cross,) = [line for line in lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (200.0, 3.0)


def test_a_loss_lost_before_its_first_row_is_named_in_the_legend():
    found = [Curve("b1", "y", [row(1), row(2)]), Curve("fp16", "x", [], diverged_at=1)]
    (legend,) = curves.draw(found).legends
    assert [text.get_text() for text in legend.get_texts()] == ["y", "x: lost at step 1"]


def test_the_first_losses_do_not_set_the_scale_but_a_later_spike_does():
    falling = [row(step, loss=100.0 if step == 1 else 3 - step / 100) for step in range(1, 101)]
    assert drawn(Curve("fp16", "x", falling)).get_ylim()[1] < 4
    spiking = [*falling, row(101, loss=50.0)]
    assert 50 < drawn(Curve("fp16", "x", spiking)).get_ylim()[1] < 60


def test_a_line_that_leaves_upwards_is_worse_than_an_untrained_model():
    rows = [row(1, loss=6.0), *(row(step, loss=500.0) for step in range(2, 50))]
    good = [row(step, loss=6.0 / step) for step in range(1, 50)]
    low, high = drawn(Curve("fp16", "x", rows), Curve("b1", "y", good)).get_ylim()
    assert -0.5 < low < 6 / 49 and 6.0 < high < 6.5
    low, high = drawn(Curve("fp16", "x", rows)).get_ylim()  # nothing else to show
    assert 6.0 < high < 1000


def test_a_loss_that_is_infinite_does_not_break_the_scale():
    rows = [row(1), row(2), row(3, loss=math.inf)]
    assert math.isfinite(drawn(Curve("fp16", "x", rows)).get_ylim()[1])


def test_nothing_to_draw_is_said():
    with pytest.raises(QBenchError, match="nothing to draw"):
        curves.draw([Curve("fp16", "x", [])])


def test_the_same_curve_gives_the_same_bytes(tmp_path):
    found = [Curve("fp16", "FP16", [row(1), row(2)])]
    for name in ("a.png", "b.png"):
        curves.save(curves.draw(found), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_figure_of_another_kind_is_refused(tmp_path):
    with pytest.raises(QBenchError, match="must end in .png, .svg or .pdf"):
        curves.save(curves.draw([Curve("fp16", "x", [row(1)])]), tmp_path / "a.jpg")
