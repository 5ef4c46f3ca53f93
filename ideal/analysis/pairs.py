"""Which domains help or hurt which capabilities, beyond noise.

More of domain j means less of the others, so its effect on reference set r is its influence above the mixture's,
in units of the largest on that set:

    c_jr = e_jr / max_i |e_ir|        e_jr: what an example of j is worth to r, as the update counts it

(``ideal.equilibrium.values``). So every column's mean over the mixture is 0: where a set's own domain does most for it,
the others hurt it by taking that one's place. A domain's effect on its own set is left out.

Intervals come from the bootstrap (``InfluenceTable.resampled``), each resample centred and scaled in the same way.
Among the M·(R − 1) pairs some would look real by luck: Benjamini and Hochberg (1995) keep the expected share of false
ones among those named below a rate. Where four domains differed by noise alone (rate 0.1, 150 tables of the kind in
tests/ideal/analysis/test_pairs.py), 0, 7 and 14 % of the tables with 4, 8 and 16 blocks named a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ideal.influence.table import Array, InfluenceTable

ROUNDING = 1e-12
"""Differences this small beside the influences themselves are none."""


@dataclass(frozen=True)
class Pair:
    """What more of a domain does to another domain's reference set.

    Attributes:
        domain, reference: their numbers.
        value: c_jr; positive: more of the domain lowers the loss there.
        low, high: its bootstrap interval.
        p: two-sided bootstrap p-value of c_jr = 0.
        effect: `helps`, `hurts`, or `undecided`.
    """

    domain: int
    reference: int
    value: float
    low: float
    high: float
    p: float
    effect: str


def pairs(
    table: InfluenceTable, worth: Callable[[Array], Array], *, resamples: int, confidence: float, seed: int
) -> list[Pair]:
    """All pairs of a domain and another's reference set, the clearest first.

    Args:
        worth: from influences a_jr [..., M, R] to e_jr, of the same shape.
        confidence: level of the intervals; 1 − confidence is the rate of false pairs among those named.
    """
    matrix = table.matrix()
    value = relative(worth(matrix), matrix)
    cloud = table.resampled(resamples, seed)
    cloud = relative(worth(cloud), cloud)
    tail = (1 - confidence) / 2
    low, high = np.quantile(cloud, [tail, 1 - tail], axis=0)
    p = p_values(cloud)
    others = [(j, r) for j, r in np.ndindex(*value.shape) if j != r]
    real = discoveries(np.array([p[at] for at in others]), 1 - confidence)
    found = [
        Pair(*at, float(value[at]), float(low[at]), float(high[at]), float(p[at]), _effect(low[at], high[at], named))
        for at, named in zip(others, real, strict=True)
    ]
    return sorted(found, key=lambda pair: (pair.p, -abs(pair.value)))


def relative(worth: Array, matrix: Array) -> Array:
    """[..., M, R] c_jr; a column without differences stays 0.

    Args:
        worth, matrix: [..., M, R] e_jr, and the influences a_jr that they are of.
    """
    largest = np.abs(worth).max(-2, keepdims=True)
    real = largest > ROUNDING * np.abs(matrix).max(-2, keepdims=True)
    return np.asarray(np.where(real, worth / np.where(real, largest, 1.0), 0.0))


def p_values(cloud: Array) -> Array:
    """[...] twice the smaller share of the resamples [S, ...] on one side of 0, at least 1 / (S + 1)."""
    smaller = np.minimum((cloud <= 0).mean(0), (cloud >= 0).mean(0))
    return np.asarray(np.clip(2 * smaller, 1 / (len(cloud) + 1), 1.0))


def discoveries(p: Array, rate: float) -> npt.NDArray[np.bool_]:
    """[N] which of N p-values count: all up to the largest p_(k) ≤ rate·k/N, in ascending order."""
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
    found = np.zeros(len(p), bool)
    found[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return found


def _effect(low: float, high: float, named: bool) -> str:
    if not named or low <= 0 <= high:
        return "undecided"
    return "helps" if low > 0 else "hurts"
