"""The comparison of predicted with actual changes: its derivatives, its measures, its ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from ideal.analysis.fidelity import (
    MODES,
    agreement,
    attainable,
    coverage,
    decided,
    moved,
    off_diagonal,
    own_loss,
    pearson,
    predicted,
    right_signs,
    spearman,
    widening,
    within_sets,
)
from ideal.influence.table import Array

VOLUMES = {"a": 40, "b": 100, "c": 60}
TOKENS = [5.0, 2.0, 8.0]
A = np.random.default_rng(0).normal(size=(3, 2)) + 2.0  # mostly one sign: what training longer is worth


def test_moves_keep_what_they_should() -> None:
    up = moved(VOLUMES, "a", 0.5, "steps")
    assert up == {"a": 60, "b": 88, "c": 52}
    assert list(up) == list(VOLUMES), "the order of domains is that of the data's order"
    assert sum(moved(VOLUMES, "c", -0.35, "steps").values()) == sum(VOLUMES.values())
    assert moved(VOLUMES, "b", -0.25, "epochs") == {"a": 40, "b": 75, "c": 60}


def loss(volumes: Array, mode: str, dilution: float, squares: Array) -> Array:
    """[R] of a world where a step sums tokens' gradients, which lower the losses by a_jr, over the sum of their squares
    to the power of the dilution."""
    usual = np.array(list(VOLUMES.values())) @ (squares * TOKENS) / sum(VOLUMES.values())
    steps = volumes.sum() / sum(VOLUMES.values()) if mode == "epochs" else 1.0
    tokens = volumes / volumes.sum() * TOKENS
    summed = (tokens @ squares) ** dilution
    length = np.array(list(VOLUMES.values())) @ TOKENS / sum(VOLUMES.values())
    return np.asarray(-steps * tokens @ A / summed * usual**dilution / length)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dilution", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("squares", [[1.0, 1.0, 1.0], [3.0, 0.5, 1.0]])
def test_predictions_are_the_derivative(mode: str, dilution: float, squares: list[float]) -> None:
    v = np.array(list(VOLUMES.values()), float)
    w = v * TOKENS / (v @ TOKENS)
    rho = np.array(squares) / (w @ squares)
    crowding = (rho - 1)[:, None] * (w @ A)
    found = predicted(A, crowding, VOLUMES, TOKENS, mode, dilution)
    for j in range(3):
        step = np.zeros(3)
        step[j] = 1e-6 * v[j]
        if mode == "steps":
            step -= (np.arange(3) != j) * v * step[j] / (v.sum() - v[j])
        change = loss(v + step, mode, dilution, np.array(squares)) - loss(v - step, mode, dilution, np.array(squares))
        np.testing.assert_allclose(found[j], change / 2e-6, rtol=1e-6)
    other = predicted(A, crowding, VOLUMES, TOKENS, "epochs" if mode == "steps" else "steps", dilution)
    uncentred = predicted(A, crowding, VOLUMES, TOKENS, mode, None)
    for wrong in (other, uncentred):
        assert np.corrcoef(found.ravel(), wrong.ravel())[0, 1] < 0.99


def noisy(truth: Array, seeds: int, noise: float, seed: int = 0) -> Array:
    return truth + noise * np.random.default_rng(seed).normal(size=(seeds, *truth.shape))


TRUTH = np.random.default_rng(1).normal(size=(6, 6))


def test_a_prediction_that_is_right_agrees() -> None:
    found = agreement(noisy(2 * TRUTH, 8, 1e-6), noisy(TRUTH, 8, 1e-6))
    for name in ("pearson", "spearman", "off diagonal", "within sets", "single"):
        assert found[name].value == pytest.approx(1.0, abs=1e-3)
    assert found["slope"].value == pytest.approx(0.5, abs=1e-3)
    assert right_signs(noisy(TRUTH, 8, 1e-6), noisy(TRUTH, 8, 1e-6)) == (36, 36)
    assert set(agreement(noisy(TRUTH[0], 8, 0.1), noisy(TRUTH[0], 8, 0.1))) == {
        "pearson",
        "spearman",
        "single",
        "slope",
    }


def test_one_that_is_noise_does_not_and_its_interval_says_so() -> None:
    found = agreement(noisy(np.zeros((6, 6)), 8, 1.0, seed=3), noisy(TRUTH, 8, 0.1))
    assert abs(found["pearson"].value) < 0.5
    assert found["pearson"].low < 0 < found["pearson"].high


@pytest.mark.parametrize("seeds", [8, 20])
def test_intervals_of_a_correlation_hold_what_they_say(seeds: int) -> None:
    """Of a strong one, too; percentiles of resampled seeds would lie too low and hold it in a quarter of cases."""
    random, tried, held, percentiles = np.random.default_rng(0), 100, 0, 0
    for number in range(tried):
        x = random.normal(size=(8, 8))
        y = 0.95 * x + np.sqrt(1 - 0.95**2) * random.normal(size=(8, 8))
        predictions, actual = noisy(x, seeds, 0.3, 2 * number), noisy(y, seeds, 0.3, 2 * number + 1)
        found = agreement(predictions, actual)["pearson"]
        assert found.low <= found.value <= found.high
        held += found.low <= pearson(x, y) <= found.high
        draws = random.integers(0, seeds, (100, seeds))
        low, high = np.quantile([pearson(predictions[d].mean(0), actual[d].mean(0)) for d in draws], [0.05, 0.95])
        percentiles += low <= pearson(x, y) <= high
    assert held / tried >= 0.75
    assert percentiles / tried < 0.5


def test_seeds_that_differ_are_better_together_than_alone() -> None:
    found = agreement(noisy(TRUTH, 12, 2.0), noisy(TRUTH, 12, 1e-6))
    assert found["single"].value == pytest.approx(1 / np.sqrt(1 + 4 / TRUTH.var()), abs=0.1)
    assert found["single"].value < found["pearson"].value


def test_the_trivial_rule_is_told_from_influence_off_the_diagonal() -> None:
    """Domains that do most for their own sets: the rule has nearly all of the whole, and nothing off the diagonal."""
    random = np.random.default_rng(4)
    losses = np.array([1.0, 2.0, 3.0, 1.5, 2.5])
    rule = own_loss(losses)
    np.testing.assert_array_equal(rule, np.diag(losses))
    assert own_loss(np.tile(losses, (3, 1))).shape == (3, 5, 5)
    actual = rule + 0.15 * random.normal(size=(5, 5))
    blurred = rule + 0.01 * random.normal(size=(5, 5))  # so that there is something to correlate
    assert pearson(blurred, actual) > 0.95
    assert within_sets(blurred, actual) > 0.95
    assert abs(off_diagonal(blurred, actual)) < 0.5
    assert off_diagonal(actual + 0.01 * random.normal(size=(5, 5)), actual) > 0.95


def test_within_sets_no_column_mean_counts() -> None:
    """A predictor that knows which sets move, and not by which domain, knows nothing there."""
    random = np.random.default_rng(5)
    sets = 10 * random.normal(size=6)
    actual, guess = (sets + random.normal(size=(6, 6)) for _ in range(2))
    assert pearson(guess, actual) > 0.95
    assert abs(within_sets(guess, actual)) < 0.5


def test_equal_values_share_their_rank() -> None:
    assert spearman(np.array([1.0, 1.0, 1.0, 2.0]), np.array([4.0, 3.0, 5.0, 9.0])) == pytest.approx(
        spearman(np.array([1.0, 1.0, 1.0, 2.0]), np.array([5.0, 4.0, 3.0, 9.0]))
    )


def test_only_signs_that_the_retrainings_decide_are_counted() -> None:
    actual = noisy(np.array([1.0, -1.0, 0.0, 0.0, 0.0]), 10, 0.3)
    assert decided(actual)[:2].all()
    wrong_where_undecided = noisy(np.array([1.0, -1.0, *(-np.sign(actual.mean(0)[2:]))]), 10, 1e-9)
    sure = decided(actual)
    right = (np.sign(wrong_where_undecided.mean(0)) == np.sign(actual.mean(0)))[sure]
    assert right_signs(wrong_where_undecided, actual) == (right.sum(), sure.sum())


@pytest.mark.parametrize("seeds", [4, 8, 20])
def test_of_noise_a_twentieth_is_decided_however_few_the_seeds(seeds: int) -> None:
    """Two standard errors would decide 14 % of it with four seeds."""
    assert decided(noisy(np.zeros(4000), seeds, 1.0)).mean() == pytest.approx(0.05, abs=0.012)


def test_what_is_attainable_is_what_a_perfect_predictor_reaches() -> None:
    """Halves agree by less: they are noisy on both sides."""
    truth = np.random.default_rng(2).normal(size=(40, 40))
    actual = noisy(truth, 8, 1.0)
    h, top = attainable(actual, 0)["pearson"]
    assert h == pytest.approx(0.8, abs=0.03)  # two means of 4, noise variance 1/4 each, and a signal of variance 1
    assert top == pytest.approx(pearson(truth, actual.mean(0)), abs=0.01)
    assert top > h + 0.1
    assert attainable(noisy(TRUTH, 8, 1e-9), 0)["off diagonal"] == pytest.approx((1.0, 1.0))
    assert attainable(noisy(np.zeros((20, 20)), 8, 1.0), 0)["pearson"][1] < 0.5


def test_coverage_counts_intervals_that_hold() -> None:
    truth = np.zeros(3)
    low, high = np.array([[-1.0, 0.5, -1], [-1, -1, -1]]), np.array([[1.0, 1, 1], [1, 1, -0.5]])
    assert coverage(low, high, truth) == pytest.approx(4 / 6)


def test_widening_is_what_intervals_lack() -> None:
    """Intervals three times too narrow on one side, right on the other."""
    random = np.random.default_rng(0)
    value = random.normal(size=(200, 30))
    truth = np.zeros(30)
    low, high = value - 1.645 / 3, value + 1.645
    factor, held = widening(low, value, high, truth, 0.9)
    one_sided = np.abs(value) / np.where(value < 0, 1.645, 1.645 / 3)
    assert factor == pytest.approx(np.quantile(one_sided, 0.9))
    assert held == pytest.approx(0.9, abs=0.01)
    assert coverage(value - factor * 1.645 / 3, value + factor * 1.645, truth) == pytest.approx(0.9, abs=0.001)
    exact = np.broadcast_to(truth, value.shape)
    assert widening(exact, exact, exact, truth, 0.9) == (0.0, 1.0)
