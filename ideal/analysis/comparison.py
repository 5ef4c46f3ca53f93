"""Whether one method is better than another: both ran with the same seeds and were scored on the same items.

Seeds and items are both samples, of trainings and of all that a benchmark could ask. With a method's score y_si at seed
s on item i, and the mean over both,

    Var(ȳ) = σ²_seeds/S + σ²_items/I + σ²_rest/(S·I) = (MS_seeds + MS_items − MS_rest) / (S·I)

from the mean squares of a two-way analysis of variance; degrees of freedom are Satterthwaite's. Several benchmarks
share their seeds and not their items: the first term is that of the overall score, the others add up. A difference is
paired by seed and by item, which takes out what either does to both methods. Of scores without items seeds alone speak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Tables = Sequence[Array | None]
"""Of each benchmark, [S, I] scores by seed and item; None where the score isn't a mean over items."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; unbounded where the seeds can't say."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference; ``p`` is two-sided."""

    p: float


def estimate(values: Sequence[float], confidence: float, items: Tables = ()) -> Estimate:
    """The mean of one method's values.

    Args:
        values: one for each seed.
        confidence: level of the interval.
        items: what the values are the mean over benchmarks of.
    """
    return _difference(np.array(values, float), items, confidence)[0]


def difference(
    values: Sequence[float], base: Sequence[float], confidence: float, items: Tables = (), base_items: Tables = ()
) -> Difference:
    """How much more a method has than another.

    Args:
        values, base: one for each seed, in the same order.
        confidence: level of the interval.
        items, base_items: what they are the mean over benchmarks of, in the same order; unpaired ones don't count.
    """
    apart = np.array(values, float) - np.array(base, float)
    pairs = zip(items, base_items, strict=True)
    tables = [None if x is None or y is None or x.shape != y.shape else x - y for x, y in pairs]
    found, p = _difference(apart, tables, confidence)
    return Difference(found.mean, found.low, found.high, p)


def holm(p: Sequence[float]) -> list[float]:
    """p values of several comparisons, adjusted so that each is the chance of any false one up to it (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate([(len(p) - rank) * p[n] for rank, n in enumerate(order)])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(each) for each in adjusted]


def _difference(values: Array, items: Tables, confidence: float) -> tuple[Estimate, float]:
    """The mean and its interval, and the p of its being 0."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf), 1.0
    variance, freedom = _variance(values, items)
    if variance <= (1e-12 * float(np.abs(values).max())) ** 2:
        signs = 1.0 if mean == 0 else 2.0 ** (1 - count)  # equal values know no scale: what their signs alone say
        reach = 0.0 if 2.0 ** (1 - count) <= 1 - confidence else math.inf
        return Estimate(mean, mean - reach, mean + reach), signs
    error = math.sqrt(variance)
    reach = error * float(stats.t.ppf((1 + confidence) / 2, freedom))
    return Estimate(mean, mean - reach, mean + reach), 2 * float(stats.t.sf(abs(mean) / error, freedom))


def _variance(values: Array, items: Tables) -> tuple[float, float]:
    """Of the mean, with its degrees of freedom; at least that of seeds, or of items, alone."""
    count = len(values)
    seeds = float(values.var(ddof=1)) / count
    total, of_items = seeds, 0.0
    squares = seeds**2 / (count - 1)
    for table in items:
        if table is None or table.shape[1] < 2:
            continue
        size = table.shape[1]
        share = 1 / (len(items) ** 2 * count * size)  # of a mean square, in the overall mean's variance
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        columns = share * count * float(table.mean(0).var(ddof=1))
        within = share * float((rest**2).sum()) / ((count - 1) * (size - 1))
        total, of_items = total + columns - within, of_items + columns
        squares += columns**2 / (size - 1) + within**2 / ((count - 1) * (size - 1))
    variance = max(total, seeds, of_items)
    return variance, variance**2 / squares if squares else math.inf
