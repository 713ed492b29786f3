"""A planted difference of two points on 300 questions: what paired and unpaired tests say of it.

The first table fixes which answers change (80.0 % against 78.0 %); the second lets chance decide,
and says how often each test finds p < 0.05: for a true loss how often it is seen, without one how
often it is seen all the same. McNemar's share is summed over everything that can happen, that of
the unpaired test counted in 2,000 draws. Seeded, no timing, seconds.
"""

from __future__ import annotations

import math

import numpy as np

from qbench.comparison.statistics import mcnemar, mcnemar_p, paired_bootstrap, unpaired_z

QUESTIONS, RIGHT, TURNS = 300, 240, 2000
CHANGED = ((6, 0), (7, 1), (10, 4), (20, 14))
"""Answers lost and gained: always six more lost."""
RATES = ((0.02, 0.0), (0.025, 0.005), (0.03, 0.01), (0.06, 0.04), (0.01, 0.01), (0.05, 0.05))
"""Shares of the questions lost and gained: four times two points, twice nothing."""


def planted(lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong of both models, (questions,)."""
    before = np.arange(QUESTIONS) < RIGHT
    after = before.copy()
    after[:lost], after[RIGHT : RIGHT + gained] = False, True
    return before, after


def unpaired_p(before: float, after: float) -> float:
    """The p of the z-test that forgets the pairing, from two accuracies."""
    errors = [math.sqrt(share * (1 - share) / (QUESTIONS - 1)) for share in (before, after)]
    p = unpaired_z(before, errors[0], after, errors[1]).p
    return 1.0 if p is None else p


def fixed() -> None:
    print("lost/gained  difference  McNemar  95 % paired bootstrap  unpaired z")
    for lost, gained in CHANGED:
        before, after = planted(lost, gained)
        test, interval = mcnemar(before, after), paired_bootstrap(before, after)
        ends = f"{100 * (interval.low or 0):+.1f} to {100 * (interval.high or 0):+.1f}"
        z = unpaired_p(before.mean(), after.mean())
        change = 100 * test.difference
        print(f"{lost:>4} / {gained:<4}  {change:>+9.1f}  {test.p:7.3f}  {ends:>21}  {z:10.2f}")


def power(lose: float, gain: float) -> float:
    """The chance that McNemar's test finds p < 0.05, whatever number of answers changes."""
    from scipy.stats import binom

    found = 0.0
    for changed in range(1, QUESTIONS + 1):
        weight = binom.pmf(changed, QUESTIONS, lose + gain)
        if weight > 1e-9:
            lost = np.arange(changed + 1)
            p = np.array([mcnemar_p(changed - int(n), int(n)) for n in lost])
            found += weight * binom.pmf(lost, changed, lose / (lose + gain))[p < 0.05].sum()
    return float(found)


def drawn(seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    print("\nlost / gained    McNemar  unpaired z   (how often p < 0.05)")
    for lose, gain in RATES:
        seen = 0
        for _ in range(TURNS):
            before = generator.random(QUESTIONS) < RIGHT / QUESTIONS
            # a right answer is lost, a wrong one gained, so often that the shares of all hold
            chance = np.where(before, lose / 0.8, gain / 0.2)
            after = before ^ (generator.random(QUESTIONS) < chance)
            seen += unpaired_p(before.mean(), after.mean()) < 0.05
        paired, unpaired = 100 * power(lose, gain), 100 * seen / TURNS
        print(f"{100 * lose:>4g} % / {100 * gain:g} %  {paired:>8.1f} %  {unpaired:>8.1f} %")


if __name__ == "__main__":
    fixed()
    drawn()
