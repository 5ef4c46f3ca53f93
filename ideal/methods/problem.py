"""What a method chooses from, and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ideal.config.config import Config
from ideal.errors import BadInput
from ideal.mixture import round_volumes, seeded

Array = npt.NDArray[np.float64]


class Stages(Protocol):
    """Work that a method may ask for. Each piece is recorded: it isn't done twice, whichever method asks."""

    def trained(self, volumes: Mapping[str, int]) -> Any:
        """SFT of θ₀ on a mixture, as the final one; something to hand to the others."""

    def losses(self, model: Any) -> dict[str, float]:
        """Each reference set's loss (nats per token) at a trained model."""

    def short(self, mixtures: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
        """SFT of θ₀ on each of some small mixtures; each reference set's loss (nats per token)."""

    def merged(self, models: Sequence[Any], shares: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        """Each reference set's loss (nats per token) at averages of trained models' weights, one for each of shares."""

    def doremi(self, reference: Any) -> dict[str, float]:
        """Each domain's share of the tokens by ``ideal.methods.doremi``, given its reference model."""

    def doge(self) -> dict[str, float]:
        """Each domain's share of the tokens by ``ideal.methods.doge``."""

    def regmix(self, mixtures: Sequence[Mapping[str, int]]) -> list[float]:
        """Each domain's share of the examples by ``ideal.methods.regmix``, from what ``short`` finds of these."""


@dataclass(frozen=True)
class Problem:
    """A mixture to choose.

    Attributes:
        volumes: D0, examples of each domain; its total is kept.
        pools: unique examples there are.
        tokens: mean supervised tokens of a domain's examples.
        reference_tokens: supervised tokens of each reference set.
    """

    config: Config
    volumes: Mapping[str, int]
    pools: Mapping[str, int]
    tokens: Mapping[str, float]
    reference_tokens: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.volumes.values())

    @property
    def shares(self) -> Array:
        """[M] of D0's examples."""
        return np.array(list(self.volumes.values())) / self.total

    def mixture(self, shares: Sequence[float] | Array) -> dict[str, int]:
        """Volumes in these proportions of examples, between the floor and ``max_copies`` of each pool."""
        limits = self.config.equilibrium
        low = np.full(len(self.pools), float(limits.floor))
        high = np.floor(limits.max_copies * np.array(list(self.pools.values()), float) + 1e-9)
        filled = fill(np.asarray(shares, float), self.total, low, high)
        return dict(zip(self.volumes, round_volumes(filled.tolist(), self.total), strict=True))

    def mixture_of_tokens(self, weights: Mapping[str, float]) -> dict[str, int]:
        """Volumes in which each domain has such a share of the supervised tokens."""
        examples = np.array([weights[domain] / self.tokens[domain] for domain in self.volumes])
        return self.mixture(examples / examples.sum())

    def around(self, count: int, *names: str) -> Array:
        """[count, M] shares of examples from a Dirichlet distribution with D0's as its mean, seeded by ``names``."""
        spread = self.config.methods.concentration * len(self.volumes)
        drawn = seeded(self.config.seed, *names).dirichlet(spread * self.shares, count)
        return np.asarray(drawn, float)

    @property
    def weights(self) -> Array:
        """[R] of each reference set in what is minimised, by ``equilibrium.objective``; they sum to 1."""
        micro = self.config.equilibrium.objective == "micro"
        sizes = np.array([self.reference_tokens[domain] if micro else 1.0 for domain in self.volumes])
        return np.asarray(sizes / sizes.sum(), float)

    def objective(self, losses: Mapping[str, float]) -> float:
        """What is minimised: the mean over reference sets, or over all of their tokens."""
        return float(self.weights @ [losses[domain] for domain in self.volumes])


def fill(shares: Array, total: int, low: Array, high: Array) -> Array:
    """[M] v_j = clip(c·shares_j, low_j, high_j) with the c for which they sum to ``total``, found by bisection.

    Raises:
        BadInput: the limits leave no such volumes.
    """
    if not low.sum() <= total <= high.sum():
        raise BadInput(
            "equilibrium",
            f"floor and max_copies ask for {low.sum():g} to {high.sum():g} examples, D0 has {total}",
            "widen them, or change the volumes",
        )
    shares = np.maximum(shares, 1e-12)
    bottom, top = 0.0, float((high / shares).max())
    for _ in range(200):
        middle = (bottom + top) / 2
        if np.clip(middle * shares, low, high).sum() < total:
            bottom = middle
        else:
            top = middle
    filled = np.clip(top * shares, low, high)
    return np.asarray(filled * (total / filled.sum()))
