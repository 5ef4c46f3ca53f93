"""How the next mixture hangs on the reference set: other draws of it, half of it, other weights, a capability less.

All of it follows from the products between blocks that an influence leaves behind (``ideal.influence.table``). With
n_rc how often block c of reference set r is taken, and u_r the weight of set r in the objective,

    a_jr(n) = Σ_bc n_rc ⟨G_rc, (H + λ)⁻¹ G_jb⟩ / (T_j Σ_c n_rc T_rc),        a_j(n, u) = Σ_r u_r a_jr(n),

with T the supervised tokens of domain j and of block rc. Each a_j goes through ``ideal.equilibrium.update``, limits and
rounding included. The domains' own blocks stay as they are: this is about the reference set alone, where the intervals
of a run are about both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ideal.config.config import EquilibriumConfig
from ideal.equilibrium import update
from ideal.influence.table import Array, InfluenceTable
from ideal.mixture import seeded

ZERO = 1e-9
"""A β smaller than this is none: it has no sign."""


@dataclass(frozen=True)
class Start:
    """The mixture that is updated; lists are by domain.

    Attributes:
        volumes: examples in it.
        pools: unique examples there are.
        tokens_per_example: mean supervised tokens.
        m: largest relative change of a volume.
    """

    volumes: Sequence[int]
    pools: Sequence[int]
    tokens_per_example: Sequence[float]
    m: float


@dataclass(frozen=True)
class Spread:
    """A number, or one for each domain, over a scenario's draws: the mean, and the interval's ends."""

    mean: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, draws: Array, confidence: float) -> Spread:
        """Args: draws: [S] or [S, M]."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
        return cls(np.asarray(draws.mean(0)), low, high)


@dataclass(frozen=True)
class Scenario:
    """The update under a change of the reference set.

    Attributes:
        draws: how many random ones it is about; 1: the change is a given one, and low = mean = high.
        beta: [M] relative change of each volume.
        volumes: [M] examples in the next mixture.
        cosine: [] of β with the β it is compared to.
        flips: [] domains whose β has the other sign there.
    """

    name: str
    draws: int
    beta: Spread
    volumes: Spread
    cosine: Spread
    flips: Spread


def scenarios(
    table: InfluenceTable,
    names: Sequence[str],
    start: Start,
    config: EquilibriumConfig,
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> list[Scenario]:
    """Every scenario, each compared with the whole reference set, which comes first.

    A half shares its examples with the whole, so their β agree more than two reference sets of that size would:
    that is what comparing the two halves with each other says.

    Args:
        names: [R] the capabilities.
        draws: random reference sets for each random scenario.
    """

    sets, blocks = table.reference_tokens.shape
    weights = table.objective(np.eye(sets), config.objective)

    def steps(influence: Array, weights: Array = weights) -> tuple[Array, Array]:
        """[S, M, R] influences and [R] weights of the sets → [S, M] β, [S, M] volumes."""
        crowding = table.crowding @ weights
        found = [
            update(
                a, a[None], crowding, start.volumes, start.pools, start.tokens_per_example, config, start.m, confidence
            )
            for a in influence @ weights
        ]
        return np.array([step.beta for step in found]), np.array([step.volumes for step in found], float)

    def scenario(name: str, step: tuple[Array, Array], against: Array) -> Scenario:
        beta, volumes = step
        parts = (beta, volumes, cosines(beta, against), flips(beta, against))
        return Scenario(name, len(beta), *(Spread.of(part, confidence) for part in parts))

    whole = steps(on_blocks(table, np.ones((1, sets, blocks))))
    full = whole[0]
    found = [scenario("the whole reference set", whole, full)]

    again = steps(on_blocks(table, resampled_blocks(sets, blocks, draws, seed)))
    found.append(scenario("drawn again (bootstrap)", again, full))
    if blocks > 1:
        one, other = (steps(on_blocks(table, part)) for part in half_blocks(sets, blocks, draws, seed))
        found.append(scenario("half of it", one, full))
        found.append(scenario("half of it, against the other half", one, other[0]))

    for words, factor in (("{} counts twice", 2.0), ("{} counts half", 0.5), ("without {}", 0.0)):
        if sets == 1:
            break  # the weight of the only set cancels
        for r, name in enumerate(names):
            changed = weights * np.where(np.arange(sets) == r, factor, 1.0)
            found.append(scenario(words.format(name), steps(table.matrix()[None], changed), full))
    return found


def on_blocks(table: InfluenceTable, counts: Array) -> Array:
    """[S, M, R] a_jr on parts of the reference sets.

    Args:
        counts: [S, R, B] n_rc, how often each reference block is taken; none of a set's sums may be 0.
    """
    total = np.einsum("mrc,src->smr", table.products.sum((0, 2)), counts)
    tokens = np.einsum("src,rc->sr", counts, table.reference_tokens)
    return np.asarray(total / table.domain_tokens.sum(1)[:, None] / tokens[:, None, :])


def resampled_blocks(sets: int, blocks: int, draws: int, seed: int) -> Array:
    """[S, R, B] each set's blocks drawn with replacement, as many as there are."""
    random = seeded(seed, "reference bootstrap")
    return random.multinomial(blocks, np.full(blocks, 1 / blocks), size=(draws, sets)).astype(float)


def half_blocks(sets: int, blocks: int, draws: int, seed: int) -> tuple[Array, Array]:
    """[S, R, B] twice: a random half of each set's blocks, and the other half (the larger, if B is odd)."""
    places = seeded(seed, "reference halves").random((draws, sets, blocks)).argsort(-1)
    half = (places < blocks // 2).astype(float)
    return half, 1 - half


def cosines(beta: Array, against: Array) -> Array:
    """[S] cosine of each β with its counterpart; two that change nothing agree, one that does so alone doesn't.

    Args:
        beta: [S, M].
        against: [S, M], or [1, M] for all.
    """
    lengths = np.linalg.norm(beta, axis=1), np.linalg.norm(against, axis=1)
    product, still = lengths[0] * lengths[1], (lengths[0] < ZERO) & (lengths[1] < ZERO)
    cosine = (beta * against).sum(1) / np.where(product > 0, product, 1.0)
    return np.asarray(np.where(still, 1.0, cosine))


def flips(beta: Array, against: Array) -> Array:
    """[S] domains that one β gives more and the other less; shapes as for ``cosines``."""
    signs = [np.where(np.abs(b) < ZERO, 0.0, np.sign(b)) for b in (beta, against)]
    return np.asarray((signs[0] * signs[1] < 0).sum(1).astype(float))
