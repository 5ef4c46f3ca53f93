"""Draws that differ only where volumes do, whole numbers that keep a sum, and the order of the data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ideal.mixture import data_order, draw, round_volumes


def test_a_larger_volume_holds_all_of_a_smaller_one() -> None:
    draws = [draw(10, volume, 0, "math") for volume in (1, 4, 10, 13, 20, 37)]
    for small, large in pairwise(draws):
        np.testing.assert_array_equal(large[: len(small)], small)


def test_whole_copies_come_first_and_the_rest_without_repetition() -> None:
    counts = np.bincount(draw(10, 37, 0, "math"), minlength=10)
    assert sorted(counts) == [3] * 3 + [4] * 7
    assert len(set(draw(10, 6, 0, "math").tolist())) == 6


def test_a_draw_is_its_seeds_and_domains_own() -> None:
    one = draw(50, 20, 0, "math")
    np.testing.assert_array_equal(one, draw(50, 20, 0, "math"))
    assert not np.array_equal(one, draw(50, 20, 1, "math"))
    assert not np.array_equal(one, draw(50, 20, 0, "code"))
    assert not np.array_equal(one, np.arange(20)), "a file's order is no sample of it"


def test_every_example_is_drawn_equally_often() -> None:
    counts = sum(np.bincount(draw(10, 3, seed, "math"), minlength=10) for seed in range(2000))
    np.testing.assert_allclose(counts, 600, rtol=0.15)


@pytest.mark.parametrize(
    ("volumes", "expected"),
    [
        ([1.5, 2.5, 3.0], [2, 2, 3]),  # a tie: the earlier domain
        ([0.9, 0.9, 5.2], [1, 1, 5]),
        ([3.2, 3.3, 3.5], [3, 3, 4]),
        ([4.0, 6.0], [4, 6]),
        ([3.9999999999, 6.0000000001], [4, 6]),  # what a sum of floats makes of whole numbers
    ],
)
def test_whole_volumes_keep_the_total(volumes: list[float], expected: list[int]) -> None:
    assert round_volumes(volumes, round(sum(volumes))) == expected


def test_volumes_of_another_total_are_an_error() -> None:
    with pytest.raises(ValueError, match="not 13"):
        round_volumes([4.0, 6.0], 13)


def test_every_epoch_is_a_new_order_of_everything() -> None:
    order = data_order({"a": 5, "b": 15}, 2.5, 0)
    assert len(order) == 50
    first, second, half = order[:20], order[20:40], order[40:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert not np.array_equal(first, second)
    assert len(set(half.tolist())) == 10
    np.testing.assert_array_equal(order, data_order({"a": 5, "b": 15}, 2.5, 0))
    assert not np.array_equal(order, data_order({"a": 5, "b": 15}, 2.5, 1))
    assert len(data_order({"a": 3}, 0.01, 0)) == 1, "a run has a step"


def test_a_changed_volume_leaves_the_order_of_the_rest() -> None:
    """Two runs then differ by their mixtures, not by a new shuffle."""

    def named(volumes: dict[str, int]) -> list[tuple[str, int]]:
        entries = [(d, i) for d, v in volumes.items() for i in range(v)]
        return [entries[p] for p in data_order(volumes, 1, 0)]

    few, many = named({"a": 10, "b": 30}), named({"a": 18, "b": 24})
    both = set(few) & set(many)
    assert len(both) == 34
    assert [e for e in few if e in both] == [e for e in many if e in both]
