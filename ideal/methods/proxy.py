"""What DoReMi and DOGE share: a proxy run whose every batch holds every domain, and weights that move as it trains.

A domain that a batch lacks would keep its old score while the others' are renewed: one-hot weights, the known failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ideal.config import SftConfig
from ideal.methods.problem import Array
from ideal.mixture import seeded
from ideal.training import Step, schedule


def steps(pools: Mapping[str, int], total: int, config: SftConfig, seed: int) -> Iterator[tuple[Step, list[list[int]]]]:
    """As many steps as SFT has on ``total`` examples, each with every domain's examples: indices into its pool.

    A batch's places go to the domains equally; those that are left over, to each domain in turn.
    """
    size, count = config.batch_examples, len(pools)
    number = math.ceil(max(1, round(total * config.epochs)) / size)
    streams = [_stream(pool, seed, domain) for domain, pool in pools.items()]
    for step in range(number):
        rate = config.learning_rate * schedule(step, number, config)
        extra = {(step * (size % count) + k) % count for k in range(size % count)}
        counts = [size // count + (k in extra) for k in range(count)]
        yield Step(step, [], rate), [[next(s) for _ in range(n)] for s, n in zip(streams, counts, strict=True)]


def _stream(pool: int, seed: int, domain: str) -> Iterator[int]:
    """A domain's examples, shuffled anew whenever all have been seen."""
    random = seeded(seed, "proxy", domain)
    while True:
        yield from random.permutation(pool).tolist()


def moved(weights: Array, scores: Array, smoothing: float = 0.0) -> Array:
    """[M] softmax(log α + scores), a little of it spread over all domains: α ← (1−ε)α + ε/K."""
    raised = np.log(weights) + scores
    grown = np.exp(raised - raised.max())
    grown /= grown.sum()
    return np.asarray((1 - smoothing) * grown + smoothing / len(grown))
