"""Which of several settings gave the best mixture, and how sure that is.

Each setting's final model has a loss on every reference example. The examples are drawn again (bootstrap), the same
ones for all settings, and with several seeds the seeds too: what is common to all settings cancels, and a setting is
best only as often as its lead survives. The reference sets steered the mixtures, so this says nothing about examples
that no update has seen; benchmarks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ideal.influence.table import Array


@dataclass(frozen=True)
class Selection:
    """K settings compared; lower losses are better.

    Attributes:
        best: the setting with the lowest loss.
        losses: [K] objective, mean over seeds, nats per token.
        chances: [K] share of resamples in which a setting is the best.
        low, high: [K] interval of its loss above the best one's.
    """

    best: int
    losses: Array
    chances: Array
    low: Array
    high: Array


def select(
    losses: Sequence[Array], tokens: Sequence[Array], *, objective: str, resamples: int, confidence: float, seed: int
) -> Selection:
    """Compare K settings with S seeds each on R reference sets.

    Args:
        losses: of each set, [K, S, n] its examples' summed losses.
        tokens: of each set, [n] their supervised tokens.
        objective: `macro`, each set alike, or `micro`, each token alike.
    """
    random = np.random.default_rng(seed)
    seeds = losses[0].shape[1]
    counts = [random.multinomial(len(t), np.full(len(t), 1 / len(t)), resamples).astype(float) for t in tokens]
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    cloud = np.einsum("bks,bs->bk", _objective(losses, tokens, counts, objective), drawn)
    point = _objective(losses, tokens, [np.ones((1, len(t))) for t in tokens], objective)[0].mean(1)
    best = int(point.argmin())
    tail = (1 - confidence) / 2
    low, high = np.quantile(cloud - cloud[:, [best]], [tail, 1 - tail], axis=0)
    chances = np.bincount(cloud.argmin(1), minlength=len(point)) / resamples
    return Selection(best, point, chances, low, high)


def interval(values: Sequence[float], chances: Array, confidence: float) -> tuple[float, float]:
    """Between which values the best one lies, with so much of the chances."""
    order = np.argsort(values)
    reached = np.cumsum(chances[order])
    tail = (1 - confidence) / 2
    low, high = (int(np.searchsorted(reached, share * (1 - 1e-12))) for share in (tail, 1 - tail))
    return float(values[order[low]]), float(values[order[min(high, len(values) - 1)]])


def _objective(losses: Sequence[Array], tokens: Sequence[Array], counts: Sequence[Array], kind: str) -> Array:
    """[B, K, S] the objective with every example counted so often."""
    sums = np.stack([np.einsum("bn,ksn->bks", c, x) for c, x in zip(counts, losses, strict=True)])
    sizes = np.stack([c @ t for c, t in zip(counts, tokens, strict=True)])[:, :, None, None]
    return np.asarray(sums.sum(0) / sizes.sum(0) if kind == "micro" else (sums / sizes).mean(0))
