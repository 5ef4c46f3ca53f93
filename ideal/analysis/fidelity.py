"""How well influence predicts what retraining does: the moves, the two sides of the comparison, and its measures.

Every domain's volume is moved up and down and the model trained again, with everything else as it was: the same seed,
the same draws of the other examples, in the same order. The actual value of a domain is the central difference

    dQ_r/dβ_j ≈ (Q_r(v_j(1+δ)) − Q_r(v_j(1−δ))) / 2δ,

and influence predicts it from one training, with a_jr per token, w_j the domain's share of the supervised tokens, c the
dilution, and δ_jr how noisy a domain is beside the others (``ideal.equilibrium``):

    steps    the total, and so the number of steps, is kept; the other domains make room in proportion:
             dQ_r/dβ_j = −Σ_k w_k u_k (a_kr − c(ā_r + δ_kr)),     u_j = 1,  u_k = −v_j/(V − v_j)
    epochs   the other domains stay, and training is longer by the new examples:
             dQ_r/dβ_j = −w_j (a_jr − c(ā_r + δ_jr)) − c (v_j/V) ā_r

Uncentred, both are the paper's −w_j a_jr.

A correlation over all M × R entries is easily won: "each domain helps its own set alone, in proportion to that set's
loss" takes no gradient (``own_loss``), and where domains have little to do with each other it agrees best. What only
influence can know lies off the diagonal, and within a set's own column.

The retrainings are noisy, so no predictor reaches 1. If the means over two halves of the seeds correlate by h, the
mean over all correlates with its own noiseless value by √(2h/(1+h)): that is what a perfect predictor attains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from ideal.equilibrium import token_weights
from ideal.influence.table import Array
from ideal.mixture import round_volumes, seeded

MODES = ("steps", "epochs")
Picks = npt.NDArray[np.int64]
"""Numbers of seeds."""


def moved(volumes: Mapping[str, int], domain: str, change: float, mode: str) -> dict[str, int]:
    """The volumes with one domain's changed by this share.

    Args:
        mode: `steps` keeps the total, `epochs` the other volumes.
    """
    own = round(volumes[domain] * (1 + change))
    if mode == "epochs":
        return {**volumes, domain: own}
    total = sum(volumes.values())
    others = {name: v for name, v in volumes.items() if name != domain}
    room = total - own
    shrunk = round_volumes([v * room / sum(others.values()) for v in others.values()], room)
    return {**dict.fromkeys(volumes, 0), **dict(zip(others, shrunk, strict=True)), domain: own}


def predicted(
    influence: Array,
    crowding: Array,
    volumes: Mapping[str, int],
    tokens: list[float],
    mode: str,
    dilution: float | None,
) -> Array:
    """[..., M, R] dQ_r/dβ_j, nats per token.

    Args:
        influence: [..., M, R] a_jr.
        crowding: [..., M, R] δ_jr.
        tokens: [M] mean supervised tokens of a domain's examples.
        dilution: c; None: uncentred.
    """
    v = np.array(list(volumes.values()), float)
    w = token_weights(list(volumes.values()), tokens)[:, None]
    if dilution is None:
        return np.asarray(-w * influence)
    diluted = dilution * (w * influence).sum(-2, keepdims=True)
    above = w * (influence - diluted - dilution * crowding)
    if mode == "epochs":
        return np.asarray(-above - (v / v.sum())[:, None] * diluted)
    makes_room = np.eye(len(v)) - (1 - np.eye(len(v))) * (v / (v.sum() - v))[:, None]
    return np.asarray(-makes_room @ above)


def own_loss(losses: Array) -> Array:
    """[..., R, R] influences by the trivial rule: each domain helps its own set alone, in proportion to its loss.

    Args:
        losses: [..., R] each reference set's; domain r is set r's own.
    """
    return np.asarray(losses[..., None] * np.eye(losses.shape[-1]))


@dataclass(frozen=True)
class Measure:
    """A number with its interval over seeds."""

    value: float
    low: float
    high: float


def pearson(x: Array, y: Array) -> float:
    """Over all entries."""
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def off_diagonal(x: Array, y: Array) -> float:
    """Pearson over the entries [M, R] of domains on other domains' sets."""
    others = np.eye(*x.shape) == 0
    return pearson(x[others], y[others])


def within_sets(x: Array, y: Array) -> float:
    """Mean over sets of Pearson over domains [M, R]: whether each set's domains are told apart."""
    return float(np.mean([pearson(x[:, r], y[:, r]) for r in range(x.shape[1])]))


def spearman(x: Array, y: Array) -> float:
    """Pearson of the ranks; equal values share theirs."""
    return pearson(stats.rankdata(x), stats.rankdata(y))


def slope(x: Array, y: Array) -> float:
    """Actual by predicted, through the origin: 1 where the prediction has the right size."""
    return float((x * y).sum() / (x * x).sum())


Compare = Callable[[Array, Array], float]
"""From two arrays of one shape, predicted and actual, to how far they agree."""

CORRELATIONS: dict[str, Compare] = {"pearson": pearson, "spearman": spearman}
"""Of anything."""
OF_A_MATRIX: dict[str, Compare] = {"off diagonal": off_diagonal, "within sets": within_sets}
"""Of all domains on all sets."""


def correlations(dimensions: int) -> dict[str, Compare]:
    """Those that fit a prediction of one number for each domain (1) or for each domain and set (2)."""
    return CORRELATIONS | (OF_A_MATRIX if dimensions == 2 else {})


def decided(actual: Array, confidence: float = 0.95) -> Array:
    """[...] whether the seeds decide an entry's sign: Student's interval of its mean excludes 0.

    Args:
        actual: [S, ...] by seed.
    """
    error = actual.std(0, ddof=1) / np.sqrt(len(actual))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(actual) - 1))
    return np.asarray(np.abs(actual.mean(0)) >= reach * error)


def right_signs(prediction: Array, actual: Array) -> tuple[int, int]:
    """How many signs of the mean prediction are right, and of how many that the seeds decide.

    Args:
        prediction, actual: [S, ...] by seed.
    """
    sure = decided(actual)
    right = np.sign(prediction.mean(0)) == np.sign(actual.mean(0))
    return int(right[sure].sum()), int(sure.sum())


def jackknife(of: Callable[[Picks], float], seeds: int, confidence: float, correlation: bool) -> Measure:
    """A measure of all seeds, with an interval from leaving each of them out (Quenouille 1956, Tukey 1958).

    Resampled seeds would make every mean noisier than it is, and so a correlation too low: the jackknife takes that
    bias out. A correlation is handled as its inverse hyperbolic tangent (Fisher's z), which keeps ends below 1.

    Args:
        of: from the numbers of some seeds to the measure of their means.
    """
    every = np.arange(seeds)
    value = of(every)
    raw = np.array([of(np.delete(every, s)) for s in every])
    whole = value
    if correlation:
        whole, raw = (np.arctanh(np.clip(x, -1 + 1e-12, 1 - 1e-12)) for x in (whole, raw))
    centre = seeds * whole - (seeds - 1) * raw.mean()
    error = np.sqrt((seeds - 1) / seeds * ((raw - raw.mean()) ** 2).sum())
    reach = error * stats.t.ppf((1 + confidence) / 2, seeds - 1)
    ends = np.array([centre - reach, centre + reach])
    low, high = np.tanh(ends) if correlation else ends
    return Measure(value, float(min(low, value)), float(max(high, value)))


def agreement(prediction: Array, actual: Array, confidence: float = 0.9) -> dict[str, Measure]:
    """How far the mean prediction agrees with the mean actual change, by every measure.

    ``single`` is what a run has, which predicts from one training: the mean Pearson correlation of one seed's
    prediction with the mean actual change.

    Args:
        prediction, actual: [S, ...] by seed; pairs are left out together.
    """
    seeds = len(actual)

    def of_means(measure: Compare, correlation: bool = True) -> Measure:
        return jackknife(lambda s: measure(prediction[s].mean(0), actual[s].mean(0)), seeds, confidence, correlation)

    def alone(s: Picks) -> float:
        return float(np.mean([pearson(one, actual[s].mean(0)) for one in prediction[s]]))

    found = {name: of_means(measure) for name, measure in correlations(actual.ndim - 1).items()}
    found["single"] = jackknife(alone, seeds, confidence, correlation=True)
    found["slope"] = of_means(slope, correlation=False)
    return found


def attainable(actual: Array, seed: int, splits: int = 200) -> dict[str, tuple[float, float]]:
    """How two halves of the seeds agree, h, and what a perfect predictor of their mean attains, √(2h/(1+h)).

    Args:
        actual: [S, ...] by seed, S of 4 or more.

    Returns:
        (h, attainable) by measure, h the mean over random halvings; the latter is 0 where h is not positive.
    """
    random = seeded(seed, "ceiling")
    half = len(actual) // 2
    orders = [random.permutation(len(actual)) for _ in range(splits)]
    found = {}
    for name, measure in correlations(actual.ndim - 1).items():
        h = float(np.mean([measure(actual[o[:half]].mean(0), actual[o[half:]].mean(0)) for o in orders]))
        found[name] = (h, float(np.sqrt(2 * h / (1 + h))) if h > 0 else 0.0)
    return found


def coverage(low: Array, high: Array, truth: Array) -> float:
    """Share of the intervals that hold the truth.

    Args:
        low, high: [S, ...] each seed's interval.
        truth: [...] the same for every seed.
    """
    return float(((low <= truth) & (truth <= high)).mean())


def widening(low: Array, value: Array, high: Array, truth: Array, level: float) -> tuple[float, float]:
    """By what factor intervals must grow on either side of their value, so that this share of them holds the truth.

    Args:
        low, value, high: [S, ...] each seed's interval and what it is about.
        truth: [...] the same for every seed.

    Returns:
        the factor; and the share that holds the truth where each seed's intervals grow by the other seeds' factor.
    """
    side = np.where(truth > value, high - value, value - low)
    needed = np.abs(truth - value) / np.maximum(side, np.finfo(float).tiny)
    others = [np.quantile(np.delete(needed, s, 0), level) for s in range(len(needed))]
    held = [(needed[s] <= factor).mean() for s, factor in enumerate(others)]
    return float(np.quantile(needed, level)), float(np.mean(held))
