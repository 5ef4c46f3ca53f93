"""What `regmix` expects of mixtures that nobody trained on: regressions from shares to reference losses.

Each reference set's losses are fitted alone, by settings of the lowest leave-one-out error: each run's loss by the
regression on all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ideal.methods.problem import Array

if TYPE_CHECKING:
    from lightgbm import Booster

Regressor = Callable[[Array, Array, Array], Array]
"""([n, M] shares that were tried, [n, R] losses that they gave, [a, M] shares that are asked) → [a, R] losses."""

LEAVES = (2, 3, 5)
"""Smallest leaves that are tried, in runs."""
TREES = 200
"""Most trees."""
TREE: dict[str, Any] = {
    "objective": "regression",
    "learning_rate": 0.05,
    "min_data_in_bin": 1,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
    "verbosity": -1,
}


def boosted(tried: Array, losses: Array, asked: Array) -> Array:
    """Boosted trees (LightGBM), the authors' regressor.

    With their 512 runs they leave its smallest leaf at 20 and stop at up to 1000 trees of rate 0.01 by mixtures that
    they hold out. A leaf of 20 leaves 32 runs without a single split, and none can be spared: the smallest leaf and
    the number of trees are chosen by leave-one-out, of trees with five times that rate, which fit as well.
    """
    predicted = np.empty((len(asked), losses.shape[1]))
    everything = np.ones(len(tried), bool)
    for column, y in enumerate(losses.T):
        errors = np.array([_staged_errors(tried, y, leaf) for leaf in LEAVES])
        leaf, last = np.unravel_index(int(errors.argmin()), errors.shape)
        best = _booster(tried, y, everything, LEAVES[int(leaf)], int(last) + 1)
        predicted[:, column] = best.predict(asked, num_threads=1)
    return predicted


def _staged_errors(tried: Array, y: Array, leaf: int) -> Array:
    """[TREES] mean squared leave-one-out error after each tree."""
    errors = np.zeros(TREES)
    for left in range(len(y)):
        model = _booster(tried, y, np.arange(len(y)) != left, leaf, TREES)
        reached = model.predict(tried[[left]], pred_leaf=True, num_threads=1)
        steps = [model.get_leaf_output(tree, int(number)) for tree, number in enumerate(np.ravel(reached))]
        staged = np.cumsum([*steps, *[0.0] * (TREES - len(steps))])  # it ends early where no split helps
        errors += (staged - y[left]) ** 2
    return errors / len(y)


def _booster(tried: Array, y: Array, kept: Any, leaf: int, trees: int) -> Booster:
    import lightgbm

    settings = {**TREE, "min_data_in_leaf": leaf}
    return lightgbm.train(settings, lightgbm.Dataset(tried[kept], y[kept], params=settings), trees)


def ridge(tried: Array, losses: Array, asked: Array) -> Array:
    """Ridge regression on the shares and on their roots, which fall ever slower as losses do."""
    known, wanted = _features(tried), _features(asked)
    mean, scale = known.mean(0), known.std(0)
    scale[scale == 0] = 1
    Z, centre = (known - mean) / scale, losses.mean(0)
    U, s, Vt = np.linalg.svd(Z, full_matrices=False)
    target = U.T @ (losses - centre)
    predicted = np.empty((len(asked), losses.shape[1]))
    strengths = len(tried) * np.logspace(-6, 2, 33)
    for column in range(losses.shape[1]):
        errors = [_left_out(U, s, losses[:, column] - centre[column], strength) for strength in strengths]
        best = strengths[int(np.argmin(errors))]
        weights = Vt.T @ (s / (s**2 + best) * target[:, column])
        predicted[:, column] = centre[column] + (wanted - mean) / scale @ weights
    return predicted


def _features(shares: Array) -> Array:
    return np.concatenate([shares, np.sqrt(shares)], axis=1)


def _left_out(U: Array, s: Array, y: Array, strength: float) -> float:
    """Mean squared error of each run's loss by the regression on all others (its closed form for ridge)."""
    shrunk = s**2 / (s**2 + strength)
    fitted = U @ (shrunk * (U.T @ y))
    leverage = (U**2 * shrunk).sum(1) + 1 / len(y)  # the mean is fitted, too
    return float(np.mean(((y - fitted) / np.maximum(1 - leverage, 1e-9)) ** 2))


REGRESSORS: dict[str, Regressor] = {"lightgbm": boosted, "ridge": ridge}
