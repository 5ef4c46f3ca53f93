"""RegMix (Liu et al. 2024): a regression from mixtures to reference losses over many short runs, and its optimum.

The mixtures are drawn as in the authors' code: D0's shares are flattened (temperature ½), so that what fills D0 doesn't
fill every mixture, and each draw has a Dirichlet strength of its own between 0.1 (nearly one domain alone) and 5 (near
the flattened shares), log-uniformly. The regressor is LightGBM, as theirs, or ridge (``ideal.methods.regression``). The
optimum is the mean of the best of many mixtures that are drawn likewise; the authors draw those about D0's own shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ideal.methods.problem import Array, Problem, Stages
from ideal.methods.regression import REGRESSORS
from ideal.mixture import round_volumes, seeded

TEMPERATURE = 0.5
WEAKEST, STRONGEST = 0.1, 5.0
"""Sums of the Dirichlet parameters."""
SIMULATED = 100_000
"""Mixtures that the regression is asked for."""
BEST = 128
"""Of those, how many the result is the mean of."""


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """Train on ``methods.regmix_runs`` mixtures of ``methods.regmix_share`` of the total; the best by them."""
    settings = problem.config.methods
    total = max(len(problem.volumes), round(settings.regmix_share * problem.total))
    mixtures = [
        dict(zip(problem.volumes, round_volumes((total * shares).tolist(), total), strict=True))
        for shares in drawn(problem, settings.regmix_runs, "runs")
    ]
    return problem.mixture(stages.regmix(mixtures))


def drawn(problem: Problem, count: int, name: str) -> Array:
    """[count, M] shares of examples, seeded by ``name``."""
    random = seeded(problem.config.seed, "regmix", name)
    flat = problem.shares**TEMPERATURE
    strengths = np.exp(random.uniform(np.log(WEAKEST), np.log(STRONGEST), (count, 1)))
    logs = log_gammas(random, strengths * flat / flat.sum())
    parts = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(parts / parts.sum(1, keepdims=True), float)


def log_gammas(random: np.random.Generator, shapes: Array) -> Array:
    """Logarithms of Gamma variates, which for small shapes are less than any float: G(a) = G(a + 1) · U^(1/a)."""
    return np.asarray(np.log(random.gamma(shapes + 1)) + np.log(random.random(shapes.shape)) / shapes, float)


def optimum(
    problem: Problem, mixtures: Sequence[Mapping[str, int]], losses: Sequence[Mapping[str, float]]
) -> list[float]:
    """Each domain's share of the examples: of simulated mixtures within the limits, the mean of the best.

    Args:
        losses: by reference set, of each mixture.
    """
    volumes = np.array([list(mixture.values()) for mixture in mixtures], float)
    found = np.array([[each[domain] for domain in problem.volumes] for each in losses])
    simulated = drawn(problem, SIMULATED, "simulated")
    copies = problem.config.equilibrium.max_copies
    most = copies * np.array([problem.pools[domain] for domain in problem.volumes]) / problem.total
    within = (simulated <= most).all(1)
    if within.sum() >= BEST:
        simulated = simulated[within]
    regress = REGRESSORS[problem.config.methods.regmix_regressor]
    predicted = regress(volumes / volumes.sum(1, keepdims=True), found, simulated) @ problem.weights
    best: list[float] = simulated[np.argsort(predicted, kind="stable")[:BEST]].mean(0).tolist()
    return best
