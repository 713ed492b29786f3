"""The power law of loss against size: BitNet's published points, exact laws, what has none."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from qbench.comparison import reference
from qbench.comparison.scaling import count_sizes, fit
from qbench.errors import QBenchError

SIZES = [125e6, 350e6, 760e6, 1.3e9, 2.7e9, 6.7e9]  # BitNet, arXiv 2310.11453, section 3.1


def published(method: str) -> dict[int, float]:
    """Size -> loss in bits per token, of Fig. 3."""
    table = reference.load("bitnet-scaling")
    rows = table[(table["method"] == method) & (table["metric"] == "loss")]
    return dict(zip(rows["parameters"], rows["value"], strict=True))


def fitted(method: str) -> dict[int, float]:
    """The published points the paper's law was fitted on, 125M to 6.7B."""
    return {size: loss for size, loss in published(method).items() if size <= 6_700_000_000}


def squares(sizes: list[float], losses: list[float], a: float, b: float, c: float) -> float:
    """What a law leaves, N in 1e9."""
    return sum((a * (n / 1e9) ** b + c - loss) ** 2 for n, loss in zip(sizes, losses, strict=True))


@pytest.mark.parametrize("method", ["Transformer", "BitNet"])
def test_every_fitted_value_is_within_003_of_its_published_point(method: str) -> None:
    points = fitted(method)
    assert len(points) == 6
    law = fit(list(points), list(points.values()))
    distances = [abs(law(size) - loss) for size, loss in points.items()]
    assert max(distances) < 0.03
    assert law.worst == pytest.approx(max(distances), abs=1e-12)


@pytest.mark.parametrize(
    ("method", "a", "b", "c"),
    # the two curves as drawn in Fig. 3, refitted; N in 1e9
    [("Transformer", 0.429, -0.399, 3.733), ("BitNet", 0.641, -0.391, 3.786)],
)
def test_the_curve_is_the_one_drawn_in_the_paper(method: str, a: float, b: float, c: float) -> None:
    points = fitted(method)
    law = fit(list(points), list(points.values()))
    # between the smallest and the largest fitted size; the coefficients themselves are no test
    for size in np.geomspace(125e6, 6.7e9, 50):
        assert law(size) == pytest.approx(a * (size / 1e9) ** b + c, abs=0.002)


def test_the_models_that_were_not_fitted_are_predicted() -> None:
    points = fitted("BitNet")
    law = fit(list(points), list(points.values()))
    held_out = {n: loss for n, loss in published("BitNet").items() if n not in points}
    assert held_out == {13_000_000_000: 4.041, 30_000_000_000: 3.954}
    # 0.020 below the point of 13B, 0.001 above that of 30B
    assert law(13e9) - 4.041 == pytest.approx(-0.0202, abs=0.001)
    assert law(30e9) - 3.954 == pytest.approx(0.0012, abs=0.001)


def test_the_gap_between_the_published_laws_shrinks_as_the_paper_says() -> None:
    laws = {m: fit(list(fitted(m)), list(fitted(m).values())) for m in ("Transformer", "BitNet")}
    gaps = [laws["BitNet"](n) - laws["Transformer"](n) for n in (125e6, 1.3e9, 6.7e9, 100e9)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(0.09, abs=0.01)  # the refitted curves at 100B


@pytest.mark.parametrize(("b", "c"), product([-0.05, -0.391, -1.0, -2.5], [0.0, 1.7, 3.786]))
@pytest.mark.parametrize("scale", [1e-5, 1.0, 100.0])
def test_points_on_a_law_give_that_law_back(b: float, c: float, scale: float) -> None:
    sizes = [scale * size for size in SIZES]
    law = fit(sizes, [0.5 * (size / scale / 1e9) ** b + c for size in sizes])
    assert law.worst < 1e-6
    assert (law.a * (scale * 1e9 / 1e9) ** law.b, law.b, law.c) == pytest.approx(
        (0.5, b, c), rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("method", ["Transformer", "BitNet"])
def test_no_law_of_a_fine_grid_of_exponents_is_nearer(method: str) -> None:
    points = fitted(method)
    sizes, losses = list(map(float, points)), list(points.values())
    law = fit(sizes, losses)
    found = squares(sizes, losses, law.a, law.b, law.c)
    for b in np.linspace(-1.5, -0.01, 600):
        columns = np.stack([(np.array(sizes) / 1e9) ** b, np.ones(len(sizes))], axis=1)
        a, c = np.linalg.lstsq(columns, np.array(losses), rcond=None)[0]
        assert squares(sizes, losses, a, b, c) >= found - 1e-12


def test_the_floor_is_never_below_zero() -> None:
    # a straight line in log N: without the limit the best floor lies far below zero
    losses = [8 - math.log(size / 1e8) for size in SIZES]
    law = fit(SIZES, losses)
    assert law.c == 0 and law.a > 0
    # at c = 0 and this exponent a is that of linear least squares through the origin
    falling = np.array([(size / 1e9) ** law.b for size in SIZES])
    assert law.a == pytest.approx(float(falling @ losses / (falling @ falling)))
    left = squares(SIZES, losses, law.a, law.b, 0)
    for b in (law.b - 0.01, law.b + 0.01):
        falling = np.array([(size / 1e9) ** b for size in SIZES])
        assert squares(SIZES, losses, float(falling @ losses / (falling @ falling)), b, 0) > left


def test_the_unit_of_size_and_of_loss_does_not_bend_the_curve() -> None:
    losses = list(fitted("BitNet").values())
    law = fit(SIZES, losses)
    in_nats = fit(SIZES, [math.log(2) * loss for loss in losses])
    smaller = fit([size / 1000 for size in SIZES], losses)
    for size in (125e6, 1e9, 30e9):
        assert in_nats(size) == pytest.approx(math.log(2) * law(size), rel=1e-6)
        assert smaller(size / 1000) == pytest.approx(law(size), rel=1e-6)


def test_the_order_of_the_points_does_not_matter() -> None:
    losses = list(fitted("BitNet").values())
    law, turned = fit(SIZES, losses), fit(SIZES[::-1], losses[::-1])
    assert turned(1e9) == pytest.approx(law(1e9), rel=1e-9)
    assert (turned.smallest, turned.largest, turned.n_sizes) == (125e6, 6.7e9, 6)


def test_twins_that_differ_by_a_few_norms_are_one_size() -> None:
    assert count_sizes([2_000_000, 2_010_000, 500_000, 502_000]) == 2
    assert count_sizes([]) == 0
    # each is within 5 % of its neighbour, and the last is not within 5 % of the first
    assert count_sizes([100, 104, 108, 112]) == 2


@pytest.mark.parametrize(
    ("sizes", "losses", "said"),
    [
        (SIZES[:3], [5, 4, 3.5], "at least 4 sizes, not 3"),
        ([1e6, 1.01e6, 2e6, 3e6], [5, 4.9, 4, 3.5], "at least 4 sizes, not 3"),
        (SIZES, [5, 4, math.inf, 3, 3, 3], "finite losses"),
        (SIZES, [5, 4, math.nan, 3, 3, 3], "finite losses"),
        ([0, *SIZES[1:]], [5, 4, 3, 3, 3, 3], "at least one parameter"),
        (SIZES, [1, 2, 3, 4, 5, 6], "does not fall with size"),
        (SIZES, [3.0] * 6, "does not fall with size"),
        (SIZES, [9.0, 5, 5, 5, 5, 5], "leave the exponent of a power law open"),
    ],
)
def test_points_without_a_law_say_why(sizes: list[float], losses: list[float], said: str) -> None:
    with pytest.raises(QBenchError, match=said):
        fit(sizes, losses)


def test_a_law_reads_as_in_the_paper() -> None:
    law = fit(SIZES, [0.641 * (size / 1e9) ** -0.391 + 3.786 for size in SIZES])
    assert str(law) == "0.641·N^−0.391 + 3.786"
