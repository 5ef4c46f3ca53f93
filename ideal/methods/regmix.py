"""RegMix (Liu et al. 2024): a regression from mixtures to reference losses over many short runs, and its optimum.

Each reference loss is linear in the shares and in their roots, which fall ever slower as losses do; ridge regression,
its strength by leave-one-out. The optimum is the mean of the best of many random mixtures, as in the paper.
"""

from __future__ import annotations

import numpy as np

from ideal.methods.problem import Array, Problem, Stages
from ideal.mixture import round_volumes

SIMULATED = 20_000
"""Random mixtures that the regression is asked for."""
BEST = 100
"""Of those, how many the result is the mean of."""


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """Train on ``methods.regmix_runs`` random mixtures of ``methods.regmix_share`` of the total; the best by them."""
    settings = problem.config.methods
    total = max(len(problem.volumes), round(settings.regmix_share * problem.total))
    mixtures = [
        dict(zip(problem.volumes, round_volumes((total * shares).tolist(), total), strict=True))
        for shares in problem.around(settings.regmix_runs, "regmix", "runs")
    ]
    losses = stages.short(mixtures)
    tried = np.array([list(mixture.values()) for mixture in mixtures]) / total
    found = np.array([[each[domain] for domain in problem.volumes] for each in losses])
    simulated = problem.around(SIMULATED, "regmix", "simulated")
    predicted = predict(tried, found, simulated).mean(1)
    return problem.mixture(simulated[np.argsort(predicted)[:BEST]].mean(0))


def predict(tried: Array, losses: Array, asked: Array) -> Array:
    """[a, R] losses that a ridge regression expects at other mixtures.

    Args:
        tried: [n, M] shares.
        losses: [n, R] what they gave.
        asked: [a, M] shares.
    """
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
