"""Whether a number came out again: the noise it is allowed, and the verdict.

Two careful measurements of one row never agree to the last digit. What is allowed is

    half a unit of the last printed digit, and the largest of
    - the preset's tolerance, which covers dtype, kernels and library versions (the same weights see
      the same text in both measurements, so no sampling error is allowed);
    - for a row that was calibrated 1.96 paired standard errors of its difference from the
      full-precision row over the same windows or questions: how unevenly quantization moves the
      items stands in for what another calibration draw would do (rounding to nearest reads nothing,
      and gets none of it);
    - for a row that draws at random and was run with several seeds, the half-width of the 95 %
      interval for one further draw, t·s·sqrt(1 + 1/n), in the logarithm for perplexities, whose
      draws have a long tail.

What was measured otherwise (fewer items, another window, other weights) gets no verdict at all, nor
does a number whose noise is so wide that nearly everything would lie within it (:func:`too_wide`).
Left out: tests (:mod:`qbench.comparison.statistics`); there is one published number, without items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qbench.reproduction.presets import Measure, Tolerance
from qbench.reproduction.published import Published

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame

    from qbench.comparison.pairing import Paired

QUANTILE = 1.96
"""Of the normal distribution: 95 % lie within so many standard errors."""
GATE_ERRORS = 3.0
"""Standard errors that a gate adds where only some of the items were measured."""
WITHIN, DIFFERS = "within noise", "differs"
WIDEST_SHARE = 0.25
"""Of a published perplexity: noise beyond it tells nothing apart."""
WIDEST_POINTS = 5.0
"""The same of an accuracy."""


@dataclass(frozen=True)
class Reproduced:
    """What came out of one or several runs of a row, in the published unit."""

    values: tuple[float, ...]
    """One per seed."""
    stderr: float | None = None
    """Over items, of the first."""
    paired: float | None = None
    """Standard error over items of the difference from the full-precision row, of the first."""

    def centre(self, measure: Measure) -> float:
        """The one number that is printed: the mean, of perplexities the geometric one."""
        if len(self.values) == 1:
            return self.values[0]
        if measure.is_perplexity and all(value > 0 for value in self.values):
            return math.exp(sum(map(_log, self.values)) / len(self.values))
        return sum(self.values) / len(self.values)


def noise(published: Published, measure: Measure, found: Reproduced, tolerance: Tolerance) -> float:
    """How far a row may be off, rounding included, in the published unit."""
    share = tolerance.perplexity / 100 * published.value
    half_widths = [share if measure.is_perplexity else tolerance.accuracy]
    if found.paired is not None:
        half_widths.append(QUANTILE * found.paired)
    spread = seed_interval(found.values, found.centre(measure), measure.is_perplexity)
    if spread is not None:
        half_widths.append(spread)
    return published.rounding + max(half_widths)


def seed_interval(values: Sequence[float], centre: float, is_perplexity: bool) -> float | None:
    """Half-width of the 95 % prediction interval for one further draw; None for a single one.

    Args:
        values: one number per seed.
        centre: their mean, or geometric mean.
        is_perplexity: whether the interval is taken in the logarithm; it is wider upwards, and the
            wider half is returned.
    """
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.stats import t

    scaled = [_log(value) for value in values] if is_perplexity else list(values)
    mean = sum(scaled) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in scaled) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation * math.sqrt(1 + 1 / n)
    return centre * math.expm1(min(half, 700.0)) if is_perplexity else half


def too_wide(published: Published, measure: Measure, allowed: float) -> bool:
    """Whether noise is so wide that a verdict would say nothing: two seeds, or uneven ones."""
    share = WIDEST_SHARE * published.value
    return allowed > published.rounding + (share if measure.is_perplexity else WIDEST_POINTS)


def verdict(difference: float, allowed: float) -> str:
    """``within noise`` or ``differs``; a difference that is not finite differs."""
    return WITHIN if abs(difference) <= allowed else DIFFERS


def paired_error(pairs: Paired, measure: Measure, value: float) -> float | None:
    """Standard error of a row's difference from the full-precision row, in the published unit.

    Args:
        pairs: the items of the full-precision row and of this one.
        measure: the column.
        value: the row's own number, in the published unit.
    """
    from qbench.comparison.pairing import right
    from qbench.evaluation.estimates import ratio

    if not measure.is_perplexity:
        gap = right(pairs.b, measure.metric).astype(float) - right(pairs.a, measure.metric)
        error = ratio(gap, [1] * len(gap))[1]
        return None if error is None else 100 * error
    if "corpus" in pairs.b or not (math.isfinite(value) and value > 1):
        return None
    before, after = (_losses(items) for items in (pairs.a, pairs.b))
    count = pairs.b["n_tokens"].to_numpy(dtype=float)
    error = ratio(after - before, count)[1]
    if error is None:
        return None
    # what the loss is divided by: the tokens themselves, or the words of a perplexity per word
    units = float(after.sum()) / math.log(value)
    return value * error * float(count.sum()) / units


def _losses(items: DataFrame) -> ndarray:
    """Loss of every item in nats."""
    return (items["nll"] if "nll" in items else -items["loglikelihood"]).to_numpy(dtype=float)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan
