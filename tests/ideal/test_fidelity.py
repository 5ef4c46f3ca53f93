"""The comparison of predicted with actual changes: its derivatives, its measures, its ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from ideal.fidelity import MODES, agreement, ceiling, coverage, decided, moved, predicted, widening
from ideal.influence import Array

VOLUMES = {"a": 40, "b": 100, "c": 60}
TOKENS = [5.0, 2.0, 8.0]
A = np.random.default_rng(0).normal(size=(3, 2)) + 2.0  # mostly one sign: what training longer is worth


def test_moves_keep_what_they_should() -> None:
    up = moved(VOLUMES, "a", 0.5, "steps")
    assert up == {"a": 60, "b": 88, "c": 52}
    assert list(up) == list(VOLUMES), "the order of domains is that of the data's order"
    assert sum(moved(VOLUMES, "c", -0.35, "steps").values()) == sum(VOLUMES.values())
    assert moved(VOLUMES, "b", -0.25, "epochs") == {"a": 40, "b": 75, "c": 60}


def loss(volumes: Array, mode: str, dilution: float) -> Array:
    """[R] of a world where a step sums tokens' gradients, which lower the losses by a_jr, over T^dilution."""
    usual = np.array(list(VOLUMES.values())) @ TOKENS / sum(VOLUMES.values())
    steps = volumes.sum() / sum(VOLUMES.values()) if mode == "epochs" else 1.0
    tokens = volumes / volumes.sum() * TOKENS
    return np.asarray(-steps * tokens @ A / tokens.sum() ** dilution * usual ** (dilution - 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dilution", [0.2, 0.5, 1.0])
def test_predictions_are_the_derivative(mode: str, dilution: float) -> None:
    v = np.array(list(VOLUMES.values()), float)
    found = predicted(A, VOLUMES, TOKENS, mode, dilution)
    for j in range(3):
        step = np.zeros(3)
        step[j] = 1e-6 * v[j]
        if mode == "steps":
            step -= (np.arange(3) != j) * v * step[j] / (v.sum() - v[j])
        change = (loss(v + step, mode, dilution) - loss(v - step, mode, dilution)) / 2e-6
        np.testing.assert_allclose(found[j], change, rtol=1e-6)
    other = predicted(A, VOLUMES, TOKENS, "epochs" if mode == "steps" else "steps", dilution)
    uncentred = predicted(A, VOLUMES, TOKENS, mode, None)
    for wrong in (other, uncentred):
        assert np.corrcoef(found.ravel(), wrong.ravel())[0, 1] < 0.99


def noisy(truth: Array, seeds: int, noise: float, seed: int = 0) -> Array:
    return truth + noise * np.random.default_rng(seed).normal(size=(seeds, *truth.shape))


TRUTH = np.random.default_rng(1).normal(size=(6, 6))


def test_a_prediction_that_is_right_agrees() -> None:
    found = agreement(noisy(2 * TRUTH, 8, 1e-6), noisy(TRUTH, 8, 1e-6), 0)
    for name in ("pearson", "spearman", "cosine", "signs"):
        assert found[name].value == pytest.approx(1.0, abs=1e-3)
    assert found["slope"].value == pytest.approx(0.5, abs=1e-3)


def test_one_that_is_noise_does_not_and_its_interval_says_so() -> None:
    found = agreement(noisy(np.zeros((6, 6)), 8, 1.0, seed=3), noisy(TRUTH, 8, 0.1), 0)
    assert abs(found["pearson"].value) < 0.5
    assert found["pearson"].low < 0 < found["pearson"].high


def test_seeds_that_differ_are_better_together_than_alone() -> None:
    found = agreement(noisy(TRUTH, 12, 2.0), noisy(TRUTH, 12, 1e-6), 0)
    assert found["single"].value == pytest.approx(1 / np.sqrt(1 + 4 / TRUTH.var()), abs=0.1)
    assert found["single"].low < found["single"].value < found["single"].high < found["pearson"].value


def test_only_signs_that_the_retrainings_decide_are_counted() -> None:
    actual = noisy(np.array([1.0, -1.0, 0.0, 0.0, 0.0]), 10, 0.3)
    assert decided(actual)[:2].all()
    wrong_where_undecided = noisy(np.array([1.0, -1.0, *(-np.sign(actual.mean(0)[2:]))]), 10, 1e-9)
    sure = decided(actual)
    expected = (np.sign(wrong_where_undecided.mean(0)) == np.sign(actual.mean(0)))[sure].mean()
    assert agreement(wrong_where_undecided, actual, 0)["signs"].value == pytest.approx(expected)
    assert decided(noisy(np.zeros(4000), 20, 1.0)).mean() == pytest.approx(0.06, abs=0.02)


def test_the_ceiling_is_how_the_halves_agree() -> None:
    assert ceiling(noisy(TRUTH, 8, 1e-9), 0)["pearson"].value == pytest.approx(1.0)
    assert abs(ceiling(noisy(np.zeros((20, 20)), 8, 1.0), 0)["pearson"].value) < 0.15
    # two means of 4 with noise variance 1/4 each, and a signal of variance 1: r = 1/(1 + 1/4)
    many = noisy(np.random.default_rng(2).normal(size=(40, 40)), 8, 1.0)
    assert ceiling(many, 0)["pearson"].value == pytest.approx(0.8, abs=0.03)


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
