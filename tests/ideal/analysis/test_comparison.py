"""Intervals and p values: by hand, and by simulation of seeds and items, both drawn anew each time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ideal.analysis.comparison import Array, difference, estimate, holm

DRAWS = 1500


def test_students_t_by_hand() -> None:
    # three values 1, 2, 3: deviation 1, error 1/√3, t(97.5 %, 2) = 4.3027
    found = estimate([1, 2, 3], 0.95)
    assert (found.mean, found.high - 2) == (2, pytest.approx(4.30265 / math.sqrt(3), rel=1e-4))
    apart = difference([2, 4, 6], [1, 2, 3], 0.95)
    assert apart.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641 with 2 degrees of freedom
    assert difference([1.0], [0.5], 0.95).p == 1
    assert math.isinf(difference([1.0], [0.5], 0.95).high)


def test_two_way_variance_by_hand() -> None:
    # rows 1 and 4: mean squares 13.5 of seeds (df 1), 2 of items (df 2), 0 of the rest: (13.5 + 2 − 0) / 6
    table = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    found = estimate(table.mean(1).tolist(), 0.9, [table])
    variance, freedom = 15.5 / 6, 15.5**2 / (13.5**2 / 1 + 2**2 / 2)
    reach = math.sqrt(variance) * stats.t.ppf(0.95, freedom)
    assert (found.mean, found.high - found.mean) == (2.5, pytest.approx(reach))


def test_equal_differences_are_worth_what_their_signs_are() -> None:
    """Four seeds that all gain 0.1 have their signs to show and no scale: 2^(1-4), not 0."""
    base = [0.1, 0.2, 0.3, 0.4]
    assert difference([each + 0.1 for each in base], base, 0.95).p == 0.125
    assert math.isinf(difference([each + 0.1 for each in base], base, 0.95).low)
    six = difference([0.5] * 6, [0.25] * 6, 0.95)
    assert (six.p, six.low, six.high) == (2**-5, 0.25, 0.25)
    assert difference(base, base, 0.95).p == 1


def test_scores_of_items_that_another_lacks_are_not_paired() -> None:
    table = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 7.0]])
    values = table.mean(1).tolist()
    alone = difference(values, [0.0, 0.0], 0.9)
    assert difference(values, [0.0, 0.0], 0.9, [table], [None]) == alone
    assert difference(values, [0.0, 0.0], 0.9, [table], [np.zeros((2, 2))]) == alone
    assert difference(values, [0.0, 0.0], 0.9, [table], [np.zeros((2, 3))]) != alone


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def drawn(random: np.random.Generator, seeds: int, benchmarks: int, items: int, binary: bool) -> list[Array]:
    """Of each benchmark, [S, I]: a seed does something to all, an item is easy or hard for all seeds, and luck."""
    common = 0.1 * random.normal(size=(seeds, 1))
    tables = []
    for _ in range(benchmarks):
        own, hard = 0.1 * random.normal(size=(seeds, 1)), random.normal(size=items)
        table = common + own + hard + 0.5 * random.normal(size=(seeds, items))
        tables.append((table > 0).astype(float) if binary else table)
    return tables


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize(("benchmarks", "items", "binary"), [(1, 60, False), (3, 40, True)])
def test_intervals_hold_the_population_mean(seeds: int, benchmarks: int, items: int, binary: bool) -> None:
    """93 to 97 % of the 95 % intervals do, and of those that know of seeds alone far fewer."""
    random, truth = np.random.default_rng(seeds), 0.5 if binary else 0.0
    held, of_seeds = [], []
    for _ in range(DRAWS):
        tables = drawn(random, seeds, benchmarks, items, binary)
        values = np.mean([table.mean(1) for table in tables], 0).tolist()
        both, one = estimate(values, 0.95, tables), estimate(values, 0.95)
        held.append(both.low <= truth <= both.high)
        of_seeds.append(one.low <= truth <= one.high)
    assert 0.93 <= np.mean(held) <= 0.97
    assert np.mean(of_seeds) < 0.85


@pytest.mark.parametrize("seeds", [5, 10])
def test_differences_are_found_by_chance_as_often_as_they_say(seeds: int) -> None:
    """Two methods alike, on the same seeds and items, each item a bit better for one of them."""
    random = np.random.default_rng(seeds)
    p, of_seeds = [], []
    for _ in range(DRAWS):
        common = random.normal(size=50)
        first, second = (
            common + 0.5 * random.normal(size=50) + 0.1 * random.normal(size=(seeds, 1))
            + 0.3 * random.normal(size=(seeds, 50))
            for _ in range(2)
        )  # fmt: skip
        values, base = first.mean(1).tolist(), second.mean(1).tolist()
        p.append(difference(values, base, 0.95, [first], [second]).p)
        of_seeds.append(difference(values, base, 0.95).p)
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07
    assert np.mean(np.array(of_seeds) < 0.05) > 0.1
