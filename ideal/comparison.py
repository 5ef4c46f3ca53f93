"""Whether one method is better than another: seeds are the repeats, and both methods ran with the same ones.

Student's t over seeds; a difference is paired, which takes out what a seed does to both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its interval; unbounded where one seed can't say."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference; ``p`` is two-sided."""

    p: float


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """The mean of one method's values.

    Args:
        values: one for each seed.
        confidence: level of the interval.
    """
    mean, reach = _mean_and_reach(values, confidence)
    return Estimate(mean, mean - reach, mean + reach)


def difference(values: Sequence[float], base: Sequence[float], confidence: float) -> Difference:
    """How much more a method has than another.

    Args:
        values, base: one for each seed, in the same order.
        confidence: level of the interval.
    """
    apart = [value - other for value, other in zip(values, base, strict=True)]
    mean, reach = _mean_and_reach(apart, confidence)
    if reach == 0:
        p = 1.0 if mean == 0 else 0.0
    elif math.isinf(reach):
        p = 1.0
    else:
        p = float(stats.ttest_1samp(apart, 0).pvalue)
    return Difference(mean, mean - reach, mean + reach, p)


def _mean_and_reach(values: Sequence[float], confidence: float) -> tuple[float, float]:
    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return float(np.mean(values)), error * float(stats.t.ppf((1 + confidence) / 2, count - 1))
