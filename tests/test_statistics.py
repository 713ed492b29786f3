"""Paired tests and intervals against closed forms, enumerations, scipy and statsmodels' own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qbench.comparison.statistics import (
    NOT_FINITE,
    holm,
    mcnemar,
    mcnemar_p,
    paired_bootstrap,
    resamples_for,
    sign_flips,
    unpaired_z,
    wilson,
)


def planted(n10: int, n01: int, n: int = 300, right: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """``right`` of ``n`` questions are right for a; b loses ``n10`` of them, gains ``n01``."""
    a = np.arange(n) < right
    b = a.copy()
    b[:n10] = False
    b[right : right + n01] = True
    return a, b


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (6, 0), (7, 1), (9, 9), (3, 14), (40, 53)])
def test_mcnemar_is_the_two_sided_binomial_test_of_the_questions_answered_differently(counts):
    n10, n01 = counts
    a, b = planted(n10, n01)
    found = mcnemar(a, b)
    m = n10 + n01
    tail = sum(math.comb(m, k) for k in range(min(counts) + 1)) / 2**m
    assert found.p == pytest.approx(min(1.0, 2 * tail), rel=1e-12)
    assert (found.n, found.n10, found.n01) == (300, n10, n01)
    assert found.difference == pytest.approx((n01 - n10) / 300)


def test_mcnemar_and_the_randomization_test_are_one_test_on_right_and_wrong():
    for n10, n01 in itertools.product(range(7), repeat=2):
        a, b = planted(n10, n01, n=40, right=20)
        assert sign_flips(b.astype(float) - a) == pytest.approx(mcnemar(a, b).p, rel=1e-12)


def test_two_hundred_questions_more_that_both_answer_alike_change_nothing_in_mcnemar():
    a, b = planted(6, 1)
    more = np.ones(200, dtype=bool)
    assert mcnemar(np.append(a, more), np.append(b, more)).p == mcnemar(a, b).p


def test_mcnemar_refuses_numbers_that_are_not_right_or_wrong_and_lists_of_two_lengths():
    with pytest.raises(ValueError, match="right"):
        mcnemar([1, 0.5], [1, 1])
    with pytest.raises(ValueError, match="one length"):
        mcnemar([1, 0], [1])


def test_no_questions_make_no_difference_and_no_evidence():
    found = mcnemar([], [])
    assert math.isnan(found.difference)
    assert found.p == 1.0


def brute_force_p(values: list[float]) -> float:
    signs = list(itertools.product((1, -1), repeat=len(values)))
    sums = [abs(sum(s * v for s, v in zip(sign, values, strict=True))) for sign in signs]
    return sum(s >= abs(sum(values)) - 1e-9 for s in sums) / len(signs)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_few_differences_are_tested_over_all_their_signs(size):
    values = np.random.default_rng(size).normal(0.4, 1.0, size).tolist()
    assert sign_flips(values) == pytest.approx(brute_force_p(values))
    assert sign_flips([*values, 0.0, 0.0]) == sign_flips(values)  # a tie tells nothing


def test_the_exact_test_keeps_its_level_whatever_the_differences_are():
    """Were the signs random, p <= level would come about in at most that share of cases."""
    sizes = np.array([0.1, 0.1, 0.4, 1.0, 2.5, 7.0, 7.5, 30.0])
    ps = [sign_flips(np.array(s) * sizes) for s in itertools.product((1, -1), repeat=8)]
    for level in (0.01, 0.05, 0.1, 0.5):
        assert np.mean([p <= level for p in ps]) <= level


def test_many_differences_are_tested_as_scipy_tests_them():
    from scipy.stats import permutation_test

    values = np.random.default_rng(3).normal(0.15, 1.0, 120)
    theirs = permutation_test(
        (values,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(1),
    )
    ours = sign_flips(values)
    error = math.sqrt(ours * (1 - ours) / 9999)
    assert 0.01 < ours < 0.5
    assert ours == pytest.approx(theirs.pvalue, abs=5 * error)


def test_a_p_value_of_random_signs_is_never_zero_and_depends_on_the_seed_alone():
    values = np.linspace(1, 2, 50)
    assert sign_flips(values, n=999) == 1 / 1000
    noisy = np.random.default_rng(0).normal(0.2, 1, 50)
    assert sign_flips(noisy, seed=4) == sign_flips(noisy, seed=4) != sign_flips(noisy, seed=5)


def test_the_least_p_of_random_signs_passes_the_strictest_step_of_holm():
    for comparisons in (1, 30, 500, 2000):
        least = 1 / (resamples_for(comparisons) + 1)
        assert least * comparisons < 0.05


def test_differences_that_are_not_finite_are_not_tested():
    assert sign_flips([1.0, math.inf]) is None
    assert sign_flips([1.0, math.nan]) is None
    assert sign_flips([]) == 1.0


def every_resample(gap: list[float], weights: list[float]) -> np.ndarray:
    """The statistic of each of the n^n equally likely resamples."""
    chosen = np.array(list(itertools.product(range(len(gap)), repeat=len(gap))))
    return np.array(gap)[chosen].sum(axis=1) / np.array(weights)[chosen].sum(axis=1)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [31, 31, 20, 31, 7]])
def test_the_percentile_interval_is_that_of_all_resamples(weights):
    a, b = [3.0, 1.0, 4.0, 1.5, 0.2], [3.5, 1.25, 3.75, 2.5, 0.1]
    every = every_resample([y - x for x, y in zip(a, b, strict=True)], weights)
    found = paired_bootstrap(a, b, weights, n=40_000, method="percentile")
    for end, tail in ((found.low, 0.025), (found.high, 0.975)):
        below, upto = (every < end - 1e-9).mean(), (every <= end + 1e-9).mean()
        assert below - 0.005 <= tail <= upto + 0.005
    p = 2 * min((every <= 0).mean(), (every >= 0).mean())
    assert found.p == pytest.approx(p, abs=0.01)
    assert found.difference == pytest.approx(np.subtract(b, a).sum() / np.sum(weights))


def test_many_kinds_of_items_are_resampled_as_few_kinds_are(monkeypatch):
    """Drawing items one by one, and drawing how many there are of each kind, are one thing."""
    from qbench.comparison import statistics

    a, b = planted(20, 8)
    few = paired_bootstrap(a, b, n=20_000)
    monkeypatch.setattr(statistics, "_CATEGORIES", 0)
    many = paired_bootstrap(a, b, n=20_000)
    assert few.low == pytest.approx(many.low, abs=1 / 300 + 1e-9)
    assert few.high == pytest.approx(many.high, abs=1 / 300 + 1e-9)
    assert few.p == pytest.approx(many.p, abs=0.01)


def test_the_bca_interval_is_scipys():
    from scipy.stats import bootstrap

    draw = np.random.default_rng(8)
    weights = draw.integers(5, 200, 60)
    a = weights * draw.gamma(2.0, 1.0, 60)
    b = a + weights * draw.exponential(0.2, 60) ** 2  # skewed, so that BCa is not the percentiles

    def statistic(x, y, w, axis=-1):
        return (y - x).sum(axis=axis) / w.sum(axis=axis)

    theirs = bootstrap(
        (a, b, weights),
        statistic,
        paired=True,
        method="BCa",
        n_resamples=40_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = paired_bootstrap(a, b, weights, n=40_000)
    plain = paired_bootstrap(a, b, weights, n=40_000, method="percentile")
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)
    assert abs(plain.high - theirs.high) > 0.05 * width


def test_five_windows_that_are_all_worse_are_no_proof_though_the_bootstrap_says_so():
    a = [10.0, 20.0, 30.0, 40.0, 50.0]
    b = [10.1, 20.1, 30.2, 40.1, 50.3]
    assert paired_bootstrap(a, b).p == 0.0002  # the trap: no resample has another sign
    assert sign_flips(np.subtract(b, a)) == 2 / 2**5


def test_items_that_do_not_differ_are_no_certainty_that_none_would():
    found = paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.difference, found.low, found.high, found.p) == (0.0, None, None, 1.0)
    assert found.reason == "no item differs"


@pytest.mark.parametrize(
    ("a", "b"), [([1.0, math.inf], [1.0, 2.0]), ([1, 1], [1, math.nan]), ([math.inf], [math.inf])]
)
def test_a_loss_that_is_not_finite_has_no_interval_and_says_so(a, b):
    found = paired_bootstrap(a, b)
    assert (found.low, found.high, found.p, found.reason) == (None, None, None, NOT_FINITE)


def test_one_item_or_none_has_no_interval_and_says_so():
    assert paired_bootstrap([1.0], [2.0]).reason == "a single item has no spread"
    assert paired_bootstrap([], []).reason == "no items"


def test_wilson_is_the_score_interval():
    k, n, z = 261, 300, 1.959963984540054
    share = k / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert wilson(k, n) == pytest.approx((centre - half, centre + half), rel=1e-12)
    low, high = wilson(20, 20)
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(20 / (20 + z**2))
    assert wilson(0, 0) is None


def test_holm_steps_down_and_leaves_out_what_was_not_tested():
    # Holm 1979: sorted p times what is left, never below the one before, at most 1
    given = [0.01, None, 0.04, 0.03, 0.005, 0.9]
    assert holm(given) == pytest.approx([0.04, None, 0.09, 0.09, 0.025, 0.9])
    assert holm([]) == []
    assert holm([None]) == [None]


def test_the_unpaired_test_is_the_quotient_of_the_errors():
    found = unpaired_z(0.80, 0.03, 0.86, 0.04)
    assert found.z == pytest.approx(0.06 / 0.05)
    assert found.p == pytest.approx(math.erfc(1.2 / math.sqrt(2)))
    assert unpaired_z(0.5, None, 0.6, 0.1).p is None
    assert unpaired_z(1.0, 0.0, 1.0, 0.0).p is None


def test_two_points_on_300_questions_are_seen_by_the_paired_test_alone():
    """80 % against 78 %: what the tests say depends on how many answers changed, not z."""
    expected = {(6, 0): 0.03125, (7, 1): 0.0703125, (13, 7): 0.2631759643554688}
    for (n10, n01), p in expected.items():
        a, b = planted(n10, n01)
        assert mcnemar(a, b).difference == pytest.approx(-0.02)
        assert mcnemar(a, b).p == pytest.approx(p)
        stderr = [math.sqrt(x.mean() * (1 - x.mean()) / 299) for x in (a, b)]
        z = unpaired_z(a.mean(), stderr[0], b.mean(), stderr[1])
        assert z.p == pytest.approx(0.5481, abs=5e-5)  # each error alone is 2.3 points
    low = paired_bootstrap(*planted(6, 0)).high
    assert low is not None and low < 0  # the interval of the six leaves zero out
    assert mcnemar_p(0, 6) == 0.03125
