"""From influences to the next mixture's volumes.

Training takes v_j examples of domain j, τ_j supervised tokens each, so domain j has the weight w_j = v_j·τ_j / Σ_k
v_k·τ_k among the tokens. A step sums its T tokens' gradients and divides by T^c. With a_j the influence per token
(``ideal.influence.table``), ā = Σ_k w_k a_k, and the total V, so the number of steps, fixed (Σ_j v_j β_j = 0), the
reference loss Q moves with the relative changes β of the volumes by

    dQ = −Σ_j β_j w_j (a_j − c·ā),

and an *example* of domain j is worth, beside the others whose place it takes,

    e_j = (τ_j/τ̄)(a_j − c·ā) − (1 − c) ā,      τ̄ = Σ_k (v_k/V) τ_k,      Σ_j v_j e_j = 0.

c, the *dilution*, is 1 for gradient descent on the batch's mean loss: a domain of long examples takes weight from the
others. AdamW divides by the root of the mean squared gradient. Where a batch is mostly noise that root grows with √T,
whatever the loss was divided by, and c is ½ (``DILUTION``); `ideal fidelity` finds that to be nearer to what
retraining does.

That root also grows faster with tokens whose gradients are large. With ρ_j the mean squared gradient of domain j's
tokens over that of the mixture's, weight by weight, and x the direction along which a reference loss falls
(``ideal.influence.table``), more of domain j divides all others' share by more than the mean domain does, by

    δ_j = ⟨x, ρ_j ∘ ḡ⟩ − ā,      Σ_j w_j δ_j = 0:      ā + δ_j takes the place of the ā that c multiplies.

Two rules turn that into β:

    balanced    β_j = m·e_j / max_k|e_k|                 the total is kept: Σ_j v_j e_j = 0, exactly
    paper       β_j = m·w_j·a_j / max_k|w_k·a_k|         the total grows or shrinks (IDEAL, arXiv 2505.12762)

Where all domains have examples of the same length and δ = 0, e_j is a_j − ā, whatever c. With ``normalise: mean`` the
divisor is the mean |e_k| over the mixture's examples, so that a domain of mean worth moves by m already: divided by the
largest, a small domain of great worth takes the whole step, and large harmful ones hardly shrink. A volume falls by m
at most and rises by ``growth``·m: since the total is kept, large domains can give no more than small ones may take. The
limits (these, the floor, the most copies) are met by projection, which keeps the total, and not by clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ideal.config.config import EquilibriumConfig
from ideal.errors import BadInput
from ideal.mixture import round_volumes

Array = npt.NDArray[np.float64]

DILUTION = 0.5
"""c of AdamW, which every SFT here is by."""


@dataclass(frozen=True)
class Update:
    """The next mixture and how it came about; lists are by domain.

    Attributes:
        value: e_j (``balanced``) or w_j·a_j (``paper``); positive: more of the domain lowers the loss.
        low, high: the value's bootstrap interval.
        noise: how likely it is that noise alone puts some domain's value as far from 0, in units of its own spread.
        beta: relative change of each volume, before rounding.
        volumes: examples in the next mixture.
    """

    value: list[float]
    low: list[float]
    high: list[float]
    noise: float
    beta: list[float]
    volumes: list[int]

    @property
    def decided(self) -> list[bool]:
        """Whether a domain's interval lies on one side of 0."""
        return [low > 0 or high < 0 for low, high in zip(self.low, self.high, strict=True)]

    def told(self, sure: float) -> bool:
        """Whether some domain's value is other than 0 with this confidence, the number of domains allowed for."""
        return self.noise <= 1 - sure

    def change(self, before: Sequence[int]) -> float:
        """Largest relative change of a volume."""
        return max(abs(new - old) / old for new, old in zip(self.volumes, before, strict=True))


def token_weights(volumes: Sequence[int], tokens_per_example: Sequence[float]) -> Array:
    """[M] w_j: each domain's share of the mixture's supervised tokens."""
    weighted = np.asarray(volumes, float) * np.asarray(tokens_per_example, float)
    return np.asarray(weighted / weighted.sum())


def values(
    influence: Array,
    crowding: Array,
    volumes: Sequence[int],
    tokens_per_example: Sequence[float],
    rule: str,
    dilution: float,
) -> Array:
    """[..., M] what more of each domain is worth, up to a common factor.

    Args:
        influence: [..., M] a_j, per token.
        crowding: [..., M] δ_j, per token.
        rule: `balanced` or `paper`; the latter knows no dilution.
        dilution: c.
    """
    weights = token_weights(volumes, tokens_per_example)
    if rule == "paper":
        return np.asarray(weights * influence)
    shares = np.asarray(volumes, float) / sum(volumes)
    lengths = weights / shares
    mean = (influence * weights).sum(-1, keepdims=True)
    return np.asarray(lengths * (influence - dilution * (mean + crowding)) - (1 - dilution) * mean)


def update(
    influence: Array,
    resampled: Array,
    crowding: Array,
    volumes: Sequence[int],
    pools: Sequence[int],
    tokens_per_example: Sequence[float],
    config: EquilibriumConfig,
    m: float,
    confidence: float,
) -> Update:
    """One step towards the equilibrium.

    Args:
        influence: [M] a_j on the objective.
        resampled: [S, M] the same for every bootstrap resample.
        crowding: [M] δ_j on the objective.
        volumes: [M] examples in the mixture at which the influence was computed.
        pools: [M] unique examples there are.
        tokens_per_example: [M] mean supervised tokens of a domain's examples.
        m: largest relative fall of a volume; the largest rise is ``growth`` times that.
        confidence: level of the intervals.
    """
    value, cloud = (
        values(a, crowding, volumes, tokens_per_example, config.rule, DILUTION) for a in (influence, resampled)
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(cloud, [tail, 1 - tail], axis=0)
    size = np.abs(value).max() if config.normalise == "largest" else np.average(np.abs(value), weights=volumes)
    wanted = m * value / size if size > 0 else np.zeros_like(value)
    lowest, highest = limits(volumes, pools, config, m)
    if config.rule == "paper":
        beta = np.clip(wanted, lowest, highest)
        new = [round(v * (1 + b)) for v, b in zip(volumes, beta, strict=True)]
    else:
        beta = project(wanted, np.asarray(volumes, float), lowest, highest)
        new = round_volumes(list(np.asarray(volumes) * (1 + beta)), sum(volumes))
    return Update(value.tolist(), low.tolist(), high.tolist(), by_noise(value, cloud), beta.tolist(), new)


def by_noise(value: Array, cloud: Array) -> float:
    """p-value of the largest |value|, each in units of its own spread, where all are 0.

    It is held against the largest deviation of each resample, so that the more domains there are, the further one must
    be from 0; single signs would be sure of noise (some domain has one sign in 75 % of the resamples nearly always).

    Args:
        value: [M].
        cloud: [S, M] resamples around it, with tails as wide as blocks are few (``InfluenceTable.resampled``).
    """
    unit = np.maximum(cloud.std(0), 1e-300)
    largest = np.abs((cloud - value) / unit).max(1)
    return float((1 + (largest >= np.abs(value / unit).max()).sum()) / (1 + len(cloud)))


def limits(volumes: Sequence[int], pools: Sequence[int], config: EquilibriumConfig, m: float) -> tuple[Array, Array]:
    """[M], [M] smallest and largest β that keep a volume between the floor and ``max_copies`` of its pool.

    Raises:
        BadInput: a volume already lies outside.
    """
    v = np.asarray(volumes, float)
    most = np.floor(config.max_copies * np.asarray(pools, float) + 1e-9)  # whole, so that rounding can't pass it
    if (v < config.floor).any() or (v > most).any():
        raise BadInput(
            "equilibrium", "a starting volume lies outside floor and max_copies", "widen them, or change the volumes"
        )
    return np.maximum(-m, config.floor / v - 1), np.minimum(config.growth * m, most / v - 1)


def project(beta: Array, volumes: Array, low: Array, high: Array) -> Array:
    """[M] the point of {vᵀβ = 0, low ≤ β ≤ high} nearest to ``beta``, distances weighted by volume.

    The optimality conditions give β_j = clip(b_j − μ, low_j, high_j) with one μ for all; vᵀβ falls in μ, so bisection
    finds it. ``low ≤ 0 ≤ high`` makes the set non-empty.
    """

    def excess(mu: float) -> float:
        return float(volumes @ np.clip(beta - mu, low, high))

    if abs(excess(0.0)) <= 1e-12 * volumes.sum():
        return np.clip(beta, low, high)
    left, right = float((beta - high).min()), float((beta - low).max())
    for _ in range(200):
        middle = (left + right) / 2
        left, right = (middle, right) if excess(middle) > 0 else (left, middle)
    return np.clip(beta - (left + right) / 2, low, high)
