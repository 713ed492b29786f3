"""Paired tests, intervals and the correction for many tests: pure functions on arrays.

Two models that answer the same questions are compared question by question: McNemar's exact test
(McNemar 1947), which is the sign test on the questions that only one of them gets right. Numbers
that are not right or wrong (losses of windows, means over tasks) are compared by the same idea,
the randomization test of Fisher and Pitman: if the two models were exchangeable, every difference
could as well have had the other sign. Intervals are paired bootstraps (Efron 1987, BCa), Wilson's
for a single accuracy. Holm (1979) holds the chance of even one false mark at the level.

The bootstrap's own p-value is given too, but no mark is set by it: with five windows that are all
a little worse it says 0.0002, where five signs cannot say less than 1/16.

Everything is b against a: a positive difference means that b is larger. A number that is not finite
makes no test; the result then has ``p=None`` and says why. Left out: tests for windows that depend
on each other (neighbours of one text do, a little), and noise over seeds, which is another thing
than noise over items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

    Values = Sequence[float] | Sequence[bool] | ndarray

LEVEL = 0.05
"""Chance of a false mark in a whole family of tests; intervals cover one minus this."""
RESAMPLES = 9999
NOT_FINITE = "not every number is finite"
_ENUMERATED = 13  # 2^13 signs are fewer than RESAMPLES
_CATEGORIES = 64  # so many different items are resampled by their counts
_BLOCK = 1 << 22  # numbers resampled at a time: 32 MB


@dataclass(frozen=True)
class McNemar:
    """Two models on the same questions."""

    n: int
    n01: int
    """Questions that b alone gets right."""
    n10: int
    """Questions that a alone gets right."""
    difference: float
    """Accuracy of b minus that of a; NaN without questions."""
    p: float
    """Two-sided, exact; 1 where no question is answered differently."""


@dataclass(frozen=True)
class Bootstrap:
    """A paired difference with its interval."""

    n: int
    difference: float
    """b minus a, per unit of weight."""
    low: float | None
    high: float | None
    p: float | None
    """Two-sided: twice the smaller share of resamples at or beyond zero."""
    reason: str = ""
    """Why there is no interval."""


@dataclass(frozen=True)
class Unpaired:
    """Two accuracies compared as if their questions had nothing to do with each other."""

    z: float
    p: float | None


def mcnemar(a_right: Values, b_right: Values) -> McNemar:
    """McNemar's exact test of whether b is right more or less often than a.

    Args:
        a_right: for each question whether a is right, (n,).
        b_right: the same of b, in the same order.

    Raises:
        ValueError: for lengths that differ, or values other than right and wrong.
    """
    import numpy as np

    a, b = _pair(a_right, b_right)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("McNemar's test takes right (1) and wrong (0) only")
    n01, n10 = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())
    difference = (n01 - n10) / len(a) if len(a) else math.nan
    return McNemar(len(a), n01, n10, difference, mcnemar_p(n01, n10))


def mcnemar_p(n01: int, n10: int) -> float:
    """The exact two-sided p of so many questions that only b, and only a, gets right."""
    from statsmodels.stats.contingency_tables import mcnemar as exact

    return float(exact([[0, n10], [n01, 0]], exact=True).pvalue)


def sign_flips(differences: Values, seed: int = 0, n: int = RESAMPLES) -> float | None:
    """Two-sided p of the randomization test on the sum of paired differences.

    Up to 13 differences that are not zero all signs are tried, and p is exact; beyond, ``n`` random
    ones are, and the observed signs count as one more, so that p is never zero.

    Args:
        differences: b minus a of each item, (m,); scaled by whatever weight the item has.
        seed: of the random signs.
        n: how many of them.

    Returns:
        None where a difference is not finite.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(values).all():
        return None
    values = values[values != 0]
    m, observed = len(values), abs(float(values.sum()))
    if m == 0:
        return 1.0
    least = observed - 1e-12 * float(np.abs(values).sum())  # a sum in another order is as large
    if m <= _ENUMERATED:
        codes = np.arange(2**m)[:, None] >> np.arange(m) & 1
        return float((np.abs(2 * (codes @ values) - values.sum()) >= least).mean())
    generator = np.random.default_rng(seed)
    beyond, done, block = 0, 0, max(1, _BLOCK // m)
    while done < n:
        size = min(block, n - done)
        bits = np.frombuffer(generator.bytes(-(-size * m // 8)), dtype=np.uint8)
        flipped = np.unpackbits(bits, count=size * m).reshape(size, m)
        sums = 2 * (flipped @ values) - values.sum()
        beyond += int((np.abs(sums) >= least).sum())
        done += size
    return (beyond + 1) / (n + 1)


def resamples_for(comparisons: int, level: float = LEVEL) -> int:
    """How many random signs so many tests need: the least p must pass Holm's strictest step."""
    return max(RESAMPLES, math.ceil(4 * comparisons / level))


def paired_bootstrap(
    a: Values,
    b: Values,
    weights: Values | None = None,
    seed: int = 0,
    n: int = RESAMPLES,
    *,
    level: float = LEVEL,
    method: str = "bca",
) -> Bootstrap:
    """Bootstrap of sum(b - a) / sum(weights) over items that both were measured on.

    For accuracies a and b are right or wrong, without weights. For perplexities they are the loss
    of each window and the weights its tokens: the difference is then that of the mean losses, and
    its exponential the ratio of the perplexities, the interval's ends included.

    Args:
        a: one number per item, (m,).
        b: the same items of the other model.
        weights: of each item, (m,); 1 where none are given.
        seed: of the resamples.
        n: how many.
        level: the interval covers ``1 - level``.
        method: ``bca`` (bias-corrected and accelerated, Efron 1987) or ``percentile``.

    Raises:
        ValueError: for lengths that differ or another method.
    """
    import numpy as np

    if method not in ("bca", "percentile"):
        raise ValueError(f"unknown method {method!r}; known: bca, percentile")
    first, second = _pair(a, b)
    share = np.ones(len(first)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(share) != len(first):
        raise ValueError(f"{len(share)} weights for {len(first)} items")
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        gap = second - first
    total = float(share.sum())
    value = float(gap.sum()) / total if total else math.nan
    if not (np.isfinite(gap).all() and math.isfinite(value)):
        return Bootstrap(len(gap), value, None, None, None, NOT_FINITE if len(gap) else "no items")
    if len(gap) and not gap.any():  # from 0 to 0 would claim to be certain
        return Bootstrap(len(gap), 0.0, None, None, 1.0, "no item differs")
    if len(gap) < 2:
        return Bootstrap(len(gap), value, None, None, None, "a single item has no spread")
    found = _resampled(gap, share, np.random.default_rng(seed), n)
    below, above = int((found <= 0).sum()), int((found >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (n + 1))
    tails = (level / 2, 1 - level / 2)
    if method == "bca" and float(np.ptp(found)) > 0:
        tails = _bca_tails(found, value, gap, share, level)
    low, high = np.quantile(found, tails)
    return Bootstrap(len(gap), value, float(low), float(high), p)


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Wilson's interval (1927) of k right answers out of n; None without answers."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return None
    low, high = proportion_confint(k, n, alpha=level, method="wilson")
    return float(low), float(high)


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the same order; what was not tested (None) stays so."""
    tested = [p for p in pvalues if p is not None]
    if not tested:
        return list(pvalues)
    from statsmodels.stats.multitest import multipletests

    adjusted = iter(multipletests(tested, method="holm")[1].tolist())
    return [None if p is None else next(adjusted) for p in pvalues]


def unpaired_z(a: float, a_stderr: float | None, b: float, b_stderr: float | None) -> Unpaired:
    """The z-test that forgets the pairing: (b - a) over the root of both squared errors.

    It is here to show what pairing gains, and for numbers whose items are not stored.
    """
    from scipy.stats import norm

    if a_stderr is None or b_stderr is None:
        return Unpaired(math.nan, None)
    spread = math.hypot(a_stderr, b_stderr)
    if spread == 0 or not math.isfinite(b - a):
        return Unpaired(math.nan, None)
    z = float(b - a) / spread
    return Unpaired(z, float(2 * norm.sf(abs(z))))


def _pair(a: Values, b: Values) -> tuple[ndarray, ndarray]:
    import numpy as np

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a pair needs two lists of one length, not {first.shape}, {second.shape}")
    return first, second


def _resampled(gap: ndarray, share: ndarray, generator: Any, n: int) -> ndarray:
    """The statistic of ``n`` resamples of the items, (n,)."""
    import numpy as np

    kinds, counts = np.unique(np.stack([gap, share], axis=1), axis=0, return_counts=True)
    if len(kinds) <= _CATEGORIES:  # drawing items is drawing how many there are of each kind
        drawn = generator.multinomial(len(gap), counts / len(gap), size=n)
        return (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    parts, done = [], 0
    while done < n:
        size = min(max(1, _BLOCK // len(gap)), n - done)
        chosen = generator.integers(0, len(gap), (size, len(gap)))
        parts.append(gap[chosen].sum(axis=1) / share[chosen].sum(axis=1))
        done += size
    return np.concatenate(parts)


def _bca_tails(
    found: ndarray, value: float, gap: ndarray, share: ndarray, level: float
) -> tuple[float, float]:
    """Which quantiles of the resamples are the ends (Efron 1987, eq. 2.3 and 6.6)."""
    from scipy.stats import norm

    n = len(found)
    # ties count half: an accuracy's resamples often equal the value itself
    less = (float((found < value).sum()) + float((found <= value).sum())) / (2 * n)
    bias = norm.ppf(min(max(less, 0.5 / n), 1 - 0.5 / n))
    rest = share.sum() - share
    if (rest <= 0).any():
        return level / 2, 1 - level / 2
    without = (gap.sum() - gap) / rest
    pull = without.mean() - without
    spread = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * spread**1.5) if spread else 0.0
    ends = []
    for tail in (level / 2, 1 - level / 2):
        z = bias + norm.ppf(tail)
        ends.append(float(norm.cdf(bias + z / (1 - acceleration * z))))
    return ends[0], ends[1]
