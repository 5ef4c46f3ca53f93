"""What DoReMi and DOGE share: a proxy run whose every batch holds every domain, and weights that move as it trains.

A domain that a batch lacks would keep its old score while the others' are renewed: one-hot weights, the known failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ideal.config.config import SftConfig
from ideal.costs import input_tokens
from ideal.data.batches import Item
from ideal.data.examples import ExampleSet
from ideal.methods.problem import Array
from ideal.mixture import seeded
from ideal.training.trainer import Step, number_of_steps, schedule

Batch = list[list[Item]]
"""Of each domain, its examples."""


@dataclass(frozen=True)
class Stepped:
    """What a proxy's step did.

    Attributes:
        alpha: [M] the weights after it.
        passes: token passes that it took (``ideal.costs``).
    """

    alpha: Array
    passes: int


def steps(sets: Mapping[str, ExampleSet], total: int, config: SftConfig, seed: int) -> Iterator[tuple[Step, Batch]]:
    """As many steps as SFT has on ``total`` examples, each with examples of every domain.

    A batch's places go to the domains equally; those that are left over, to each domain in turn.
    """
    size, count = config.batch_examples, len(sets)
    streams = [_stream(found, seed, domain) for domain, found in sets.items()]
    for step, rate in enumerate(rates(total, config)):
        extra = {(step * (size % count) + k) % count for k in range(size % count)}
        counts = [size // count + (k in extra) for k in range(count)]
        yield Step(step, [], rate), [[next(s) for _ in range(n)] for s, n in zip(streams, counts, strict=True)]


def rates(total: int, config: SftConfig) -> list[float]:
    """Every step's learning rate."""
    number = number_of_steps(total, config)
    return [config.learning_rate * schedule(step, number, config) for step in range(number)]


def _stream(found: ExampleSet, seed: int, domain: str) -> Iterator[Item]:
    """A domain's examples, shuffled anew whenever all have been seen."""
    random = seeded(seed, "proxy", domain)
    while True:
        for number in random.permutation(len(found)).tolist():
            yield found[number]


def items(batch: Batch) -> list[Item]:
    """The examples of all domains."""
    return [item for part in batch for item in part]


def tokens(batch: Batch) -> int:
    """Input tokens of a batch."""
    return input_tokens(items(batch))


def per_token(batch: Batch, weights: Sequence[float] | Array) -> list[float]:
    """Each example's weight on its tokens, with which the batch's mean loss is Σ_k α_k · (mean loss of domain k)."""
    found: list[float] = []
    for part, weight in zip(batch, weights, strict=True):
        count = sum(int(supervised[1:].sum()) for _, supervised in part)
        found += [float(weight) / count] * len(part)
    return found


def moved(weights: Array, scores: Array, smoothing: float = 0.0) -> Array:
    """[M] softmax(log α + scores), a little of it spread over all domains: α ← (1−ε)α + ε/K."""
    raised = np.log(weights) + scores
    grown = np.exp(raised - raised.max())
    grown /= grown.sum()
    return np.asarray((1 - smoothing) * grown + smoothing / len(grown))
